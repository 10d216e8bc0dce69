"""The wheel in an environment that has the packages of `dependencies` and no others: what users get from `pip install`.

The environment is made of links to the packages that are installed here, so nothing is downloaded: the closure of
pyproject.toml's dependencies, without that of any extra.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

from openblip.cli.doctor import EXTRAS
from openblip.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OF_AN_EXTRA = {"openblip.serve": "serve"}
"""Folders whose modules need an extra to be imported; all others import without one."""
IMPORT_ALL = """
import importlib, json, pkgutil, openblip
problems = {}
for module in pkgutil.walk_packages(openblip.__path__, "openblip."):
    try:
        if module.name != "openblip.__main__":
            importlib.import_module(module.name)
    except BaseException as error:
        problems[module.name] = f"{type(error).__name__}: {error}"
print(json.dumps(problems))
"""
CONSUMER = """
import openblip

model = openblip.load("openblip-mini")
reveal_type(model)
reveal_type(openblip.Nucleus(top_p=0.9).top_p)
model.caption("a.png", num_captions="three")
openblip.Beam(num_beams=3, top_p=0.9)
"""


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile in order, with what stands behind each."""
    lines = (line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    whole = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(words[0], words[1].strip()) for line in whole if len(words := line.split(maxsplit=1)) == 2]


def test_dockerfile_copies_what_there_is_and_the_builder_gets_no_more() -> None:
    copied = [shlex.split(rest) for name, rest in instructions() if name == "COPY"]
    sources = {source for words in copied if not words[0].startswith("--from") for source in words[:-1]}
    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    assert sent[1] == "*"
    assert {line[1:] for line in sent if line.startswith("!")} == sources
    needed = {PROJECT["readme"], *PROJECT["license-files"], "src", "docs", "pyproject.toml"}  # what hatchling reads
    assert needed <= sources


def test_dockerfile_installs_extras_that_there_are_with_pinned_versions() -> None:
    installs = [rest for name, rest in instructions() if name == "RUN" and "pip install" in rest]
    extras = {extra for rest in installs for found in re.findall(r"\.\[([\w,]+)\]", rest) for extra in found.split(",")}
    assert "serve" in extras
    assert extras <= PROJECT["optional-dependencies"].keys()
    assert all("-c constraints.txt" in rest for rest in installs)
    assert any("--index-url ${TORCH_INDEX} torch" in rest for rest in installs)
    python = next(rest for name, rest in instructions() if name == "ARG").removeprefix("PYTHON=")
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]


def test_container_serves_as_no_root_and_says_whether_it_is_healthy() -> None:
    listed = instructions()
    last = [*listed[max(i for i, (name, _) in enumerate(listed) if name == "FROM") :]]
    settings = dict(last)  # of an instruction that is repeated, the last
    assert settings["USER"] not in ("root", "0")
    assert f"useradd --system --uid 10001 --home-dir {settings['WORKDIR']}" in settings["RUN"]
    serve = json.loads(settings["ENTRYPOINT"])
    port = settings["EXPOSE"]
    assert serve == ["openblip", "serve", "--host", "0.0.0.0", "--port", port]
    check = settings["HEALTHCHECK"].partition("CMD ")[2]
    assert f"http://127.0.0.1:{port}/health'" in json.loads(check)[2]
    compile(json.loads(check)[2], "HEALTHCHECK", "exec")
    if "serve" in COMMANDS:  # its options are those that the container gives
        COMMANDS["serve"].bind([*serve[2:], *json.loads(settings["CMD"])], prog="openblip serve")


