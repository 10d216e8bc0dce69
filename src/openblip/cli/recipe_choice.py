"""The recipe's name as first word of a command, and help without one."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from openblip.errors import ConfigError


def choose_recipe(
    command: str, recipes: Mapping[str, Callable[[], Any]], argv: Sequence[str]
) -> tuple[str, list[str]]:
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
