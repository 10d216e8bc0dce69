"""OpenBLIP's own checkpoint: a folder with config.json, model.safetensors and tokenizer.json.

Key table: the keys of model.safetensors are the names of `Blip`'s parameters, unchanged.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import safetensors
import torch
from safetensors.torch import load_file, save_file

from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.errors import CheckpointError, OpenBlipError
from openblip.models.blip import Blip
from openblip.models.config import BlipConfig

FORMAT = "openblip"
EncoderToken = Literal["[ENC]", "[CLS]"]
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Checkpoint(NamedTuple):
    """A model with what turns pictures and texts into its input."""

    model: Blip
    tokenizer: Tokenizer
    preprocessing: Preprocessing
    prompt: str = ""
    """What its captions go on from, unless the caller says otherwise."""
    encoder_token: EncoderToken = "[ENC]"
    """What a text begins with that is read together with an image: BLIP was trained with [ENC]."""


class Settings(NamedTuple):
    """What a checkpoint says about itself, without its weights and words."""

    model: BlipConfig
    preprocessing: Preprocessing
    prompt: str
    encoder_token: EncoderToken


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> None:
    """Write a folder that `load_checkpoint` reads; weights in `dtype`, or as they are if None.

    config.json comes last: a folder that a killed process left without it is no checkpoint yet.
    """
    folder = Path(folder)
    model = checkpoint.model
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    write_weights(folder, weights)
    checkpoint.tokenizer.save(folder)
    write_config(folder, write_settings(checkpoint))


def write_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Put model.safetensors into a folder, whole or not at all."""
    partial = folder / f"{WEIGHTS}.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    os.replace(partial, folder / WEIGHTS)


def write_config(folder: Path, settings: Mapping[str, Any]) -> None:
    """Put config.json into a folder, whole or not at all; what stands there last says that all is there."""
    partial = folder / f"{CONFIG}.partial"
    partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / CONFIG)


def is_checkpoint(folder: str | Path) -> bool:
    """Whether the folder's config.json says it is OpenBLIP's."""
    path = Path(folder) / CONFIG
    return path.is_file() and read_json(path).get("format") == FORMAT


def load_checkpoint(folder: str | Path, tokenizer: str | os.PathLike[str] | None = None) -> Checkpoint:
    """Read a folder of `save_checkpoint`, in float32 on the CPU, in eval mode.

    tokenizer: folder or hub name of the vocabulary; None is the checkpoint's own.

    Raises CheckpointError when a file is missing or unreadable, when weights are missing, left over or
    wrongly shaped (it lists them), or when tokenizer or preprocessing are another model's.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    if config.get("format") != FORMAT:
        raise CheckpointError(f"{folder / CONFIG} is not an OpenBLIP checkpoint (no format: {FORMAT}).")
    settings = read_settings(config, str(folder / CONFIG))
    model = empty_blip(settings.model)
    load_weights(model, read_weights(folder / WEIGHTS), origin=str(folder / WEIGHTS))
    words = Tokenizer.load(folder if tokenizer is None else os.fspath(tokenizer))
    checkpoint = Checkpoint(
        model.eval(), words, settings.preprocessing, settings.prompt, settings.encoder_token
    )
    check_parts_fit(folder, checkpoint)
    return checkpoint


def write_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """All of a checkpoint but its weights and words: numbers, strings, lists and dicts."""
    return {
        "format": FORMAT,
        "model_type": "blip",
        "model": checkpoint.model.config.to_dict(),
        "preprocessing": asdict(checkpoint.preprocessing),
        "prompt": checkpoint.prompt,
        "encoder_token": checkpoint.encoder_token,
    }


def read_settings(written: Mapping[str, Any], source: str) -> Settings:
    """The inverse of `write_settings`; CheckpointError where something is missing, unknown or impossible."""
    try:
        return Settings(
            BlipConfig.from_dict(written["model"]),
            read_preprocessing(written["preprocessing"]),
            str(written["prompt"]),
            checked_encoder_token(written.get("encoder_token", "[ENC]")),
        )
    except (KeyError, TypeError, AttributeError, OpenBlipError) as error:
        raise CheckpointError(f"{source}: {error}. Was it written by another version?") from error


def read_preprocessing(written: Mapping[str, Any]) -> Preprocessing:
    """What `asdict` made of a preprocessing, after its way through JSON."""
    return Preprocessing(**_with_tuples(dict(written)))


def empty_blip(config: BlipConfig) -> Blip:
    """A model on the CPU whose weights are still to be filled in, which saves drawing random ones."""
    with torch.device("meta"):
        model = Blip(config)
    model.to_empty(device="cpu")
    return model


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, floating ones as float32."""
    if not path.is_file():
        raise CheckpointError(f"There is no {path}; the checkpoint is incomplete.")
    try:
        tensors = load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Is the file whole?") from error
    return as_float32(tensors)


def as_float32(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, floating ones as float32."""
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], origin: str) -> None:
    """Put `weights` into `model`, strictly: names and shapes must be exactly the model's."""
    check_weights(model.state_dict(), weights, origin)
    model.load_state_dict(weights)


def check_weights(
    model: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], origin: str
) -> None:
    """CheckpointError, with a list, unless names and shapes of `weights` are exactly those of `model`."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    problems = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"left over {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} is {found[name]}, the config says {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if problems:
        raise CheckpointError(f"{origin} does not fit its config: {'; '.join(problems)}.")


def checked_encoder_token(token: str) -> EncoderToken:
    """The token itself; CheckpointError unless it is one that texts may begin with."""
    for known in get_args(EncoderToken):
        if token == known:
            return cast(EncoderToken, known)
    raise CheckpointError(f"Texts beside an image begin with [ENC] or [CLS], not with {token}.")


def check_parts_fit(source: str | Path, checkpoint: Checkpoint) -> None:
    """What would otherwise fail at the first unlucky word or picture."""
    config, words = checkpoint.model.config, checkpoint.tokenizer.vocab_size
    if words > config.text.vocab_size:
        raise CheckpointError(
            f"{source}: the tokenizer has {words} entries, with [DEC] and [ENC], the model "
            f"{config.text.vocab_size}; it is another model's."
        )
    size, patch = checkpoint.preprocessing.image_size, config.vision.patch_size
    if size < 1 or size % patch:
        raise CheckpointError(
            f"{source}: preprocessing.image_size {size} is no multiple of the patch size {patch}."
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint; CheckpointError when there is none or it is damaged."""
    if not path.is_file():
        raise CheckpointError(f"There is no {path}; name a folder that holds a checkpoint.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return config


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that frozen dataclasses hold."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
