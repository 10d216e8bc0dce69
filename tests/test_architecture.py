"""The shape of the code: who imports whom, and what stays light to import."""

import ast
import graphlib
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "openblip"
FILES = sorted(PACKAGE.rglob("*.py"))

# What a part may import besides itself. Everyone may import the ground: `errors`, `progress`, `files`, `text_counts`,
# `distributed`, `cluster`.
# A dotted entry allows that module alone; `__init__` is the package's own offer (load and the decodings);
# `cli` may import anything.
EVERYONE = {"errors", "progress", "files", "text_counts", "distributed", "cluster"}
MAY_IMPORT: dict[str, set[str]] = {
    **{name: set() for name in (*EVERYONE, "nn", "objectives", "metrics", "data", "emoji_scenes")},
    "models": {"nn"},
    "generation": {"models", "nn"},
    "checkpoints": {"models", "nn", "data"},
    "predictor": {"nn.config", "nn.linear", "models", "generation", "checkpoints", "data"},
    "tasks": {"models", "nn", "objectives", "data"},
    "evaluation": {"predictor", "metrics", "data", "generation", "models"},
    "training": {"data", "tasks.base"},
    "capfilt": {"__init__", "predictor", "data", "generation", "metrics", "evaluation"},
    "recipes": {
        "__init__", "nn", "models", "objectives", "generation", "metrics", "data", "checkpoints", "tasks",
        "predictor", "evaluation", "training", "capfilt",
    },
    "cost": {
        "__init__", "nn.config", "models", "data", "generation", "checkpoints", "predictor", "recipes", "tasks",
        "training",
    },
    "search": {"__init__", "predictor", "data", "capfilt"},
    "serve": {"__init__", "generation", "predictor", "data", "capfilt", "search"},
    "__init__": {"predictor", "generation"},
}  # fmt: skip
# Read by `openblip … --help`, which has to answer at once; the heavy ones build and run a recipe, or measure.
LIGHT_MODULES = [f"{part}.config" for part in ("nn", "models", "training", "data", "tasks", "capfilt", "serve")]
LIGHT_MODULES += ["models.flops", "generation.decoding", "cluster", "recipes.*", "cost.*", "cli.*"]
HEAVY_MODULES = ("recipes.initialize", "recipes.validation", "cost.measure")


def module_name(file: Path) -> str:
    """The dotted name below `openblip`; a package's own file is called `<package>.__init__`."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def imported_files(source: str, module: str) -> set[Path]:
    """The files of the package that the source of `module` imports, also inside functions and for types only."""
    imported: set[Path] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["openblip", *module.split(".")[: -node.level]] if node.level else []
            # `from openblip.data import loader` may name a module or a thing in one; the longer name serves
            names = [".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            root, *parts = name.split(".")
            if root == "openblip":
                path = PACKAGE.joinpath(*parts)
                candidates = [
                    file for above in (path, path.parent) for file in (above.with_suffix(".py"), above / "__init__.py")
                ]
                imported |= {next(file for file in candidates if file.is_file())}
    return imported


def forbidden_imports(source: str, module: str) -> list[str]:
    """The imports of `module` that the entry of the longest name in the table that it lies in does not allow."""
    parts = module.split(".")
    if parts[0] in ("cli", "__main__"):
        return []
    entries = [entry for n in range(len(parts), 0, -1) if (entry := ".".join(parts[:n])) in MAY_IMPORT]
    assert entries, f"openblip.{module} is in no row of the import table of tests/test_architecture.py"
    allowed = MAY_IMPORT[entries[0]] | EVERYONE | {parts[0]}
    names = map(module_name, imported_files(source, module))
    return [name for name in names if not any(name == entry or name.startswith(f"{entry}.") for entry in allowed)]


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_follow_the_table(file: Path) -> None:
    assert forbidden_imports(file.read_text(), module_name(file)) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("nn.attention", "from openblip.models.blip import Blip"),
        ("data.loader", "import openblip.nn.vit"),
        ("objectives", "def late():\n    from openblip.metrics import ranking"),
        ("metrics.ranking", "from ..data import sample"),
        ("checkpoints.loading", "from openblip.tasks.captioning import Captioning"),
        ("capfilt.local", "from openblip.training.trainer import train"),
        ("models.blip", "from openblip import load"),
        ("training.trainer", "from openblip.models.blip import Blip"),
        ("errors", "from openblip.data import sample"),
    ],
)
def test_a_forbidden_import_is_found(module: str, line: str) -> None:
    assert len(forbidden_imports(line, module)) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("models.blip", "from openblip.nn.vit import VisionTransformer"),
        ("models.blip", "from .config import BlipConfig"),
        ("checkpoints.loading", "from openblip.data.tokenizer import Tokenizer"),
        ("recipes.bootstrap", "from openblip.capfilt.local import run_capfilt"),
        ("capfilt.local", "import openblip"),
        ("data.loader", "from openblip.errors import SourceError"),
        ("cli.train", "import openblip.training.trainer"),
    ],
)
def test_an_allowed_import_is_not_reported(module: str, line: str) -> None:
    assert forbidden_imports(line, module) == []


def test_no_circle_of_files() -> None:
    imports = {file: imported_files(file.read_text(), module_name(file)) - {file} for file in FILES}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the files


def test_no_public_name_is_defined_twice() -> None:
    """One name for one thing, across the whole tree, but for the entries of files in cli/ and in recipes/tables/."""
    entries = ("command", "run", "variants", "TABLE")
    defined: dict[str, list[str]] = {}
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            else:
                continue
            for name in names:
                is_type_variable = isinstance(node, ast.Assign) and "TypeVar" in ast.dump(node.value)
                if not name.startswith("_") and name not in entries and not is_type_variable:
                    defined.setdefault(name, []).append(module_name(file))
    assert {name: modules for name, modules in defined.items() if len(modules) > 1} == {}


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_files_say_what_they_are(file: Path) -> None:
    source = file.read_text()
    assert not source.strip() or ast.get_docstring(ast.parse(source)), f"{file.name} has no module docstring"
    assert file.stem not in ("utils", "util", "helpers", "misc", "common")


def test_configurations_and_commands_import_without_torch() -> None:
    names = {module_name(file) for file in FILES if file.name != "__init__.py"} - set(HEAVY_MODULES)
    modules = [f"openblip.{n}" for n in sorted(names) if any(fnmatch(n, pattern) for pattern in LIGHT_MODULES)]
    assert "openblip.models.config" in modules
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers', 'ray'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
