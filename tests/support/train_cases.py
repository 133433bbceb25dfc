"""Several short trainings in one process per rank, for tests that compare them: `train_cases.py cases.json out.json`.

A case: `overrides` of the training's configuration, `steps`, and where wanted `rows` of a step, `run_dir` (a checkpoint
is saved there at the end), `overflow` (steps whose gradients leave float16's range), `nan_at` (the step from which on a
layer outputs NaN), `host_waits` (true to record them; with `reads_outputs` a
layer causes some), `spoilt_gradients` (steps with a finite loss and gradients that
are not finite), `resume` (a run directory to resume from).
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from host_waits import HostWaits

from fireflyds import app
from fireflyds.checkpoint import init_from
from fireflyds.checkpoint.manager import CheckpointManager
from fireflyds.checkpoint.restore import restore_latest
from fireflyds.checkpoint.storage import LocalStorage, storage_of
from fireflyds.config import TrainConfig
from fireflyds.distributed import collectives, launcher_env
from fireflyds.errors import UserError
from fireflyds.metrics.accumulator import MetricsContext
from fireflyds.metrics.flops import step_flops
from fireflyds.models import load, tuning
from fireflyds.models.precision import resolve_precision
from fireflyds.optim.compatibility import check_compatibility
from fireflyds.optim.param_groups import parameter_groups
from fireflyds.train.loop import train_steps
from fireflyds.train.objectives import load_objective
from fireflyds.train.trainer import build_model
from fireflyds.types import PackedBatch, TrainState
from fireflyds.zero import partitions
from fireflyds.zero.engine import build_engine, init_distributed

ROWS, LENGTHS = 4, (20, 1, 11)
DOMAINS = ["zh", "en", "code"]


class Batches:
    """The same rows for any number of ranks and micro-batches: documents repeat, so that losses fall."""

    def __init__(self, vocab_size: int, rows: int, micro_batch_size: int, rank_info: launcher_env.RankInfo) -> None:
        self._vocab_size, self._rows = vocab_size, rows
        first_rows = range(rank_info.rank * micro_batch_size, rows, rank_info.world_size * micro_batch_size)
        self._rows_by_micro_batch = [range(first, first + micro_batch_size) for first in first_rows]

    def steps(self, first: int, end: int):
        for step in range(first, end):
            yield [self._batch([step % 3 * self._rows + row for row in rows]) for rows in self._rows_by_micro_batch]

    def documents(self, number: int, micro: int) -> str:
        return f"documents of row {self._rows_by_micro_batch[micro][0]} of step {number}"

    def _batch(self, seeds: list[int]) -> PackedBatch:
        documents = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            documents += [torch.randint(0, self._vocab_size, (length,), generator=generator) for length in LENGTHS]
        domains = [domain for seed in seeds for domain in (0, 1, seed % 2)]
        return PackedBatch.from_documents([ids.tolist() for ids in documents], domains)


def run_case(case: dict, rank_info: launcher_env.RankInfo) -> dict:
    """A case that is refused anywhere gives its message as `error`."""
    try:
        return _train(case, rank_info)
    except UserError as error:
        return {"error": str(error)}


def _train(case: dict, rank_info: launcher_env.RankInfo) -> dict:
    rows = case.get("rows", ROWS)
    config: TrainConfig = app.compose(
        "train",
        [
            "run=x",
            "data=a/b",
            "optim.steps=9",
            f"global_batch_size={rows}",
            "optim.schedule=constant",
            "seed=0",
            *case["overrides"],
        ],
    )
    precision = resolve_precision(config.hardware)
    check_compatibility(config, precision)
    hf_config = load.architecture_of(config.model)
    model = build_model(config, hf_config, precision)
    objective = load_objective(config.objective)
    names = [group.name for group in parameter_groups(model, config)]
    widths = np.full(hf_config.vocab_size, 3, np.int32)
    metrics_context = MetricsContext(DOMAINS, widths, names, rows * 32, step_flops(model), 1e12)
    engine = build_engine(model, config, precision, config.accumulation_steps(rank_info.world_size))
    state = TrainState()
    if case.get("resume"):
        state = restore_latest(engine, LocalStorage(Path(case["resume"])), print)
    kinds = ("losses", "scales", "skipped", "norms", "lrs", "parameters", "extra")
    result = {kind: [] for kind in kinds} | {"error": None}

    def overflow_output(module, inputs, output):
        return (output[0] * 1e12, output[1]) if state.step + 1 in case.get("overflow", ()) else output

    model.get_output_embeddings().register_forward_hook(overflow_output)

    def nan_output(module, inputs, output):
        return output * float("nan") if state.step + 1 >= case["nan_at"] else output

    if "nan_at" in case:
        model.get_submodule("model.layers.1.mlp.down_proj").register_forward_hook(nan_output)

    def read_output(module, inputs, output):
        bool(output.sum() > 0)
        output.register_hook(lambda gradient: float(gradient.sum()) and None)

    if case.get("reads_outputs"):
        model.get_submodule("model.layers.1.mlp.down_proj").register_forward_hook(read_output)

    def infinite_gradient(gradient):
        return gradient * float("inf") if state.step + 1 in case.get("spoilt_gradients", ()) else gradient

    if case.get("spoilt_gradients"):
        hidden = model.get_submodule("model.layers.0.mlp.down_proj")
        hidden.register_forward_hook(lambda module, inputs, output: output.register_hook(infinite_gradient) and None)
    end, batches = state.step + case["steps"], Batches(hf_config.vocab_size, rows, config.micro_batch_size, rank_info)
    waits = HostWaits()
    steps = train_steps(engine, objective, batches, state, config, end, metrics_context, waits.span)
    try:
        for step in waits.recorded(steps) if case.get("host_waits") else steps:
            result["losses"].append(step.loss)
            result["extra"].append(step.extra)
            result["scales"].append(step.extra.get("loss_scale"))
            result["skipped"].append(step.extra["skipped_steps"])
            result["norms"].append(step.grad_norm)
            result["parameters"].append(_checksum(engine))
            result["lrs"].append([group["lr"] for group in engine.optimizer.param_groups])
    except UserError as error:
        result["error"] = str(error)
    result["host_waits"] = waits.records
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    result["state_bytes"] = sum(
        t.numel() * t.element_size()
        for s in optimizer.state.values()
        for t in s.values()
        if isinstance(t, torch.Tensor) and t.dim()
    )
    if "run_dir" in case and result["error"] is None:
        metadata = {"base": "b", "tokenizer": "t", "vocab_size": hf_config.vocab_size}
        weights_writer = init_from.TrainableWeightsWriter(
            model, replace(config), tuning.adapter_config_of(model), metadata
        )
        with CheckpointManager(engine, storage_of(Path(case["run_dir"])), config.checkpoint, weights_writer) as manager:
            manager.save(state, step)
    return result


def _checksum(engine) -> float:
    """Of what this rank holds of the trained weights."""
    return sum(float(partition.master.double().abs().sum()) for _, partition in partitions.owned_partitions(engine))


def main(cases: Path, out: Path) -> None:
    """Writes a line for every case as soon as it is done."""
    rank_info = launcher_env.rank_from_environment(os.environ)
    init_distributed(rank_info, 5)
    for name, case in json.loads(cases.read_text()).items():
        result = run_case(case, rank_info) | {"case": name}
        if rank_info.rank == 0:
            with out.open("a") as stream:
                stream.write(json.dumps(result) + "\n")
    collectives.exit_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
