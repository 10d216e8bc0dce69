"""What the documentation says is so: commands parse, links resolve, versions are pinned, no private paths."""

import importlib
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openblip.cli.main import COMMANDS
from openblip.cli.options import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT_SUFFIXES = {".md", ".py", ".toml", ".txt", ".yaml", ".yml", ".json", ".css", ".html", ".cfg", ""}
# Written in two parts, so that this file does not hold what it looks for.
PRIVATE_PATHS = re.compile("|".join(("/" + "work/", "/" + "tmp/[a-z]", "/" + "root/", "/" + "home/[a-z]")))


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def shell_lines(page: Path) -> Iterator[str]:
    """The lines of the page's ```bash blocks, continued lines joined."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()


def openblip_calls(page: Path) -> Iterator[list[str]]:
    """The words after `openblip` of every call in the page's shell blocks."""
    for line in shell_lines(page):
        for part in re.split(r"&&|\||;", line.split(" #")[0]):
            words = shlex.split(part)
            if words and words[0] == "openblip":
                yield words[1:]


CALLS = [(page_name(page), words) for page in PAGES for words in openblip_calls(page)]


def test_there_are_commands_to_check() -> None:
    documented = {name for _, words in CALLS for name in COMMANDS if words[: len(name.split())] == name.split()}
    assert {"demo", "caption", "match", "capfilt", "train", "bootstrap", "data emoji-scenes"} <= documented


class Parsed(Exception):
    """The options of a command were read."""


@pytest.mark.parametrize(("page", "words"), CALLS, ids=[" ".join(words)[:60] for _, words in CALLS])
def test_a_documented_command_has_these_options(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name = max((name for name in COMMANDS if words[: len(name.split())] == name.split()), key=len, default=None)
    assert name is not None, f"{page}: there is no command `openblip {' '.join(words)}`"
    arguments, prog = words[len(name.split()) :], f"openblip {name}"
    if name in ("train", "bootstrap"):  # they parse for themselves; stopped there, before they work
        module = importlib.import_module(f"openblip.cli.{COMMANDS[name].module}")

        def parse_and_stop(*args: Any, **options: Any) -> None:
            parse(*args, **options)
            raise Parsed

        monkeypatch.setattr(module, "parse", parse_and_stop)
        with pytest.raises(Parsed):
            COMMANDS[name].bind(arguments, prog=prog)()
    else:
        COMMANDS[name].bind(arguments, prog=prog)


def test_the_readme_says_how_to_set_up() -> None:
    lines = list(shell_lines(ROOT / "README.md"))
    assert 'pip install -c constraints.txt -e ".[demo]" && openblip demo' in lines
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in lines


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are formed on code hosts."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_resolve(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert broken == []


def test_constraints_pin_what_the_extras_need() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for name in ("demo", "metrics", "test", "dev") for line in extras[name])]

    def canonical(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    names = {canonical(re.split(r"[\[<>=!~ ;]", line)[0]) for line in wanted} - {"openblip"}
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = {canonical(line.partition("==")[0]) for line in lines if "==" in line}
    assert len(pinned) == len(lines)
    assert names <= pinned


def test_no_private_paths_in_tracked_files() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    private = [
        f"{page_name(file)}:{number}"
        for file in (ROOT / name for name in listed.stdout.split("\0") if name)
        if file.suffix in TEXT_SUFFIXES and file.is_file() and file.stat().st_size < 1_000_000
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if PRIVATE_PATHS.search(line)
    ]
    assert private == []
