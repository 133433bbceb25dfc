"""A road: verbs in order, each its own process, resumed where it stopped."""

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

from fireflyds.config import RoadConfig, StageConfig
from fireflyds.errors import UserError
from fireflyds.fs import MARKER, atomic_write_text, lock_file, remove_output
from fireflyds.runs import layout

# Lines of DeepSpeed's launcher and of progress bars: kept in the stage's log, not shown.
_NOISE = re.compile(
    r"^\[\d{4}-\d\d-\d\d |it/s\]|^\s*return func|FutureWarning|kernels-community|^(Processing zero|Parsing checkpoint|Detected checkpoint|Reconstructed )"
)


def stage_command(stage: StageConfig) -> list[str]:
    """What a person would type for a stage, from the checkout's root."""
    start = ["deepspeed", "--num_gpus", str(stage.ranks)] if stage.ranks > 1 else ["python"]
    return [*start, f"launch/{stage.verb}.py", *stage.overrides]


def stage_keys(stages: Iterable[str], seed_key: str = "") -> Iterator[str]:
    """A stage's key is a hash over what it and all before it do, so a change of one does the later ones again."""
    key = seed_key
    for does in stages:
        key = hashlib.sha256(f"{key}\n{does}".encode()).hexdigest()
        yield key


def relocate(config: Any, road: RoadConfig, runs: str, run: str) -> None:
    """Move what the composed `config` of a stage reads and writes below the road's folder to `<runs>/<run>`, in place."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            relocate(value, road, runs, run)
        elif field.name not in ("run", "runs"):
            setattr(config, field.name, _moved(value, road.out, f"{runs}/{run}"))
    if hasattr(config, "run") and f"{config.runs}/{config.run}".startswith(f"{road.out}/"):
        config.run = run + config.run.removeprefix(road.name)
        config.runs = runs


def _moved(value: Any, old: str, new: str) -> Any:
    if isinstance(value, str):
        return new + value.removeprefix(old) if value == old or value.startswith(f"{old}/") else value
    if isinstance(value, dict):
        return {key: _moved(each, old, new) for key, each in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: _moved(getattr(value, f.name), old, new) for f in dataclasses.fields(value)}
        )
    return [_moved(each, old, new) for each in value] if isinstance(value, list) else value


class RoadRunner:
    """Runs the stages of a road that are not done yet, and remembers what was done in `stages.json`.

    A stage is done when its record says so, what it makes is there, and its key is the same. A stage that was
    interrupted is started again by the same command, and goes on from its checkpoint where it has one.
    """

    def __init__(self, config: RoadConfig, seed_key: str) -> None:
        self._config, self._seed_key = config, seed_key
        self._out = Path(config.out)
        self._file = self._out / "stages.json"
        self.records: dict[str, dict[str, Any]] = {}
        if self._file.exists():
            self.records = json.loads(self._file.read_text(encoding="utf-8"))

    def run(self) -> None:
        """Raises `UserError` when a stage fails or the road is being walked already, `KeyboardInterrupt` on Ctrl-C."""
        self._out.mkdir(parents=True, exist_ok=True)
        busy = f"{self._out}: another process walks this road now. Wait for it, or end it"
        with lock_file(self._out / ".lock", busy):
            self._walk()

    def _walk(self) -> None:
        commands = ["\n".join(stage_command(stage)) for stage in self._config.stages]
        found = zip(self._config.stages, stage_keys(commands, self._seed_key), strict=True)
        for number, (stage, key) in enumerate(found, 1):
            made = self._out / stage.output
            record = self.records.get(stage.name, {})
            title = f"[{number}/{len(self._config.stages)}] {stage.name}"
            if record.get("key") == key and record.get("done") and made.exists():
                print(f"{title}: whole, re-used ({record['seconds']:.0f} s when it ran)", flush=True)
                continue
            if record.get("key") != key:
                # Only what a stage of this name made before is removed; whatever else is there is not ours.
                if record:
                    _remove(made, self._out)
                record = {"command": shlex.join(stage_command(stage)), "key": key, "seconds": 0.0, "done": False}
            print(f"{title}: {record['command']}", flush=True)
            self._do(stage, record)
            print(f"{title}: {record['seconds']:.0f} s", flush=True)

    def _do(self, stage: StageConfig, record: dict[str, Any]) -> None:
        self.records[stage.name] = record
        code = _execute(stage_command(stage), self._out / "logs" / f"{stage.name}.log", self._clock(record))
        if code != 0:
            raise UserError(
                f"{stage.name}: {record['command']} left with exit code {code}; its output: {self._out / 'logs' / stage.name}.log"
            )
        if not (self._out / stage.output).exists():
            raise UserError(f"{stage.name}: {record['command']} did not make {self._out / stage.output}")
        record["done"] = True
        self._save()

    def _clock(self, record: dict[str, Any]) -> Callable[[], None]:
        """A function that notes the time a stage has taken, all its starts together, so that a kill loses little of it."""
        started, before = time.monotonic(), record["seconds"]

        def note() -> None:
            record["seconds"] = round(before + time.monotonic() - started, 2)
            self._save()

        note()
        return note

    def _save(self) -> None:
        atomic_write_text(self._file, json.dumps(self.records, indent=2, ensure_ascii=False))


def _remove(made: Path, out: Path) -> None:
    """What an earlier, different stage of this name wrote below `out`; files of others stay."""
    made, out = made.resolve(), out.resolve()
    if out not in made.parents:
        return
    if layout.is_run(made):
        layout.remove_run(made)
        return
    for folder in (made, *made.parents):
        if folder == out:
            break
        if (folder / MARKER).is_file():
            remove_output(folder)
            return
    if made.is_file():
        made.unlink()


def _execute(words: list[str], log: Path, note_time: Callable[[], None]) -> int:
    """Run a command with this interpreter's environment; its output goes to the log, and without noise to the terminal.

    Ctrl-C and SIGTERM are passed on, and the command is given time to save; then `KeyboardInterrupt` is raised.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    bin_dir = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}"}
    # In a session of its own, so that a signal reaches all its processes, and once: DeepSpeed's launcher passes none on.
    process = subprocess.Popen(
        words,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        # A road started in the background has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    asked: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        print("   stopping (a second Ctrl-C kills) ..." if not asked else "   killing", flush=True)
        os.killpg(process.pid, signal.SIGKILL if asked else signal.SIGINT)
        asked.append(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with log.open("a", encoding="utf-8") as stream:
            for line in process.stdout or ():
                stream.write(line)
                stream.flush()
                note_time()
                # Once asked to stop, only that it was saved matters; launchers' tracebacks stay in the log.
                if line.strip() and not _NOISE.search(line) and (not asked or "stopped at" in line):
                    print("   " + line, end="", flush=True)
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        note_time()
    if asked:
        raise KeyboardInterrupt
    return code
