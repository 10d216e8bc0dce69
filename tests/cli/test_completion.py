"""Shells complete commands, recipes, options and values by the scripts of `openblip completion`."""

import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from openblip.cli.main import COMMANDS
from openblip.recipes import RECIPES

TRY = """
{script}
for line in "$@"; do
    read -ra COMP_WORDS <<< "$line"
    [[ $line == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)) COMPREPLY=()
    _tyro_openblip
    echo "${{COMPREPLY[@]}}"
done
complete -p openblip
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_completes_commands_recipes_options_and_values(run: Callable[..., Any]) -> None:
    lines = [
        "openblip ",
        "openblip caption --deco",
        "openblip caption --decoding ",
        "openblip train ",
        "openblip data ",
    ]
    script = TRY.format(script=run("completion", "bash").out)
    done = subprocess.run(["bash", "-s", "--", *lines], input=script, capture_output=True, text=True, check=True)
    commands, option, values, recipes, group, registered = (line.split() for line in done.stdout.splitlines())
    assert {name.split()[0] for name in COMMANDS} <= set(commands)
    assert option == ["--decoding"]
    assert values == ["beam", "nucleus", "greedy"]
    assert set(RECIPES) <= set(recipes)
    assert {"inspect", "emoji-scenes"} <= set(group)
    assert "-o default" in " ".join(registered)  # file names, where it has nothing to offer


@pytest.mark.parametrize(("shell", "registers"), [("zsh", "#compdef openblip"), ("fish", "complete --no-files")])
def test_scripts_of_other_shells(run: Callable[..., Any], shell: str, registers: str) -> None:
    script = run("completion", shell).out
    assert registers in script
    assert "capfilt-calibrate" in script
    assert len(script.encode()) < 128 * 1024  # fish hands it on as one argument, and Linux takes no longer one


def test_another_shell_is_refused(refusal: Callable[..., str]) -> None:
    assert "bash, zsh or fish" in refusal("completion", "tcsh")
