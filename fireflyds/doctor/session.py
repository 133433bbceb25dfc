"""The examination over all ranks: rank 0 asks and judges, the others answer. One process alone is the same with n = 1."""

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any

from fireflyds.config import DoctorConfig
from fireflyds.distributed import clock_offset, shared_folder
from fireflyds.distributed.host_identity import boot_id, distinct_host_names, local_world_size
from fireflyds.distributed.launcher_env import RankInfo
from fireflyds.distributed.rendezvous import StoreChannel, UnresponsiveRanksError
from fireflyds.distributed.timeouts import run_with_timeout
from fireflyds.doctor import clocks, gpus, inputs, links, machine, versions
from fireflyds.doctor.check import Check, failed, on_host, passed, warning
from fireflyds.doctor.hosts import check_hosts, check_terminated, check_unresponsive
from fireflyds.doctor.signal_guards import TerminatedError
from fireflyds.errors import UserError

# Of deepspeed, and of torchrun over several hosts.
LAUNCHERS_PORT = 29500
# Timeouts that a host's look may take: its disk one, its files another, and what does not wait for drives.
_LOOKS = 3
# Seconds for taking away a file that nobody needs any more.
_CLEAN_UP = 5.0


def examine(me: RankInfo, config: DoctorConfig) -> tuple[list[Check], list[str]] | None:
    """The findings and the hosts, on rank 0; None elsewhere.

    Raises:
        UserError: on another rank: rank 0 is not to be found. On rank 0: its port is taken.
    """
    if me.world_size == 1:
        host = socket.gethostname()
        alone = passed("ranks", "one process; deepspeed --num_gpus N, torchrun or srun try what lies between ranks")
        return [*on_host(host, inspect_host(config, 1, 1, len(os.sched_getaffinity(0)))), alone, check_port()], [host]
    channel = StoreChannel(me, config.timeout)
    with contextlib.ExitStack() as stack:
        parts = _handlers(channel, config, stack)
        if me.rank:
            # Rank 0 looks itself, at a disk and a set of files among others, and then waits for the others' looks.
            channel.serve(parts, (3 + _LOOKS) * config.timeout)
            return None
        report = ReportBuilder(channel, config, parts)
        try:
            _run(report, me, config)
        except TerminatedError:
            report.checks.append(check_terminated())
    return report.checks, list(dict.fromkeys(report.hosts)) or [socket.gethostname()]


