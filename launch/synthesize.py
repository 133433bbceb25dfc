"""Write the demo's corpus: documents in Chinese and English, dialogues, and questions that the documents answer.

    python launch/synthesize.py out=runs/demo/corpus
    python launch/synthesize.py out=runs/demo/corpus corpus=my_texts/

The same seed writes identical files. With `corpus`, the user's own text replaces the generated Chinese documents.
"""

import json
import random
from pathlib import Path

from fireflyds import app
from fireflyds.config import SynthesizeConfig
from fireflyds.data.read.sources import read_texts
from fireflyds.data.synthetic.chinese import CHINESE
from fireflyds.data.synthetic.corpus import dialogues, questions, split_facts, write_jsonl, write_language
from fireflyds.data.synthetic.english import ENGLISH
from fireflyds.data.synthetic.world import build_world
from fireflyds.errors import UserError
from fireflyds.fs import Output, atomic_dir

# Every n-th document of the user's own text is held out.
HELDOUT_EVERY = 20


def synthesize(config: SynthesizeConfig) -> None:
    """Writes the corpus of the demo and prints the size of each file.

    Raises:
        UserError: the world is too small for the options, or `corpus` has one document only.
    """
    rng = random.Random(config.seed)
    worlds = {lang.code: build_world(lang, config.num_entities, rng) for lang in (CHINESE, ENGLISH)}
    question_facts, dialogue_facts = split_facts(worlds["zh"], config.num_questions, rng)
    user_texts = list(read_texts(config.corpus)) if config.corpus else []
    if len(user_texts) == 1:
        raise UserError(
            "one document only; at least 2 are needed, to train and to evaluate on",
            key="corpus",
            value=config.corpus,
            remedy="A .txt file has one document per line",
        )
    with atomic_dir(Path(config.out), Output("synthesize")) as out:
        for language, num_bytes in ((CHINESE, config.zh_bytes), (ENGLISH, config.en_bytes)):
            world = worlds[language.code]
            write_language(language, world, out, num_bytes=num_bytes, heldout=config.heldout_documents, rng=rng)
        if user_texts:
            write_jsonl(out / "zh_heldout.jsonl", ({"text": text} for text in user_texts[::HELDOUT_EVERY]))
            write_jsonl(
                out / "zh.jsonl", ({"text": text} for index, text in enumerate(user_texts) if index % HELDOUT_EVERY)
            )
        dialogue_rows = [*dialogues(CHINESE, dialogue_facts, rng)]
        english_facts = [fact for entity in worlds["en"] for fact in entity.facts]
        dialogue_rows += dialogues(ENGLISH, english_facts[: len(dialogue_facts) // 3], rng)
        rng.shuffle(dialogue_rows)
        write_jsonl(out / "dialogues.jsonl", dialogue_rows)
        write_jsonl(out / "questions.jsonl", questions(question_facts, rng))
        sizes = {file.name: file.stat().st_size for file in sorted(out.glob("*.jsonl"))}
        metadata = {"seed": config.seed, "own_text": config.corpus or None, "bytes": sizes}
        (out / "about.json").write_text(json.dumps(metadata, ensure_ascii=False, indent=2), encoding="utf-8")
    for name, size in sizes.items():
        print(f"{config.out}/{name}: {size:,} bytes")


if __name__ == "__main__":
    app.main(synthesize, __doc__)
