import subprocess
import sys
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from openblip.errors import ConfigError
from openblip.generation.decoding import Beam, Greedy, Nucleus


def test_defaults_are_those_of_the_contract() -> None:
    assert Greedy() == Greedy(max_new_tokens=20, min_new_tokens=0, repetition_penalty=1.0)
    assert Beam() == Beam(num_beams=3, max_new_tokens=20, min_new_tokens=0, length_penalty=1.0, repetition_penalty=1.0)
    assert Nucleus() == Nucleus(
        top_p=0.9, temperature=1.0, max_new_tokens=20, min_new_tokens=0, repetition_penalty=1.0, seed=None
    )


@pytest.mark.parametrize("strategy", [Greedy, Beam, Nucleus])
@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"min_new_tokens": -1},
        {"min_new_tokens": 21},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
    ],
)
def test_values_out_of_range_are_refused_by_name(strategy: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"{strategy.__name__}: {next(iter(wrong))}"):
        strategy(**wrong)


@pytest.mark.parametrize(
    ("strategy", "wrong"),
    [
        (Beam, {"num_beams": 0}),
        (Beam, {"length_penalty": float("inf")}),
        (Nucleus, {"top_p": 0.0}),
        (Nucleus, {"top_p": 1.01}),
        (Nucleus, {"temperature": 0.0}),
        (Nucleus, {"temperature": float("inf")}),
        (Nucleus, {"seed": -1}),
    ],
)
def test_own_values_out_of_range_are_refused_by_name(strategy: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"{strategy.__name__}: {next(iter(wrong))}"):
        strategy(**wrong)


def test_strategies_are_frozen_and_keyword_only() -> None:
    with pytest.raises(FrozenInstanceError):
        Greedy().max_new_tokens = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        Beam(5)  # type: ignore[misc]


def test_the_strategies_do_not_import_torch() -> None:
    code = "import sys, openblip.generation.decoding; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
