"""Every command that runs a model says where and how, and refuses in one line what is not there."""

from pathlib import Path
from typing import Any

import pytest

COMMANDS = [
    ["caption", "IMAGES", "--model", "MODEL"],
    ["answer", "IMAGES", "what is it?", "--model", "MODEL"],
    ["match", "IMAGES", "a dog", "--model", "MODEL"],
    ["evaluate", "retrieval", "--data", "IMAGES", "--model", "MODEL"],
    ["capfilt", "IMAGES", "--captioner", "MODEL", "--filter", "MODEL", "--out", "OUT"],
]


def test_bootstrap_says_it_before_its_work(refusal: Any, image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bootstrap = ["bootstrap", "blip-mini", "--web", image_folder, "--human", image_folder, "--out", out]
    assert "device is gpu" in refusal(*bootstrap, "--device", "gpu")
    assert "--dtype cannot be half" in refusal(*bootstrap, "--dtype", "half")
    assert not out.exists()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--device", "gpu", "device is gpu"),
        ("--device", "meta", "device is meta"),
        ("--dtype", "half", "bfloat16, float16"),
        ("--quantization", "8bit", "only the language model of a BLIP-2"),
        ("--quantization", "2bit", "cannot be 2bit"),
    ],
)
def test_what_is_not_there_is_one_line(
    refusal: Any, checkpoint: Path, image_folder: Path, tmp_path: Path,
    command: list[str], option: str, value: str, message: str,
) -> None:  # fmt: skip
    (image_folder / "a.txt").write_text("a red dog\n")
    places = {"IMAGES": image_folder, "MODEL": checkpoint, "OUT": tmp_path / "out"}
    assert message in refusal(*(places.get(word, word) for word in command), option, value)
    assert not (tmp_path / "out").exists()
