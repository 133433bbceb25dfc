"""A request to stop, heard by any rank and agreed on by all."""

import signal

import torch
import torch.distributed as dist


class StopRequest:
    """SIGTERM or Ctrl-C: the step is finished and saved. The second one leaves at once."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked: all ranks hear the same answer."""
        asked = torch.tensor(int(self._asked), device=device)
        dist.all_reduce(asked)
        return bool(asked)
