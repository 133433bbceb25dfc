"""Runs the checks over all ranks: rank 0 sends requests and evaluates the answers of the others."""

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any

from fireflyds.config import DoctorConfig
from fireflyds.distributed import clock_offset, shared_folder
from fireflyds.distributed.host_identity import boot_id, distinct_host_names, local_world_size
from fireflyds.distributed.launcher_env import LAUNCHER_PORT, RankInfo
from fireflyds.distributed.rendezvous import StoreChannel, UnresponsiveRanksError
from fireflyds.distributed.timeouts import run_with_timeout
from fireflyds.doctor import clocks, gpus, input_files, links, machine, versions
from fireflyds.doctor.check import Check, failed, on_host, passed, warning
from fireflyds.doctor.hosts import check_hosts, check_terminated, check_unresponsive
from fireflyds.doctor.signal_guards import TerminatedError
from fireflyds.errors import UserError

# Timeouts that the inspection of a host may take: one for its disk, one for its input files, one for the rest.
_INSPECTION_TIMEOUTS = 3
# Timeout in seconds for removing the token file.
_CLEAN_UP_SECONDS = 5.0


def examine(me: RankInfo, config: DoctorConfig) -> tuple[list[Check], list[str]] | None:
    """Runs all checks. Returns the checks and the host names on rank 0, None on other ranks.

    Raises:
        UserError: rank 0 cannot be reached (on other ranks), or its port is in use (on rank 0).
    """
    if me.world_size == 1:
        host = socket.gethostname()
        ranks_check = passed(
            "ranks", "one process; deepspeed --num_gpus N, torchrun or srun also check the links between ranks"
        )
        return [*on_host(host, inspect_host(config, 1, 1, len(os.sched_getaffinity(0)))), ranks_check, check_port()], [
            host
        ]
    channel = StoreChannel(me, config.timeout)
    with contextlib.ExitStack() as stack:
        handlers = _handlers(channel, config, stack)
        if me.rank:
            # Rank 0 first inspects its own host, including disk and input files, then waits for the other hosts.
            channel.serve(handlers, (3 + _INSPECTION_TIMEOUTS) * config.timeout)
            return None
        report = ReportBuilder(channel, config, handlers)
        try:
            _run(report, me, config)
        except TerminatedError:
            report.checks.append(check_terminated())
    return report.checks, list(dict.fromkeys(report.hosts)) or [socket.gethostname()]


