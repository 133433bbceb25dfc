"""The house's walls, read from the source: imports only point down, and each library has one door."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A room imports only rooms that stand above it.
ORDER = (
    "errors", "types", "registry", "fs", "config", "option_reference", "app", "runs", "tokenizer", "data", "models",
    "distributed", "optim", "zero", "checkpoint", "metrics", "planner", "train", "doctor", "evaluation", "export",
    "inference", "cluster", "pipelines", "testing",
)  # fmt: skip
# Libraries that only these files or rooms import.
DOORS = {
    "hydra": ("app.py",),
    "omegaconf": ("app.py", "option_reference.py", "config/"),
    "deepspeed": ("zero/", "optim/optimizers"),
    "wandb": ("metrics/trackers",),
    "tensorboard": ("metrics/trackers",),
    "datasets": ("data/read/hub.py",),
    "peft": ("models/tuning.py",),
    "optuna": ("cluster/sweep/",),
    "bitsandbytes": ("optim/optimizers",),
    "matplotlib": ("metrics/plots.py", "data/show.py", "tokenizer/report/page.py", "cluster/sweep/study.py"),
}
# Rooms that a submitting host without torch must be able to import.
WITHOUT_TORCH = ("runs", "cluster", "config")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _sources() -> list[Path]:
    found = sorted((ROOT / "fireflyds").rglob("*.py"))
    assert len(found) > 30
    return found


def _room(path: Path) -> str:
    return path.relative_to(ROOT / "fireflyds").parts[0].removesuffix(".py")


def test_the_order_names_every_room_once() -> None:
    rooms = {_room(path) for path in _sources()} - {"__init__"}
    assert len(ORDER) == len(set(ORDER))
    assert rooms <= set(ORDER)


def test_rooms_import_only_what_stands_above_them() -> None:
    for path in _sources():
        room = _room(path)
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] != "fireflyds" or len(parts) < 2 or parts[1] not in ORDER or parts[1] == room:
                continue
            assert ORDER.index(parts[1]) < ORDER.index(room), f"{path.relative_to(ROOT)} imports {name}"


def test_kernels_know_nothing_of_fireflyds() -> None:
    files = sorted((ROOT / "kernels").rglob("*.py"))
    assert files
    for path in files:
        assert not [name for name in _imports(path) if name == "fireflyds" or name.startswith("fireflyds.")], path


def test_every_library_has_one_door() -> None:
    for path in _sources():
        file = str(path.relative_to(ROOT / "fireflyds"))
        for name in _imports(path):
            doors = DOORS.get(name.split(".")[0])
            assert doors is None or file.startswith(doors), f"{file} imports {name}; its doors are {doors}"


def test_kernels_keep_triton_and_bitsandbytes_behind_their_doors() -> None:
    folder = ROOT / "kernels" / "fireflyds_kernels"
    for path in sorted(folder.rglob("*.py")):
        libraries = {name.split(".")[0] for name in _imports(path)}
        assert "triton" not in libraries or path.name.startswith("triton"), path
        assert "bitsandbytes" not in libraries or path.parent.name == "qlora_linear", path
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not path.name.startswith("triton"):
            top = {a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names}
            assert not top & {"triton", "bitsandbytes", "flash_attn"}, path


def test_rooms_of_a_submitting_host_never_import_torch() -> None:
    for room in WITHOUT_TORCH:
        for path in (ROOT / "fireflyds" / room).rglob("*.py"):
            assert not [name for name in _imports(path) if name.split(".")[0] == "torch"], path


def test_kernels_folder_is_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_files_and_functions_keep_their_size() -> None:
    for path in [*_sources(), *(ROOT / "launch").glob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 300, path
        for node in ast.walk(ast.parse(source)):
            # A Triton kernel is one function.
            if isinstance(node, ast.FunctionDef) and not path.name.startswith("triton"):
                assert (node.end_lineno or 0) - node.lineno <= 62, f"{path}:{node.name}"
