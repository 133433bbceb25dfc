"""Train a model on a token store: continued pre-training and instruction tuning, full-parameter, LoRA or QLoRA.

    deepspeed --num_gpus 2 launch/train.py experiment=demo_cpt
    torchrun --nproc_per_node 8 launch/train.py run=cpt model=models/llama-2-7b-zh data=stores/cpt optim.steps=1000
    python launch/train.py run=sft model=runs/cpt/export data=stores/sft tuning=qlora optim.epochs=2

The run's folder is `runs/<run>`. The same command resumes it from its newest checkpoint, on any number of GPUs. During
training `touch runs/<run>/SAVE` saves a checkpoint; Ctrl-C, SIGTERM or SIGUSR1 save and exit with code 75, on which a
scheduler may restart it; `touch runs/<run>/STOP` saves and exits with code 76.
"""

from fireflyds import app
from fireflyds.config import TrainConfig


def train(config: TrainConfig) -> None:
    """Trains or resumes the run and ends the process with its exit code.

    Raises:
        UserError: the configuration or an input is invalid.
    """
    # Heavy imports are deferred until the configuration is validated.
    from fireflyds.distributed.collectives import exit_process
    from fireflyds.train.trainer import Trainer

    trainer = Trainer.build(config)
    exit_process(trainer.fit())


if __name__ == "__main__":
    app.main(train, __doc__)
