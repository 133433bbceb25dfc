"""Finds links of the repository's Markdown files whose target does not exist.

    python tests/support/links.py

Prints one line `file:line: link` for each broken link, and exits with 1 if there are any. Checked are links, images,
link definitions and HTML attributes with a relative target: the file must exist, and an anchor must be that of a
heading (or an HTML `id` or `name`) of the file. Links to other hosts are not followed.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
INLINE_CODE = re.compile(r"(`+)(?!`)(?:(?!\1).)+?\1(?!`)")
LINK = re.compile(r"\]\(\s*(?:<([^>]*)>|([^\s()]*(?:\([^\s()]*\)[^\s()]*)*))(?:\s+[\"'(][^)]*)?\s*\)")
DEFINITION = re.compile(r" {0,3}\[[^\]^][^\]]*\]:\s*<?([^\s>]+)>?")
ATTRIBUTE = re.compile(r"<[^>]*\b(?:href|src)=[\"']([^\"']+)[\"']")
ANCHOR = re.compile(r"<[^>]*\b(?:id|name)=[\"']([^\"']+)[\"']")
HEADING = re.compile(r" {0,3}#{1,6}\s+(.*?)(?:\s+#+)?\s*$")


def markdown_files(root: Path = ROOT) -> list[Path]:
    """The Markdown files below `root` that git does not ignore. Without git: all but those in caches and in `runs`."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"]
    try:
        names = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")) - {""}
    except (OSError, subprocess.CalledProcessError):
        # No git, no repository, or one of another owner.
        paths = [path.relative_to(root) for path in root.rglob("*.md")]
        names = {str(path) for path in paths if not any(_is_ignored(part) for part in path.parts)}
    return [root / name for name in sorted(names) if (root / name).is_file()]


def _is_ignored(folder: str) -> bool:
    return folder in ("runs", "build", "__pycache__") or (folder.startswith(".") and folder not in (".github", ".ci"))


def split_fences(text: str) -> Iterator[tuple[int, str, bool]]:
    """Yields the number and the text of each line, and whether it belongs to a fenced code block."""
    fence = ""
    for number, line in enumerate(text.splitlines(), start=1):
        mark = FENCE.match(line)
        if fence:
            yield number, line, True
            if mark and mark[1].startswith(fence) and not line.strip(" `~"):
                fence = ""
        else:
            fence = mark[1] if mark else ""
            yield number, line, bool(mark)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    text = re.sub(r"(?<!\w)_+([^_]+)_+(?!\w)", r"\1", text)
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """The anchors of a Markdown text. A repeated heading gets a number."""
    names: set[str] = set()
    for _, line, in_fence in split_fences(text):
        if in_fence:
            continue
        names |= set(ANCHOR.findall(line))
        if heading := HEADING.match(line):
            name = base = slug(heading[1])
            count = 0
            while name in names:
                count += 1
                name = f"{base}-{count}"
            names.add(name)
    return names


def links(text: str) -> Iterator[tuple[int, str]]:
    """Yields the line number and the target of each link of a Markdown text."""
    for number, line, in_fence in split_fences(text):
        if in_fence:
            continue
        # Link texts may contain code; only what is outside of it can be a link.
        bare = INLINE_CODE.sub("code", line)
        for match in LINK.finditer(bare):
            yield number, match[1] or match[2] or ""
        for pattern in (DEFINITION, ATTRIBUTE):
            for match in pattern.finditer(bare):
                yield number, match[1]


def is_broken(file: Path, link: str, root: Path = ROOT) -> bool:
    """Whether a link of `file` points to nothing in the checkout at `root`."""
    if re.match(r"[a-z][a-z0-9+.-]*:|//", link, re.IGNORECASE):
        return False
    name, _, anchor = unquote(link).partition("#")
    target = file if not name else (root / name[1:] if name.startswith("/") else file.parent / name)
    if not link or not target.exists() or not target.resolve().is_relative_to(root.resolve()):
        return True
    return bool(anchor) and target.suffix == ".md" and anchor not in anchors(target.read_text(encoding="utf-8"))


def broken_links(files: list[Path], root: Path = ROOT) -> list[str]:
    """One entry `file:line: link` for each broken link of the files."""
    return [
        f"{file.relative_to(root)}:{number}: {link}"
        for file in files
        for number, link in links(file.read_text(encoding="utf-8"))
        if is_broken(file, link, root)
    ]


def main() -> int:
    links_without_target = broken_links(markdown_files())
    print("\n".join(links_without_target), end="\n" if links_without_target else "")
    return 1 if links_without_target else 0


if __name__ == "__main__":
    sys.exit(main())
