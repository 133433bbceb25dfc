"""Run the demo pipeline on this machine, from a base model to a better Chinese model, and check the figures.

    python launch/demo.py
    python launch/demo.py corpus=my_texts/

Writes `report.md`, `loss.png` and `summary.json` into the pipeline's folder. The same command resumes where it stopped
and skips complete stages. The exit code is not 0 if a stage or a check of the figures fails.
"""

import hashlib
import json
from pathlib import Path

from fireflyds import app
from fireflyds.config import DemoConfig
from fireflyds.data.read.files import find_files
from fireflyds.errors import UserError
from fireflyds.fs import atomic_write_text
from fireflyds.metrics.plots import plot_loss
from fireflyds.pipelines import demo_report
from fireflyds.pipelines.stage_runner import PipelineRunner
from fireflyds.runs import layout
from fireflyds.runs.jsonl import read_jsonl


def demo(config: DemoConfig) -> None:
    """Runs the stages of the pipeline, writes the report and prints its figures.

    Raises:
        UserError: a stage failed, or a check of the figures did.
    """
    # The stages depend on the options, so a changed option reruns them.
    seed_hash = hashlib.sha256(app.options_hash().encode())
    if config.corpus:
        config.road.stages[0].overrides.append(f"corpus={config.corpus}")
        for file in find_files(config.corpus):
            seed_hash.update(file.read_bytes())
    runner = PipelineRunner(config.road, seed_hash.hexdigest())
    runner.run()

    out = Path(config.road.out)
    stages = {
        stage.name: {key: runner.records[stage.name][key] for key in ("seconds", "command")}
        for stage in config.road.stages
    }
    curves = {}
    for stage in config.road.stages:
        if stage.verb == "train":
            curves[stage.name] = list(read_jsonl(out / stage.output / layout.METRICS))
            stages[stage.name] |= demo_report.training(curves[stage.name])
    figures = demo_report.figures(out)
    checks = demo_report.checks(figures, own_text=bool(config.corpus))
    plot_loss(curves, out / "loss.png")
    atomic_write_text(out / "report.md", demo_report.report(stages, figures, checks))
    atomic_write_text(
        out / "summary.json", json.dumps({"stages": stages, "figures": figures}, indent=2, ensure_ascii=False)
    )
    print("", demo_report.table(figures), "", sep="\n")
    for check in checks:
        print(f"{'passed' if check.passed else 'FAILED'}: {check.rule} ({check.value})")
    print(f"\nstages: {sum(stage['seconds'] for stage in stages.values()):.0f} s. Report: {out / 'report.md'}")
    failed = [check.rule for check in checks if not check.passed]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(checks)} checks failed: {'; '.join(failed)}",
            key=config.road.name,
            remedy=f"See {out / 'report.md'}",
        )


if __name__ == "__main__":
    app.main(demo, __doc__)
