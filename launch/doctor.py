"""Say what this machine runs, and prove on a model that packing changes nothing.

    python launch/doctor.py
    python launch/doctor.py packing=true model=models/llama-2-7b layers=4
    python launch/doctor.py packing=true model=runs/cpt/export precision=fp32 documents=[512,3,1000]

The first lists the kernels chosen on every device, and why not others. The second takes documents of random tokens and
compares, for every attention that runs here: the loss and the gradients of all documents packed with those of each
alone in transformers' own forward pass, and the other documents' values when one document is replaced. Exits 1 when
anything differs by more than rounding.
"""

import sys
from importlib import metadata

from fireflyds import app
from fireflyds.config import DoctorConfig, HardwareConfig


def doctor(config: DoctorConfig) -> None:
    import fireflyds_kernels

    versions = ("torch", "transformers", "deepspeed", "bitsandbytes")
    print(", ".join(f"{name} {metadata.version(name)}" for name in versions))
    print(fireflyds_kernels.describe())
    if not config.packing:
        return
    from fireflyds.engine import deepspeed
    from fireflyds.engine import doctor as examination

    precision = deepspeed.resolve_precision(HardwareConfig(precision=config.precision))
    model = examination.load_model(config, precision)
    print(f"\n{type(model).__name__} of {config.model}, {precision.name}, documents of {config.documents} tokens")
    findings = list(examination.examine(model, list(config.documents), config.seed))
    print(examination.table(findings))
    if not all(finding.proven for finding in findings):
        sys.exit(1)


if __name__ == "__main__":
    app.main(doctor, __doc__)
