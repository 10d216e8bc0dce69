"""The `openblip` command itself: help without torch, exit codes, one-line errors."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from openblip import distributed
from openblip.cli import main as cli
from openblip.cli import options
from openblip.cli.options import parse, parse_call
from openblip.errors import ConfigError, OpenBlipError, SourceError

HELP_OF_EVERY_COMMAND = """
import contextlib, io, json, sys
from openblip.cli.main import COMMANDS, main

helps = {}
for name in ["", *COMMANDS]:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            code = main([*name.split(), "--help"])
        except Exception as error:
            code = repr(error)
    heavy = sorted({"torch", "transformers"} & set(sys.modules))
    helps[name] = {"code": code, "heavy": heavy, "text": text.getvalue()}
print(json.dumps(helps))
"""


CAPTION_ONE_IMAGE = """
import sys
from openblip.cli.main import main

code = main(["caption", sys.argv[1], "--model", "openblip-mini-captioner", "--device", "cpu"])
slow = ("torch._dynamo", "torch._inductor", "sympy", "transformers", "huggingface_hub", "pyarrow")
print(code, *(name for name in slow if name in sys.modules), file=sys.stderr)
"""


@pytest.mark.slow
def test_a_caption_imports_neither_a_compiler_nor_transformers(image_folder: Path) -> None:
    command = [sys.executable, "-c", CAPTION_ONE_IMAGE, str(image_folder / "a.png")]
    process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert process.stderr.splitlines()[-1] == "0"


@pytest.fixture(scope="module")
def helps() -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-c", HELP_OF_EVERY_COMMAND]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    helps: dict[str, dict[str, Any]] = json.loads(printed)
    return helps


@pytest.mark.parametrize("name", ["", *cli.COMMANDS])
def test_help_answers_without_importing_torch(helps: dict[str, dict[str, Any]], name: str) -> None:
    # The commands run one after the other in one process: the first name that fails is the one to look at.
    assert helps[name]["code"] == 0
    assert helps[name]["heavy"] == []
    assert "usage: openblip" in helps[name]["text"]


def test_no_arguments_list_every_command_and_a_group_its_own(run: Any) -> None:
    text = run().out
    assert all(name in text and entry.summary in text for name, entry in cli.COMMANDS.items())
    text = run("data").out
    assert "data inspect" in text
    assert "capfilt" not in text


def test_version(run: Any) -> None:
    assert run("--version").out.startswith("openblip 0.")


@pytest.mark.parametrize(
    ("words", "closest"),
    [(["capfit"], "`openblip capfilt`"), (["data", "inspekt"], "`openblip data inspect`"), (["mach"], "match")],
)
def test_an_unknown_command_names_the_closest(refusal: Any, words: list[str], closest: str) -> None:
    assert closest in refusal(*words)


Use = Callable[[Callable[..., int]], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Makes `openblip probe` run the given function."""

    def install(command: Callable[..., int]) -> None:
        module = types.ModuleType("openblip.cli.probe")
        module.command = command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "openblip.cli.probe", module)
        monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command("probe", "command", "for this test"))

    return install


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


def test_the_exit_code_of_a_command_is_returned(use: Use, run: Any) -> None:
    def command(*, failures: int = 0) -> int:
        return 1 if failures else 0

    use(command)
    run("probe")
    run("probe", "--failures", "3", code=1)


def test_an_error_is_one_line(use: Use, refusal: Any) -> None:
    use(raising(OpenBlipError("no shards\nin a/b")))
    assert refusal("probe") == "openblip: no shards in a/b\n"


def test_an_error_ends_with_the_page_that_explains_it(use: Use, refusal: Any) -> None:
    use(raising(SourceError("no shards in a/b.")))
    assert refusal("probe") == "openblip: no shards in a/b (see `openblip docs data#sources`)\n"


def test_a_missing_file_is_one_line(use: Use, refusal: Any) -> None:
    use(lambda: len(Path("/no/such/file").read_text()))
    assert "/no/such/file" in refusal("probe")


