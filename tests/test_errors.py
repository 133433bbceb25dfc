"""Errors carry their parts as fields; the message is composed of them, and the kind decides the exit code and the
status."""

import ast
import json
import pickle
from pathlib import Path

import pytest

from fireflyds.errors import DivergedError, LostRankError, UserError
from fireflyds.runs.status import Status

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("no such file"), "no such file"),
        (UserError("is empty", key="corpus"), "corpus: is empty"),
        (UserError("must be above 0", key="optim.lr", value=0.0), "optim.lr=0.0: must be above 0"),
        (
            UserError("is not there", key=Path("a/b.json"), remedy="Get it again"),
            "a/b.json: is not there. Get it again",
        ),
        (UserError("needs text", key="size", value=None, remedy="Give corpus"), "size=None: needs text. Give corpus"),
    ],
)
def test_the_message_is_composed_of_the_fields(error: UserError, message: str) -> None:
    assert str(error) == message


def test_a_context_keeps_class_fields_and_exit_code() -> None:
    error = DivergedError("the loss is nan", key="data", value="x", remedy="Lower optim.lr")
    inner = error.within("step 3")
    outer = inner.within("stage cpt")
    assert str(outer) == "stage cpt: step 3: data=x: the loss is nan. Lower optim.lr"
    assert (type(outer), outer.key, outer.value) == (DivergedError, "data", "x")
    assert (outer.remedy, outer.exit_code) == ("Lower optim.lr", 2)
    assert str(error) == "data=x: the loss is nan. Lower optim.lr"
    assert str(UserError("a").within("")) == "a"


def test_an_error_of_a_worker_process_keeps_its_fields() -> None:
    copied = pickle.loads(
        pickle.dumps(UserError("is empty", key="corpus", value="x", remedy="Give text").within("part 1"))
    )
    assert str(copied) == "part 1: corpus=x: is empty. Give text"
    lost = pickle.loads(pickle.dumps(LostRankError("rank 3 died", rank=3, remedy="Start again")))
    assert (lost.rank, str(lost), lost.exit_code) == (3, "rank 3 died. Start again", 1)


@pytest.mark.parametrize(
    "error",
    [
        UserError("is empty", key="corpus", value="x", remedy="Give text").within("part 1"),
        LostRankError("rank 3 died", rank=3, remedy="Start again"),
        DivergedError("the loss is nan"),
    ],
)
def test_an_error_sent_as_json_keeps_its_class_and_fields(error: UserError) -> None:
    received = UserError.from_dict(json.loads(json.dumps(error.as_dict())))
    assert (type(received), str(received), vars(received)) == (type(error), str(error), vars(error))


@pytest.mark.parametrize(
    ("error", "kind", "exit_code"),
    [
        (UserError("x"), "user_error", 2),
        (DivergedError("x"), "diverged", 2),
        (LostRankError("x", rank=1), "lost_rank", 1),
        (OSError("x"), "error", 1),
    ],
)
def test_the_status_records_the_kind_of_an_error(tmp_path: Path, error: Exception, kind: str, exit_code: int) -> None:
    with pytest.raises(type(error)), Status(tmp_path, 0, 9):
        raise error
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["kind"], status["exit_code"], status["message"]) == ("failed", kind, exit_code, "x")


def test_every_user_error_has_a_remedy() -> None:
    lines_without_remedy: dict[str, list[int]] = {}
    for path in sorted(path for folder in ("fireflyds", "launch") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or any(keyword.arg == "remedy" for keyword in node.keywords):
                continue
            if ast.unparse(node.func).split(".")[-1] in ("UserError", "LostRankError", "DivergedError"):
                lines_without_remedy.setdefault(path.relative_to(ROOT).as_posix(), []).append(node.lineno)
    assert not lines_without_remedy
