"""Tokenize raw text and dialogues into a token store.

    python launch/prepare.py data=corpus.jsonl tokenizer=models/llama-2-7b-zh out=stores/cpt
    python launch/prepare.py data=demo_cpt tokenizer=runs/demo/expanded
    python launch/prepare.py data='dialogues/*.json' tokenizer=models/llama-2-7b-zh template=llama2 out=stores/sft
    python launch/prepare.py data=corpus.jsonl tokenizer=models/llama-2-7b-zh inspect=3
    python launch/prepare.py out=stores/cpt stats=only

`data` is a file, a folder, a glob, or an option of `conf/data`. The same command resumes after a kill, and
rebuilds only the parts that a changed source, tokenizer or template affects. On several machines that share a file
system: `submit verb=prepare cluster.nodes=8`, or srun or torchrun with one process a machine; a lost machine's parts
are made by the others.
"""

import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fireflyds import app, registry
from fireflyds.config import PrepareConfig, StatsMode
from fireflyds.data import show
from fireflyds.data.chat_template import AUTO, DATE, OWN, TEMPLATES, find_template, resolve
from fireflyds.data.encode import sample_dialogues, stop_id
from fireflyds.data.read.files import describe_folder
from fireflyds.data.store.build import finish_store, make_parts, refuse_rejected_share, store_provenance
from fireflyds.data.store.many_machines import Leader, follow
from fireflyds.data.store.parts import plan_tasks
from fireflyds.data.store.store import MANIFEST, TokenStore, read_manifest
from fireflyds.distributed.launcher_env import rank_from_environment
from fireflyds.errors import UserError
from fireflyds.fs import Output, refuse_inputs_inside, resumable_dir
from fireflyds.tokenizer.auto_tokenizer import compare
from fireflyds.tokenizer.encoder import load_encoder
from fireflyds.types import Encoder


def prepare(config: PrepareConfig) -> None:
    """Writes the token store, or prints samples (`inspect`) or statistics (`stats=only`).

    Raises:
        UserError: a source, the tokenizer or `out` is missing or unusable, or too many rows are unreadable.
    """
    out = Path(config.out or config.data.store)
    if config.stats is StatsMode.only:
        print_stats(out)
        return
    if not config.data.sources:
        raise UserError(
            "is empty",
            key="data.sources",
            remedy="Give data=<file, folder or glob>, or an option of conf/data that lists sources",
        )
    if not config.tokenizer:
        raise UserError("is not set; prepare needs it", key="tokenizer", remedy="Give tokenizer=<directory or .model>")
    registry.require(TEMPLATES, config.template, "template", also=(AUTO, OWN))
    encoder = load_encoder(config.tokenizer)
    config = with_template(config, encoder)
    for source in config.data.sources:
        for line in describe_folder(Path(source.path)) if Path(source.path).is_dir() else []:
            print(line, file=sys.stderr, flush=True)
    if config.inspect:
        show.print_samples(config, encoder)
        return
    if out == Path():
        raise UserError("is empty and data.store too", key="out", remedy="Give out=<folder>")
    refuse_overlap(config, out)
    place = rank_from_environment(os.environ)
    load = functools.partial(load_encoder, config.tokenizer)
    if place.rank:
        follow(config, out, load, place.rank, place.world_size)
        return
    with Leader(config, out, place.world_size) as leader:
        write_store(config, encoder, out, leader)


