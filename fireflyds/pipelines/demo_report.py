"""Figures, checks and report of the demo pipeline, from a base model to a Chinese model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fireflyds.evaluation.results import latest_figures
from fireflyds.runs import layout

MODELS = ("base", "unexpanded", "cpt", "sft")


@dataclass(frozen=True, slots=True)
class DemoCheck:
    """A requirement on the pipeline's figures, the measured value and the result."""

    rule: str
    value: str
    passed: bool


def figures(out: Path) -> dict[str, float]:
    """Returns the figures by name, read from the files that the pipeline's stages wrote."""
    scores = {
        name: {
            task: latest_figures(out / name / layout.EXPORT / "eval", task)
            for task in ("bits_per_byte", "multiple_choice")
        }
        for name in MODELS
    }
    tokenizer_stats = _json(out / "expanded" / "report.json")["measured"][-1]
    values = {
        "tokens_per_char_zh_before": tokenizer_stats["before"]["tokens_per_character"],
        "tokens_per_char_zh_after": tokenizer_stats["after"]["tokens_per_character"],
    }
    for language in ("zh", "en"):
        for name in MODELS:
            values[f"bits_per_byte_{language}_{name}"] = scores[name]["bits_per_byte"][language]
    for name in MODELS:
        values[f"accuracy_{name}"] = scores[name]["multiple_choice"]["accuracy"]
    values["accuracy_chance"] = scores["sft"]["multiple_choice"]["chance"]
    values["questions"] = scores["sft"]["multiple_choice"]["questions"]
    differences = [_json(out / name / layout.EXPORT / "export.json")["reload_max_rel_diff"] for name in MODELS]
    values["reload_max_rel_diff"] = max(differences)
    return values


def checks(f: dict[str, float], *, own_text: bool) -> list[DemoCheck]:
    """Returns the checks. Accuracy is left out with the user's own text, which lacks the questions' facts."""
    fall = 1 - f["bits_per_byte_zh_cpt"] / f["bits_per_byte_zh_base"]
    rise = f["bits_per_byte_en_cpt"] / f["bits_per_byte_en_base"] - 1
    fewer = 1 - f["tokens_per_char_zh_after"] / f["tokens_per_char_zh_before"]
    gain = f["accuracy_sft"] - f["accuracy_chance"]
    gap = f["bits_per_byte_zh_cpt"] - f["bits_per_byte_zh_unexpanded"]
    results = [
        DemoCheck("tokens per Chinese character fall by at least 40 %", f"{-fewer:+.1%}", fewer >= 0.40),
        DemoCheck("Chinese bits per byte fall by at least 20 % from base to CPT", f"{-fall:+.1%}", fall >= 0.20),
        DemoCheck("... and end below CPT of the unexpanded base in equal steps", f"{gap:+.3f}", gap < 0),
        DemoCheck("English bits per byte rise by at most 5 % from base to CPT", f"{rise:+.1%}", rise <= 0.05),
        DemoCheck(
            "reloaded logits equal the trained model's to 1e-5",
            f"{f['reload_max_rel_diff']:.1e}",
            f["reload_max_rel_diff"] <= 1e-5,
        ),
    ]
    if not own_text:
        accurate = gain >= 0.15 and f["questions"] >= 200
        results.append(
            DemoCheck(
                "accuracy ends at least 15 points above chance on at least 200 questions",
                f"{100 * gain:+.1f} points",
                accurate,
            )
        )
    return results


def table(f: dict[str, float]) -> str:
    """Returns a Markdown table with one row per model."""
    rows = ["| model | bits per byte, Chinese | bits per byte, English | multiple choice |", "|---|---:|---:|---:|"]
    names = {
        "base": "base",
        "unexpanded": "base, CPT without new pieces",
        "cpt": "expanded, CPT",
        "sft": "expanded, CPT, SFT (QLoRA)",
    }
    for name, title in names.items():
        zh, en, accuracy = f[f"bits_per_byte_zh_{name}"], f[f"bits_per_byte_en_{name}"], f[f"accuracy_{name}"]
        rows.append(f"| {title} | {zh:.3f} | {en:.3f} | {accuracy:.1%} |")
    rows += [
        "",
        f"Chance: {f['accuracy_chance']:.1%} of {f['questions']:.0f} questions. Tokens per Chinese character: "
        f"{f['tokens_per_char_zh_before']:.3f} -> {f['tokens_per_char_zh_after']:.3f}.",
    ]
    return "\n".join(rows)


def training(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Returns losses, steps, tokens and tokens per second of a training stage, from its rows of `metrics.jsonl`."""
    seconds = sum(row["seconds"] for row in rows)
    return {
        "first_loss": rows[0]["loss"],
        "last_loss": rows[-1]["loss"],
        "steps": rows[-1]["step"],
        "tokens": rows[-1]["tokens"],
        "tokens_per_second": round(rows[-1]["tokens"] / seconds, 1),
    }


def report(stages: dict[str, dict[str, Any]], f: dict[str, float], demo_checks: list[DemoCheck]) -> str:
    """Returns the text of `report.md`."""
    lines = ["# From a base model to a Chinese model", "", table(f), "", "![loss](loss.png)", "", "## Checks", ""]
    lines += [f"- {'passed' if check.passed else 'FAILED'}: {check.rule} ({check.value})" for check in demo_checks]
    lines += ["", "## Stages", "", "| stage | seconds | loss | tokens/s | command |", "|---|---:|---|---:|---|"]
    for name, stage in stages.items():
        loss = f"{stage['first_loss']:.3f} -> {stage['last_loss']:.3f}" if "first_loss" in stage else ""
        speed = f"{stage['tokens_per_second']:,.0f}" if "tokens_per_second" in stage else ""
        lines.append(f"| {name} | {stage['seconds']:.1f} | {loss} | {speed} | `{stage['command']}` |")
    total = sum(stage["seconds"] for stage in stages.values())
    return "\n".join([*lines, f"| total | {total:.1f} | | | |", ""])


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
