"""Reads a command's options from its signature, and reports a wrong one as one line."""

import contextlib
import functools
import io
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from openblip.errors import ConfigError

Parsed = TypeVar("Parsed")

# tyro reports a wrong option in a box, and ends it with parts of the help that the message points to anyway.
_BOX_TITLE = re.compile(r"^╭─+ .*? ─+╮$", re.MULTILINE)
_BOX_LINE = re.compile(r"[╭╮╰╯│─]+")
_HELP_PART = re.compile(r"(For full helptext|Argument helptext|Got errors).*", re.DOTALL)


def parse_call(command: Callable[..., int], arguments: Sequence[str], *, prog: str) -> Callable[[], int]:
    """Binds `arguments` to the parameters of `command`, without calling it.

    Args:
        command: a function with annotated parameters and a docstring with an `Args:` section.
        arguments: the words after the name of the command.
        prog: what the help calls the command, e.g. "openblip match".

    Returns:
        The call, ready to be made.

    Raises:
        ConfigError: a wrong or missing option, on one line.
        SystemExit: help was asked for and printed (code 0).
    """

    @functools.wraps(command)
    def bind(*args: object, **kwargs: object) -> Callable[[], int]:
        return functools.partial(command, *args, **kwargs)

    return parse(bind, arguments, prog=prog)


def parse(
    target: Callable[..., Parsed],
    arguments: Sequence[str],
    *,
    prog: str,
    default: Parsed | None = None,
    description: str | None = None,
) -> Parsed:
    """Builds `target`, a dataclass or a function, from command-line words; raises as `parse_call` does.

    Args:
        target: its fields or parameters are the options.
        arguments: the words to read.
        prog: what the help calls the command.
        default: for a dataclass, an instance whose values are the defaults.
        description: what the help says first; the docstring of `target` when None.
    """
    options: dict[str, Any] = {} if default is None else {"default": default}
    report = io.StringIO()
    try:
        with contextlib.redirect_stderr(report):
            built: Parsed = tyro.cli(
                target,
                args=list(arguments),
                prog=prog,
                description=description,
                config=(
                    tyro.conf.AvoidSubcommands,
                ),  # a recipe has chosen: the fields of its choice are options
                **options,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(f"{_one_line(report.getvalue())}; see `{prog} --help`") from None
    return built


def _one_line(box: str) -> str:
    """The sentence inside tyro's box."""
    text = _BOX_LINE.sub(" ", _BOX_TITLE.sub("", box))
    return " ".join(_HELP_PART.sub("", text).split()).rstrip(".:") or "wrong options"
