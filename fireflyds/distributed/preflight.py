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
from fireflyds.config import TrainConfig
from fireflyds.distributed import clock_offset
from fireflyds.distributed import network as interfaces
from fireflyds.distributed.host_identity import boot_id, describe_ranks, distinct_host_names
from fireflyds.distributed.launcher_env import RankInfo
from fireflyds.distributed.rendezvous import Handler, StoreChannel, UnresponsiveRanksError
from fireflyds.distributed.shared_folder import (
    REMEDY,
    describe_blind_ranks,
    existing_part,
    read_token,
    token_file,
)
from fireflyds.errors import LostRankError, UserError
from fireflyds.runs import config_diff as changes

# Seconds that a rank that has come may take to answer, and to see a file that rank 0 wrote.
_ANSWER_SECONDS, _SHARED_FOLDER_SECONDS = 60.0, 10.0
# Clocks further apart, in seconds, are warned of.
_MAX_CLOCK_SKEW = 1.0
# Rank 0 says whom it waits for after so many seconds.
_NOTICE_SECONDS = 30.0
_LIBRARIES = ("torch", "deepspeed", "transformers")
_REMEDIES = {
    "code": "Bring the checkouts of all hosts to the same commit, or start from a folder that all hosts mount",
    "configuration": "Give the same command on every host",
    "versions": "Install the same versions on every host",
    "inputs": "Give the same store and tokenizer on every host",
}


def check_ranks_agree(
    me: RankInfo, config: TrainConfig, text: str, inputs: dict[str, Any]
) -> tuple[StoreChannel | None, list[str]]:
    """Wait for all ranks and compare them. `text` is the whole configuration, `inputs` what is read, by contents.

    Returns what must be kept until the ranks have joined, since its store is theirs, and notes for the log.

    Raises:
        UserError: on every rank that has come: who has not, or differs, and what to do.
    """
    me.export()
    interfaces.set_network_interface(config.hardware.network_interface, os.environ)
    return compare_ranks(me, config, text, inputs) if me.world_size > 1 else (None, [])


def compare_ranks(
    me: RankInfo, config: TrainConfig, text: str, inputs: dict[str, Any]
) -> tuple[StoreChannel, list[str]]:
    """As `check_ranks_agree`, for several ranks."""
    seconds = 60 * config.hardware.start_timeout_minutes
    channel = StoreChannel(me, seconds)
    channel.register()
    channel.set(f"here/{me.rank}", rank_fingerprint(me, text, inputs))
    if me.rank:
        _serve(channel, config, text, seconds)
        return channel, []
    verdict, lost, notes = "", False, []
    try:
        answers = _wait_for_all(channel, seconds)
        _compare(channel, answers, text, _ANSWER_SECONDS)
        hosts = distinct_host_names([answer["host"] for answer in answers], [answer["machine"] for answer in answers])
        notes = _between_hosts(channel, hosts, config.runs)
    except UserError as error:
        verdict, lost = str(error), isinstance(error, LostRankError)
    except UnresponsiveRanksError as silent:
        ranks, lost = describe_ranks(silent.ranks), True
        verdict = (
            f"{ranks} came, and did not answer to `{silent.step}` within {_ANSWER_SECONDS:g} s. See the logs there"
        )
    except OSError as error:
        verdict = f"runs={config.runs}: cannot be written ({error.strerror}). Give another runs="
    # Also where some have not come: those that have shall hear it.
    channel.end([verdict, lost])
    _raise_verdict(verdict, lost)
    return channel, notes


def _raise_verdict(verdict: str, lost: bool) -> None:
    """A rank that has not come may come at the next start; what differs will differ then too."""
    if verdict:
        raise LostRankError(verdict) if lost else UserError(verdict)


def _serve(channel: StoreChannel, config: TrainConfig, text: str, seconds: float) -> None:
    parts: dict[str, Handler] = {
        "code": lambda payload: code_hashes() if channel.me.rank in payload else None,
        "configuration": lambda payload: text if channel.me.rank in payload else None,
        "clock skew": lambda payload: clock_offset.answer_pings(channel, payload),
        "shared folder": lambda payload: read_token(config.runs, _SHARED_FOLDER_SECONDS, payload),
    }
    # Rank 0 may have come later than this rank, and then waits as long itself.
    _raise_verdict(*channel.serve(parts, 2 * seconds + _ANSWER_SECONDS))


