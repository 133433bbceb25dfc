"""Checks before the ranks join: all are present, with the same code, configuration, libraries and `runs` folder.

Otherwise hosts would train with different settings, or block in a collective that does not identify the missing rank.
"""

import hashlib
import os
import socket
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import fireflyds_kernels
import torch

import fireflyds
from fireflyds import app
from fireflyds.config import DoctorConfig, TrainConfig
from fireflyds.distributed import clock_offset, network
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
from fireflyds.runs import config_diff
from fireflyds.runs.provenance import installed_version

_DOCTOR = DoctorConfig()
# Seconds within which a connected rank must answer, and must see a file that rank 0 wrote.
_ANSWER_SECONDS, _SHARED_FOLDER_SECONDS = _DOCTOR.timeout, _DOCTOR.shared_timeout
# Clock offset in seconds above which a warning is logged.
_MAX_CLOCK_SKEW = _DOCTOR.max_clock_skew
# Seconds after which rank 0 prints the ranks that it is waiting for.
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
    """Wait for all ranks and compare them. `text`: the configuration as YAML; `inputs`: hashes of the inputs, by name.

    Returns the channel, which must be kept until the ranks have joined because they use its store (None with one rank),
    and notes for the log.

    Raises:
        UserError: on every connected rank: the ranks that are missing or differ, and the remedy.
    """
    me.export()
    network.set_network_interface(config.hardware.network_interface, os.environ)
    return compare_ranks(me, config, text, inputs) if me.world_size > 1 else (None, [])


def compare_ranks(
    me: RankInfo, config: TrainConfig, text: str, inputs: dict[str, Any]
) -> tuple[StoreChannel, list[str]]:
    """`check_ranks_agree` for more than one rank."""
    seconds = 60 * config.hardware.start_timeout_minutes
    channel = StoreChannel(me, seconds)
    channel.register()
    channel.set(f"here/{me.rank}", rank_fingerprint(me, text, inputs))
    if me.rank:
        _serve(channel, config, text, seconds)
        return channel, []
    failure: UserError | None = None
    notes: list[str] = []
    try:
        answers = _wait_for_all(channel, seconds)
        _compare(channel, answers, text, _ANSWER_SECONDS)
        hosts = distinct_host_names([answer["host"] for answer in answers], [answer["machine"] for answer in answers])
        notes = _compare_hosts(channel, hosts, config.runs)
    except UserError as error:
        failure = error
    except UnresponsiveRanksError as unresponsive:
        failure = LostRankError(
            f"{describe_ranks(unresponsive.ranks)} connected, but did not answer to `{unresponsive.step}` within "
            f"{_ANSWER_SECONDS:g} s",
            remedy="See the logs there",
        )
    except OSError as error:
        failure = UserError(
            f"cannot be written ({error.strerror})", key="runs", value=config.runs, remedy="Give another runs="
        )
    # Also if ranks are missing: the connected ones must end with the same message.
    channel.end(failure and failure.as_dict())
    if failure:
        raise failure
    return channel, notes


def _serve(channel: StoreChannel, config: TrainConfig, text: str, seconds: float) -> None:
    handlers: dict[str, Handler] = {
        "code": lambda payload: code_hashes() if channel.me.rank in payload else None,
        "configuration": lambda payload: text if channel.me.rank in payload else None,
        "clock skew": lambda payload: clock_offset.answer_pings(channel, payload),
        "shared folder": lambda payload: read_token(config.runs, _SHARED_FOLDER_SECONDS, payload),
    }
    # Rank 0 may have started later than this rank, and waits for up to `seconds` itself.
    if failure := channel.serve(handlers, 2 * seconds + _ANSWER_SECONDS):
        raise UserError.from_dict(failure)


