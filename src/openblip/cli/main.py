"""The `openblip` command: find the command that was asked for, run it, and turn errors into exit codes.

Nothing heavy is imported here: a command's module is imported when the command is chosen, and torch when it
runs. Exit codes: 0 done; 1 done, with failures that were listed; 2 bad input or nothing could start; 130
interrupted.
"""

import difflib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from openblip.errors import ConfigError, OpenBlipError


class Command(NamedTuple):
    """The module of a command, and what the list of commands says about it.

    The module has `command(...)`, whose annotated parameters and docstring are its options (read by tyro). A
    command whose options depend on an earlier argument has `run(argv) -> int` instead, and parses for itself.
    """

    module: str
    summary: str


COMMANDS: dict[str, Command] = {
    "demo": Command("openblip.cli.demo", "clean a small noisy set with the shipped models, offline"),
    "caption": Command("openblip.cli.caption", "caption images, folders of images or a data source"),
    "answer": Command("openblip.cli.answer", "answer questions about images or videos"),
    "match": Command("openblip.cli.match", "score how well texts describe images"),
    "capfilt": Command("openblip.cli.capfilt", "caption and filter noisy image-text pairs"),
    "capfilt-select": Command("openblip.cli.capfilt_select", "change the threshold of a CapFilt run"),
    "capfilt-export": Command("openblip.cli.capfilt_export", "write the bootstrapped pairs as tar shards"),
    "bootstrap": Command("openblip.cli.bootstrap", "train, clean the data, train anew, compare"),
    "train": Command("openblip.cli.train", "train a recipe, on one machine or under torchrun"),
    "evaluate": Command("openblip.cli.evaluate", "measure a model on any of its tasks"),
    "convert": Command("openblip.cli.convert", "write a checkpoint in another format"),
    "data inspect": Command("openblip.cli.data_inspect", "count and check what a data source holds"),
    "data emoji-scenes": Command("openblip.cli.data_emoji_scenes", "write the embedded world as tar shards"),
}
GROUPS = frozenset(name.split()[0] for name in COMMANDS if " " in name)

INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended
BROKEN_PIPE = 141  # the same for SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: the words after `openblip`; those of the process when None.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]  # it may stand anywhere before a --
    words = [word for word in words[:end] if word != "--debug"] + words[end:]
    try:
        call = _find_call(words)
        code = call()
        sys.stdout.flush()  # here, so that a closed pipe is met inside this try
        return code
    except BrokenPipeError:
        # The reader has gone (`openblip caption … | head`). Python flushes once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return BROKEN_PIPE
    except SystemExit as stop:  # help was printed
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        if debug:
            raise
        print("openblip: interrupted; resume with the same command", file=sys.stderr)
        return INTERRUPTED
    except (OpenBlipError, OSError) as error:
        if debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"openblip: {message}", file=sys.stderr)
        return 2


def _find_call(words: list[str]) -> Callable[[], int]:
    """The call that the words ask for, with its options; raises `ConfigError` when there is none."""
    if not words or words[0] in ("-h", "--help"):
        return functools.partial(_print, _overview(COMMANDS))
    if words[0] == "--version":
        from importlib.metadata import version

        return functools.partial(_print, f"openblip {version('openblip')}")
    if words[0] in GROUPS and (len(words) == 1 or words[1] in ("-h", "--help")):
        group = {name: entry for name, entry in COMMANDS.items() if name.startswith(f"{words[0]} ")}
        return functools.partial(_print, _overview(group))
    for length in (2, 1):
        name, arguments = " ".join(words[:length]), words[length:]
        if name in COMMANDS:
            module = importlib.import_module(COMMANDS[name].module)
            if hasattr(module, "run"):
                return functools.partial(module.run, arguments)
            from openblip.cli.parsing import parse_call

            return parse_call(module.command, arguments, prog=f"openblip {name}")
    asked = " ".join(words[:2]) if words[0] in GROUPS else words[0]
    close = difflib.get_close_matches(asked, COMMANDS, n=1, cutoff=0.4)
    hint = f"did you mean `openblip {close[0]}`?" if close else "`openblip --help` lists the commands"
    raise ConfigError(f"there is no command `{asked}`; {hint}")


def _print(text: str) -> int:
    print(text)
    return 0


def _overview(commands: dict[str, Command]) -> str:
    width = max(map(len, commands)) + 2
    lines = [f"  {name:<{width}}{entry.summary}" for name, entry in commands.items()]
    return "\n".join(
        [
            "usage: openblip COMMAND [arguments]",
            "",
            "Bootstrapping language-image pre-training: train, caption, match and clean image-text data.",
            "",
            "commands:",
            *lines,
            "",
            "`openblip COMMAND --help` shows the options of a command, `--debug` the traceback of an error,",
            "`openblip --version` the version.",
        ]
    )
