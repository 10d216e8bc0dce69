"""What tests of checkpoints do to files, and how they compare models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openblip.checkpoints.loading import load_checkpoint

WEIGHTS = "model.safetensors"


def edit_weights(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a safetensors file, or of the one in a folder."""
    path = path / WEIGHTS if path.is_dir() else path
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the config.json of a folder."""
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_pth(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of a .pth file."""
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


class Exploit:
    """Unpickled carelessly, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def assert_read_in_bfloat16(source: Path, **parts: Path) -> None:
    """Whether a checkpoint's weights, but not those of a Q-Former and its heads, are rounded when they are read so."""
    counts: list[int] = []

    def choose(num_weights: int) -> torch.dtype:
        counts.append(num_weights)
        return torch.bfloat16

    exact = load_checkpoint(source, **parts).model.state_dict()
    rounded = load_checkpoint(source, **parts, dtype=choose).model.state_dict()
    is_blip2 = any(name.startswith("qformer.") for name in exact)
    for name, tensor in exact.items():
        is_halved = tensor.is_floating_point() and name.startswith(("vision.", "language.") if is_blip2 else "")
        expected = tensor.bfloat16() if is_halved else tensor
        assert rounded[name].dtype == expected.dtype, name
        assert torch.equal(rounded[name], expected), name
    num_weights = sum({tensor.data_ptr(): tensor.numel() for tensor in exact.values()}.values())
    assert parts or counts[0] >= 0.99 * num_weights  # some files have no temperature


def assert_same_weights(model: nn.Module, expected: nn.Module, *, rounded: tuple[str, ...] = ()) -> None:
    """The same names and bits; those of `rounded` went through another number, and may differ in the last digit."""
    state, expected_state = model.state_dict(), expected.state_dict()
    assert state.keys() == expected_state.keys()
    for name, tensor in expected_state.items():
        torch.testing.assert_close(
            state[name], tensor, rtol=1e-6 if name in rounded else 0, atol=0, equal_nan=True, msg=name
        )
