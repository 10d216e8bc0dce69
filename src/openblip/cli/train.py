"""`openblip train RECIPE`: trains a recipe, with any of its settings changed."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from openblip.cli.parsing import parse
from openblip.errors import ConfigError
from openblip.recipes.catalog import RECIPES
from openblip.recipes.run import Run


def run_recipe(argv: Sequence[str]) -> int:
    """Trains the recipe that the first word names, changed by the options that follow it.

    The exit code is 0 when the training reached its end, 130 when a signal stopped it.
    """
    name, options = choose_recipe("train", RECIPES, argv)
    chosen = parse_run(name, [word for word in options if word != "--resume"], prog=f"openblip train {name}")
    if chosen.train(resume="--resume" in options):
        print(f"trained: {chosen.out}/model", file=sys.stderr)
        return 0
    print(f"stopped; go on with the same command and --resume ({chosen.out})", file=sys.stderr)
    return 130


def parse_run(name: str, options: Sequence[str], *, prog: str) -> Run:
    """The recipe `name` with changed settings."""
    recipe = RECIPES[name]
    default = recipe()
    shared = inspect.getdoc(inspect.getmodule(recipe))
    text = f"{inspect.getdoc(recipe)}\n\n{shared}\n\nAlso: --resume continues the run in --out where it was stopped."
    chosen: Run = parse(type(default), options, prog=prog, default=default, description=text)
    return chosen


def choose_recipe(command: str, recipes: Mapping[str, Callable[[], Any]], argv: Sequence[str]) -> tuple[str, list[str]]:
    """The name that `argv` begins with, and the words after it.

    Raises ConfigError for an unknown or missing name; SystemExit after printing the list for --help.
    """
    if argv and argv[0] in recipes:
        return argv[0], list(argv[1:])
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: openblip {command} RECIPE [options]\n\nrecipes:")
        for name, recipe in recipes.items():
            summary = (inspect.getdoc(recipe) or "").split("\n")[0]
            print(f"  {name:<22}{summary}")
        print(f"\n`openblip {command} RECIPE --help` shows every option with the recipe's value.")
        raise SystemExit(0)
    given = f'there is no recipe "{argv[0]}"' if argv else "no recipe is named"
    raise ConfigError(f"{given}; choose one of {', '.join(recipes)}")
