"""A chat session with models that have, or do not have, a limit of positions."""

import shutil
from pathlib import Path

import pytest

from fireflyds import app
from fireflyds.data.templates import chatml
from fireflyds.inference.chat import ChatSession
from fireflyds.testing.models import tiny_model


@pytest.mark.parametrize("model_type", ["llama", "bloom"])
def test_a_model_with_and_without_a_limit_of_positions_answers(
    base_tokenizer: Path, tmp_path: Path, model_type: str
) -> None:
    """BLOOM's configuration has no `max_position_embeddings`: ALiBi has no limit."""
    folder = tmp_path / "model"
    shutil.copytree(base_tokenizer, folder)
    size = {"vocab_size": 400} | ({"n_head": 4} if model_type == "bloom" else {})
    tiny_model(model_type, **size).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(chatml.CHAT.jinja, encoding="utf-8")
    session = ChatSession(app.compose("chat", [f"model={folder}", "max_new_tokens=3", "temperature=0"]))
    answer = session.send("how are you")
    assert session.messages == [{"role": "user", "content": "how are you"}, {"role": "assistant", "content": answer}]
