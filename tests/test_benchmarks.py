"""Benchmarks start verbs with valid keys, use names of this project that exist, and compare equal workloads."""

import ast
import csv
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from grid import ROOT

from fireflyds import app
from fireflyds.evaluation.results import EvaluationResult, append_result

FOLDER = ROOT / "benchmarks"
Call = tuple[str, list[str]]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a file of `benchmarks/`, as if it were started as a script."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def _record_calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Replaces `subprocess` calls; returns the list of verbs that benchmarks start, with their arguments."""
    calls: list[Call] = []

    def start(command: list[Any], *_: Any, **__: Any) -> SimpleNamespace:
        arguments = [str(word) for word in command]
        position = next(index for index, word in enumerate(arguments) if Path(word).parent.name == "launch")
        calls.append((Path(arguments[position]).stem, arguments[position + 1 :]))
        table = {"trainable_parameters": 1, "groups": [{"memory_bytes": 1}] * 2}
        return SimpleNamespace(returncode=0, stdout=json.dumps(table), pid=0)

    monkeypatch.setattr(subprocess, "run", start)
    monkeypatch.setattr(subprocess, "Popen", start)
    return calls


def _data(folder: Path) -> Path:
    """The data folder of benchmarks, with small files."""
    lines = "\n".join(["one line of text"] * 20)
    for name in ("tokenizers/llama2_32000.model", "tokenizers/chinese_llama2_55296.model"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    for name in ("clue_corpus_small_sample_zh.txt", "wiki_demo_en.txt"):
        (folder / "corpora").mkdir(exist_ok=True)
        (folder / "corpora" / name).write_text(lines, encoding="utf-8")
    return folder


def _bench_tuning(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "wait4", lambda pid, options: (pid, 0, SimpleNamespace(ru_maxrss=1024)))
    module.prepare(folder, _data(folder / "data"))
    for stage in ("cpt", "sft"):
        (folder / "stores" / stage).mkdir(parents=True)
        totals = {"totals": {"tokens": 2, "bytes": 8}}
        (folder / "stores" / stage / "manifest.json").write_text(json.dumps(totals), encoding="utf-8")
        for number, method in enumerate(module.METHODS):
            run = folder / "runs" / f"{stage}-{number}"
            (run / "checkpoints" / "step-1").mkdir(parents=True)
            metrics = json.dumps({"loss": 1.0, "tokens_per_second": 2.0})
            (run / "metrics.jsonl").write_text(f"{metrics}\n" * 10, encoding="utf-8")
            figures = {"zh": 1.5, "en": 2.5}
            result = EvaluationResult("bits_per_byte", "m", "p", "s", figures, {}, True, "w", {})
            append_result(run / "export" / "eval", result)
            results = module.train(folder, method, stage, "expanded", 10)
            assert (results["scores"], results["speed"], results["trained"]) == (figures, 2.0, 1)


def _bench_rows(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "losses", lambda *_: [1.0] * module.CPT_STEPS)
    monkeypatch.setattr(module, "describe", lambda *_: "")
    (folder / "text.txt").write_text("one\ntwo", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["", *[str(folder / "text.txt")] * 2, str(folder / "out")])
    module.main()


def _bench_train(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "call", lambda folder, *command: subprocess.run(command))
    module.make_store(folder, _data(folder / "data"))


def _bench_data(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "repeated", lambda source, out, size: out.write_text("text"))
    monkeypatch.setattr(module, "timed", lambda work: 1.0)
    monkeypatch.setattr(module, "_watch", lambda running: 1)
    module.encoding_rows(folder, folder / "model", folder)
    module.memory_rows(folder, folder / "model", folder)


def _train_ours(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turn_settings = importlib.import_module("train_turn").Turn("f", "m", "s", "t", "d", 64, 4, 2, 2, 1e-3, 1000)
    subprocess.run([ROOT / "launch" / "train.py", *module.overrides(turn_settings)])


VERB_BENCHMARKS = {
    "bench_data": _bench_data,
    "bench_rows": _bench_rows,
    "bench_train": _bench_train,
    "bench_tuning": _bench_tuning,
    "train_ours": _train_ours,
}


def test_every_benchmark_that_starts_a_verb_is_tested() -> None:
    benchmarks = {file.stem for file in FOLDER.glob("*.py") if '"launch"' in file.read_text(encoding="utf-8")}
    # The smoke test lists its verbs: `test_the_smoke_test_gives_keys_that_the_verbs_have`.
    assert benchmarks - {"gpu_smoke"} == set(VERB_BENCHMARKS)


@pytest.mark.parametrize("name", VERB_BENCHMARKS)
def test_verbs_accept_the_keys_that_benchmarks_pass(
    name: str, benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = benchmark(name)
    calls = _record_calls(monkeypatch)
    VERB_BENCHMARKS[name](module, tmp_path, monkeypatch)
    assert calls
    # `model=expanded` names a folder that the benchmark creates earlier.
    monkeypatch.chdir(tmp_path)
    for key, _, value in (word.partition("=") for _, overrides in calls for word in overrides):
        if key in ("model", "data") and value != "at_path" and not (tmp_path / value).exists():
            (tmp_path / value).mkdir(parents=True)
    for verb, overrides in calls:
        app.compose(verb, overrides)


def _attributes(tree: ast.AST) -> Iterator[tuple[Any, str]]:
    """Yields what a source imports of this project, as module and name, and the attributes of the modules it names."""
    modules: dict[str, ModuleType] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fireflyds"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                package = importlib.import_module(str(node.module))
                if not hasattr(package, alias.name) and importlib.util.find_spec(name):
                    importlib.import_module(name)
                yield package, alias.name
                if isinstance(value := getattr(package, alias.name, None), ModuleType):
                    modules[alias.asname or alias.name] = value
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield modules[node.value.id], node.attr


def _sources(file: Path, module: ModuleType | None) -> Iterator[str]:
    """Yields the text of a benchmark and the programs that it holds as strings."""
    yield file.read_text(encoding="utf-8")
    for value in vars(module).values() if module else ():
        if isinstance(value, str) and "\nfrom fireflyds" in value:
            yield value.format(paths=[], model="some/model", tuning="qlora")


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.py")))
def test_project_names_used_by_benchmarks_exist(name: str, benchmark) -> None:
    module = benchmark(name) if name == "bench_tuning" else None
    for source in _sources(FOLDER / f"{name}.py", module):
        for owner, attribute in _attributes(ast.parse(source)):
            assert hasattr(owner, attribute), f"{owner.__name__}.{attribute}"


def test_the_loading_program_of_bench_tuning_composes(benchmark) -> None:
    program = list(_sources(FOLDER / "bench_tuning.py", benchmark("bench_tuning")))[1]
    (call,) = [
        node
        for node in ast.walk(ast.parse(program))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "app.compose"
    ]
    verb, overrides = (ast.literal_eval(argument) for argument in call.args)
    assert app.compose(verb, overrides).model.path == "some/model"


@pytest.mark.slow
@pytest.mark.data
def test_contenders_train_on_the_same_tokens_with_equal_losses(data_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "bench_train.py", data_folder, tmp_path, "--quick"]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert completed.returncode == 0, completed.stderr[-4000:]
    (table,) = tmp_path.glob("train_cpu*.csv")
    with table.open(encoding="utf-8") as stream:
        results = {row["contender"]: row for row in csv.DictReader(stream)}
    reference = results["ours"]
    for contender in ("HF Trainer, padded", "HF Trainer, packed by position_ids"):
        assert results[contender]["learned_tokens"] == reference["learned_tokens"]
        assert float(results[contender]["last_loss"]) == pytest.approx(float(reference["last_loss"]), abs=2e-4)


def test_the_gpu_script_fits_its_time_and_goes_on_behind_a_part_that_fails(tmp_path: Path) -> None:
    """Played: `python` and `timeout` write down what they are asked for; two of the parts fail."""
    calls = tmp_path / "calls"
    (tmp_path / "python").write_text(
        f"""#!/bin/sh
case "$*" in *is_available*) exit 0;; esac
echo "python $*" >> {calls}
case "$*" in *gpu_smoke*|*test_linear_cross_entropy*) exit 1;; esac
"""
    )
    (tmp_path / "timeout").write_text(f"""#!/bin/sh\nshift\necho "limit $1" >> {calls}\nshift\nexec "$@"\n""")
    for name in ("python", "timeout"):
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")}
    command = [str(FOLDER / "gpu.sh"), str(tmp_path / "results")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    lines = calls.read_text().splitlines()
    limits = [int(line.split()[1]) for line in lines if line.startswith("limit")]
    beside = limits.count(200)
    assert beside == 7
    # The tests run beside each other. A command on a machine with a GPU may take ten minutes, all of them fifteen.
    assert sum(limits) - (beside - 1) * 200 <= 14 * 60
    scripts = [word for line in lines for word in line.split() if word.startswith("benchmarks/")]
    assert scripts == [f"benchmarks/{name}.py" for name in ("gpu_smoke", "bench_kernels_gpu", *["bench_train_gpu"] * 2)]
    # Every file and option is there.
    for line in lines:
        for word in line.split():
            assert not word.startswith(("tests/kernels/", "benchmarks/")) or (ROOT / word).is_file(), word
    for text in ("--only full --rounds 1", "--only qlora --rounds 1"):
        assert any(text in line for line in lines)
    assert ended.returncode == 1
    assert ended.stdout.count("error: ") == 2
    refused = subprocess.run([*command, "tets"], env=environment, capture_output=True, text=True, timeout=60)
    assert (refused.returncode, refused.stdout) == (2, "error: part=tets: one of smoke, tests, kernels, full, qlora\n")


def test_the_smoke_test_gives_keys_that_the_verbs_have(benchmark, monkeypatch, tmp_path: Path) -> None:
    gpu_smoke = benchmark("gpu_smoke")
    monkeypatch.chdir(tmp_path)
    for name in ("corpus", "store", "tokenizer", "runs/full/export"):
        Path(name).mkdir(parents=True)
    Path("corpus/zh.jsonl").touch()
    for _, (verb, *words) in gpu_smoke.steps(gpu_smoke.SHAPE, 1024):
        app.compose(verb, words)
