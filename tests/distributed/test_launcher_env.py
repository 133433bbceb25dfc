"""The variables of every launcher give the same rank information."""

import os
import socket
import tempfile

import pytest

from fireflyds.distributed.launcher_env import RankInfo, first_host, free_port, rank_from_environment
from fireflyds.errors import UserError


def test_torchrun_variables_are_used_unchanged() -> None:
    rank_info = rank_from_environment(
        {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "1234"}
    )
    assert (
        rank_info.rank,
        rank_info.local_rank,
        rank_info.world_size,
        rank_info.master_addr,
        rank_info.master_port,
    ) == (
        3,
        1,
        4,
        "host",
        1234,
    )


def test_slurm_tasks_agree_on_address_and_port() -> None:
    variables = {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "91", "SLURM_STEP_ID": "2"}
    rank_infos = [
        rank_from_environment(variables | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task % 2)})
        for task in range(4)
    ]
    assert [rank_info.rank for rank_info in rank_infos] == [0, 1, 2, 3]
    assert [rank_info.local_rank for rank_info in rank_infos] == [0, 1, 0, 1]
    assert {(rank_info.world_size, rank_info.master_addr, rank_info.master_port) for rank_info in rank_infos} == {
        (4, "gpu07", rank_infos[0].master_port)
    }
    assert (
        rank_from_environment(variables | {"SLURM_PROCID": "0", "SLURM_STEP_ID": "3"}).master_port
        != rank_infos[0].master_port
    )


def test_plain_python_is_one_process_even_inside_an_allocation() -> None:
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_ID": str(0xFFFFFFFB)}
    for environment in ({}, batch_script):
        rank_info = rank_from_environment(environment)
        assert (rank_info.rank, rank_info.world_size, rank_info.master_addr) == (0, 1, "127.0.0.1")
        assert rank_info.master_port > 1023


def test_deepspeed_on_one_node_replaces_the_default_port(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    variables = {
        "WORLD_SIZE": "2",
        "CROSS_SIZE": "1",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    ports = {
        rank_from_environment(variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}).master_port for rank in range(2)
    }
    assert len(ports) == 1
    assert ports != {29500}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [("gpu[03-05,9],x1", "gpu03"), ("a1,a2", "a1"), ("solo", "solo"), ("n[7]", "n7"), ("a,b[1-2]", "a")],
)
def test_first_host_of_a_node_list(nodes: str, expected: str) -> None:
    assert first_host(nodes) == expected


def test_free_ports_are_distinct() -> None:
    assert free_port() != free_port()


OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "5",
    "MV2_COMM_WORLD_SIZE": "8",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}


@pytest.mark.parametrize("variables", [OPEN_MPI, MVAPICH, MPICH])
def test_mpi_over_hosts_needs_the_address_of_rank_zero(variables: dict[str, str]) -> None:
    rank_info = rank_from_environment(variables | {"MASTER_ADDR": "north"})
    assert rank_info == RankInfo(5, 1, 8, "north", 29500)
    assert rank_from_environment(variables | {"MASTER_ADDR": "north", "MASTER_PORT": "777"}).master_port == 777
    with pytest.raises(UserError, match="=8 ranks are on several hosts.* Start with mpirun -x MASTER_ADDR="):
        rank_from_environment(variables)


@pytest.mark.parametrize("variables", [OPEN_MPI, MVAPICH, MPICH])
def test_mpi_on_one_host_needs_no_address(variables: dict[str, str], tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    rank_key, size_key, local_rank_key, local_size_key = variables
    rank_infos = [
        rank_from_environment({rank_key: str(rank), size_key: "2", local_rank_key: str(rank), local_size_key: "2"})
        for rank in (0, 1)
    ]
    assert [
        (rank_info.rank, rank_info.local_rank, rank_info.world_size, rank_info.master_addr) for rank_info in rank_infos
    ] == [
        (0, 0, 2, "127.0.0.1"),
        (1, 1, 2, "127.0.0.1"),
    ]
    assert rank_infos[0].master_port == rank_infos[1].master_port


def test_mpirun_variables_take_precedence_over_the_slurm_step_that_started_it() -> None:
    slurm_variables = {
        "SLURM_PROCID": "1",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_ID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": "gpu7",
    }
    assert rank_from_environment(slurm_variables | OPEN_MPI | {"MASTER_ADDR": "north"}).rank == 5
    assert rank_from_environment(slurm_variables | {"PMI_RANK": "1", "PMI_SIZE": "2"}).master_addr == "gpu7"
    # One of mpirun's ranks always equals the number of Slurm's task.
    rank_info = rank_from_environment(slurm_variables | MPICH | {"PMI_RANK": "1", "MASTER_ADDR": "north"})
    assert (rank_info.rank, rank_info.world_size, rank_info.master_addr) == (1, 8, "north")


def test_a_variable_that_is_not_a_number_is_named() -> None:
    with pytest.raises(UserError, match=r"LOCAL_RANK='x': is no number\."):
        rank_from_environment({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"})
    with pytest.raises(UserError, match=r"SLURM_NTASKS: is not set\."):
        rank_from_environment({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0"})


def test_a_requeued_job_takes_another_port() -> None:
    slurm_variables = {
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "n1",
        "SLURM_JOB_ID": "91",
    }
    ports = [
        rank_from_environment(slurm_variables | {"SLURM_RESTART_COUNT": str(count)}).master_port for count in range(4)
    ]
    assert len(set(ports)) == 4
    assert ports[0] == rank_from_environment(slurm_variables).master_port
    assert all(20_000 <= port < 40_000 for port in ports)


def test_scontrol_gives_the_address_of_a_node_whose_name_does_not_resolve(tmp_path, monkeypatch) -> None:
    def fail_to_resolve(*ignored):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail_to_resolve)
    slurm_variables = {
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "gpu[7-8]",
    }
    monkeypatch.setenv("PATH", str(tmp_path))
    assert rank_from_environment(slurm_variables).master_addr == "gpu7"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "NodeName=$3 Arch=x86_64"\necho "   NodeAddr=10.1.2.3 NodeHostName=$3"\n')
    scontrol.chmod(0o755)
    assert rank_from_environment(slurm_variables).master_addr == "10.1.2.3"


def test_open_mpis_local_rank_follows_the_device_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed asserts that the two are equal; a wrapper that shows each rank its own GPU makes local rank 3 take GPU
    0."""
    monkeypatch.setattr(os, "environ", {"OMPI_COMM_WORLD_LOCAL_RANK": "3"})
    RankInfo(3, 0, 8, "127.0.0.1", 29500).export()
    assert os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == os.environ["LOCAL_RANK"] == "0"
    monkeypatch.setattr(os, "environ", {})
    RankInfo(3, 3, 8, "127.0.0.1", 29500).export()
    assert "OMPI_COMM_WORLD_LOCAL_RANK" not in os.environ
