"""The import graph, read from the source: packages import only lower layers, and each library has its modules."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A package imports only packages that precede it.
ORDER = (
    "errors", "types", "registry", "fs", "progress", "exit_handling", "hub", "config", "option_reference",
    "overrides", "app", "runs", "tokenizer", "data", "models", "distributed", "optim", "zero", "checkpoint", "metrics",
    "planner", "train", "doctor", "evaluation", "export", "inference", "cluster", "pipelines", "testing",
)  # fmt: skip
# Libraries that only these modules or packages import.
ALLOWED_IMPORTERS = {
    "hydra": ("app.py",),
    "omegaconf": ("app.py", "option_reference.py", "config/"),
    "deepspeed": ("zero/", "optim/optimizers"),
    "wandb": ("metrics/trackers",),
    "tensorboard": ("metrics/trackers",),
    "datasets": ("data/read/hub.py",),
    "huggingface_hub": ("hub.py", "models/baichuan.py"),
    "modelscope": ("hub.py",),
    "peft": ("models/tuning.py",),
    "optuna": ("cluster/sweep/",),
    "bitsandbytes": ("optim/optimizers", "models/convert/dequantize.py"),
    "matplotlib": ("metrics/plots.py", "data/show.py", "tokenizer/report/page.py", "cluster/sweep/study.py"),
}
# Packages that a submitting host without torch must be able to import.
WITHOUT_TORCH = ("runs", "cluster", "config")


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _sources() -> list[Path]:
    paths = sorted((ROOT / "fireflyds").rglob("*.py"))
    assert len(paths) > 30
    return paths


def _package(path: Path) -> str:
    return path.relative_to(ROOT / "fireflyds").parts[0].removesuffix(".py")


def test_the_order_names_every_package_once() -> None:
    packages = {_package(path) for path in _sources()} - {"__init__"}
    assert len(ORDER) == len(set(ORDER))
    assert packages <= set(ORDER)


def test_packages_import_only_preceding_packages() -> None:
    for path in _sources():
        package = _package(path)
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] != "fireflyds" or len(parts) < 2 or parts[1] not in ORDER or parts[1] == package:
                continue
            assert ORDER.index(parts[1]) < ORDER.index(package), f"{path.relative_to(ROOT)} imports {name}"


def test_kernels_do_not_import_fireflyds() -> None:
    files = sorted((ROOT / "kernels").rglob("*.py"))
    assert files
    for path in files:
        assert not [name for name in _imports(path) if name == "fireflyds" or name.startswith("fireflyds.")], path


def test_libraries_are_imported_only_by_allowed_modules() -> None:
    for path in _sources():
        file = str(path.relative_to(ROOT / "fireflyds"))
        for name in _imports(path):
            importers = ALLOWED_IMPORTERS.get(name.split(".")[0])
            assert importers is None or file.startswith(importers), f"{file} imports {name}; allowed in {importers}"


def test_triton_and_bitsandbytes_are_imported_only_by_their_kernel_modules() -> None:
    folder = ROOT / "kernels" / "fireflyds_kernels"
    for path in sorted(folder.rglob("*.py")):
        libraries = {name.split(".")[0] for name in _imports(path)}
        assert "triton" not in libraries or path.name.startswith("triton"), path
        assert "bitsandbytes" not in libraries or path.parent.name == "qlora_linear", path
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not path.name.startswith("triton"):
            top_level_imports = {a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names}
            assert not top_level_imports & {"triton", "bitsandbytes", "flash_attn"}, path


def test_packages_of_a_submitting_host_do_not_import_torch() -> None:
    for package in WITHOUT_TORCH:
        for path in (ROOT / "fireflyds" / package).rglob("*.py"):
            assert not [name for name in _imports(path) if name.split(".")[0] == "torch"], path


def test_kernels_folder_is_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_files_and_functions_are_within_size_limits() -> None:
    for path in [*_sources(), *(ROOT / "launch").glob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 300, path
        for node in ast.walk(ast.parse(source)):
            # A Triton kernel is one function.
            if isinstance(node, ast.FunctionDef) and not path.name.startswith("triton"):
                assert (node.end_lineno or 0) - node.lineno <= 55, f"{path}:{node.name}"
