"""`openblip docs`: the pages of docs/, which are part of the package, and what errors point to."""

import difflib
import re
import sys
from pathlib import Path
from typing import Annotated

import tyro

from openblip.errors import ConfigError

_INSTALLED, _CLONE = Path(__file__).parents[1] / "docs", Path(__file__).parents[3] / "docs"


def command(page: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[PAGE]")] = "") -> int:
    """Prints a page of the documentation or a section of it; without PAGE, which pages there are.

    Args:
        page: a page such as capfilt, or the section of a heading: data#sources.
    """
    if not page:
        width = max(map(len, _pages()))
        for name, path in _pages().items():
            print(f"  {name:<{width}}  {path.read_text(encoding='utf-8').partition(chr(10))[0].removeprefix('# ')}")
        return 0
    text = read_page(page)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(text))
    else:
        print(text, end="")
    return 0


def read_page(page: str) -> str:
    """A page in Markdown, or a section: "data" or "data#sources". Raises ConfigError for one that is not there."""
    name, _, anchor = page.partition("#")
    path = _pages().get(name.removesuffix(".md"))
    if path is None:
        raise ConfigError(_not_found(f"page {name}", name, list(_pages())))
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if not anchor:
        return "".join(lines)
    headings: list[tuple[str, int, int]] = []  # the anchor, the line, and how deep it is
    in_code = False
    for number, line in enumerate(lines):
        in_code ^= line.startswith("```")
        if not in_code and (found := re.match(r"(#+) (.*)", line)):
            slug = re.sub(r"[^\w\- ]", "", found[2].lower()).strip().replace(" ", "-")
            headings.append((slug, number, len(found[1])))
    place = next(((number, depth) for slug, number, depth in headings if slug == anchor), None)
    if place is None:
        raise ConfigError(_not_found(f"section {anchor} in {name}", anchor, [slug for slug, _, _ in headings]))
    start, deepest = place
    later = [number for _, number, depth in headings if number > start and depth <= deepest]
    return "".join(lines[start : min(later, default=len(lines))])


def _pages() -> dict[str, Path]:
    """The pages by name: those of the package or, without, of the clone that it runs from."""
    folder = _INSTALLED if _INSTALLED.is_dir() else _CLONE
    files = (file for file in sorted(folder.glob("*.md")) if file.read_text(encoding="utf-8").startswith("# "))
    return {file.stem: file for file in files}


def _not_found(what: str, name: str, there: list[str]) -> str:
    close = difflib.get_close_matches(name, there, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(there)}"
    return f"the documentation has no {what}; {hint}"
