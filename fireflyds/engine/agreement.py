"""Before the ranks join: has everybody come, with the same code, configuration and libraries, to the same folder?

Otherwise hosts would train different things together, or wait for each other in a collective that nobody can name.
"""

import hashlib
import os
import socket
import sys
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import fireflyds_kernels
import torch

import fireflyds
from fireflyds import app
from fireflyds.config import DoctorConfig, TrainConfig
from fireflyds.engine import changes, deepspeed, interfaces
from fireflyds.engine.doctor import clocks, links
from fireflyds.engine.doctor.check import Verdict
from fireflyds.engine.doctor.hosts import boot_id, tell_apart
from fireflyds.engine.doctor.machine import place_of
from fireflyds.engine.meeting import Meeting, Part, SilentError
from fireflyds.engine.ranks import Ranks
from fireflyds.errors import LostRankError, UserError

# Rank 0 says whom it waits for after so many seconds.
_PATIENCE = 30.0
_LIBRARIES = ("torch", "deepspeed", "transformers")
_REMEDY = {
    "code": "Bring the checkouts of all hosts to the same commit, or start from a folder that all hosts mount",
    "configuration": "Give the same command on every host",
    "versions": "Install the same versions on every host",
    "inputs": "Give the same store and tokenizer on every host",
}


def join(me: Ranks, config: TrainConfig, text: str, inputs: dict[str, Any]) -> list[str]:
    """Wait for all ranks, compare, and join them. `text` is the whole configuration, `inputs` what is read, by contents.
    Returns what to note in the log.

    Raises:
        UserError: on every rank that has come: who has not, or differs, and what to do.
    """
    me.export()
    interfaces.choose(config.hardware.network_interface, os.environ)
    # Kept until the ranks have joined: its store is theirs.
    meeting, notes = meet(me, config, text, inputs) if me.world_size > 1 else (None, [])
    deepspeed.start(me, config.hardware.timeout_minutes)
    del meeting
    return notes


def meet(me: Ranks, config: TrainConfig, text: str, inputs: dict[str, Any]) -> tuple[Meeting, list[str]]:
    """As `join`, without the joining."""
    seconds = 60 * config.hardware.start_timeout_minutes
    meeting = Meeting(me, seconds)
    meeting.claim()
    meeting.tell(f"here/{me.rank}", about(me, text, inputs))
    asked = DoctorConfig(runs=config.runs)
    if me.rank:
        _take_part(meeting, asked, text, seconds)
        return meeting, []
    verdict, lost, notes = "", False, []
    try:
        answers = _wait_for_all(meeting, seconds)
        _compare(meeting, answers, text, asked.timeout)
        hosts = tell_apart([answer["host"] for answer in answers], [answer["machine"] for answer in answers])
        notes = _between_hosts(meeting, hosts, asked)
    except UserError as error:
        verdict, lost = str(error), isinstance(error, LostRankError)
    except SilentError as silent:
        ranks, lost = named(set(silent.ranks)), True
        verdict = f"{ranks} came, and did not answer to `{silent.step}` within {asked.timeout:g} s. See the logs there"
    except OSError as error:
        verdict = f"runs={config.runs}: cannot be written ({error.strerror}). Give another runs="
    # Also where some have not come: those that have shall hear it.
    meeting.end([verdict, lost])
    _obey(verdict, lost)
    return meeting, notes


def _obey(verdict: str, lost: bool) -> None:
    """A rank that has not come may come at the next start; what differs will differ then too."""
    if verdict:
        raise LostRankError(verdict) if lost else UserError(verdict)


def _take_part(meeting: Meeting, asked: DoctorConfig, text: str, seconds: float) -> None:
    parts: dict[str, Part] = {
        "code": lambda payload: code() if meeting.me.rank in payload else None,
        "configuration": lambda payload: text if meeting.me.rank in payload else None,
        "clock skew": lambda payload: clocks.answer_pings(meeting, payload),
        "shared folder": lambda payload: links.read_token(asked, payload),
    }
    # Rank 0 may have come later than this rank, and then waits as long itself.
    _obey(*meeting.serve(parts, 2 * seconds + asked.timeout))


