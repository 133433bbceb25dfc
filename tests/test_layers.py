"""The house's walls, read from the source: imports only point down, and each library has one door."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = {"engine": 4, "evaluation": 4, "cluster": 4, "tokenizer": 3, "data": 3, "models": 3}
BASE = {"config", "types", "registry", "errors", "directories", "reference", "app"}
DOORS = {
    "hydra": {"fireflyds/app.py"},
    "deepspeed": {"fireflyds/engine/deepspeed.py", "fireflyds/engine/checkpoint.py", "fireflyds/engine/optimizers.py"},
    "wandb": {"fireflyds/engine/trackers.py"},
    "tensorboard": {"fireflyds/engine/trackers.py"},
    "datasets": {"fireflyds/data/hub.py"},
    "peft": {"fireflyds/models/tuning.py"},
    "optuna": {"fireflyds/cluster/study.py", "fireflyds/cluster/sweep.py"},
    "bitsandbytes": {"fireflyds/engine/optimizers.py"},
}
# evaluation scores models and reads data; it may look down, never sideways.


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


def test_imports_only_point_down() -> None:
    for path in _sources():
        folder = path.relative_to(ROOT / "fireflyds").parts[0]
        level = LAYERS.get(folder, 2)
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] != "fireflyds" or len(parts) < 2 or parts[1] == folder:
                continue
            target = LAYERS.get(parts[1], 2)
            assert target < level or (target == level == 2), f"{path.relative_to(ROOT)} (layer {level}) imports {name}"


def test_kernels_know_nothing_of_fireflyds() -> None:
    files = sorted((ROOT / "kernels").rglob("*.py"))
    assert files
    for path in files:
        assert not [name for name in _imports(path) if name == "fireflyds" or name.startswith("fireflyds.")], path


def test_every_library_has_one_door() -> None:
    for path in _sources():
        where = str(path.relative_to(ROOT))
        for name in _imports(path):
            library = name.split(".")[0]
            assert library not in DOORS or where in DOORS[library], (
                f"{where} imports {library}; its door is {DOORS[library]}"
            )


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


def test_cluster_never_imports_torch() -> None:
    for path in (ROOT / "fireflyds" / "cluster").rglob("*.py"):
        assert not [name for name in _imports(path) if name.split(".")[0] == "torch"]


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
