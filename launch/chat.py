"""Chat with a model in the terminal, with streaming and history.

    python launch/chat.py model=runs/demo/sft/export
    python launch/chat.py model=runs/demo/sft/export prompt="你好！"

In the chat, `/clear` clears the history; `/exit` or Ctrl-D exits.
"""

import io
import sys
from pathlib import Path

from fireflyds import app
from fireflyds.config import ChatConfig
from fireflyds.errors import UserError


def chat(config: ChatConfig) -> None:
    """Answers `prompt`, or the messages typed in the terminal until `/exit`.

    Raises:
        UserError: `model` is not a Hugging Face directory, or has no chat template.
    """
    if not (Path(config.model) / "config.json").is_file():
        raise UserError(
            "no config.json there", key="model", value=config.model, remedy="Give the directory of a Hugging Face model"
        )
    from fireflyds.inference.chat import ChatSession

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    session = ChatSession(config)
    if config.prompt:
        session.send(config.prompt)
        return
    print("/clear clears the history, /exit exits")
    while True:
        try:
            message = input("> ").strip()
        except EOFError:
            return
        if message == "/exit":
            return
        if message == "/clear":
            session.clear()
        elif message:
            session.send(message)


if __name__ == "__main__":
    app.main(chat, __doc__)
