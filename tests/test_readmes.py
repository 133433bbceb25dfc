"""The READMEs agree with the code: commands, links, file lists, and figures quoted from benchmark results."""

import functools
import re
import shlex
import shutil
from collections.abc import Iterator
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import NamedTuple

import pytest
from links import ROOT, broken_links, markdown_files, slug, split_fences

from fireflyds import app
from fireflyds.config import VERBS, SubmitAction
from fireflyds.errors import UserError

READMES = sorted(
    str(path.relative_to(ROOT))
    for path in markdown_files()
    if path.name.startswith("README") or path.name == "CONTRIBUTING.md"
)
# READMEs in which the extraction of commands must match.
READMES_WITH_COMMANDS = (
    "README.md",
    "README.zh.md",
    "launch/README.md",
    "launch/README.zh.md",
    "fireflyds/cluster/README.md",
)
# Model directories that the examples name without a folder.
MODELS = ("llama-2-7b", "llama-2-7b-zh")
# Keys that `...` stands for.
ELLIPSIS = {
    "train": ("run=cpt", "model=models/llama", "data=stores/cpt", "optim.steps=1000", "global_batch_size=64"),
    "export": ("run=cpt",),
}
PACKAGES = sorted(path.parent.name for path in (ROOT / "fireflyds").glob("*/__init__.py"))
# Folders in which every file is an entry of the same kind; a README names the folder only.
REGISTRIES = (
    "data/formats",
    "data/templates",
    "evaluation/tasks",
    "models/convert/layouts",
    "models/families",
    "optim/optimizers",
    "train/objectives",
)
SOURCES = ("benchmarks", "fireflyds", "kernels", "launch", "tests")
RESULTS = ROOT / "benchmarks" / "results"


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _fences(text: str) -> list[str]:
    """The contents of the fenced code blocks of a Markdown text."""
    blocks: list[list[str]] = []
    inside = False
    for _, line, in_fence in split_fences(text):
        if in_fence and not inside:
            blocks.append([])
        elif in_fence and not re.match(r" {0,3}(```|~~~)", line):
            blocks[-1].append(line)
        inside = in_fence
    return ["\n".join(block) for block in blocks]


def _prose(text: str) -> str:
    return "\n".join("" if in_fence else line for _, line, in_fence in split_fences(text))


def _code(text: str) -> Iterator[str]:
    """Yields the lines of fenced code blocks, with continuations joined, and the inline code."""
    for block in _fences(text):
        yield from re.sub(r"\\\n\s*", "", block).splitlines()
    for span in re.findall(r"(?<!`)`((?:[^`\n]|\n(?!\s*\n))+)`(?!`)", _prose(text)):
        yield " ".join(span.split())


def _commands(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """The commands of a text that start a verb: its name, and its arguments with placeholders filled."""
    commands = []
    for code in _code(text):
        match = re.search(r"(.*?\s)?launch/(\w+)\.py((?:\s.*)?)$", code)
        if not match or not (match[1] or "=" in match[3]):
            continue
        verb, arguments = match[2], re.sub(r"<[^<>]*>", "name", match[3])
        words = shlex.split(arguments, comments=True)
        if "..." in words or "…" in words:
            words = [word for word in words if word not in ("...", "…")]
            inner_verb = next((word.partition("=")[2] for word in words if word.startswith("verb=")), verb)
            known_keys = {word.partition("=")[0] for word in words}
            words += [word for word in ELLIPSIS.get(inner_verb, ()) if word.partition("=")[0] not in known_keys]
        commands.append((verb, tuple(words)))
    return commands


@functools.cache
def _error(verb: str, overrides: tuple[str, ...]) -> str:
    """The error of a command's keys and values; empty without one."""
    try:
        if verb not in VERBS:
            return "no such verb"
        if verb in ("submit", "sweep"):
            verb_overrides, other_overrides = app.split(verb, list(overrides))
            config = app.compose(verb, verb_overrides)
            run = f"run={config.run}" if verb == "submit" else f"run={config.study}/trial-0000"
            if verb == "submit" and (config.action is not SubmitAction.submit or config.road):
                if config.road:
                    app.option("road", config.road)
                return f"{other_overrides[0]}: no such key for submit" if other_overrides else ""
            train_config = app.compose(config.verb if verb == "submit" else "train", [*other_overrides, run])
            train_config.accumulation_steps(config.cluster.world_size)
        elif overrides not in (("-h",), ("--help",)):
            app.compose(verb, list(overrides))
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def example_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with the models of the examples; option files that a README shows are in its `conf`."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(ROOT / "conf", folder / "conf")
    for name in READMES:
        for block in _fences(_read(name)):
            if title := re.match(r"# (conf/\S+\.yaml)\n", block):
                (folder / title[1]).write_text(block, encoding="utf-8")
    for model in MODELS:
        (folder / model).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "CONF", folder / "conf")
        patch.chdir(folder)
        yield folder
    _error.cache_clear()


