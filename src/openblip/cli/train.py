"""`openblip train RECIPE`: trains a recipe, with any of its settings changed."""

import sys
from collections.abc import Sequence
from typing import Any

from openblip.cli.parsing import parse
from openblip.cli.recipe_choice import choose_recipe
from openblip.recipes.any_run import AnyRun
from openblip.recipes.catalog import RECIPES


def run(argv: Sequence[str]) -> int:
    """Reads the recipe's name, then the rest as changes to it; returns the exit code."""
    name, words = choose_recipe("train", RECIPES, argv)
    resume = "--resume" in words
    recipe = RECIPES[name]
    default = recipe()
    chosen: Any = parse(
        type(default),
        [word for word in words if word != "--resume"],
        prog=f"openblip train {name}",
        default=default,
        description=f"{recipe.__doc__}\n\nAlso: --resume goes on with the run in --out where it was stopped.",
    )
    return train(chosen, resume)


def train(chosen: AnyRun, resume: bool) -> int:
    """Starts the run; exit code 0 when it reached its end, 130 when a signal stopped it."""
    from openblip.recipes.start import start

    if start(chosen, resume):
        print(f"trained: {chosen.out}/model", file=sys.stderr)
        return 0
    print(f"stopped; go on with the same command and --resume ({chosen.out})", file=sys.stderr)
    return 130