def about(me: Ranks, text: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """What must be the same on every rank, and where this one is."""
    files = "\n".join(f"{name} {digest}" for name, digest in sorted(code().items()))
    return {
        "host": socket.gethostname(),
        "machine": boot_id(),
        "inputs": inputs,
        "world_size": me.world_size,
        "code": _hash(files.encode()),
        "configuration": _hash(text.encode()),
        "versions": {name: metadata.version(name) for name in _LIBRARIES} | {"CUDA": str(torch.version.cuda)},
    }


def code() -> dict[str, str]:
    """A hash of every file of the code that runs."""
    launched = Path(sys.argv[0]).resolve().parent
    folders = {"fireflyds": fireflyds.__path__[0], "fireflyds_kernels": fireflyds_kernels.__path__[0]}
    found = {
        f"{name}/{file.relative_to(folder)}": _hash(file.read_bytes())
        for name, folder in folders.items()
        for file in Path(folder).rglob("*.py")
    }
    return found | {f"{launched.name}/{file.name}": _hash(file.read_bytes()) for file in launched.glob("*.py")}


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _wait_for_all(meeting: Meeting, seconds: float) -> list[dict[str, Any]]:
    me, started, said = meeting.me, time.monotonic(), False
    missing = set(range(me.world_size))
    while True:
        missing -= {rank for rank in missing if meeting.told(f"here/{rank}")}
        waited = time.monotonic() - started
        if not missing:
            return [meeting.hear(f"here/{rank}", seconds) for rank in range(me.world_size)]
        if waited > seconds:
            raise LostRankError(
                f"{named(missing)} of {me.world_size} did not come to {me.master_addr}:{me.master_port} within {seconds:g} s "
                "(hardware.start_timeout_minutes). See the logs there: was it started, with the same number of hosts, and "
                "does that host reach this address? `launch/doctor.py`, started the same way, tries it"
            )
        if waited > _PATIENCE and not said:
            print(f"waiting for {named(missing)} of {me.world_size} to come", file=sys.stderr, flush=True)
            said = True
        time.sleep(0.1)


def named(missing: set[int]) -> str:
    """`rank 3 (node 1), rank 4 (node 2)`; the number of the node where the launcher says how many ranks one has."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "0")))
    shown = [f"rank {rank}" + (f" (node {rank // local})" if local else "") for rank in sorted(missing)[:8]]
    return ", ".join(shown) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")


def _compare(meeting: Meeting, answers: list[dict[str, Any]], text: str, seconds: float) -> None:
    """Raises `UserError` naming rank, host and what differs from rank 0's."""
    own = answers[0]
    for rank, answer in enumerate(answers):
        if answer["world_size"] != own["world_size"]:
            raise UserError(
                f"rank {rank} on {answer['host']} was told of {answer['world_size']} ranks, rank 0 on {own['host']} of "
                f"{own['world_size']}. Give the same number of hosts and ranks everywhere"
            )
    for what in ("code", "configuration", "versions", "inputs"):
        others = [rank for rank, answer in enumerate(answers) if answer[what] != own[what]]
        if not others:
            continue
        rank, theirs, ours = others[0], answers[others[0]][what], own[what]
        if what == "code":
            theirs, ours = meeting.call(what, [rank], lambda payload: code(), seconds)[rank], code()
        elif what == "configuration":
            told = meeting.call(what, [rank], lambda payload: text, seconds)[rank]
            theirs, ours = app.plain(told), app.plain(text)
        more = f" ({len(others)} ranks differ)" if len(others) > 1 else ""
        raise UserError(
            f"rank {rank} on {answers[rank]['host']} has another {what.rstrip('s')} than rank 0 on {own['host']}{more}: "
            f"{_difference(what, ours, theirs)}. {_REMEDY[what]}"
        )


def _difference(what: str, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    if what == "code":
        files = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        return ", ".join(files[:4]) + (f" and {len(files) - 4} more files" if len(files) > 4 else "")
    found = changes.differences(ours, theirs, free=())
    return "; ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")


def _between_hosts(meeting: Meeting, hosts: list[str], asked: DoctorConfig) -> list[str]:
    """What to note of clocks; raises `UserError` when the folder of runs is not the same one everywhere."""
    leaders = [hosts.index(host) for host in dict.fromkeys(hosts)]
    if len(leaders) == 1:
        return []
    with links.token_file(place_of(asked.runs)) as payload:
        answers = meeting.call("shared folder", payload, partial(links.read_token, asked), asked.timeout)
    shared = links.check_shared_folder(answers, hosts, asked.runs)
    if shared.verdict is Verdict.red:
        raise UserError(f"{shared.found}. {shared.remedy[:1].upper()}{shared.remedy[1:]}")
    apart: dict[int, tuple[float, float]] = {}

    def ask(each: Any) -> None:
        apart.update(clocks.ask_clocks(meeting, each))

    meeting.call("clock skew", clocks.clock_payload(leaders, len(hosts)), ask, asked.timeout)
    check = clocks.check_clocks(apart, leaders, hosts, asked.max_clock_skew)
    return [] if check.verdict is Verdict.green else [f"warning: clock skew: {check.found}; {check.remedy}"]
