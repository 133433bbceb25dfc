"""Several processes make one store together; what a lost one had is made by the others, with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from samples import CHINESE, ENGLISH

from fireflyds.data.store.shared_work import Board, Claims, SharedPlace, deal

ROOT = Path(__file__).parents[3]


def files_of(store: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(store)): file.read_bytes()
        for file in sorted(store.rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    }


def start(rank: int, words: list[str], folder: Path) -> subprocess.Popen[str]:
    ranks = {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29400",
    }
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "prepare.py"), *words],
        cwd=folder,
        env={**os.environ, **ranks, "TORCHELASTIC_RUN_ID": "together"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def words(tmp_path: Path, base_tokenizer: Path) -> list[str]:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(24):
        rows = [{"text": f"{number} {text}"} for text in [*ENGLISH, *CHINESE] * 3]
        (folder / f"{number:02}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return ["data=texts", f"tokenizer={base_tokenizer}", "workers=1", "lost_after_seconds=4"]


def test_two_processes_make_the_store_of_one_though_one_is_killed(verb, words: list[str], tmp_path: Path) -> None:
    verb("prepare", *words, "out=alone")
    first, second = (start(rank, [*words, "out=together"], tmp_path) for rank in (0, 1))
    claims = tmp_path / ".together.claims"
    deadline = time.monotonic() + 120
    while len(list(claims.glob("*.claim"))) < 4:  # process 1 has begun
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(second.pid, signal.SIGKILL)
    output, _ = first.communicate(timeout=120)
    second.wait(10)
    assert first.returncode == 0, output
    assert files_of(tmp_path / "together") == files_of(tmp_path / "alone")
    # The file of the lost process stays until the next start.
    left = [".together.work.1.json", "alone", "texts", "together"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    verb("prepare", *words, "out=together")
    assert sorted(path.name for path in tmp_path.iterdir()) == left[1:]


def test_a_process_that_starts_late_ends_as_the_first_did(verb, words: list[str], tmp_path: Path) -> None:
    verb("prepare", *words, "out=store")
    first = start(0, [*words, "out=store"], tmp_path)
    assert "nothing to do" in first.communicate(timeout=120)[0]
    late = start(1, [*words, "out=store"], tmp_path)
    output, _ = late.communicate(timeout=120)
    assert late.returncode == 0, output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "texts"]


@pytest.mark.slow
def test_both_end_well_and_a_second_start_has_nothing_to_do(words: list[str], tmp_path: Path) -> None:
    for expected in ("wrote store", "nothing to do"):
        processes = [start(rank, [*words, "out=store"], tmp_path) for rank in (1, 0)]
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        assert expected in outputs[1]


def test_a_claim_is_of_one_process_until_that_is_lost(tmp_path: Path) -> None:
    with Claims(tmp_path, 4.0) as mine, Claims(tmp_path, 4.0) as others:
        assert mine.take("a")
        assert not others.take("a")
        assert not others.is_lost("a")
        old = time.time() - 60
        mine._held.clear()  # its thread touches the claim no more, as if the process were lost
        os.utime(tmp_path / "a.claim", (old, old))
        assert others.is_lost("a")
        assert others.take("a")
        others.release("a")
        assert mine.take("a")
    assert list(tmp_path.iterdir()) == []


def test_parts_are_dealt_until_all_are_finished(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    with Claims(tmp_path / "claims", 4.0) as claims:
        made = []
        for key in deal(SharedPlace(1, 2, claims), parts, ["a", "b", "c", "d"]):
            assert key is not None
            made.append(key)
            (parts / f"{key}.json").touch()
        assert made == ["c", "d", "a", "b"]
        assert list(deal(SharedPlace(0, 2, claims), parts, ["a", "b"])) == []


def test_the_board_of_an_earlier_start_does_not_count(tmp_path: Path) -> None:
    Board(tmp_path / "store", "one").write(3, "work", tasks=[])
    assert Board(tmp_path / "store", "two").read(1) is None
    assert Board(tmp_path / "store", "one").read(2) == {"job": "one", "state": "work", "tasks": []}
    Board(tmp_path / "store", "one").seen(2)
    assert len(list(tmp_path.iterdir())) == 1
    Board(tmp_path / "store", "two").clear()
    assert list(tmp_path.iterdir()) == []
