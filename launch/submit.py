"""Submit a verb, or a whole pipeline (`road`), to Slurm; show its status and logs; cancel it.

    python launch/submit.py verb=train experiment=demo_cpt cluster=slurm cluster.nodes=4 cluster.gpus_per_node=8
    python launch/submit.py verb=prepare run=cpt data=corpus/ tokenizer=models/zh out=stores/cpt cluster=slurm
    python launch/submit.py road=demo cluster=slurm_cpu cluster.time=00:30:00
    python launch/submit.py action=status run=cpt

All input is checked before a job is queued. The frozen configuration and the submitted script are written to the run's
folder. A training run that is preempted, loses a node or reaches its time limit is requeued and resumes from its
checkpoint. `dry_run=true` writes and prints everything but queues nothing.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fireflyds import app, hub
from fireflyds.cluster import input_checks, job_status, script, slurm, submission
from fireflyds.cluster.submission import PlannedJob
from fireflyds.config import (
    VERBS,
    ClusterConfig,
    ExportConfig,
    PipelineConfig,
    Scheduler,
    StageConfig,
    SubmitAction,
    SubmitConfig,
    TrainConfig,
)
from fireflyds.errors import UserError
from fireflyds.pipelines import stage_runner
from fireflyds.runs import config_diff, find, layout


def submit(config: SubmitConfig, overrides: list[str]) -> None:
    """Submits the verb or the stages of the road, or runs `action` on submitted jobs.

    `rest` are the arguments for the verb.

    Raises:
        UserError: an input of a job is missing or invalid, or the scheduler refuses a job.
    """
    if config.action is not SubmitAction.submit:
        _run_action(config, overrides)
        return
    if config.cluster.scheduler is not Scheduler.slurm:
        raise UserError(
            "submit is for a scheduler",
            key="cluster.scheduler",
            value="none",
            remedy="Give cluster=slurm, or start the verb itself",
        )
    folder, planned = _plan_pipeline(config, overrides) if config.road else _plan_verb(config, overrides)
    command = f"python launch/submit.py {{}} run={folder.relative_to(config.runs)}"
    command += "" if config.runs == "runs" else f" runs={config.runs}"
    if not planned:
        print(f"{folder}: every stage is complete; nothing to submit")
        return
    if config.dry_run:
        if shutil.which("scontrol") is not None:
            submission.refuse_active(folder)
        submission.write(planned, config.cluster)
        for planned_job in planned:
            print(f"# {planned_job.job.script}\n{script.text(planned_job.job, config.cluster)}")
        print("dry_run=true: written and checked, nothing is queued")
        return
    for record in submission.submit(planned, config.cluster, folder):
        print(f"{record.name}: job {record.id}, {record.script}, output in {record.log}")
    for action, description in (
        ("status", "show its status"),
        ("logs", "show its output"),
        ("cancel", "cancel it; training saves first"),
    ):
        print(f"  {command.format(f'action={action}')}   # {description}")


def _plan_verb(config: SubmitConfig, overrides: list[str]) -> tuple[Path, list[PlannedJob]]:
    verb = config.verb
    if verb not in VERBS or not VERBS[verb].submittable:
        submittable = ", ".join(name for name, record in VERBS.items() if record.submittable)
        raise UserError(
            "is not submitted",
            key="verb",
            value=verb,
            remedy=f"Known: {submittable}" + ("; road=demo does" if verb == "demo" else ""),
        )
    fields = VERBS[verb].config.__dataclass_fields__
    run_overrides = [f"run={config.run}"] if config.run and "run" in fields else []
    run_overrides += [f"runs={config.runs}"] if config.runs != "runs" and "runs" in fields else []
    composed = app.compose(verb, [*overrides, *run_overrides])
    # Compute nodes may have no network.
    hub.localize(composed, VERBS[verb].models, weights=VERBS[verb].needs_weights)
    name = config.run or getattr(composed, "run", "")
    if not name:
        raise UserError(f"is not set; it identifies the job of {verb}", key="run", remedy="Give run=<name>")
    _check_inputs(verb, composed, config.cluster)
    folder = Path(config.runs) / name
    run_dir = folder if isinstance(composed, TrainConfig) else None
    return folder, [submission.plan_job(verb, name if run_dir else verb, folder, run_dir, app.to_yaml(composed))]


def _plan_pipeline(config: SubmitConfig, overrides: list[str]) -> tuple[Path, list[PlannedJob]]:
    file = app.option("road", config.road)
    if overrides:
        raise UserError(
            "no such key for submit",
            key=overrides[0],
            remedy=f"The keys of a pipeline's stages are in its file, {file}",
        )
    stages = app.from_yaml(file, PipelineConfig)
    run = config.run or stages.name
    folder = Path(config.runs) / run
    all_composed = [_compose_stage(file, stage) for stage in stages.stages]
    for composed in all_composed:
        stage_runner.relocate(composed, stages, config.runs, run)
    texts = [app.to_yaml(composed) for composed in all_composed]
    keys = stage_runner.stage_keys(f"{stage.verb}\n{text}" for stage, text in zip(stages.stages, texts, strict=True))
    planned: list[PlannedJob] = []
    planned_outputs: list[Path] = []
    for stage, composed, text, key in zip(stages.stages, all_composed, texts, keys, strict=True):
        run_dir = Path(composed.run_dir) if isinstance(composed, TrainConfig) else None
        planned_job = submission.plan_job(stage.verb, stage.name, folder, run_dir, text, key)
        done_file, output = planned_job.job.done, folder / stage.output
        if done_file.exists() and done_file.read_text().strip() == key and output.exists():
            print(f"{stage.name}: complete, skipped")
            continue
        _check_inputs(stage.verb, composed, config.cluster, planned_outputs, stage.name)
        planned_outputs += input_checks.stage_outputs(composed, folder, stage.output)
        planned.append(planned_job)
    return folder, planned


def _compose_stage(file: Path, stage: StageConfig) -> Any:
    if stage.verb not in VERBS or not VERBS[stage.verb].submittable:
        raise UserError(f"stage {stage.name}: verb={stage.verb} is not submitted", key=file, remedy="Remove the stage")
    composed = app.compose(stage.verb, stage.overrides)
    hub.localize(composed, VERBS[stage.verb].models, weights=VERBS[stage.verb].needs_weights)
    return composed


def _check_inputs(
    verb: str, composed: Any, cluster: ClusterConfig, planned_outputs: Sequence[Path] = (), stage: str = ""
) -> None:
    """Checks the inputs of a job as far as this is possible without torch and without a GPU."""
    try:
        input_checks.require_input_paths(verb, composed, planned_outputs)
        if isinstance(composed, ExportConfig) and not planned_outputs:
            find.find_run(composed.runs, "run", composed.run)
        if isinstance(composed, TrainConfig):
            composed.accumulation_steps(cluster.world_size)
            if not planned_outputs:
                input_checks.check_training_inputs(composed)
            if composed.init_from and not planned_outputs:
                find.find_run(composed.runs, "init_from", composed.init_from)
            config_diff.require_same_config(Path(composed.run_dir), app.to_yaml(composed), composed.run)
    except UserError as error:
        raise error.within(f"stage {stage}" if stage else "") from error


def _run_action(config: SubmitConfig, overrides: list[str]) -> None:
    if overrides:
        raise UserError(
            f"action={config.action.name} takes run= and runs= only", key=overrides[0], remedy="Leave it out"
        )
    folder = Path(config.runs) / config.run
    records = submission.read_job_records(folder)
    if not records:
        raise UserError(
            f"nothing was submitted under this name in {config.runs} (no {folder / layout.JOBS})",
            key="run",
            value=config.run,
            remedy="Give the run= or the runs= of the submit command",
        )
    if config.action is SubmitAction.logs:
        print(job_status.logs(records, config.lines))
        return
    states = slurm.states([record.id for record in records])
    if config.action is SubmitAction.cancel:
        active = [record for record in records if states[record.id].active]
        slurm.cancel([record.id for record in active])
        names = ", ".join(f"{record.name} (job {record.id})" for record in active)
        print(f"cancelled: {names or 'nothing, no job was active'}")
        return
    print(job_status.status(records, states))


if __name__ == "__main__":
    app.main(submit, __doc__, passes_on=True)
