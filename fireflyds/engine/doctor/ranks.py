"""The examination over all ranks: rank 0 asks and judges, the others answer. One process alone is the same with n = 1."""

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any

from fireflyds.config import DoctorConfig
from fireflyds.engine.doctor import gpus, inputs, links, machine, versions
from fireflyds.engine.doctor.check import Check, at, green, red, yellow
from fireflyds.engine.doctor.meeting import Meeting, SilentError
from fireflyds.engine.doctor.patience import within
from fireflyds.engine.ranks import Ranks

# Of deepspeed, and of torchrun over several hosts.
LAUNCHERS_PORT = 29500


def examine(me: Ranks, config: DoctorConfig) -> tuple[list[Check], list[str]] | None:
    """The findings and the hosts, on rank 0; None elsewhere.

    Raises:
        UserError: on another rank: rank 0 is not to be found. On rank 0: its port is taken.
    """
    if me.world_size == 1:
        host = socket.gethostname()
        alone = green("ranks", "one process; deepspeed --num_gpus N, torchrun or srun try what lies between ranks")
        return [*at(host, look(config, 1, 1)), alone, check_port()], [host]
    meeting = Meeting(me, config.timeout)
    with contextlib.ExitStack() as stack:
        parts = _parts(meeting, config, stack)
        if me.rank:
            # A look is a disk and a set of files; rank 0 may then wait for others as long again.
            meeting.serve(parts, 4 * config.timeout)
            return None
        report = Report(meeting, config, parts)
        try:
            report.run()
        except SilentError as silent:
            if not report.checks:
                local = _local_size() or 1
                report.checks = at(socket.gethostname(), look(config, local, max(1, me.world_size // local)))
            report.checks.append(check_silent(silent, me, report.hosts, config.timeout))
        meeting.end()
    return report.checks, list(dict.fromkeys(report.hosts)) or [socket.gethostname()]


def look(config: DoctorConfig, ranks_here: int, num_hosts: int) -> list[Check]:
    """What one process of a host can say of it."""
    found = gpus.look()
    return [
        *versions.check_all(),
        *gpus.check_all(ranks_here),
        *machine.check_all(config, ranks_here, num_hosts, len(found)),
        *inputs.check_all(config),
    ]


def _parts(meeting: Meeting, config: DoctorConfig, stack: contextlib.ExitStack) -> dict[str, Callable[[Any], Any]]:
    """What a rank does when a step is called."""
    me = meeting.me

    def here(payload: Any) -> dict[str, Any]:
        return {"host": socket.gethostname(), "versions": versions.installed(versions.own_requirements())}

    def look_here(payload: Any) -> list[dict[str, Any]]:
        if me.rank not in payload["leaders"]:
            return []
        ranks_here, num_hosts = payload["ranks"][payload["leaders"].index(me.rank)], len(payload["leaders"])
        return [check.to_dict() for check in look(config, ranks_here, num_hosts)]

    def open_door(payload: Any) -> list[Any] | None:
        if me.rank not in payload["leaders"]:
            return None
        address = own_address(me.master_addr, me.master_port)
        door = stack.enter_context(links.listening(address))
        return [address, door.getsockname()[1]]

    return {
        "here": here,
        "look": look_here,
        "clock skew": lambda payload: links.answer_pings(meeting, payload) if me.rank else None,
        "open ports": open_door,
        "ports": lambda payload: links.try_doors([tuple(each) for each in payload.get(str(me.rank), [])]),
        "shared folder": lambda payload: links.read_token(config, payload),
        "all-reduce": lambda payload: links.all_reduce(meeting, config),
    }


class Report:
    """Rank 0's side: findings as they come in, so that what is known is told even when somebody falls silent."""

    def __init__(self, meeting: Meeting, config: DoctorConfig, parts: dict[str, Callable[[Any], Any]]) -> None:
        self.meeting, self.config, self._parts = meeting, config, parts
        self.checks: list[Check] = []
        self.hosts: list[str] = []
        """By rank."""
        self._leaders: list[int] = []

    def run(self) -> None:
        """Raises `SilentError` as soon as a rank does not answer."""
        here = self._call("here")
        self.hosts = [answer["host"] for answer in here]
        self._leaders = [self.hosts.index(host) for host in dict.fromkeys(self.hosts)]
        self._look()
        self.checks.append(check_hosts(self.hosts, self.meeting.me.master_addr))
        if len(self._leaders) > 1:
            self.checks.append(
                versions.check_same({self.hosts[rank]: here[rank]["versions"] for rank in self._leaders})
            )
        self._ports()
        self._clocks()
        self._shared_folder()
        try:
            answers = self._call("all-reduce")
        except SilentError as silent:
            nothing = {"error": ""}
            answers = [silent.answers.get(rank, nothing) for rank in range(len(self.hosts))]
        joined = [self.meeting.told(f"joined/{rank}") for rank in range(len(answers))]
        self.checks.append(links.check_all_reduce(answers, self.hosts, joined, self.config))

    def _call(self, step: str, payload: Any = None) -> list[Any]:
        return self.meeting.call(step, payload, self._parts[step], self.config.timeout)

    def _look(self) -> None:
        counts = [self.hosts.count(self.hosts[rank]) for rank in self._leaders]
        answers = self._call("look", {"leaders": self._leaders, "ranks": counts})
        for rank in self._leaders:
            host, answer = self.hosts[rank], answers[rank]
            if isinstance(answer, dict):
                self.checks += at(
                    host, [red("host", f"cannot be examined: {answer['error']}", "see the log of that rank")]
                )
            else:
                self.checks += at(host, map(Check.from_dict, answer))

    def _ports(self) -> None:
        """Every host tries the next one's door and rank 0's."""
        answers, leaders = self._call("open ports", {"leaders": self._leaders}), self._leaders
        doors = {}
        for rank in leaders:
            if isinstance(answers[rank], dict):
                fault = f"{self.hosts[rank]} cannot listen: {answers[rank]['error']}"
                remedy = "MASTER_ADDR must be an address of rank 0's host that all hosts route to"
                self.checks.append(red("ports", fault, remedy))
                return
            doors[rank] = (self.hosts[rank], *answers[rank])
        tries = {}
        for place, rank in enumerate(leaders):
            tries[str(rank)] = [doors[to] for to in dict.fromkeys((leaders[(place + 1) % len(leaders)], leaders[0]))]
        answers = self._call("ports", tries)
        self.checks.append(links.check_ports({self.hosts[rank]: _list(answers[rank]) for rank in leaders}))

    def _clocks(self) -> None:
        payload = links.clock_payload(self._leaders, len(self.hosts))
        found: dict[int, tuple[float, float]] = {}

        def ask(payload: Any) -> None:
            found.update(links.ask_clocks(self.meeting, payload))

        self.meeting.call("clock skew", payload, ask, self.config.timeout)
        if found:
            self.checks.append(links.check_clocks(found, self.hosts, self.config.max_clock_skew))

    def _shared_folder(self) -> None:
        place = machine.place_of(self.config.runs)
        try:
            with contextlib.ExitStack() as stack:
                payload = within(self.config.timeout, lambda: stack.enter_context(links.token_file(place)))
                answers = self._call("shared folder", payload)
        except (OSError, TimeoutError):
            # `disk` of rank 0's host has said it, with the remedy.
            return
        self.checks.append(links.check_shared_folder(answers, self.hosts, self.config.runs))


def _list(answer: Any) -> list[str]:
    return [answer["error"]] if isinstance(answer, dict) else answer


def check_hosts(hosts: list[str], master_addr: str) -> Check:
    """`hosts` by rank."""
    counts = {host: hosts.count(host) for host in dict.fromkeys(hosts)}
    about = f"{len(hosts)} ranks on {len(counts)} host{'s' * (len(counts) > 1)}: "
    about += ", ".join(f"{host} ({count})" for host, count in list(counts.items())[:8])
    about += f" and {len(counts) - 8} more" * (len(counts) > 8)
    if len(counts) > 1 and len(set(counts.values())) > 1:
        return yellow("hosts", about, "unless meant so, start as many on every host (--ntasks-per-node, slots=)")
    if len(counts) > 1:
        try:
            own = socket.gethostbyname(hosts[0])
        except OSError:
            remedy = f"enter {hosts[0]} in DNS or /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
            return yellow("hosts", f"{about}; the name {hosts[0]} has no address", remedy)
        if own.startswith("127.") and "GLOO_SOCKET_IFNAME" not in os.environ:
            remedy = (
                "give it its own address in /etc/hosts, or set GLOO_SOCKET_IFNAME: gloo offers the others this address"
            )
            return yellow("hosts", f"{about}; {hosts[0]} is {own} to itself", remedy)
    return green("hosts", f"{about}; MASTER_ADDR is {master_addr}")


def check_silent(silent: SilentError, me: Ranks, hosts: list[str], timeout: float) -> Check:
    """Names the ranks, with their hosts where they have said those, else with the number of their node."""
    local = _local_size()
    named = []
    for rank in silent.ranks[:8]:
        where = f" on {hosts[rank]}" if hosts else f" (node {rank // local})" if local else ""
        named.append(f"rank {rank}{where}")
    more = f" and {len(silent.ranks) - 8} more" if len(silent.ranks) > 8 else ""
    step = "come" if silent.step == "here" else f"answered to `{silent.step}`"
    remedy = (
        f"see their logs: were they started, does their host reach MASTER_ADDR={me.master_addr} port {me.master_port}, do "
        "they hang (py-spy dump)? Where starting takes long, give a longer timeout="
    )
    found = f"{', '.join(named)}{more} of {me.world_size}: not {step} within {timeout:g} s; what follows was not tried"
    return red("ranks", found, remedy)


def _local_size() -> int:
    """Ranks of a host as the launcher says; 0 where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "0")))


def check_port(master_port: int = LAUNCHERS_PORT) -> Check:
    """Of a machine alone: a port can be opened and reached, and the one that launchers take is free."""
    with contextlib.suppress(OSError), links.listening("127.0.0.1") as door:
        if closed := links.try_doors([("this host", "127.0.0.1", door.getsockname()[1])]):
            return red("ports", f"cannot be reached: {closed[0]}", "let the firewall pass the loopback interface")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", master_port))
    except OSError as error:
        remedy = (
            "another job runs here: give deepspeed --master_port or torchrun --rdzv-endpoint another for several hosts"
        )
        return yellow("ports", f"{master_port}, which launchers take, cannot be had: {error.strerror}", remedy)
    return green("ports", f"free ones can be opened and reached; {master_port}, which launchers take, is free")


def own_address(master_addr: str, master_port: int) -> str:
    """This host's address on the way to rank 0's."""
    family = socket.getaddrinfo(master_addr, master_port, type=socket.SOCK_DGRAM)[0]
    # Nothing is sent: connecting a datagram socket only chooses the way.
    with socket.socket(family[0], socket.SOCK_DGRAM) as probe:
        probe.connect(family[4])
        return str(probe.getsockname()[0])
