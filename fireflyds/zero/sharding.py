"""Shards the parameters of a model for ZeRO-3 one by one, before DeepSpeed sees it.

DeepSpeed moves a model that has no sharded parameters to the device as a whole, also where parameters are offloaded
(`DeepSpeedEngine._configure_distributed_model`). Here a parameter is read, broadcast by rank 0, cut into shards and
freed before the next one is read.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fireflyds.config import Offload, Precision, TrainConfig
from fireflyds.errors import UserError
from fireflyds.models.architecture import is_stateful_mixer
from fireflyds.models.deferred import materialize
from fireflyds.models.precision import DTYPES


class _Streamed(nn.Module):
    """A module whose parameters get their values when they are asked for. DeepSpeed shards each before the next."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model = model
        self._device, self._dtype, self._reads = device, dtype, dist.get_rank() == 0

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        for parameter in self.model.parameters(recurse):
            materialize(parameter, self._device, self._dtype, reads=self._reads)
            yield parameter


def shard_parameters(model: nn.Module, ds_config: dict[str, Any], config: TrainConfig, precision: Precision) -> None:
    """Shards all parameters, in the number format of `precision`, and moves the buffers to the device.

    Raises:
        UserError: layers that run once for every document: DeepSpeed would free their weights after the first.
    """
    mixer = next((module for module in model.modules() if is_stateful_mixer(module)), None)
    if config.packing and mixer is not None:
        raise UserError(
            f"{type(mixer).__name__} runs once for every document, which DeepSpeed's stage 3 does not support",
            key="zero.stage",
            value=3,
            remedy="Use zero=2, or packing=false",
        )
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import Init

    device = torch.device(get_accelerator().current_device_name())
    dtype = None if precision is Precision.fp32 else DTYPES[precision]
    offload = config.zero.offload_param
    Init(
        module=_Streamed(model, device, dtype),
        dtype=DTYPES[precision],
        config_dict_or_path=ds_config,
        remote_device=None if offload is Offload.none else offload.name,
    )
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
