"""What sharding a model for ZeRO-3 takes on this rank: `shard_memory.py <base> <out> <override> ...`, under torchrun.

Writes `<out>.<rank>.json`: the growth of this process's own memory (pages of mapped files do not count) and the
largest module that was moved as a whole.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from fireflyds import app
from fireflyds.config import Precision
from fireflyds.distributed import collectives, launcher_env
from fireflyds.models import load
from fireflyds.train.trainer import build_model
from fireflyds.zero.ds_config import build_ds_config
from fireflyds.zero.engine import init_distributed
from fireflyds.zero.sharding import shard_parameters


def own_bytes() -> int:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


def main(base: str, out: str, overrides: list[str]) -> None:
    rank_info = launcher_env.rank_from_environment(os.environ)
    init_distributed(rank_info, 5)
    config = app.compose("train", ["run=x", f"model={base}", "data=c/d", "optim.steps=3", "zero=3", *overrides])
    ds_config = build_ds_config(config, Precision.bf16, 1)
    # What every start takes once: modules, buffers of gloo.
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401

    dist.broadcast(torch.zeros(1 << 20), 0)
    shard_parameters(nn.Linear(8, 8), ds_config, config, Precision.bf16)
    moved, peak, done = [], [own_bytes()], threading.Event()
    before, move = peak[0], nn.Module.to

    def record(module: nn.Module, *arguments, **options):
        moved.append(sum(parameter.numel() for parameter in module.parameters()))
        return move(module, *arguments, **options)

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], own_bytes())
            time.sleep(0.0005)

    nn.Module.to = record
    thread = threading.Thread(target=watch)
    thread.start()
    hf_config = load.config_of("model", base)
    model = build_model(config, hf_config, Precision.bf16)
    after_build = own_bytes() - before
    shard_parameters(model, ds_config, config, Precision.bf16)
    done.set()
    thread.join()
    nn.Module.to = move
    sums = {name: float(parameter.ds_tensor.float().sum()) for name, parameter in model.named_parameters()}
    result = {"built": after_build, "peak": peak[0] - before, "largest_moved": max(moved, default=0), "sums": sums}
    Path(f"{out}.{rank_info.rank}.json").write_text(json.dumps(result), encoding="utf-8")
    collectives.exit_process(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
