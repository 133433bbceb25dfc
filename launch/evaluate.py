"""Evaluate a Hugging Face directory: bits per byte of held-out text, multiple choice by likelihood, CMMLU.

    python launch/evaluate.py model=runs/demo/sft/export tasks=[bits_per_byte] texts.zh=zh.jsonl texts.en=en.jsonl
    python launch/evaluate.py model=models/my-llama tasks=[cmmlu] cmmlu=cmmlu/ subjects=[anatomy,astronomy]

Writes `scores.json` into `out` (default `<model>/eval`).
"""

import json
from pathlib import Path

from fireflyds import app, registry
from fireflyds.config import EvaluateConfig
from fireflyds.fs import atomic_write_text

TASKS = "fireflyds.evaluation.tasks"


def evaluate(config: EvaluateConfig) -> None:
    tasks = {name: registry.find(TASKS, name) for name in config.tasks}
    from fireflyds.evaluation.scorer import load_evaluated_model

    subject = load_evaluated_model(config)
    scores: dict[str, dict[str, float]] = {}
    for name, task in tasks.items():
        scores[name] = task.evaluate(subject, config)
        for figure, value in scores[name].items():
            print(f"{name}.{figure}: {value:.4f}")
    out = Path(config.out or Path(config.model) / "eval")
    out.mkdir(parents=True, exist_ok=True)
    prompt = "chat" if subject.chat is not None else "plain"
    document = {"model": config.model, "prompt": prompt, "scores": scores}
    atomic_write_text(out / "scores.json", json.dumps(document, ensure_ascii=False, indent=2))
    print(f"wrote {out / 'scores.json'}")


if __name__ == "__main__":
    app.main(evaluate, __doc__)