@pytest.mark.parametrize("words", [["probe", "--debug"], ["--debug", "probe"]])
def test_debug_raises_the_error_itself(use: Use, words: list[str]) -> None:
    use(raising(SourceError("no shards")))
    with pytest.raises(SourceError, match="no shards"):
        cli.main(words)


def test_a_programming_error_is_not_hidden(use: Use) -> None:
    use(raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


def test_an_interrupt_says_how_to_go_on(use: Use, run: Any) -> None:
    use(raising(KeyboardInterrupt()))
    assert "resume with the same command" in run("probe", code=130).err


@pytest.mark.parametrize(
    ("line", "message"),
    [("", "--count"), ("--count many", "many"), ("--count 1 --cuont 2", "--cuont"), ("--count", "--count")],
)
def test_wrong_options_are_one_line(use: Use, refusal: Any, line: str, message: str) -> None:
    def command(*, count: int) -> int:
        raise AssertionError("must not run")

    use(command)
    error = refusal("probe", *line.split())
    assert message in error
    assert "see `openblip probe --help`" in error
    assert not set("╭╰│─") & set(error)


def test_parsing_does_not_run_the_command() -> None:
    calls = []

    def command(*, count: int = 2) -> int:
        calls.append(count)
        return 0

    call = parse_call(command, ["--count", "5"], prog="openblip probe")
    assert calls == []
    assert call() == 0
    assert calls == [5]
    with pytest.raises(ConfigError):
        parse_call(command, ["--count", "x"], prog="openblip probe")


def test_a_closed_pipe_is_quiet() -> None:
    command = [sys.executable, "-c", "import sys; from openblip.cli.main import main; sys.exit(main(['--help']))"]
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    os.close(writing)
    assert result.stderr == ""
    assert result.returncode == cli.BROKEN_PIPE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    inner: Inner
    rounds: int = 1


def test_a_given_instance_sets_the_defaults() -> None:
    default = Options(inner=Inner(width=7))

    def parsed(*words: str) -> Options:
        return parse(Options, words, prog="openblip probe", default=default)

    assert parsed("--rounds", "2") == Options(inner=Inner(width=7), rounds=2)
    assert parsed("--inner.width", "3") == Options(inner=Inner(width=3))
    with pytest.raises(ConfigError, match=r"inner\.width"):
        parsed("--inner.width", "x")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "evaluate",
            "caption|retrieval|filter|vqa|nlvr|visdial|video-retrieval|video-qa|classification, --data and --model",
        ),
        ("caption a.png --modl x", "no option --modl; did you mean --model?"),
        ("caption a.png --model x --decoding y", "cannot be y; choose beam, nucleus or greedy"),
        ("convert a b c --format openblip", "c cannot be understood here"),
    ],
)
def test_errors_name_every_option_and_the_closest(refusal: Any, line: str, message: str) -> None:
    assert message in refusal(*line.split())


def test_an_error_that_tyro_words_itself_is_still_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version may know errors that the hook is not told about."""
    monkeypatch.setattr(options._errors, "on_parse_error", lambda hook: contextlib.nullcontext())
    with pytest.raises(ConfigError, match=r"^the options cannot be understood; see `probe --help`$"):
        parse(Options, ["--unknown"], prog="probe", default=Options(inner=Inner()))


@pytest.mark.parametrize(("rank", "is_first", "is_said"), [("0", True, True), ("1", False, False), ("1", True, True)])
def test_of_the_processes_of_torchrun_one_says_what_is_wrong(
    run: Any, monkeypatch: pytest.MonkeyPatch, rank: str, is_first: bool, is_said: bool
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(distributed, "fails_first", lambda: is_first)
    assert bool(run("train", "no-recipe", code=2).err) == is_said
    assert bool(run("train", "--help").out) == (rank == "0")


def test_the_first_process_that_fails_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    store = cast(Any, torch.distributed).TCPStore("localhost", 0, is_master=True)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    fails_first = distributed.fails_first.__wrapped__
    assert [fails_first() for _ in range(3)] == [True, False, False]


def test_output_that_is_full_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["--help"]) == 1
    assert capsys.readouterr().err.startswith("openblip: a file or standard output cannot be written: No space left")
