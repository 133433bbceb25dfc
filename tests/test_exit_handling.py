"""Ctrl-C while modules are imported, and refusals of processes with a process group."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A library that turns an interrupt of its import into another error, as transformers does, or aborts, as torch does.
_LIBRARY = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except BaseException as error:
    {ending}
"""
_VERB = """
import sys
sys.argv[0] = "doctor"
from fireflyds import app
def verb(config):
    {body}
app.main(verb, "")
"""


def _run(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{cwd}"},
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.parametrize("ending", ["os.abort()", "raise ImportError('could not import') from error"])
def test_an_interrupt_during_an_import_never_reaches_the_library(tmp_path: Path, ending: str) -> None:
    (tmp_path / "native.py").write_text(_LIBRARY.format(ending=ending), encoding="utf-8")
    ended = _run(_VERB.format(body="import native"), tmp_path)
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "interrupted: what is whole stays; give the same command again\n"


def test_an_interrupt_elsewhere_is_an_exception_that_a_verb_can_clean_up_after(tmp_path: Path) -> None:
    body = """
    import os, signal, time
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    finally:
        print("cleaned up")
    """
    ended = _run(_VERB.format(body=body), tmp_path)
    assert (ended.returncode, ended.stdout) == (130, "cleaned up\n")
    assert ended.stderr == "interrupted: what is whole stays; give the same command again\n"


def test_a_refusal_keeps_its_exit_code_where_a_thread_of_the_process_group_would_abort(tmp_path: Path) -> None:
    # Stands for NCCL's watchdog: an ordinary exit of this process would abort.
    body = """
    import os, types
    from fireflyds.errors import UserError
    class Group(types.ModuleType):
        is_available = is_initialized = staticmethod(lambda: True)
    class Watchdog:
        def __del__(self):
            os.abort()
    sys.modules["torch.distributed"] = Group("torch.distributed")
    sys.watchdog = Watchdog()
    raise UserError("is wrong", key="a", value=1, remedy="Give 2")
    """
    ended = _run(_VERB.format(body=body), tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == "error: a=1: is wrong. Give 2\n"
