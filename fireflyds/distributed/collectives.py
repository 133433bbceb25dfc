"""Work on rank 0 while the other ranks wait, and leaving the process group."""

from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch.distributed as dist

from fireflyds.errors import UserError, describe
from fireflyds.exit_handling import end_process

T = TypeVar("T")


def leave_group() -> None:
    """Wait for the other ranks and leave the process group."""
    dist.barrier()
    dist.destroy_process_group()


def exit_process(exit_code: int) -> NoReturn:
    """Leave the process group and end the process."""
    leave_group()
    end_process(exit_code)


def run_on_rank_zero(work: Callable[[], T]) -> T | None:
    """Run `work` on rank 0 while the other ranks wait. Returns its result; None on the other ranks.

    Raises:
        UserError: on every rank: `work` raised a `UserError` or an `OSError`. Any other exception of `work` is raised
            unchanged on rank 0, and as a `UserError` on the other ranks.
    """
    result: T | None = None
    unexpected: Exception | None = None
    failure: list[UserError | None] = [None]
    if dist.get_rank() == 0:
        try:
            result = work()
        except UserError as error:
            failure = [error]
        except OSError as error:
            remedy = "Free disk space or correct permissions, and run the command again"
            failure = [UserError(str(error), remedy=remedy)]
        except Exception as error:
            unexpected = error
            failure = [UserError(f"rank 0 failed ({describe(error)})", remedy="See the log of rank 0")]
    dist.broadcast_object_list(failure)
    if unexpected is not None:
        raise unexpected
    if failure[0] is not None:
        raise failure[0]
    return result
