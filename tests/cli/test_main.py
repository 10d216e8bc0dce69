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

import pytest

from openblip.cli import main as cli
from openblip.cli import options
from openblip.cli.options import parse, parse_call
from openblip.errors import ConfigError, OpenBlipError, SourceError

HELP_OF_EVERY_COMMAND = """
import contextlib, io, json, sys
from openblip.cli.main import COMMANDS, main

found = {}
for name in ["", *COMMANDS]:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            code = main([*name.split(), "--help"])
        except Exception as error:
            code = repr(error)
    heavy = sorted({"torch", "transformers"} & set(sys.modules))
    found[name] = {"code": code, "heavy": heavy, "text": text.getvalue()}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, dict[str, object]]:
    result = subprocess.run(
        [sys.executable, "-c", HELP_OF_EVERY_COMMAND], capture_output=True, text=True, check=True, timeout=60
    )
    found: dict[str, dict[str, object]] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("name", ["", *cli.COMMANDS])
def test_help_answers_without_importing_torch(helps: dict[str, dict[str, object]], name: str) -> None:
    # The commands run one after the other in one process: the first name that fails is the one to look at.
    assert helps[name]["code"] == 0
    assert helps[name]["heavy"] == []
    assert "usage: openblip" in str(helps[name]["text"])


def test_no_arguments_list_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text and entry.summary in text for name, entry in cli.COMMANDS.items())


def test_a_group_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data"]) == 0
    text = capsys.readouterr().out
    assert "data inspect" in text
    assert "capfilt" not in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("openblip 0.")


@pytest.mark.parametrize(
    ("words", "closest"),
    [(["capfit"], "`openblip capfilt`"), (["data", "inspekt"], "`openblip data inspect`"), (["mach"], "match")],
)
def test_an_unknown_command_names_the_closest(
    words: list[str], closest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert closest in captured.err
    assert captured.err.count("\n") == 1


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., int]], None]:
    """Makes `openblip probe` run the given function."""

    def install(command: Callable[..., int]) -> None:
        module = types.ModuleType("openblip.cli.probe")
        module.command = command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "openblip.cli.probe", module)
        monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command("openblip.cli.probe", "command", "for this test"))

    return install


Use = Callable[[Callable[..., int]], None]


def test_the_exit_code_of_a_command_is_returned(use: Use) -> None:
    def command(*, failures: int = 0) -> int:
        return 1 if failures else 0

    use(command)
    assert cli.main(["probe"]) == 0
    assert cli.main(["probe", "--failures", "3"]) == 1


@pytest.mark.parametrize("error", [SourceError("no shards\nin a/b"), OpenBlipError("no shards in a/b")])
def test_an_error_is_one_line(use: Use, capsys: pytest.CaptureFixture[str], error: OpenBlipError) -> None:
    def command() -> int:
        raise error

    use(command)
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == "openblip: no shards in a/b\n"


def test_a_missing_file_is_one_line(use: Use, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        return len(Path("/no/such/file").read_text())

    use(command)
    assert cli.main(["probe"]) == 2
    captured = capsys.readouterr().err
    assert "/no/such/file" in captured
    assert captured.count("\n") == 1


@pytest.mark.parametrize("words", [["probe", "--debug"], ["--debug", "probe"]])
def test_debug_raises_the_error_itself(use: Use, words: list[str]) -> None:
    def command() -> int:
        raise SourceError("no shards")

    use(command)
    with pytest.raises(SourceError, match="no shards"):
        cli.main(words)


def test_a_programming_error_is_not_hidden(use: Use) -> None:
    def command() -> int:
        raise ZeroDivisionError

    use(command)
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


def test_an_interrupt_says_how_to_go_on(use: Use, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        raise KeyboardInterrupt

    use(command)
    assert cli.main(["probe"]) == 130
    assert "resume with the same command" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--count"),
        (["--count", "many"], "many"),
        (["--count", "1", "--cuont", "2"], "--cuont"),
        (["--count"], "--count"),
    ],
)
def test_wrong_options_are_one_line(
    use: Use, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    def command(*, count: int) -> int:
        raise AssertionError("must not run")

    use(command)
    assert cli.main(["probe", *words]) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert "see `openblip probe --help`" in captured
    assert captured.count("\n") == 1
    assert not set("╭╰│─") & set(captured)


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
    code = "import sys; from openblip.cli.main import main; sys.exit(main(['--help']))"
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=60
    )
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
    found = parse(Options, ["--rounds", "2"], prog="openblip probe", default=default)
    assert found == Options(inner=Inner(width=7), rounds=2)
    found = parse(Options, ["--inner.width", "3"], prog="openblip probe", default=default)
    assert found == Options(inner=Inner(width=3))
    with pytest.raises(ConfigError, match=r"inner\.width"):
        parse(Options, ["--inner.width", "x"], prog="openblip probe", default=default)


def test_errors_name_every_option_and_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (
            ["evaluate"],
            "caption|retrieval|filter|vqa|nlvr|visdial|video-retrieval|video-qa|classification, --data and --model",
        ),
        (["caption", "a.png", "--modl", "x"], "no option --modl; did you mean --model?"),
        (["caption", "a.png", "--model", "x", "--decoding", "y"], "cannot be y; choose beam, nucleus or greedy"),
        (["convert", "a", "b", "c", "--format", "openblip"], "c cannot be understood here"),
    ):
        assert cli.main(words) == 2
        assert message in capsys.readouterr().err


def test_an_error_that_tyro_words_itself_is_still_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version may know errors that the hook is not told about."""
    monkeypatch.setattr(options._errors, "on_parse_error", lambda hook: contextlib.nullcontext())
    with pytest.raises(ConfigError, match=r"^the options cannot be understood; see `probe --help`$"):
        parse(Options, ["--unknown"], prog="probe", default=Options(inner=Inner()))
