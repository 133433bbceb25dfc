"""CMMLU with the prompts of haonan-li/CMMLU: the likeliest of A, B, C, D as the next token.

Not the official protocol: a prompt that is too long is cut at its left here, and whole shots are dropped there.
"""

import csv
from itertools import islice
from pathlib import Path

from fireflyds.config import CmmluConfig
from fireflyds.errors import UserError
from fireflyds.evaluation.scorer import EvaluatedModel, continuation_losses
from fireflyds.evaluation.tasks import EvaluationTask

LETTERS = "ABCD"


def evaluate(model: EvaluatedModel, options: CmmluConfig, limit: int | None) -> dict[str, float]:
    """Accuracy by subject; `accuracy` over all questions and `accuracy_mean_of_subjects`, as published figures are."""
    folder = Path(options.data)
    names = sorted(path.stem for path in (folder / "test").glob("*.csv"))
    if not names:
        raise UserError(
            "no test/*.csv there",
            key="cmmlu.data",
            value=f"{options.data!r}",
            remedy="Give the folder of CMMLU with dev/ and test/",
        )
    unknown = sorted(set(options.subjects) - set(names))
    if unknown:
        raise UserError(f"no {unknown[0]!r} in {folder}", key="cmmlu.subjects", remedy=f"Known: {', '.join(names)}")
    results = {
        name: _score_subject(model, folder, name, options.num_shots, limit) for name in options.subjects or names
    }
    correct, total = (sum(result[index] for result in results.values()) for index in (0, 1))
    accuracies = {name: right / questions for name, (right, questions) in results.items()}
    return accuracies | {
        "accuracy": correct / total,
        "accuracy_mean_of_subjects": sum(accuracies.values()) / len(accuracies),
        "chance": 1 / len(LETTERS),
        "questions": total,
    }


def _score_subject(
    model: EvaluatedModel, folder: Path, name: str, num_shots: int, limit: int | None
) -> tuple[int, int]:
    """Right answers and questions."""
    # A letter after the last colon of the prompt, as the model would write it.
    letters = [model.encoder.encode(letter, continues=model.chat_tokenizer is None) for letter in LETTERS]
    header = f"以下是关于{NAMES.get(name, name)}的单项选择题，请直接给出正确答案的选项。\n\n"
    examples = islice(_rows(folder / "dev" / f"{name}.csv"), num_shots)
    shots = "".join(f"{_ask(row)}{row['Answer']}\n\n" for row in examples)
    right = questions = 0
    for row in islice(_rows(folder / "test" / f"{name}.csv"), limit):
        losses = continuation_losses(model, model.prompt_ids(header + shots + _ask(row)), letters)
        right += LETTERS[losses.index(min(losses))] == row["Answer"]
        questions += 1
    if questions == 0:
        raise UserError("no question in it", key=f"{folder}/test/{name}.csv", remedy="Get the file again")
    return right, questions


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def _ask(row: dict[str, str]) -> str:
    choices = "".join(f"{letter}. {row[letter]}\n" for letter in LETTERS)
    return f"题目：{row['Question']}\n{choices}答案是："


# The Chinese subject names of the official prompts.
NAMES = dict(
    pair.split(":")
    for pair in [
        "agronomy:农学",
        "anatomy:解剖学",
        "ancient_chinese:古汉语",
        "arts:艺术学",
        "astronomy:天文学",
        "business_ethics:商业伦理",
        "chinese_civil_service_exam:中国公务员考试",
        "chinese_driving_rule:中国驾驶规则",
        "chinese_food_culture:中国饮食文化",
        "chinese_foreign_policy:中国外交政策",
        "chinese_history:中国历史",
        "chinese_literature:中国文学",
        "chinese_teacher_qualification:中国教师资格",
        "clinical_knowledge:临床知识",
        "college_actuarial_science:大学精算学",
        "college_education:大学教育学",
        "college_engineering_hydrology:大学工程水文学",
        "college_law:大学法律",
        "college_mathematics:大学数学",
        "college_medical_statistics:大学医学统计",
        "college_medicine:大学医学",
        "computer_science:计算机科学",
        "computer_security:计算机安全",
        "conceptual_physics:概念物理学",
        "construction_project_management:建设工程管理",
        "economics:经济学",
        "education:教育学",
        "electrical_engineering:电气工程",
        "elementary_chinese:小学语文",
        "elementary_commonsense:小学常识",
        "elementary_information_and_technology:小学信息技术",
        "elementary_mathematics:初等数学",
        "ethnology:民族学",
        "food_science:食品科学",
        "genetics:遗传学",
        "global_facts:全球事实",
        "high_school_biology:高中生物",
        "high_school_chemistry:高中化学",
        "high_school_geography:高中地理",
        "high_school_mathematics:高中数学",
        "high_school_physics:高中物理学",
        "high_school_politics:高中政治",
        "human_sexuality:人类性行为",
        "international_law:国际法学",
        "journalism:新闻学",
        "jurisprudence:法理学",
        "legal_and_moral_basis:法律与道德基础",
        "logical:逻辑学",
        "machine_learning:机器学习",
        "management:管理学",
        "marketing:市场营销",
        "marxist_theory:马克思主义理论",
        "modern_chinese:现代汉语",
        "nutrition:营养学",
        "philosophy:哲学",
        "professional_accounting:专业会计",
        "professional_law:专业法学",
        "professional_medicine:专业医学",
        "professional_psychology:专业心理学",
        "public_relations:公共关系",
        "security_study:安全研究",
        "sociology:社会学",
        "sports_science:体育学",
        "traditional_chinese_medicine:中医中药",
        "virology:病毒学",
        "world_history:世界历史",
        "world_religions:世界宗教",
    ]
)


TASK = EvaluationTask(
    protocol="cmmlu_letter_likelihood_left_cut",
    source="prompts of https://github.com/haonan-li/CMMLU; prompts that are too long are cut at their left",
    evaluate=evaluate,
    covers_all=lambda options: not options.subjects,
)