def rank_fingerprint(me: RankInfo, text: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """What must be the same on every rank, and where this one is."""
    files = "\n".join(f"{name} {digest}" for name, digest in sorted(code_hashes().items()))
    return {
        "host": socket.gethostname(),
        "machine": boot_id(),
        "inputs": inputs,
        "world_size": me.world_size,
        "code": _hash(files.encode()),
        "configuration": _hash(text.encode()),
        "versions": {name: metadata.version(name) for name in _LIBRARIES} | {"CUDA": str(torch.version.cuda)},
    }


def code_hashes() -> dict[str, str]:
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


def _wait_for_all(channel: StoreChannel, seconds: float) -> list[dict[str, Any]]:
    me, started, said = channel.me, time.monotonic(), False
    missing = set(range(me.world_size))
    while True:
        missing -= {rank for rank in missing if channel.has(f"here/{rank}")}
        waited = time.monotonic() - started
        if not missing:
            return [channel.get(f"here/{rank}", seconds) for rank in range(me.world_size)]
        if waited > seconds:
            raise LostRankError(
                f"{describe_ranks(list(missing))} of {me.world_size} did not come to {me.master_addr}:{me.master_port} within {seconds:g} s "
                "(hardware.start_timeout_minutes). See the logs there: was it started, with the same number of hosts, and "
                "does that host reach this address? `launch/doctor.py`, started the same way, tries it"
            )
        if waited > _NOTICE_SECONDS and not said:
            print(
                f"waiting for {describe_ranks(list(missing))} of {me.world_size} to come", file=sys.stderr, flush=True
            )
            said = True
        time.sleep(0.1)


def _compare(channel: StoreChannel, answers: list[dict[str, Any]], text: str, seconds: float) -> None:
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
            theirs, ours = channel.call(what, [rank], lambda payload: code_hashes(), seconds)[rank], code_hashes()
        elif what == "configuration":
            told = channel.call(what, [rank], lambda payload: text, seconds)[rank]
            theirs, ours = app.plain(told), app.plain(text)
        more = f" ({len(others)} ranks differ)" if len(others) > 1 else ""
        raise UserError(
            f"rank {rank} on {answers[rank]['host']} has another {what.rstrip('s')} than rank 0 on {own['host']}{more}: "
            f"{_difference(what, ours, theirs)}. {_REMEDIES[what]}"
        )


def _difference(what: str, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    if what == "code":
        files = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        return ", ".join(files[:4]) + (f" and {len(files) - 4} more files" if len(files) > 4 else "")
    found = changes.diff_configs(ours, theirs, free=())
    return "; ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")


def _between_hosts(channel: StoreChannel, hosts: list[str], runs: str) -> list[str]:
    """What to note of clocks; raises `UserError` when the folder of runs is not the same one everywhere."""
    leaders = [hosts.index(host) for host in dict.fromkeys(hosts)]
    if len(leaders) == 1:
        return []
    with token_file(existing_part(runs)) as payload:
        read = partial(read_token, runs, _SHARED_FOLDER_SECONDS)
        answers = channel.call("shared folder", payload, read, _ANSWER_SECONDS)
    if text := describe_blind_ranks(answers, hosts, runs):
        raise UserError(f"{text}. {REMEDY[:1].upper()}{REMEDY[1:]}")
    offsets: dict[int, tuple[float, float]] = {}

    def measure(request: Any) -> None:
        offsets.update(clock_offset.measure_offsets(channel, request))

    channel.call("clock skew", clock_offset.ping_request(leaders, len(hosts)), measure, _ANSWER_SECONDS)
    if silent := [rank for rank in leaders if rank and rank not in offsets]:
        return [f"warning: clock skew is not known: no answer of {describe_ranks(silent, hosts)}"]
    largest = clock_offset.largest_offset(offsets, hosts)
    if not largest.exceeds(_MAX_CLOCK_SKEW):
        return []
    return [
        f"warning: clock skew: {largest.ahead} is {largest.seconds:.3f} s ahead of {largest.behind}, "
        f"± {largest.precision:.4f} s; start chronyd or ntpd on all hosts"
    ]
