"""Trainings of one tiny model on one or more ranks, all cells of a rank count in one process group."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# DeepSpeed would leave matrices as small as these whole on every rank.
SHARDED = "zero.extra.zero_optimization.stage3_param_persistence_threshold=0"
ADAPTERS = ["tuning.r=4", "tuning.dropout=0"]


def run_cases(folder: Path, cases: dict, ranks: int = 2) -> dict:
    """What `train_cases.py` found of every case, by name."""
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = [str(ROOT / "tests" / "support" / "train_cases.py"), str(folder / "cases.json"), str(folder / "out.json")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"]
    # One optimizer's kernels would be compiled for many seconds.
    environment |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run([*launcher, *script], env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict = json.loads((folder / "out.json").read_text())
    return found


def case(base: Path, tuning: str, stage: int, *more: str, steps: int = 4, **rest) -> dict:
    extra = ADAPTERS if tuning in ("lora", "qlora", "dora", "rslora") else []
    overrides = [f"model={base}", f"tuning={tuning}", *extra, f"zero={stage}", "optim.lr=1e-2", SHARDED, *more]
    return {"overrides": overrides, "steps": steps} | rest


def near(values: list[float], wanted: list[float], tolerance: float) -> None:
    assert len(values) == len(wanted)
    assert all(abs(a - b) <= tolerance * abs(b) for a, b in zip(values, wanted, strict=True)), (values, wanted)