@pytest.mark.usefixtures("example_folder")
@pytest.mark.parametrize("name", READMES)
def test_commands_compose(name: str) -> None:
    commands = _commands(_read(name))
    assert commands or name not in READMES_WITH_COMMANDS
    errors = [
        f"{verb} {shlex.join(overrides)}: {error}" for verb, overrides in commands if (error := _error(verb, overrides))
    ]
    assert not errors, "\n".join(errors)


@pytest.mark.usefixtures("example_folder")
@pytest.mark.parametrize(
    "text",
    [
        "`python launch/train.py run=a model=x/y data=a/b optim.step=1`",
        "`python launch/export.py`",
        "```\ndeepspeed --num_gpus 4 launch/train.py run=a model=x/y \\\n  data=demo_ctp ...\n```",
        "`launch/trian.py run=a`",
        "`python launch/submit.py verb=train ... cluster=slum`",
        "`python launch/submit.py verb=train ... cluster=slurm sed=1`",
        "`python launch/submit.py action=status run=cpt seed=1`",
        "`python launch/submit.py road=demmo cluster=slurm`",
        "`python launch/submit.py verb=train ... cluster=slurm cluster.nodes=3 global_batch_size=128`",
        "`python launch/sweep.py study=lr sweep=lr experiment=demo_sfft cluster=local`",
        "`python launch/export.py\nrun=<run> whta=adapter`",
    ],
)
def test_wrong_commands_are_detected(text: str) -> None:
    ((verb, overrides),) = _commands(text)
    assert _error(verb, overrides)


