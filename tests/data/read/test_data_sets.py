"""Saved data sets are read in parts, so that a killed preparation goes on where it was."""

from pathlib import Path

import datasets
import pytest

from fireflyds.config import SourceConfig
from fireflyds.data.read import hub
from fireflyds.data.read.sources import read_part, source_parts


@pytest.mark.parametrize("count", [1, 20, 21, 100])
def test_the_parts_hold_every_row_once_in_order(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SHARD_ROWS", 20)
    texts = [f"row {number}" for number in range(count)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    source = SourceConfig(path=str(tmp_path / "saved"))
    parts = source_parts(source)
    assert len(parts) == -(-count // 20)
    assert [item.sample.text for part in parts for item in read_part(source, part)] == texts
