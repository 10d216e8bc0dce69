"""The `openblip` command: find the command that was asked for, run it, and turn errors into exit codes.

A command's module is imported when the command is chosen, and torch when it runs. Exit codes: 0 done; 1 done, with
failures that were listed, or broken off; 2 bad input or nothing could start; 130 interrupted.
"""

import contextlib
import difflib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import NamedTuple

from openblip.errors import ConfigError, OpenBlipError, page_command
from openblip.files import name_full_disk
from openblip.text_counts import count_texts

BROKEN_PIPE = 141  # what a shell reports for a process that SIGPIPE ended; 130 is the same for SIGINT
OVERVIEW = """usage: openblip COMMAND [arguments]

Bootstrapping language-image pre-training: train, caption, match and clean image-text data.

commands:
{}

`openblip COMMAND --help` shows the options of a command, `--debug` the traceback of an error,
`openblip --version` the version, `openblip docs` the guides."""


class Command(NamedTuple):
    """A command's module in this folder and its function, and what the list of commands says about it."""

    module: str
    function: str
    """Its annotated parameters and docstring are its options, read by tyro. One whose options depend on an earlier
    argument has the single parameter `argv`, and parses for itself."""
    summary: str

    def bind(self, arguments: Sequence[str], *, prog: str) -> Callable[[], int]:
        """Import the function and read its options; raises `ConfigError` for wrong ones."""
        function: Callable[..., int] = getattr(importlib.import_module(f"openblip.cli.{self.module}"), self.function)
        if list(inspect.signature(function).parameters) == ["argv"]:
            return functools.partial(function, arguments)
        from openblip.cli.options import parse_call

        return parse_call(function, arguments, prog=prog)


COMMANDS = {
    "demo": Command("capfilt", "run_demo", "clean a small noisy set with the shipped models, offline"),
    "caption": Command("caption", "command", "caption images, folders of images or a data source"),
    "answer": Command("answer", "command", "answer questions about images or videos"),
    "match": Command("match", "command", "score how well texts describe images"),
    "capfilt": Command("capfilt", "clean_pairs", "caption and filter noisy image-text pairs"),
    "capfilt-select": Command("capfilt", "select_texts", "change the threshold of a CapFilt run"),
    "capfilt-score": Command("capfilt_score", "command", "add scores to a CapFilt run: duplicates, CLIP, ..."),
    "capfilt-sample": Command("capfilt_calibrate", "sample_run", "a page on which a person labels sampled texts"),
    "capfilt-calibrate": Command("capfilt_calibrate", "calibrate_run", "thresholds and a learned mix from labels"),
    "capfilt-export": Command("capfilt", "export_pairs", "write the bootstrapped pairs as tar shards"),
    "index": Command("search", "build", "embed the images of a source for search"),
    "search": Command("search", "find", "find images of an index by text or image"),
    "serve": Command("serve", "command", "models and search as an HTTP server"),
    "bootstrap": Command("train", "run_bootstrap", "train, clean the data, train anew, compare"),
    "train": Command("train", "run_recipe", "train a recipe, on one machine or under torchrun"),
    "ablate": Command("ablate", "command", "a table of the papers: train, measure, compare"),
    "evaluate": Command("evaluate", "command", "measure a model on any of its tasks"),
    "convert": Command("convert", "command", "write a checkpoint in another format"),
    "export": Command("export", "command", "write a model as ONNX or OpenVINO graphs, to run without torch"),
    "models": Command("models", "command", "list the shipped models and the known public checkpoints"),
    "doctor": Command("doctor", "command", "what is installed, where models run, what is missing for more"),
    "docs": Command("docs", "command", "show the guides, and the sections that errors point to"),
    "completion": Command("completion", "command", "a script with which a shell completes commands and options"),
    "estimate": Command("estimate", "command", "hours, machines and cost of CapFilt and of pre-trainings"),
    "data inspect": Command("data", "inspect_data", "count and check what a data source holds"),
    "data emoji-scenes": Command("data", "write_scenes", "write the embedded world as tar shards"),
}

