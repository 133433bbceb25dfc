"""Work on rank 0 while the others wait, and leaving the process group."""

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch.distributed as dist

from fireflyds.errors import UserError

T = TypeVar("T")


def leave_group() -> None:
    """Wait for the other ranks and leave the process group."""
    dist.barrier()
    dist.destroy_process_group()


def exit_process(exit_code: int) -> NoReturn:
    """Leave the other ranks, and the process.

    Threads of gloo and NCCL outlive their groups. One that asks for the interpreter's lock while Python takes the
    interpreter down ends in C++ that may not throw: "terminate called without an active exception", SIGABRT after a run
    that was whole. So the interpreter is not taken down; what was registered for its end is done.
    """
    leave_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def run_on_rank_zero(work: Callable[[], T]) -> T | None:
    """Do something on rank 0 while the others wait; its `UserError` becomes everybody's, and so does trouble with the disk.
    Other ranks get None."""
    result, unexpected, failure = None, None, [None]
    if dist.get_rank() == 0:
        try:
            result = work()
        except Exception as error:
            unexpected = None if isinstance(error, UserError | OSError) else error
            remedy = ". Make room, or mend its rights, and give the same command again" * isinstance(error, OSError)
            failure = [f"{str(error) or repr(error)}{remedy}"]  # type: ignore[list-item]
    dist.broadcast_object_list(failure)
    if unexpected is not None:
        raise unexpected
    if failure[0] is not None:
        raise UserError(failure[0])
    return result