def rank_fingerprint(me: RankInfo, text: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """The values that must be equal on every rank, and the host of this one."""
    files = "\n".join(f"{name} {digest}" for name, digest in sorted(code_hashes().items()))
    return {
        "host": socket.gethostname(),
        "machine": boot_id(),
        "inputs": inputs,
        "world_size": me.world_size,
        "code": _hash(files.encode()),
        "configuration": _hash(text.encode()),
        "versions": {name: installed_version(name) for name in _LIBRARIES} | {"CUDA": str(torch.version.cuda)},
    }


def code_hashes() -> dict[str, str]:
    """By path: the hash of every Python file of the packages and of the launched script's folder."""
    script_folder = Path(sys.argv[0]).resolve().parent
    folders = {"fireflyds": fireflyds.__path__[0], "fireflyds_kernels": fireflyds_kernels.__path__[0]}
    hashes = {
        f"{name}/{file.relative_to(folder)}": _hash(file.read_bytes())
        for name, folder in folders.items()
        for file in Path(folder).rglob("*.py")
    }
    return hashes | {
        f"{script_folder.name}/{file.name}": _hash(file.read_bytes()) for file in script_folder.glob("*.py")
    }


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _wait_for_all(channel: StoreChannel, seconds: float) -> list[dict[str, Any]]:
    """The fingerprints of all ranks, by rank, once all have connected."""
    me, started, notice_printed = channel.me, time.monotonic(), False
    missing = set(range(me.world_size))
    while True:
        missing -= {rank for rank in missing if channel.has(f"here/{rank}")}
        waited = time.monotonic() - started
        if not missing:
            return [channel.get(f"here/{rank}", seconds) for rank in range(me.world_size)]
        if waited > seconds:
            raise LostRankError(
                f"{describe_ranks(list(missing))} of {me.world_size} did not connect to "
                f"{me.master_addr}:{me.master_port} within {seconds:g} s (hardware.start_timeout_minutes)",
                remedy="See the logs there: was it started, with the same number of hosts, and can that host reach "
                "this address? `launch/doctor.py`, started the same way, tests the connection",
            )
        if waited > _NOTICE_SECONDS and not notice_printed:
            print(
                f"waiting for {describe_ranks(list(missing))} of {me.world_size} to connect",
                file=sys.stderr,
                flush=True,
            )
            notice_printed = True
        time.sleep(0.1)


def _compare(channel: StoreChannel, answers: list[dict[str, Any]], text: str, seconds: float) -> None:
    """Raises `UserError` with the rank, its host and the differences from rank 0."""
    reference = answers[0]
    for rank, answer in enumerate(answers):
        if answer["world_size"] != reference["world_size"]:
            raise UserError(
                f"rank {rank} on {answer['host']} was started with {answer['world_size']} ranks, rank 0 on "
                f"{reference['host']} with {reference['world_size']}",
                remedy="Give the same number of hosts and ranks everywhere",
            )
    for key in ("code", "configuration", "versions", "inputs"):
        different_ranks = [rank for rank, answer in enumerate(answers) if answer[key] != reference[key]]
        if not different_ranks:
            continue
        rank, theirs, ours = different_ranks[0], answers[different_ranks[0]][key], reference[key]
        if key == "code":
            theirs, ours = channel.call(key, [rank], lambda payload: code_hashes(), seconds)[rank], code_hashes()
        elif key == "configuration":
            their_text = channel.call(key, [rank], lambda payload: text, seconds)[rank]
            theirs, ours = app.plain(their_text), app.plain(text)
        note = f" ({len(different_ranks)} ranks differ)" if len(different_ranks) > 1 else ""
        raise UserError(
            f"rank {rank} on {answers[rank]['host']} has another {key.rstrip('s')} than rank 0 on "
            f"{reference['host']}{note}: {_difference(key, ours, theirs)}",
            remedy=_REMEDIES[key],
        )


def _difference(key: str, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    if key == "code":
        files = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        return ", ".join(files[:4]) + (f" and {len(files) - 4} more files" if len(files) > 4 else "")
    differences = config_diff.diff_configs(ours, theirs, free=())
    return "; ".join(differences[:4]) + (f" and {len(differences) - 4} more" if len(differences) > 4 else "")


def _compare_hosts(channel: StoreChannel, hosts: list[str], runs: str) -> list[str]:
    """Returns warnings about the clocks of the hosts; raises `UserError` if they do not share the `runs` folder."""
    leaders = [hosts.index(host) for host in dict.fromkeys(hosts)]
    if len(leaders) == 1:
        return []
    with token_file(existing_part(runs)) as payload:
        reader = partial(read_token, runs, _SHARED_FOLDER_SECONDS)
        answers = channel.call("shared folder", payload, reader, _ANSWER_SECONDS)
    if text := describe_blind_ranks(answers, hosts, runs):
        raise UserError(text, remedy=f"{REMEDY[:1].upper()}{REMEDY[1:]}")
    offsets: dict[int, tuple[float, float]] = {}

    def measure(request: Any) -> None:
        offsets.update(clock_offset.measure_offsets(channel, request))

    channel.call("clock skew", clock_offset.ping_request(leaders, len(hosts)), measure, _ANSWER_SECONDS)
    if unresponsive := [rank for rank in leaders if rank and rank not in offsets]:
        ranks = describe_ranks(unresponsive, hosts)
        return [f"warning: clock skew is unknown: no answer from {ranks}; see the log of that rank"]
    largest = clock_offset.largest_offset(offsets, hosts)
    if not largest.exceeds(_MAX_CLOCK_SKEW):
        return []
    refused = "; Slurm refuses such a host's credentials" * (largest.seconds > clock_offset.MUNGE_SECONDS)
    return [
        f"warning: clock skew: {largest.ahead} is {largest.seconds:.3f} s ahead of {largest.behind}, ± "
        f"{largest.precision:.4f} s; start chronyd or ntpd on all hosts{refused}"
    ]