def write_store(config: PrepareConfig, encoder: Encoder, out: Path, leader: Leader) -> None:
    """Writes the token store at `out`, with the other processes where there are several."""
    for line in tokenizer_notes(config, encoder):
        print(f"note: {line}", file=sys.stderr, flush=True)
    tasks = plan_tasks(config, encoder.fingerprint())
    made_from = store_provenance(config, encoder, tasks)
    if is_whole(out) and read_manifest(out)["made_from"] == made_from:
        refuse_rejected_share(config, read_manifest(out)["totals"])
        print(f"{out}: complete and made from the same sources, tokenizer and template; nothing to do")
        return
    with resumable_dir(out, Output("prepare", caches=("plans", "stats.png")), pieces="parts") as folder:
        load, earlier = functools.partial(load_encoder, config.tokenizer), out / "parts"
        if leader.is_alone:
            infos = make_parts(config, tasks, load, folder / "parts", earlier, made_from)
        else:
            infos = leader.make_parts(tasks, load, folder / "parts", earlier, made_from)
        manifest = finish_store(config, tasks, infos, encoder, folder, made_from)
    print(show.format_manifest(manifest))
    totals = manifest["totals"]
    print(
        f"wrote {out}: {totals['documents']:,} documents, {totals['tokens']:,} tokens, {totals['bytes']:,} bytes, "
        f"{totals['dropped']:,} dropped, {totals['rejected']:,} rejected"
    )
    if totals["rejected"]:
        print(f"rejected rows, with file, line and reason: {out / 'rejected.jsonl'}", file=sys.stderr)


def tokenizer_notes(config: PrepareConfig, encoder: Encoder) -> Iterator[str]:
    """Yields how transformers reads the tokenizer otherwise, and whether it lacks characters."""
    chat = find_template(encoder, config.template)
    if Path(config.tokenizer).is_dir():
        difference = compare(Path(config.tokenizer), encoder, sample_dialogues(encoder, chat))
        if difference:
            yield f"{difference}. The ids here are those of the files; export writes them such that both agree"
    if "strftime_now" in chat.jinja:
        yield f"the chat template writes the current date; here it is always {DATE}, so that a row has the same tokens"
    if config.template == OWN and stop_id(encoder, chat) is None:
        yield "the chat template puts no end token behind the last answer: a model trained on it may not stop"
    if encoder.unknown_id is not None:
        yield f"{config.tokenizer} has no byte fallback: what it lacks becomes {encoder.token(encoder.unknown_id)}"


def with_template(config: PrepareConfig, encoder: Encoder) -> PrepareConfig:
    """Returns the configuration with the chat template that `auto` stands for; tells where the base has another."""
    if config.template == AUTO:
        return replace(config, template=resolve(encoder, AUTO))
    if config.template != OWN and encoder.chat_template is not None:
        own, built_in = (sample_dialogues(encoder, find_template(encoder, name)) for name in (OWN, config.template))
        if own != built_in:
            print(
                f"note: {config.tokenizer} has a chat template of its own, which renders dialogues otherwise than "
                f"template={config.template}; template=tokenizer trains it",
                file=sys.stderr,
                flush=True,
            )
    return config


def is_whole(out: Path) -> bool:
    """True where there is a store at `out` that can be opened; otherwise prints what is damaged."""
    if not (out / MANIFEST).exists():
        return False
    try:
        TokenStore(out)
    except UserError as error:
        print(f"{error.finding}; it is made again", file=sys.stderr, flush=True)
        return False
    return True


def refuse_overlap(config: PrepareConfig, out: Path) -> None:
    """Raises `UserError` if the store would replace one of its inputs or lies inside a source folder."""
    paths = {f"data.sources.{number}.path": source.path for number, source in enumerate(config.data.sources)}
    refuse_inputs_inside(out, tokenizer=config.tokenizer, **paths)
    for name, path in paths.items():
        if Path(path).is_dir() and Path(path).resolve() in out.resolve().parents:
            raise UserError(
                f"is inside {name}={path}, and would be read as text",
                key="out",
                value=out,
                remedy="Give another folder",
            )


def print_stats(out: Path) -> None:
    """Prints the statistics of the store at `out` and plots its document lengths in `stats.png`."""
    store = TokenStore(out)
    print(show.format_manifest(store.manifest))
    print(show.histogram(store))
    show.plot_lengths(store, out / "stats.png")
    print(f"wrote {out / 'stats.png'}")


if __name__ == "__main__":
    app.main(prepare, __doc__)