GUIDES = {
    "ablate": "ablations.md",
    "answer": "caption.md#questions-and-matching",
    "capfilt": "capfilt.md",
    "capfilt_calibrate": "capfilt.md#calibrating-with-labels",
    "capfilt_score": "capfilt.md#more-scores",
    "caption": "caption.md",
    "completion": "install.md",
    "convert": "checkpoints.md",
    "data": "data.md",
    "docs": "index.md",
    "doctor": "install.md",
    "estimate": "cost.md",
    "evaluate": "evaluate.md",
    "export": "export.md",
    "match": "caption.md#questions-and-matching",
    "models": "models.md",
    "search": "image-search.md",
    "serve": "serve.md",
    "train": "train.md",
}
"""For each module of commands the page of docs/ to which errors of its arguments point."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the words after `openblip`, those of the process when None, and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]  # it may stand anywhere before a --
    words = [word for word in words[:end] if word != "--debug"] + words[end:]
    try:
        with _said_once(), name_full_disk("a file or standard output", sys.stdout):
            call = _find_call(words)
            with count_texts(lambda line: print(f"note: {line}", file=sys.stderr)):
                code = call() or 0
            sys.stdout.flush()  # here, so that a closed pipe is met inside this try
        return code
    except BrokenPipeError:  # the reader has gone (`openblip caption … | head`); Python flushes once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return BROKEN_PIPE
    except SystemExit as stop:  # help was printed
        return stop.code if isinstance(stop.code, int) else 0
    except (KeyboardInterrupt, Exception) as error:
        if "RANK" in os.environ:
            from openblip.distributed import fails_first

            if not fails_first():
                return error.exit_code if isinstance(error, OpenBlipError) else 1
        if debug or not isinstance(error, KeyboardInterrupt | OpenBlipError | OSError):
            raise
        if isinstance(error, KeyboardInterrupt):
            print("openblip: interrupted; resume with the same command", file=sys.stderr)
            return 130
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OpenBlipError) and (page := error.page or _guide(words)):
            message = f"{message.rstrip('.')} (see `{page_command(page)}`)"
        print(f"openblip: {message}", file=sys.stderr)
        return error.exit_code if isinstance(error, OpenBlipError) else 2


@contextlib.contextmanager
def _said_once() -> Iterator[None]:
    """Of the processes of torchrun, let the first one alone say what all of them say. Errors are raised."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        yield


def _command_name(words: list[str]) -> str | None:
    """The command that the words begin with."""
    return next((name for name in (" ".join(words[:2]), " ".join(words[:1])) if name in COMMANDS), None)


def _guide(words: list[str]) -> str | None:
    """The page about the command that the words begin with."""
    name = _command_name(words)
    return GUIDES.get(COMMANDS[name].module) if name else None


def _find_call(words: list[str]) -> Callable[[], int | None]:
    """The call that the words ask for, with its options; raises `ConfigError` when there is none."""
    if words == ["--version"]:
        return functools.partial(print, f"openblip {version('openblip')}")
    if name := _command_name(words):
        return COMMANDS[name].bind(words[len(name.split()) :], prog=f"openblip {name}")
    group = "" if not words or words[0].startswith("-") else f"{words[0]} "
    listed = {name: command for name, command in COMMANDS.items() if name.startswith(group)}
    rest = words[1:] if group else words
    if listed and (not rest or rest[0] in ("-h", "--help")):
        width = max(map(len, listed)) + 2
        lines = [f"  {name:<{width}}{command.summary}" for name, command in listed.items()]
        return functools.partial(print, OVERVIEW.format("\n".join(lines)))
    asked = " ".join(words[:2]) if listed else words[0]
    close = difflib.get_close_matches(asked, COMMANDS, n=1, cutoff=0.4)
    hint = f"did you mean `openblip {close[0]}`?" if close else "`openblip --help` lists the commands"
    raise ConfigError(f"there is no command `{asked}`; {hint}")
