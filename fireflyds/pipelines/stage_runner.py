"""Runs a pipeline (`road`): a sequence of verbs, each in its own process, resumed at the stage where it stopped."""

import dataclasses
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fireflyds.config import PipelineConfig, StageConfig
from fireflyds.errors import UserError
from fireflyds.fs import atomic_write_text, lock_file
from fireflyds.runs import layout

# Lines of DeepSpeed's launcher and of progress bars: written to the stage's log, not to the terminal.
_HIDDEN_LINES = re.compile(
    r"^\[\d{4}-\d\d-\d\d |it/s\]|^\s*return func|FutureWarning|kernels-community|^(Processing zero|Parsing "
    r"checkpoint|Detected checkpoint|Reconstructed )"
)


def stage_command(stage: StageConfig) -> list[str]:
    """Returns the command of a stage, relative to the root of the checkout."""
    launcher = ["deepspeed", "--num_gpus", str(stage.ranks)] if stage.ranks > 1 else ["python"]
    return [*launcher, f"launch/{stage.verb}.py", *stage.overrides]


def stage_keys(stages: Iterable[str], seed_key: str = "") -> Iterator[str]:
    """Yields each stage's key: a hash over it and all earlier stages, so a changed stage also reruns later ones."""
    key = seed_key
    for stage_text in stages:
        key = hashlib.sha256(f"{key}\n{stage_text}".encode()).hexdigest()
        yield key


def relocate(config: Any, pipeline: PipelineConfig, runs: str, run: str) -> None:
    """Moves paths in a stage's composed `config` from the pipeline's folder to `<runs>/<run>`, in place."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            relocate(value, pipeline, runs, run)
        elif field.name not in ("run", "runs"):
            setattr(config, field.name, _relocated(value, pipeline.out, f"{runs}/{run}"))
    if hasattr(config, "init_from") and f"{config.runs}/{config.init_from}".startswith(f"{pipeline.out}/"):
        config.init_from = run + config.init_from.removeprefix(pipeline.name)
    if hasattr(config, "run") and f"{config.runs}/{config.run}".startswith(f"{pipeline.out}/"):
        config.run = run + config.run.removeprefix(pipeline.name)
        config.runs = runs


def _relocated(value: Any, old: str, new: str) -> Any:
    if isinstance(value, str):
        return new + value.removeprefix(old) if value == old or value.startswith(f"{old}/") else value
    if isinstance(value, dict):
        return {key: _relocated(item, old, new) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: _relocated(getattr(value, f.name), old, new) for f in dataclasses.fields(value)}
        )
    return [_relocated(item, old, new) for item in value] if isinstance(value, list) else value


class PipelineRunner:
    """Runs the incomplete stages of a pipeline and records completed ones in `stages.json`.

    A stage is complete if it is recorded as done, its output exists and its key is unchanged. An interrupted stage is
    restarted with the same command and resumes from its checkpoint if it has one.
    """

    def __init__(self, config: PipelineConfig, seed_key: str) -> None:
        self._config, self._seed_key = config, seed_key
        self._out = Path(config.out)
        self._file = self._out / "stages.json"
        self.records: dict[str, dict[str, Any]] = {}
        if self._file.exists():
            self.records = json.loads(self._file.read_text(encoding="utf-8"))

    def run(self) -> None:
        """Runs all incomplete stages.

        Raises:
            UserError: a stage fails, or another process runs this pipeline.
            KeyboardInterrupt: on Ctrl-C or SIGTERM.
        """
        self._out.mkdir(parents=True, exist_ok=True)
        remedy = "Wait for it, or end it"
        busy = UserError("another process runs this pipeline now", key=self._out, remedy=remedy)
        with lock_file(self._out / ".lock", busy):
            self._run_stages()

    def _run_stages(self) -> None:
        commands = ["\n".join(stage_command(stage)) for stage in self._config.stages]
        stages_and_keys = zip(self._config.stages, stage_keys(commands, self._seed_key), strict=True)
        for number, (stage, key) in enumerate(stages_and_keys, 1):
            output = self._out / stage.output
            record = self.records.get(stage.name, {})
            title = f"[{number}/{len(self._config.stages)}] {stage.name}"
            if record.get("key") == key and record.get("done") and output.exists():
                print(f"{title}: complete, skipped (took {record['seconds']:.0f} s)", flush=True)
                continue
            if record.get("key") != key:
                if record:
                    _remove_run(output, self._out)
                record = {"command": shlex.join(stage_command(stage)), "key": key, "seconds": 0.0, "done": False}
            print(f"{title}: {record['command']}", flush=True)
            self._run_stage(stage, record)
            print(f"{title}: {record['seconds']:.0f} s", flush=True)

    def _run_stage(self, stage: StageConfig, record: dict[str, Any]) -> None:
        self.records[stage.name] = record
        code = _execute(stage_command(stage), self._out / "logs" / f"{stage.name}.log", self._timer(record))
        if code != 0:
            raise UserError(
                f"{record['command']} failed with exit code {code}",
                key=stage.name,
                remedy=f"See its output in {self._out / 'logs' / stage.name}.log",
            )
        if not (self._out / stage.output).exists():
            raise UserError(
                f"{record['command']} did not write {self._out / stage.output}",
                key=stage.name,
                remedy="Correct the output or the out= of the stage",
            )
        record["done"] = True
        self._save()

    def _timer(self, record: dict[str, Any]) -> Callable[[], None]:
        """Returns a function that saves a stage's run time over all its starts; called often, in case of a kill."""
        start_time, previous_seconds = time.monotonic(), record["seconds"]

        def save_time() -> None:
            record["seconds"] = round(previous_seconds + time.monotonic() - start_time, 2)
            self._save()

        save_time()
        return save_time

    def _save(self) -> None:
        atomic_write_text(self._file, json.dumps(self.records, indent=2, ensure_ascii=False))


def _remove_run(output: Path, out: Path) -> None:
    """Removes the run of an earlier, different stage of this name below `out`: another configuration cannot resume it.

    All other verbs replace or extend their own output, and keep the files of others in it.
    """
    if out.resolve() in output.resolve().parents and layout.is_run(output):
        layout.remove_run(output)


def _execute(command: list[str], log: Path, note_time: Callable[[], None]) -> int:
    """Runs a command in this interpreter's environment, logs its output and prints it filtered. Returns the exit code.

    Ctrl-C and SIGTERM are forwarded as SIGINT, and the command has time to save; then `KeyboardInterrupt` is raised.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    bin_dir = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}"}
    # A separate session, so that a signal reaches each process exactly once: DeepSpeed's launcher forwards none.
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        # A pipeline started in the background ignores SIGINT, and child processes inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    signals: list[int] = []

    def forward_signal(number: int, frame: object) -> None:
        print("   stopping (a second Ctrl-C kills) ..." if not signals else "   killing", flush=True)
        os.killpg(process.pid, signal.SIGKILL if signals else signal.SIGINT)
        signals.append(number)

    previous = {number: signal.signal(number, forward_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with log.open("a", encoding="utf-8") as stream:
            for line in process.stdout or ():
                stream.write(line)
                stream.flush()
                note_time()
                # After a stop request only the line about saving is printed; launchers' tracebacks stay in the log.
                if line.strip() and not _HIDDEN_LINES.search(line) and (not signals or "stopped at" in line):
                    print("   " + line, end="", flush=True)
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        note_time()
    if signals:
        raise KeyboardInterrupt
    return code