def _run(report: "ReportBuilder", me: RankInfo, config: DoctorConfig) -> None:
    try:
        report.run()
    except UnresponsiveRanksError as silent:
        if not report.checks:
            local = local_world_size() or 1
            report.checks = on_host(
                socket.gethostname(), inspect_host(config, local, max(1, me.world_size // local), None)
            )
        report.checks.append(check_unresponsive(silent, me, report.hosts, config.timeout))
    report.channel.end()


def inspect_host(config: DoctorConfig, ranks_here: int, num_hosts: int, cores: int | None) -> list[Check]:
    """What one process of a host can say of it. `cores` are those that its ranks may use together, if known."""
    found = gpus.look()
    return [
        *versions.check_all(),
        *gpus.check_all(ranks_here),
        *machine.check_all(config, ranks_here, num_hosts, len(found), cores),
        *inputs.check_all(config),
    ]


def _handlers(
    channel: StoreChannel, config: DoctorConfig, stack: contextlib.ExitStack
) -> dict[str, Callable[[Any], Any]]:
    """What a rank does when a step is called."""
    me = channel.me

    def here(payload: Any) -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "machine": boot_id(),
            "cores": sorted(os.sched_getaffinity(0)),
            "gpus": gpus.names(),
            "versions": versions.installed(versions.own_requirements()),
        }

    def look_here(payload: Any) -> list[dict[str, Any]]:
        if me.rank not in payload["leaders"]:
            return []
        place, num_hosts = payload["leaders"].index(me.rank), len(payload["leaders"])
        found = inspect_host(config, payload["ranks"][place], num_hosts, payload["cores"][place])
        return [check.to_dict() for check in found]

    def open_door(payload: Any) -> list[Any] | None:
        if me.rank not in payload["leaders"]:
            return None
        address, listens_on = links.announced_address(me, config.timeout)
        door = stack.enter_context(links.listening_socket(listens_on))
        return [address, door.getsockname()[1]]

    return {
        "here": here,
        "look": look_here,
        "clock skew": lambda payload: clock_offset.answer_pings(channel, payload) if me.rank else None,
        "open ports": open_door,
        "ports": lambda payload: links.connect_to([tuple(each) for each in payload.get(str(me.rank), [])]),
        "shared folder": lambda payload: shared_folder.read_token(config.runs, config.shared_timeout, payload),
        "all-reduce": lambda payload: links.all_reduce(channel, config),
    }


class ReportBuilder:
    """Rank 0's side: findings as they come in, so that what is known is told even when somebody falls silent."""

    def __init__(self, channel: StoreChannel, config: DoctorConfig, parts: dict[str, Callable[[Any], Any]]) -> None:
        self.channel, self.config, self._parts = channel, config, parts
        self.checks: list[Check] = []
        self.hosts: list[str] = []
        """By rank."""
        self._leaders: list[int] = []

    def run(self) -> None:
        """Raises `SilentError` as soon as a rank does not answer."""
        here = self._here()
        self.hosts = distinct_host_names([answer["host"] for answer in here], [answer["machine"] for answer in here])
        self._leaders = [self.hosts.index(host) for host in dict.fromkeys(self.hosts)]
        self._look([set(answer["cores"]) for answer in here])
        self.checks.append(check_hosts(self.hosts, self.channel.me.master_addr))
        if len(self._leaders) > 1:
            self.checks.append(
                versions.check_same({self.hosts[rank]: here[rank]["versions"] for rank in self._leaders})
            )
            self.checks.append(gpus.check_same([answer["gpus"] for answer in here], self.hosts))
        self._ports()
        self._clocks()
        self._shared_folder()
        try:
            answers = self._call("all-reduce")
        except UnresponsiveRanksError as silent:
            nothing = {"error": ""}
            answers = [silent.answers.get(rank, nothing) for rank in range(len(self.hosts))]
        joined = [self.channel.has(f"joined/{rank}") for rank in range(len(answers))]
        self.checks.append(links.check_all_reduce(answers, self.hosts, joined, self.config))

    def _here(self) -> list[dict[str, Any]]:
        answers = self._call("here")
        if failed := [rank for rank, answer in enumerate(answers) if "error" in answer]:
            raise UserError(f"rank {failed[0]}: {answers[failed[0]]['error']}. See the log of that rank")
        return answers

    def _call(self, step: str, payload: Any = None, times: int = 1) -> list[Any]:
        return self.channel.call(step, payload, self._parts[step], times * self.config.timeout)

    def _look(self, cores: list[set[int]]) -> None:
        """`cores` that each rank may use."""
        counts = [self.hosts.count(self.hosts[rank]) for rank in self._leaders]
        # Schedulers bind each rank to cores of its own.
        allowed = [
            len(set[int]().union(*(cores[rank] for rank, host in enumerate(self.hosts) if host == self.hosts[leader])))
            for leader in self._leaders
        ]
        answers = self._call("look", {"leaders": self._leaders, "ranks": counts, "cores": allowed}, _LOOKS)
        for rank in self._leaders:
            host, answer = self.hosts[rank], answers[rank]
            if isinstance(answer, dict):
                self.checks += on_host(
                    host, [failed("host", f"cannot be examined: {answer['error']}", "see the log of that rank")]
                )
            else:
                self.checks += on_host(host, map(Check.from_dict, answer))

    def _ports(self) -> None:
        """Every host tries the next one's door and rank 0's."""
        answers, leaders = self._call("open ports", {"leaders": self._leaders}), self._leaders
        doors = {}
        for rank in leaders:
            if isinstance(answers[rank], dict):
                fault = f"{self.hosts[rank]} cannot listen: {answers[rank]['error']}"
                remedy = "MASTER_ADDR must be an address of rank 0's host that all hosts route to"
                self.checks.append(failed("ports", fault, remedy))
                return
            doors[rank] = (self.hosts[rank], *answers[rank])
        tries = {}
        for place, rank in enumerate(leaders):
            tries[str(rank)] = [doors[to] for to in dict.fromkeys((leaders[(place + 1) % len(leaders)], leaders[0]))]
        answers = self._call("ports", tries)
        self.checks.append(links.check_ports({self.hosts[rank]: _list(answers[rank]) for rank in leaders}))

    def _clocks(self) -> None:
        payload = clock_offset.ping_request(self._leaders, len(self.hosts))
        found: dict[int, tuple[float, float]] = {}

        def ask(payload: Any) -> None:
            found.update(clock_offset.measure_offsets(self.channel, payload))

        self.channel.call("clock skew", payload, ask, self.config.timeout)
        self.checks.append(clocks.check_clocks(found, payload["leaders"], self.hosts, self.config.max_clock_skew))

    def _shared_folder(self) -> None:
        """Each touch of the folder may hang, the taking away of the file too."""
        runs, timeout, stack = self.config.runs, self.config.timeout, contextlib.ExitStack()
        try:
            payload = run_with_timeout(
                timeout, lambda: stack.enter_context(shared_folder.token_file(shared_folder.existing_part(runs)))
            )
        except OSError as error:  # a TimeoutError is one
            found = f"runs={runs}: rank 0 cannot write there ({error.strerror or error}), so the others were not asked"
            self.checks.append(failed("shared folder", found, f"see `disk` of {self.hosts[0]}"))
            return
        try:
            answers = self._call("shared folder", payload)
        finally:
            with contextlib.suppress(OSError):
                run_with_timeout(min(timeout, _CLEAN_UP), stack.close)
        self.checks.append(links.check_shared_folder(answers, self.hosts, runs))


def _list(answer: Any) -> list[str]:
    return [answer["error"]] if isinstance(answer, dict) else answer


def check_port(master_port: int = LAUNCHERS_PORT) -> Check:
    """Of a machine alone: a port can be opened and reached, and the one that launchers take is free."""
    with contextlib.suppress(OSError), links.listening_socket("127.0.0.1") as door:
        if closed := links.connect_to([("this host", "127.0.0.1", door.getsockname()[1])]):
            return failed("ports", f"cannot be reached: {closed[0]}", "let the firewall pass the loopback interface")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", master_port))
    except OSError as error:
        remedy = (
            "another job runs here: give deepspeed --master_port or torchrun --rdzv-endpoint another for several hosts"
        )
        return warning("ports", f"{master_port}, which launchers take, cannot be had: {error.strerror}", remedy)
    return passed("ports", f"free ones can be opened and reached; {master_port}, which launchers take, is free")
