"""Check whether this machine, or every machine of a cluster, is ready to train: ok, warning or error, with remedies.

    python launch/doctor.py
    torchrun --nproc_per_node 8 launch/doctor.py runs=/shared/runs model=models/llama-2-7b data=stores/cpt
    deepspeed --num_gpus 2 launch/doctor.py format=json
    python launch/doctor.py packing=true model=models/llama-2-7b layers=4

Checks versions and their conflicts, GPUs, disk, limits and environment variables of every host, and whether tokenizer,
store and base model match; with several ranks also the all-reduce, ports, clocks and the shared folder. Ranks that do
not respond are listed. `warning`: training works, but slower or with fewer features; `error`: training fails or is
incorrect.

packing=true packs documents of random tokens and compares, for every attention implementation available here: loss and
gradients of the packed documents with those of each document alone in transformers' own forward pass, and the values of
all other documents when one document is replaced. Exits with 1 if a check is an `error`.
"""

import contextlib
import os
import sys

from fireflyds import app
from fireflyds.config import DoctorConfig, PlanFormat
from fireflyds.doctor import signal_guards


def doctor(config: DoctorConfig) -> None:
    """Runs the checks and exits with the code of `examine`."""
    sys.exit(examine(config))


def examine(config: DoctorConfig) -> int:
    """Prints the report, on rank 0. Returns the exit code."""
    import fireflyds_kernels

    from fireflyds.distributed import launcher_env
    from fireflyds.doctor import check_report, packing_check, session
    from fireflyds.doctor.check import Severity, failed, worst
    from fireflyds.zero import engine

    engine.pick_accelerator()
    rank_info = launcher_env.rank_from_environment(os.environ)
    if config.packing:
        packing_check.validate_config(config)
    with check_report.exclusive_stdout() as out:
        # Rank 0 prints the checks so far even if the launcher terminates it because another rank has died.
        may_be_terminated = rank_info.rank == 0 and rank_info.world_size > 1
        with signal_guards.sigterm_guard() if may_be_terminated else contextlib.nullcontext([]) as signals:
            result = session.examine(rank_info, config)
        if result is None:
            return 0
        checks, hosts = result
        packing_report = ""
        if config.packing and signals:
            checks.append(failed("packing", "not run: this rank was terminated before", "see `ranks`"))
        elif config.packing:
            check, packing_report = packing_check.check_packing(config)
            checks.append(check)
        kernels = fireflyds_kernels.describe()
        if config.format is PlanFormat.json:
            print(
                check_report.checks_to_json(checks, rank_info.world_size, hosts, kernels.splitlines()),
                file=out,
                flush=True,
            )
        else:
            table = check_report.format_checks(checks, hosts, coloured=out.isatty() and "NO_COLOR" not in os.environ)
            print(*filter(None, [kernels, packing_report, table]), sep="\n\n", file=out, flush=True)
    return 1 if worst(checks) is Severity.error else 0


if __name__ == "__main__":
    with signal_guards.exit_guard():
        app.main(doctor, __doc__)
