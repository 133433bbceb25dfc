"""Every launcher's variables give the same answer."""

import pytest

from fireflyds.engine.ranks import discover, first_host, free_port


def test_torchrun_variables_are_taken_as_they_are() -> None:
    found = discover({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "1234"})
    assert (found.rank, found.local_rank, found.world_size, found.master_addr, found.master_port) == (
        3,
        1,
        4,
        "host",
        1234,
    )


def test_slurm_tasks_agree_on_address_and_port() -> None:
    shared = {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "91", "SLURM_STEP_ID": "2"}
    found = [discover(shared | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task % 2)}) for task in range(4)]
    assert [place.rank for place in found] == [0, 1, 2, 3]
    assert [place.local_rank for place in found] == [0, 1, 0, 1]
    assert {(place.world_size, place.master_addr, place.master_port) for place in found} == {
        (4, "gpu07", found[0].master_port)
    }
    assert discover(shared | {"SLURM_PROCID": "0", "SLURM_STEP_ID": "3"}).master_port != found[0].master_port


def test_plain_python_is_one_process_even_inside_an_allocation() -> None:
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_ID": str(0xFFFFFFFB)}
    for environment in ({}, batch_script):
        found = discover(environment)
        assert (found.rank, found.world_size, found.master_addr) == (0, 1, "127.0.0.1")
        assert found.master_port > 1023


def test_deepspeed_on_one_node_leaves_the_default_port(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    launcher = {
        "WORLD_SIZE": "2",
        "CROSS_SIZE": "1",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    ports = {discover(launcher | {"RANK": str(rank), "LOCAL_RANK": str(rank)}).master_port for rank in range(2)}
    assert len(ports) == 1
    assert ports != {29500}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [("gpu[03-05,9],x1", "gpu03"), ("a1,a2", "a1"), ("solo", "solo"), ("n[7]", "n7"), ("a,b[1-2]", "a")],
)
def test_first_host_of_a_node_list(nodes: str, expected: str) -> None:
    assert first_host(nodes) == expected


def test_free_ports_are_free() -> None:
    assert free_port() != free_port()