@pytest.mark.parametrize("name", READMES)
def test_make_targets_exist(name: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", _read("Makefile"), re.MULTILINE))
    quoted_targets = {
        match[1] for code in _code(_read(name)) if (match := re.match(r"(?:\$ )?make ([a-z][\w-]*)", code))
    }
    assert quoted_targets <= targets
    assert quoted_targets or name not in ("README.md", "README.zh.md")


def test_links_resolve() -> None:
    broken = broken_links(markdown_files())
    assert not broken, "\n".join(broken)


def test_broken_links_are_detected(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A `b_c`, d\n\n# 中文：标题\n\n# A `b_c`, d\n\n```\n# no heading\n```\n")
    valid_links = (
        "[a](there.md) ![b](<there.md>) [c](there.md#a-b_c-d) [d](/there.md#a-b_c-d-1) [e](there.md#中文标题)\n"
    )
    ignored_links = "`[a](b)` [c](https://example.org/d)\n```\n[e](f)\n```\n"
    invalid_links = (
        '[a](gone.md) ![b](gone.png "title")\n[c]: gone/\n<img src="gone.svg">\n[d](there.md#no-heading) [e](#f)\n'
    )
    page = tmp_path / "page.md"
    page.write_text(valid_links + ignored_links + invalid_links, encoding="utf-8")
    assert broken_links([page], tmp_path) == [
        "page.md:6: gone.md",
        "page.md:6: gone.png",
        "page.md:7: gone/",
        "page.md:8: gone.svg",
        "page.md:9: there.md#no-heading",
        "page.md:9: #f",
    ]
    assert slug("[Links](a.md), *stars* and what's C++?") == "links-stars-and-whats-c"


@pytest.mark.parametrize("package", PACKAGES)
def test_package_readmes_name_every_file(package: str) -> None:
    folder = ROOT / "fireflyds" / package
    text = (folder / "README.md").read_text(encoding="utf-8")
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        entries = name.parent.as_posix()
        if path.name != "__init__.py":
            registry = f"{package}/{entries}" in REGISTRIES
            assert f"`{entries}/`" in text if registry else f"`{name}`" in text, name


@pytest.mark.parametrize("name", READMES)
def test_files_that_readmes_name_exist(name: str) -> None:
    folder = (ROOT / name).parent
    for code in _code(_read(name)):
        for file in re.findall(r"(?<![\w./<>*{}-])[\w./<>*{}-]+\.py\b", code):
            if "<" in file or "{" in file:
                continue
            # A plain name may be that of a file in any folder below; a path starts at the README or at the root.
            folders = [folder] if folder.parent == ROOT / "fireflyds" else [ROOT / source for source in SOURCES]
            nested = [] if "/" in file else [path for parent in folders for path in parent.rglob(file)]
            assert nested or any(any(parent.glob(file)) for parent in (folder, ROOT, ROOT / "fireflyds")), file


class Claim(NamedTuple):
    """Figures of a README, and the measurements that they quote. Each group of the patterns is one number."""

    readme: str
    quote: str
    result: str
    measured: str
    divided_by: str = ""
    """Pattern of the measurements that those of `measured` are divided by."""


HEAD = r"\| {} \|(?:[^|]*\|){{2}} ([\d.]+)×"
STEP = r"\| transformers, {} \|(?:[^|]*\|){{3}} ([\d.]+)×"
TRAINER = r"\| {} \|(?:[^|]*\|){{3}} ([\d.]+)×"
PAIR = r" \| ([\d.]+)× / ([\d.]+)×"
CLAIMS = [
    Claim("kernels/README.md", r"dense mask through SDPA" + PAIR, "kernels", HEAD.format("dense mask, SDPA")),
    Claim("kernels/README.md", r"eager attention.*" + PAIR, "kernels", HEAD.format("dense mask, eager")),
    Claim("kernels/README.md", r"35 % of the rows.*\| eager" + PAIR, "kernels", HEAD.format(r"35% \| eager")),
    Claim("kernels/README.md", r"linear_cross_entropy`" + PAIR, "kernels", HEAD.format(r"35% \| torch F.*?")),
    Claim("kernels/README.md", r"cut-cross-entropy.*" + PAIR, "kernels", HEAD.format(r"35% \| cut-cross.*?")),
    Claim("kernels/README.md", r"all rows labelled.*\| eager" + PAIR, "kernels", HEAD.format(r"100% \| eager")),
    Claim(
        "kernels/README.md",
        r"with ([\d.]+) / ([\d.]+) of its memory",
        "kernels",
        r"\| 100% \| ours \|.*\| (\d+) \|",
        divided_by=r"\| 100% \| eager \|.*\| (\d+) \|",
    ),
    Claim("kernels/README.md", r"transformers, packed" + PAIR, "kernels", STEP.format("packed by position_ids")),
    Claim("kernels/README.md", r"transformers, padded" + PAIR, "kernels", STEP.format("padded")),
    Claim(
        "launch/README.md",
        r"([\d.]+) to ([\d.]+) times as fast as transformers' own packed step",
        "kernels",
        STEP.format("packed by position_ids"),
    ),
    Claim("launch/README.md", r"([\d.]+) to ([\d.]+) times as fast as its padded", "kernels", STEP.format("padded")),
    Claim(
        "launch/README.md",
        r"([\d.]+) to ([\d.]+) times as long padded",
        "train",
        TRAINER.format("HF Trainer, padded"),
    ),
    Claim(
        "launch/README.md",
        r"([\d.]+) to ([\d.]+) times packed",
        "train",
        TRAINER.format("HF Trainer, packed by position_ids"),
    ),
    Claim(
        "launch/README.md",
        r"TRL's SFTTrainer ([\d.]+) to ([\d.]+) times",
        "train",
        TRAINER.format("TRL SFTTrainer, packing bfd"),
    ),
    Claim(
        "fireflyds/data/README.md",
        r"rows ([\d.]+) % full, 10 M documents in ([\d.]+) s",
        "data",
        r"packing 10 M lengths, ([\d.]+)% full \|[^|]*\| ([\d.]+) s",
    ),
]


def _result(topic: str) -> Path:
    """The newest result file of a topic on the CPU."""
    return max(RESULTS.glob(f"{topic}_cpu*.md"), key=lambda path: path.stem.rsplit("_", 1)[-1])


def _numbers(pattern: str, text: str) -> list[Decimal]:
    """The groups of all matches in order."""
    return [Decimal(group.replace(",", "")) for match in re.finditer(pattern, text) for group in match.groups()]


def _rounded(value: Decimal, quoted: Decimal) -> Decimal:
    """The value with as many decimals as `quoted`."""
    return value.quantize(quoted, ROUND_HALF_UP)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.readme}:{claim.quote[:40]}")
def test_quoted_figures_equal_benchmark_results(claim: Claim) -> None:
    quoted = _numbers(claim.quote.replace(" ", r"\s+"), _read(claim.readme))
    measurements = _result(claim.result).read_text(encoding="utf-8")
    measured = _numbers(claim.measured, measurements)
    if claim.divided_by:
        measured = [a / b for a, b in zip(measured, _numbers(claim.divided_by, measurements), strict=True)]
    if " to " in claim.quote:
        measured = [min(measured), max(measured)]
    assert len(quoted) == len(measured) == 2
    assert quoted == [_rounded(value, quoted_value) for value, quoted_value in zip(measured, quoted, strict=True)]


def _measured_ratios(file: Path) -> list[Decimal]:
    """The ratios in the tables of a result file, without the column of required ones."""
    all_ratios: list[Decimal] = []
    header: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        header = (header or cells) if line.startswith("|") else []
        ratios = [cell for name, cell in zip(header, cells, strict=True) if name != "asked"] if header else []
        all_ratios += [Decimal(cell[:-1]) for cell in ratios if re.fullmatch(r"[\d.]+×", cell)]
    return all_ratios


RATIO = re.compile(r"([\d.]+) ?(?:to|到|至) ?([\d.]+) ?(?:times|×|倍)|(\d+\.\d+) ?(?:times|倍)|(\d[\d.]*)×")


def _unsupported_ratios(text: str, results: Path = RESULTS) -> list[str]:
    """Ratios of a text that are not those of the result file linked in the same sentence or, without one, section."""
    unsupported = []
    for section in re.split(r"\n(?=#)", _prose(text)):
        for sentence in re.split(r"(?<=\.) (?=[A-Z])|。|\n\n", section):
            text_of_sentence = " ".join(sentence.split())
            files = re.findall(r"results/(\w+\.md)", sentence) or re.findall(r"results/(\w+\.md)", section)
            measured = [value for file in files for value in _measured_ratios(results / file)]
            for match in RATIO.finditer(text_of_sentence):
                numbers = [Decimal(group) for group in match.groups() if group]
                if not all(number in [_rounded(value, number) for value in measured] for number in numbers):
                    unsupported.append(match[0])
    return unsupported


@pytest.mark.parametrize("name", READMES)
def test_ratios_are_in_the_linked_result_file(name: str) -> None:
    assert not _unsupported_ratios(_read(name))


def test_unsupported_ratios_are_detected(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(
        "| way | faster by | asked |\n|---|---|---|\n| b | 2.46× | 3.5× |\n| c | 4.51× | |\n"
    )
    link = "[figures](results/a.md)"
    assert not _unsupported_ratios(f"It is 2.5 to\n4.5 times as fast ({link}).\n\nAnd 2.46×. 2.5 到 4.5 倍。", tmp_path)
    assert _unsupported_ratios(f"It is 2.5 to 4.6 times as fast ({link}).", tmp_path) == ["2.5 to 4.6 times"]
    assert _unsupported_ratios(f"3.5×, 2.4× {link}", tmp_path) == ["3.5×", "2.4×"]
    assert _unsupported_ratios(f"# A\n{link}\n# B\n打包 2.5 倍", tmp_path) == ["2.5 倍"]


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_main_readmes_are_short(name: str) -> None:
    assert len(_read(name).splitlines()) <= 150


def test_the_main_readmes_have_the_same_commands() -> None:
    english, chinese = (
        [re.sub(r"\s+# .*", "", line) for block in _fences(_read(name)) for line in block.splitlines()]
        for name in ("README.md", "README.zh.md")
    )
    assert len(english) > 10
    assert english == chinese