def minimal_distributions() -> set[str]:
    """Names of what `pip install openblip` installs, of what is installed here."""
    found: set[str] = set()

    def add(requirement: Requirement, extras: set[str]) -> None:
        wanted = extras or {""}
        if requirement.marker is not None and not any(requirement.marker.evaluate({"extra": e}) for e in wanted):
            return
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found and not requirement.extras:
            return
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:  # a package for another platform
            return
        found.add(name)
        for each in requires:
            add(Requirement(each), requirement.extras)

    for line in PROJECT["dependencies"]:
        add(Requirement(line), set())
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist."""
    out = tmp_path_factory.mktemp("dist")
    for target in ("wheel", "sdist"):
        command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(out)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [wheel], [sdist] = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def python(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel and its dependencies alone."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    interpreter = folder / "bin" / "python"
    where = [str(interpreter), "-c", "import site; print(site.getsitepackages()[0])"]
    site = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    for name in minimal_distributions():
        found = distribution(name)
        for entry in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / entry).exists():
                (site / entry).symlink_to(found.locate_file(entry))
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(built[0])], check=True, capture_output=True)
    return interpreter


def run_in(python: Path, *arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the environment's interpreter, with nothing of this process' paths."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([str(python), *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(tmp_path / "grey.png")
    return tmp_path / "grey.png"


@pytest.mark.slow
def test_wheel_and_sdist_hold_what_is_tracked(built: tuple[Path, Path]) -> None:
    wheel, sdist = built
    package = {str(file.relative_to(ROOT / "src")) for file in tracked("src/openblip")}
    pages = {f"openblip/{file.relative_to(ROOT)}" for file in tracked("docs")}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.startswith(f"openblip-{PROJECT['version']}.dist-info/")}
    assert held == package | pages
    assert "openblip/py.typed" in held
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in package} <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"} <= names
    assert not [name for name in names if name.startswith(("benchmarks/", ".ci/")) or "__pycache__" in name]


def tracked(folder: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z", folder], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


@pytest.mark.slow
def test_first_minutes_with_minimal_dependencies(python: Path, image: Path) -> None:
    def openblip(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        return run_in(python, "-m", "openblip", *words, cwd=image.parent, code=code)

    found = json.loads(openblip("doctor", "--as-json").stdout)
    assert found["openblip"] == PROJECT["version"]
    assert {name for name, extra in found["extras"].items() if not extra["missing"]} == set()
    assert found["broken"] == []
    caption = json.loads(openblip("caption", "grey.png", "--model", "openblip-mini-captioner").stdout)
    assert caption["key"] == "grey.png"
    assert caption["caption"]
    (image.parent / "pairs.jsonl").write_text('{"image": "grey.png", "caption": "a grey image"}\n')
    models = ("--captioner", "openblip-mini-captioner", "--filter", "openblip-mini-filter")
    openblip("capfilt", "pairs.jsonl", *models, "--out", "cleaned", "--no-check")
    assert (image.parent / "cleaned" / "report.html").is_file()
    error = openblip("index", ".", "--model", "openblip-mini-filter", "--out", "index", code=2).stderr
    assert error.startswith('openblip: an index needs LanceDB: pip install "openblip[search]"')
    page = re.search(r"\(see `openblip docs (\S+)`\)", error)
    assert page is not None
    assert openblip("docs", page[1]).stdout.startswith("## Extras\n")
    script = run_in(python, str(python.parent / "openblip"), "--version", cwd=image.parent)
    assert script.stdout == f"openblip {PROJECT['version']}\n"


@pytest.mark.slow
def test_every_module_imports_without_extras(python: Path, tmp_path: Path) -> None:
    problems = json.loads(run_in(python, "-c", IMPORT_ALL, cwd=tmp_path).stdout)
    for folder, extra in OF_AN_EXTRA.items():
        for name in [name for name in problems if name == folder or name.startswith(f"{folder}.")]:
            missing = re.fullmatch(r"ModuleNotFoundError: No module named '(\w+).*'", problems.pop(name))
            assert missing is not None
            assert missing[1] in EXTRAS[extra][0]
    assert problems == {}


@pytest.mark.slow
def test_a_users_type_checker_sees_our_types(python: Path, tmp_path: Path) -> None:
    (tmp_path / "consumer.py").write_text(CONSUMER)
    others = "".join(
        f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in ("torch", "transformers", "numpy", "pyarrow")
    )
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = true\ncache_dir = {tmp_path}\n{others}")
    command = [sys.executable, "-m", "mypy", "--python-executable", str(python), "consumer.py"]
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    *found, _ = done.stdout.splitlines()
    assert [re.sub(r"openblip\.[a-z.0-9_]+\.", "", line.partition(": ")[2]) for line in found] == [
        'note: Revealed type is "BlipPredictor | Blip2Predictor"',
        'note: Revealed type is "float"',
        'error: Argument "num_captions" to "caption" of "BasePredictor" has incompatible type "str"; expected "int"  '
        "[arg-type]",
        'error: Unexpected keyword argument "top_p" for "Beam"  [call-arg]',
    ], done.stdout + done.stderr
