"""Write the demo's corpus: documents in Chinese and English, dialogues, and questions whose answers the documents teach.

    python launch/synthesize.py out=runs/demo/corpus
    python launch/synthesize.py out=runs/demo/corpus corpus=my_texts/

The same seed writes the same bytes. With `corpus`, a person's own text stands in for the generated Chinese documents.
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

# One document in so many of a person's own text is held out.
HELDOUT_EVERY = 20


def synthesize(config: SynthesizeConfig) -> None:
    rng = random.Random(config.seed)
    try:
        worlds = {each.code: build_world(each, config.num_entities, rng) for each in (CHINESE, ENGLISH)}
        asked, told = split_facts(worlds["zh"], config.num_questions, rng)
    except ValueError as error:
        raise UserError(str(error)) from error
    own = list(read_texts(config.corpus)) if config.corpus else []
    if len(own) == 1:
        raise UserError(
            f"corpus={config.corpus}: one document only; at least 2 are needed, to train on and to measure on. "
            "A .txt file holds one document a line"
        )
    with atomic_dir(Path(config.out), Output("synthesize")) as out:
        for language, num_bytes in ((CHINESE, config.zh_bytes), (ENGLISH, config.en_bytes)):
            world = worlds[language.code]
            write_language(language, world, out, num_bytes=num_bytes, heldout=config.heldout_documents, rng=rng)
        if own:
            write_jsonl(out / "zh_heldout.jsonl", ({"text": text} for text in own[::HELDOUT_EVERY]))
            write_jsonl(out / "zh.jsonl", ({"text": text} for at, text in enumerate(own) if at % HELDOUT_EVERY))
        talks = [*dialogues(CHINESE, told, rng)]
        english_facts = [fact for entity in worlds["en"] for fact in entity.facts]
        talks += dialogues(ENGLISH, english_facts[: len(told) // 3], rng)
        rng.shuffle(talks)
        write_jsonl(out / "dialogues.jsonl", talks)
        write_jsonl(out / "questions.jsonl", questions(asked, rng))
        sizes = {file.name: file.stat().st_size for file in sorted(out.glob("*.jsonl"))}
        about = {"seed": config.seed, "own_text": config.corpus or None, "bytes": sizes}
        (out / "about.json").write_text(json.dumps(about, ensure_ascii=False, indent=2), encoding="utf-8")
    for name, size in sizes.items():
        print(f"{config.out}/{name}: {size:,} bytes")


if __name__ == "__main__":
    app.main(synthesize, __doc__)
