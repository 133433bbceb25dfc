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


class CaseResults(dict):
    """Results by the name of the case. A case whose launch failed fails only the tests that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: dict[str, str] = {}

    def __missing__(self, name: str):
        raise AssertionError(f"{name}: {self.failures.get(name, 'no such case')}")


def run_cases(folder: Path, cases: dict, ranks: int = 2) -> CaseResults:
    """The results of `train_cases.py` for every case. After a failed launch the cases after
    the failed one are launched again."""
    results = CaseResults()
    remaining = dict(cases)
    while remaining:
        output = _launch(folder, remaining, ranks)
        lines = (folder / "out.jsonl").read_text().splitlines() if (folder / "out.jsonl").exists() else []
        for line in lines:
            result = json.loads(line)
            results[result["case"]] = result
            del remaining[result["case"]]
        if remaining:  # the first of them ended the launch
            failed = next(iter(remaining))
            results.failures[failed] = output
            del remaining[failed]
    return results


def _launch(folder: Path, cases: dict, ranks: int) -> str:
    (folder / "cases.json").write_text(json.dumps(cases))
    (folder / "out.jsonl").unlink(missing_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = [str(ROOT / "tests" / "support" / "train_cases.py"), str(folder / "cases.json"), str(folder / "out.jsonl")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"]
    # Compiling the kernels of one optimizer would take many seconds.
    environment |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    completed = subprocess.run([*launcher, *script], env=environment, capture_output=True, text=True, timeout=580)
    return completed.stdout[-2000:] + completed.stderr[-4000:]


def case(base: Path, tuning: str, stage: int, *overrides_of_case: str, steps: int = 4, **options) -> dict:
    extra = ADAPTERS if tuning in ("lora", "qlora", "dora", "rslora") else []
    overrides = [
        f"model={base}",
        f"tuning={tuning}",
        *extra,
        f"zero={stage}",
        "optim.lr=1e-2",
        SHARDED,
        *overrides_of_case,
    ]
    return {"overrides": overrides, "steps": steps} | options


def near(values: list[float], expected: list[float], tolerance: float) -> None:
    assert len(values) == len(expected)
    assert all(abs(a - b) <= tolerance * abs(b) for a, b in zip(values, expected, strict=True)), (values, expected)
