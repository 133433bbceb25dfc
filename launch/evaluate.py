"""Evaluate a Hugging Face directory: bits per byte of held-out text, multiple choice by likelihood, CMMLU.

    python launch/evaluate.py model=runs/demo/sft/export bits_per_byte.texts.zh=zh.jsonl bits_per_byte.texts.en=en.jsonl
    python launch/evaluate.py model=models/my-llama tasks=[cmmlu] cmmlu.data=cmmlu/ cmmlu.subjects=[anatomy,astronomy]

Appends each task's result to `scores.json` in `out` (default `<model>/eval`), with protocol, options and versions.
"""

from dataclasses import asdict
from pathlib import Path

from fireflyds import app
from fireflyds.config import EvaluateConfig


def evaluate(config: EvaluateConfig) -> None:
    """Evaluates the tasks in order and appends each result to `scores.json`.

    Raises:
        UserError: a task or its data, or the model, is not found.
    """
    # Heavy imports are deferred until the configuration is validated.
    from fireflyds.evaluation.results import FILE, EvaluationResult, append_result, read_results, versions
    from fireflyds.evaluation.scorer import load_evaluated_model
    from fireflyds.evaluation.tasks import load_task, task_options
    from fireflyds.runs.fingerprint import weights_hash

    tasks = {name: load_task(name) for name in config.tasks}
    out = Path(config.out or Path(config.model) / "eval")
    read_results(out)  # refused before hours of evaluation, not after
    model = load_evaluated_model(config)
    prompt = "plain" if model.chat_tokenizer is None else "chat"
    for name, task in tasks.items():
        options = task_options(name, config)
        figures = task.evaluate(model, options, config.limit)
        common_options = {"limit": config.limit, "max_tokens": config.max_tokens, "prompt": prompt}
        result = EvaluationResult(
            task=name,
            model=config.model,
            protocol=task.protocol,
            source=task.source,
            figures=figures,
            options=asdict(options) | common_options,
            complete=config.limit is None and task.covers_all(options),
            weights=weights_hash(Path(config.model)),
            versions=versions(),
        )
        for figure, value in figures.items():
            print(f"{name}.{figure}: {value:.4f}")
        append_result(out, result)
        if not result.complete:
            print(f"note: {name} was evaluated on a subset of its data: not comparable with published figures")
    print(f"wrote {out / FILE}")


if __name__ == "__main__":
    app.main(evaluate, __doc__)
