"""What the documentation says is so: snippets run, commands parse, links resolve, pins are whole, no private paths."""

import importlib
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from documented_files import write_documented_files
from openblip.cli.docs import read_page
from openblip.cli.doctor import EXTRAS
from openblip.cli.main import COMMANDS, GUIDES, main
from openblip.cli.options import parse
from openblip.errors import OpenBlipError, page_command
from openblip.metrics import captioning
from openblip.recipes import RECIPES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT_SUFFIXES = {".md", ".py", ".toml", ".txt", ".yaml", ".yml", ".json", ".css", ".html", ".cfg", ".ipynb", ".rst", ""}
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
    if name in ("train", "bootstrap", "ablate"):  # they parse for themselves; stopped there, before they work
        module = importlib.import_module(f"openblip.cli.{COMMANDS[name].module}")

        def parse_and_stop(*args: Any, **options: Any) -> None:
            parse(*args, **options)
            raise Parsed

        monkeypatch.setattr(module, "parse", parse_and_stop)
        if "--resume" in words:  # a run that another snippet has begun
            monkeypatch.setattr(module, "read_run", lambda folder: replace(RECIPES["blip2-stage2-opt"](), out=folder))
        with pytest.raises(Parsed):
            COMMANDS[name].bind(arguments, prog=prog)()
    else:
        COMMANDS[name].bind(arguments, prog=prog)


# Snippets run in the order of their page, all in one folder with the files of `write_documented_files`. Where they name
# what is large or elsewhere, they run with these words instead, and with these more.
SUBSTITUTES = {
    r"\{(0*)0000\.\.\d+\}": r"{\g<1>0000..\g<1>0001}",
    "--training.steps 90000": "--training.steps 3",  # more than the 2 of MORE_WORDS
    r"--num-samples\s+\d+": "--num-samples 12 --num-workers 1",
    "Salesforce/blip-image-captioning-base": "hub/blip-base",
    "Salesforce/blip2-opt-2.7b": "hub/blip2-opt",
    r"threshold([ =])0\.8": r"threshold\g<1>0.0",  # of random scores
    "facebook/opt-2.7b": "hub/opt",
    "bert-base-chinese": "hub/bert",
}
_QUICK = "--{0}training.steps 2 --{0}training.batch-size 2 --{0}training.num-threads 1 --{0}data.num-workers 0"
MORE_WORDS = {
    "demo": "--num-samples 12 --num-workers 1",
    "bootstrap": " ".join(_QUICK.format(f"recipe.{name}.") for name in ("pretrain", "captioner", "filter"))
    + " --test scenes/human --no-check",
    "capfilt .*--check": "--no-check",  # of few pairs, by a filter of random weights
    "train (?!--resume)": _QUICK.format(""),
    "train (vqa|caption|filter|blip2-(caption|vqa|retrieval))": "--image-size 16",
    "train blip2-stage1": "--vision.source runs/blip-base/model --text-init None --tokenizer None --vocab-size 200 "
    "--qformer.hidden-dim 32 --qformer.num-layers 2 --qformer.num-heads 2 --qformer.mlp-dim 32",
    "train blip2-stage2-opt": "--language.source hub/opt --frozen-dtype float32 --language.dtype float32",
}
# What is not run, and why. Commands of openblip on these pages are still parsed by the test above.
NOT_RUN = {
    "docs/results.md": "experiments of hours; the page says on which day they ran",
    "docs/benchmarks.md": "measurements of an hour, in part against an earlier version",
    "docs/serve.md": "a server runs until it is ended: tests/serve/test_serve_command.py runs the page against one",
    "CONTRIBUTING.md": "the set-up of a working copy, and an excerpt of a file",
    "bibtex": "for other people's papers",
    "json": "shows a file",
    "diff": "shows a change: the test of tables holds the one of docs/ablations.md",
    "docker": "there is none where the tests run",
    "pip install": "the packages are installed",
    "openblip export openblip-mini-captioner exported-openvino": "OpenVINO is no part of the tests' environment",
    "import openvino": "likewise: python -m benchmarks.exported --format openvino runs it",
    "pytest": "this is it",
}
SNIPPETS = {page_name(page): re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.M | re.S) for page in PAGES}


@pytest.fixture(scope="session")
def documented_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documented")
    write_documented_files(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name, snippets in SNIPPETS.items() if snippets and name not in NOT_RUN])
def test_snippets_run(
    page: str,
    documented_files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(captioning, "java_runs", lambda: False)  # METEOR would take seconds
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    shutil.copytree(documented_files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for language, snippet in SNIPPETS[page]:
        for words, substitute in SUBSTITUTES.items():
            snippet = re.sub(words, substitute, snippet)
        if language == "python":
            if not snippet.startswith(tuple(NOT_RUN)):
                exec(compile(snippet, page, "exec"), namespace)
            continue
        if language in NOT_RUN:
            continue
        assert language == "bash", f"neither run nor listed in NOT_RUN: {language}"
        for line in re.split(r"\n|&&", snippet.replace("\\\n", " ")):
            command = line.split(" #")[0].strip()
            if not command or command.startswith(tuple(NOT_RUN)):
                continue
            program, *words = shlex.split(command)
            if command.startswith("hf download "):  # from the folder that stands for the hub
                shutil.copytree(words[1], words[3])
                continue
            more = [text for start, text in MORE_WORDS.items() if re.match(rf"{start}\b", " ".join(words))]
            assert program == "openblip", f"neither run nor listed in NOT_RUN: {command}"
            capsys.readouterr()
            assert main([*words, *shlex.split(" ".join(more))]) == 0, f"{command}\n{capsys.readouterr().err}"


def test_the_readme_says_how_to_set_up() -> None:
    lines = list(shell_lines(ROOT / "README.md"))
    assert 'pip install -c constraints.txt -e ".[demo]" && openblip demo' in lines
    assert 'pip install -c constraints.txt -e ".[test]" && pytest -n 2 --dist loadfile' in lines


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


def pages_of_errors() -> Iterator[tuple[str, str]]:
    """The page that each error class, command and `raise` with a page of its own links to, after its place."""
    classes = [OpenBlipError]
    for found in classes:
        classes += found.__subclasses__()
        if found.page:
            yield found.__name__, found.page
    for name, command in COMMANDS.items():
        yield name, GUIDES[command.module]
    for file in sorted((ROOT / "src/openblip").rglob("*.py")):
        for text in re.findall(r'(?:page=|_PAGE = )"([^"]+)"', file.read_text()):
            yield page_name(file), text


def test_errors_point_to_pages_that_are_there() -> None:
    named = list(pages_of_errors())
    assert len(named) > 30
    for place, page in named:
        path, _, anchor = page.partition("#")
        assert (ROOT / "docs" / path).is_file(), f"{place}: {page}"
        assert not anchor or anchor in anchors(ROOT / "docs" / path), f"{place}: {page}"
        assert read_page(page_command(page).removeprefix("openblip docs ")).count("\n") > 2, f"{place}: {page}"


def test_every_extra_is_explained() -> None:
    explained = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/install.md").read_text(), re.MULTILINE))
    assert explained == EXTRAS.keys()


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