def _run(report: "ReportBuilder", me: RankInfo, config: DoctorConfig) -> None:
    try:
        report.run()
    except UnresponsiveRanksError as error:
        if not report.checks:
            local = local_world_size() or 1
            report.checks = on_host(
                socket.gethostname(), inspect_host(config, local, max(1, me.world_size // local), None)
            )
        report.checks.append(check_unresponsive(error, me, report.hosts, config.timeout))
    report.channel.end()


def inspect_host(config: DoctorConfig, ranks_here: int, num_hosts: int, cores: int | None) -> list[Check]:
    """Runs the checks of one host. `cores`: number of cores that its ranks may use together, None if unknown."""
    visible_gpus = gpus.look()
    return [
        *versions.check_all(),
        *gpus.check_all(ranks_here),
        *machine.check_all(config, ranks_here, num_hosts, len(visible_gpus), cores),
        *input_files.check_all(config),
    ]


def _handlers(
    channel: StoreChannel, config: DoctorConfig, stack: contextlib.ExitStack
) -> dict[str, Callable[[Any], Any]]:
    """Handlers of one rank by name of the step that rank 0 calls."""
    me = channel.me

    def identify(payload: Any) -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "machine": boot_id(),
            "cores": sorted(os.sched_getaffinity(0)),
            "gpus": gpus.names(),
            "versions": versions.installed(versions.own_requirements()),
        }

    def inspect_leader(payload: Any) -> list[dict[str, Any]]:
        if me.rank not in payload["leaders"]:
            return []
        index, num_hosts = payload["leaders"].index(me.rank), len(payload["leaders"])
        checks = inspect_host(config, payload["ranks"][index], num_hosts, payload["cores"][index])
        return [check.to_dict() for check in checks]

    def open_port(payload: Any) -> list[Any] | None:
        if me.rank not in payload["leaders"]:
            return None
        address, listens_on = links.announced_address(me, config.timeout)
        listener = stack.enter_context(links.listening_socket(listens_on))
        return [address, listener.getsockname()[1]]

    return {
        "identify": identify,
        "inspect": inspect_leader,
        "clock skew": lambda payload: clock_offset.answer_pings(channel, payload) if me.rank else None,
        "open ports": open_port,
        "ports": lambda payload: links.connect_to([tuple(target) for target in payload.get(str(me.rank), [])]),
        "shared folder": lambda payload: shared_folder.read_token(config.runs, config.shared_timeout, payload),
        "all-reduce": lambda payload: links.all_reduce(channel, config),
    }


class ReportBuilder:
    """Rank 0's side: collects checks one by one, so that a partial report exists when a rank stops answering."""

    def __init__(self, channel: StoreChannel, config: DoctorConfig, parts: dict[str, Callable[[Any], Any]]) -> None:
        self.channel, self.config, self._parts = channel, config, parts
        self.checks: list[Check] = []
        self.hosts: list[str] = []
        """By rank."""
        self._leaders: list[int] = []

    def run(self) -> None:
        """Runs all steps. Raises `UnresponsiveRanksError` as soon as a rank does not answer."""
        identities = self._identify_ranks()
        self.hosts = distinct_host_names(
            [answer["host"] for answer in identities], [answer["machine"] for answer in identities]
        )
        self._leaders = [self.hosts.index(host) for host in dict.fromkeys(self.hosts)]
        self._inspect_hosts([set(answer["cores"]) for answer in identities])
        self.checks.append(check_hosts(self.hosts, self.channel.me.master_addr))
        if len(self._leaders) > 1:
            self.checks.append(
                versions.check_same({self.hosts[rank]: identities[rank]["versions"] for rank in self._leaders})
            )
            self.checks.append(gpus.check_same([answer["gpus"] for answer in identities], self.hosts))
        self._ports()
        self._clocks()
        self._shared_folder()
        try:
            answers = self._call("all-reduce")
        except UnresponsiveRanksError as error:
            no_answer = {"error": ""}
            answers = [error.answers.get(rank, no_answer) for rank in range(len(self.hosts))]
        joined = [self.channel.has(f"joined/{rank}") for rank in range(len(answers))]
        self.checks.append(links.check_all_reduce(answers, self.hosts, joined, self.config))

    def _identify_ranks(self) -> list[dict[str, Any]]:
        answers = self._call("identify")
        if failing := [rank for rank, answer in enumerate(answers) if "error" in answer]:
            raise UserError(f"rank {failing[0]}: {answers[failing[0]]['error']}", remedy="See the log of that rank")
        return answers

    def _call(self, step: str, payload: Any = None, times: int = 1) -> list[Any]:
        return self.channel.call(step, payload, self._parts[step], times * self.config.timeout)

    def _inspect_hosts(self, cores: list[set[int]]) -> None:
        """Inspects each host on its first rank. `cores`: cores that each rank may use, by rank."""
        counts = [self.hosts.count(self.hosts[rank]) for rank in self._leaders]
        # Schedulers may bind each rank to different cores.
        allowed = [
            len(set[int]().union(*(cores[rank] for rank, host in enumerate(self.hosts) if host == self.hosts[leader])))
            for leader in self._leaders
        ]
        answers = self._call(
            "inspect", {"leaders": self._leaders, "ranks": counts, "cores": allowed}, _INSPECTION_TIMEOUTS
        )
        for rank in self._leaders:
            host, answer = self.hosts[rank], answers[rank]
            if isinstance(answer, dict):
                self.checks += on_host(
                    host, [failed("host", f"cannot be examined: {answer['error']}", "see the log of that rank")]
                )
            else:
                self.checks += on_host(host, map(Check.from_dict, answer))

    def _ports(self) -> None:
        """Every host connects to a port of the next host and to one of rank 0's host."""
        answers, leaders = self._call("open ports", {"leaders": self._leaders}), self._leaders
        targets = {}
        for rank in leaders:
            if isinstance(answers[rank], dict):
                fault = f"{self.hosts[rank]} cannot listen: {answers[rank]['error']}"
                remedy = "MASTER_ADDR must be an address of rank 0's host that all hosts route to"
                self.checks.append(failed("ports", fault, remedy))
                return
            targets[rank] = (self.hosts[rank], *answers[rank])
        requests = {}
        for index, rank in enumerate(leaders):
            requests[str(rank)] = [
                targets[target_rank] for target_rank in dict.fromkeys((leaders[(index + 1) % len(leaders)], leaders[0]))
            ]
        answers = self._call("ports", requests)
        self.checks.append(links.check_ports({self.hosts[rank]: _error_or_list(answers[rank]) for rank in leaders}))

    def _clocks(self) -> None:
        payload = clock_offset.ping_request(self._leaders, len(self.hosts))
        offsets: dict[int, tuple[float, float]] = {}

        def measure(payload: Any) -> None:
            offsets.update(clock_offset.measure_offsets(self.channel, payload))

        self.channel.call("clock skew", payload, measure, self.config.timeout)
        self.checks.append(clocks.check_clocks(offsets, payload["leaders"], self.hosts, self.config.max_clock_skew))

    def _shared_folder(self) -> None:
        """Every access of the folder may hang, including the removal of the file, so each has a timeout."""
        runs, timeout, stack = self.config.runs, self.config.timeout, contextlib.ExitStack()
        try:
            payload = run_with_timeout(
                timeout, lambda: stack.enter_context(shared_folder.token_file(shared_folder.existing_part(runs)))
            )
        except OSError as error:  # includes TimeoutError
            message = f"runs={runs}: rank 0 cannot write there ({error.strerror or error}), so the others were skipped"
            self.checks.append(failed("shared folder", message, f"see `disk` of {self.hosts[0]}"))
            return
        try:
            answers = self._call("shared folder", payload)
        finally:
            with contextlib.suppress(OSError):
                run_with_timeout(min(timeout, _CLEAN_UP_SECONDS), stack.close)
        self.checks.append(links.check_shared_folder(answers, self.hosts, runs))


def _error_or_list(answer: Any) -> list[str]:
    return [answer["error"]] if isinstance(answer, dict) else answer


def check_port(master_port: int = LAUNCHER_PORT) -> Check:
    """Checks on a single host that a port can be opened and reached, and that the launchers' default port is free."""
    with contextlib.suppress(OSError), links.listening_socket("127.0.0.1") as listener:
        if failures := links.connect_to([("this host", "127.0.0.1", listener.getsockname()[1])]):
            return failed("ports", f"cannot be reached: {failures[0]}", "allow the loopback interface in the firewall")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", master_port))
    except OSError as error:
        remedy = "another job uses it: change deepspeed --master_port, or torchrun --rdzv-endpoint for several hosts"
        return warning("ports", f"{master_port}, the launchers' default, is not available: {error.strerror}", remedy)
    return passed("ports", f"free ports can be opened and reached; {master_port}, the launchers' default, is free")
