"""How a process ends on Ctrl-C and on a refusal. Imported before anything that takes time to import."""

import atexit
import os
import signal
import sys
from types import FrameType, TracebackType
from typing import NoReturn

MESSAGE = "interrupted: what is whole stays; give the same command again"
EXIT_INTERRUPTED = 130
_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"


def handle_interrupt(number: int, frame: FrameType | None) -> None:
    """Signal handler for Ctrl-C. Raises `KeyboardInterrupt`; while a module is being imported, ends the process.

    An exception that crosses an import may cross C++ code, which aborts (torch), or become another exception
    (transformers). What a verb writes while it imports is as safe as at any other moment: it is renamed when whole.
    """
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT_SYSTEM:
            os.write(2, f"{MESSAGE}\n".encode())
            os._exit(EXIT_INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def end_process(exit_code: int) -> NoReturn:
    """Ends the process without finalisation of the interpreter; only the handlers registered with `atexit` are run.

    Threads of gloo and NCCL outlive their groups. One that acquires the GIL while Python finalises the interpreter ends
    in C++ code that must not throw: "terminate called without an active exception", SIGABRT in place of the exit code.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def has_process_group() -> bool:
    """True where this process has joined a process group of torch, whose threads run until it ends."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and bool(distributed.is_initialized())


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print(MESSAGE, file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _show
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, handle_interrupt)
