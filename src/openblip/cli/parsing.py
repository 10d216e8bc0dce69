"""Reads a command's options from its signature, and reports a wrong one as one line."""

import contextlib
import difflib
import functools
import io
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

# tyro has no public way to word its errors; this hook hands them over as data. An error that a later version
# of tyro adds is reported by a general message, see `parse`.
from tyro import _errors

from openblip.errors import ConfigError

Parsed = TypeVar("Parsed")


def parse_call(command: Callable[..., int], arguments: Sequence[str], *, prog: str) -> Callable[[], int]:
    """Bind `arguments` to the parameters of `command`, without calling it.

    Fields of a parameter that is a dataclass are options without its name before them. Raises as `parse`.
    """

    @functools.wraps(command)
    def bind(*args: object, **kwargs: object) -> Callable[[], int]:
        return functools.partial(command, *args, **kwargs)

    return parse(bind, arguments, prog=prog, config=(tyro.conf.OmitArgPrefixes,))


def parse(
    target: Callable[..., Parsed],
    arguments: Sequence[str],
    *,
    prog: str,
    config: Sequence[Any] = (tyro.conf.AvoidSubcommands,),
    **options: Any,
) -> Parsed:
    """Build `target` from command-line words.

    Args:
        target: a dataclass or a function, whose annotated fields or parameters are the options. What the help says
            of them are the docstrings of the fields, or the `Args:` section of the function's docstring.
        arguments: the words to read.
        prog: what the help calls the command, e.g. "openblip match".
        config: markers of tyro. By default alternatives, among which a recipe has chosen, are options.
        options: of `tyro.cli`, e.g. `default`, an instance whose values are the defaults.

    Raises:
        ConfigError: a wrong or missing option, on one line.
        SystemExit: help was asked for and printed (code 0).
    """
    build = functools.partial(tyro.cli, target, prog=prog, config=config, **options)

    def option_names() -> list[str]:
        text = io.StringIO()
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text):
            build(args=["--help"])
        return list(dict.fromkeys(re.findall(r"--[a-z][a-z0-9.-]*[a-z0-9]", text.getvalue())))

    def report(event: _errors.ParseErrorEvent) -> None:
        raise ConfigError(f"{_message(event, option_names)}; see `{prog} --help`")

    try:
        with _errors.on_parse_error(report), contextlib.redirect_stderr(io.StringIO()):
            built: Parsed = build(args=list(arguments))
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(f"the options cannot be understood; see `{prog} --help`") from None
    return built


def _message(event: _errors.ParseErrorEvent, option_names: Callable[[], list[str]]) -> str:
    """What is wrong with the words, in one sentence."""
    match event:
        case _errors.MissingArgs():
            arguments = [argument.arg for argument in event.missing_arguments]
            names = [str(a.lowered.metavar) if a.is_positional() else a.display_name() for a in arguments]
            unknown = f"{_unknown(words, option_names())}; " if (words := event.unrecognized_tokens) else ""
            return f"{unknown}{_listed(names, 'and')} must be given"
        case _errors.UnrecognizedArgs():
            return _unknown(event.tokens, option_names())
        case _errors.InvalidChoice():
            choices = _listed([choice for choice in event.choices if choice != "None"], "or")
            return f"{event.argument.display_name()} cannot be {event.value}; choose {choices}"
        case _errors.BadValue(reason="too_few_values"):
            return f"{event.argument.display_name()} needs a value after it"
        case _errors.InstantiationFailure():
            name = "" if event.argument is None else f"{event.argument.display_name()}: "
            return f"{name}{event.message}"
        case _:
            return "the options cannot be understood"


def _unknown(words: Sequence[str], names: Sequence[str]) -> str:
    """Say which options there are not, with the closest that there are."""
    options = [word.split("=")[0] for word in words if word.startswith("-")]
    if not options:
        return f"{_listed(words, 'and')} cannot be understood here"
    close: list[str] = []
    for option in options:
        parts = [name for name in names if option.lstrip("-") in name]
        close += [*difflib.get_close_matches(option, names, n=2, cutoff=0.7), *parts][:3]
    hint = f"; did you mean {_listed(list(dict.fromkeys(close)), 'or')}?" if close else ""
    return f"there is no option {_listed(options, 'or')}{hint}"


def _listed(names: Sequence[str], last: str) -> str:
    """ "a, b and c"."""
    *first, end = names
    return f"{', '.join(first)} {last} {end}" if first else end
