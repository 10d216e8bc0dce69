"""Reading straight into a precision: which parts take it, and how much memory it takes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from damaged_files import assert_read_in_bfloat16
from marks import slow
from openblip.checkpoints import state_dict
from openblip.checkpoints.checkpoint import BlipCheckpoint
from openblip.checkpoints.loading import Format, save_checkpoint
from openblip.data.config import Preprocessing
from openblip.errors import CheckpointError
from openblip.models.blip import Blip
from openblip.models.config import BlipConfig
from tiny_blip import SIZE, TINY, tiny_tokenizer
from tiny_blip2 import Language, tiny_blip2

# Prints by how many MB its memory was larger, while a file of 160 MB was read into bfloat16, than before.
PEAK_OF_READING = """
import re, sys
from pathlib import Path
import torch
from torch import nn
from openblip.checkpoints import state_dict

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

with state_dict.without_weights():
    model = nn.ModuleList(nn.Linear(1000, 1000) for _ in range(40))
before = peak()
state = state_dict.unwrapped(state_dict.read_weights(Path(sys.argv[1])))
state_dict.fill(model, state, "the file", dtype=torch.bfloat16)
assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
print((peak() - before) / 1000)
"""


@pytest.mark.parametrize("format", ["openblip", "huggingface", "original"])
def test_a_blip_is_read_in_a_precision(tmp_path: Path, format: Format) -> None:
    tokenizer = tiny_tokenizer()
    text = {**TINY.to_dict()["text"], "vocab_size": tokenizer.vocab_size}
    model = Blip(BlipConfig.from_dict({**TINY.to_dict(), "text": text, "heads": ("lm",)})).eval()
    path = tmp_path / ("model.pth" if format == "original" else "model")
    save_checkpoint(BlipCheckpoint(model, tokenizer, Preprocessing(image_size=SIZE)), path, format)
    assert_read_in_bfloat16(path)


@pytest.mark.parametrize(("language", "tower"), [("opt", True), *slow((None, False))])
def test_image_encoder_and_language_model_are_read_in_it_and_a_qformer_is_not(
    tmp_path: Path, language: Language | None, tower: bool
) -> None:
    save_checkpoint(tiny_blip2(language=language, tower=tower), tmp_path)
    assert_read_in_bfloat16(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how much memory a process had")
def test_reading_takes_no_more_memory_than_what_is_read(tmp_path: Path) -> None:
    shapes = {"weight": (1000, 1000), "bias": (1000,)}
    ones = {f"{layer}.{name}": torch.ones(shape) for layer in range(40) for name, shape in shapes.items()}
    save_file(ones, tmp_path / "w.safetensors")
    command = [sys.executable, "-c", PEAK_OF_READING, str(tmp_path / "w.safetensors")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert 70 < float(printed) < 110  # of weights 80


def test_every_precision_and_shape_of_a_file_is_read(tmp_path: Path) -> None:
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]
    shapes = [(), (0,), (3,), (2, 0), (3, 2)]
    torch.manual_seed(0)
    tensors = {f"{d} {s}": (torch.rand(s) * 9).to(d) for d in dtypes for s in shapes}
    save_file(tensors, tmp_path / "all.safetensors", metadata={"format": "pt"})
    found = state_dict.read_weights(tmp_path / "all.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    found["torch.float32 (3,)"].zero_()  # a copy: what is done to a tensor does not reach the file
    assert load_file(tmp_path / "all.safetensors")["torch.float32 (3,)"].any()
    save_file({"strange": torch.zeros(2).to(torch.float8_e5m2)}, tmp_path / "f8.safetensors")
    with pytest.raises(CheckpointError, match="holds strange as F8_E5M2"):
        state_dict.read_weights(tmp_path / "f8.safetensors")
