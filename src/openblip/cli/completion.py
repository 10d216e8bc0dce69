"""`openblip completion`: scripts with which shells complete commands and their options."""

import contextlib
import importlib
import io
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Union

import tyro

AFTER = {
    "bash": "complete -o default -F _tyro_openblip openblip  # file names where there is nothing else to offer",
    "zsh": "",
    "fish": "complete --command openblip --force-files",
}
"""For each shell, what follows tyro's script."""


def command(shell: Literal["bash", "zsh", "fish"], /) -> int:
    """Prints a script with which a shell completes commands, options and their values on Tab.

    bash: `openblip completion bash >> ~/.bash_completion`. zsh: `openblip completion zsh > DIR/_openblip`, in a DIR of
    its $fpath. fish: `openblip completion fish > ~/.config/fish/completions/openblip.fish`. The script calls python3,
    and does not import openblip, so it answers at once. Write it anew after an update. Of `train` and `bootstrap` it
    completes the recipes; their --help lists the options.

    Args:
        shell: the shell that you type in.
    """
    script = io.StringIO()
    options: Any = {"config": (tyro.conf.OmitArgPrefixes,), "prog": "openblip"}
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        tyro.cli(_all_commands(), args=["--tyro-print-completion", shell], **options)
    print(script.getvalue())
    print(AFTER[shell])
    return 0


def _all_commands() -> Any:
    """The type of which tyro makes a parser for all commands; those of two words are a group of the first."""
    from openblip.cli.main import COMMANDS
    from openblip.recipes import RECIPES
    from openblip.recipes.bootstrap import FAMILIES

    def no_options() -> None:
        """Stands for a recipe, whose options its --help lists."""

    recipes = {"train": list(RECIPES), "bootstrap": list(FAMILIES)}
    groups: dict[str, list[Any]] = {}
    alone: list[Any] = []
    for name, entry in COMMANDS.items():
        *group, last = name.split()
        if name in recipes:
            alone.append(_group(name, [_subcommand(recipe, no_options) for recipe in recipes[name]]))
            continue
        function = getattr(importlib.import_module(f"openblip.cli.{entry.module}"), entry.function)
        (groups.setdefault(group[0], []) if group else alone).append(_subcommand(last, function))
    return Union[tuple(alone + [_group(name, members) for name, members in groups.items()])]  # noqa: UP007


def _subcommand(name: str, function: Callable[..., Any]) -> Any:
    return Annotated[Any, tyro.conf.subcommand(name=name, constructor=function)]


def _group(name: str, members: Sequence[Any]) -> Any:
    def choose(chosen: Any) -> None:
        """One of the members."""

    choose.__annotations__["chosen"] = Union[tuple(members)]  # noqa: UP007
    return _subcommand(name, choose)
