"""Say whether this machine, or every machine of a cluster, is fit to train: green, yellow or red, with remedies.

    python launch/doctor.py
    torchrun --nproc_per_node 8 launch/doctor.py runs=/shared/runs model=models/llama-2-7b data=stores/cpt
    deepspeed --num_gpus 2 launch/doctor.py format=json
    python launch/doctor.py packing=true model=models/llama-2-7b layers=4

Looks at versions and their conflicts, GPUs, disk, limits and variables of every host, and whether tokenizer, store and
base model agree. Over several ranks also at the all-reduce, ports, clocks and the shared folder; a rank that does not
answer is named. Yellow trains, but slower or with less than could be; red does not, or not rightly.

packing=true takes documents of random tokens and compares, for every attention that runs here: the loss and the
gradients of all documents packed with those of each alone in transformers' own forward pass, and the other documents'
values when one document is replaced. Exits 1 when anything is red.
"""

import contextlib
import os
import sys

from fireflyds import app
from fireflyds.config import DoctorConfig, PlanFormat
from fireflyds.doctor import signal_guards as patience


def doctor(config: DoctorConfig) -> None:
    with patience.sigint_guard():
        code = examine(config)
    sys.exit(code)


def examine(config: DoctorConfig) -> int:
    """Prints the report, on rank 0. Returns the exit code."""
    import fireflyds_kernels

    from fireflyds.distributed import launcher_env as ranks
    from fireflyds.doctor import packing, report
    from fireflyds.doctor import session as examination
    from fireflyds.doctor.check import Severity, failed, worst
    from fireflyds.zero import engine as deepspeed

    deepspeed.pick_accelerator()
    me = ranks.rank_from_environment(os.environ)
    if config.packing:
        packing.validate_config(config)
    with report.exclusive_stdout() as out:
        # Rank 0 tells what is known even when the launcher ends it because another rank has died.
        reports = me.rank == 0 and me.world_size > 1
        with patience.sigterm_guard() if reports else contextlib.nullcontext([]) as ended:
            examined = examination.examine(me, config)
        if examined is None:
            return 0
        checks, hosts = examined
        proof = ""
        if config.packing and ended:
            checks.append(failed("packing", "not tried: this rank was ended before", "see `ranks`"))
        elif config.packing:
            check, proof = packing.check_packing(config)
            checks.append(check)
        kernels = fireflyds_kernels.describe()
        if config.format is PlanFormat.json:
            print(report.checks_to_json(checks, me.world_size, hosts, kernels.splitlines()), file=out, flush=True)
        else:
            shown = report.format_checks(checks, hosts, coloured=out.isatty() and "NO_COLOR" not in os.environ)
            print(*filter(None, [kernels, proof, shown]), sep="\n\n", file=out, flush=True)
    return 1 if worst(checks) is Severity.error else 0


if __name__ == "__main__":
    with patience.exit_guard():
        app.main(doctor, __doc__)
