"""The user's side of a checkpoint: images and strings in, results out.

`load` gives a `BlipPredictor` for a BLIP and a `Blip2Predictor` for a BLIP-2; `BasePredictor` has their calls.
"""

import os
from typing import get_args

import torch

from openblip.checkpoints.backbones import Quantization, quantize_language_model
from openblip.checkpoints.checkpoint import Blip2Checkpoint, EncoderToken, checked_encoder_token
from openblip.checkpoints.loading import load_checkpoint
from openblip.distributed import find_device
from openblip.errors import ConfigError
from openblip.predictor.base import BasePredictor
from openblip.predictor.blip import BlipPredictor
from openblip.predictor.blip2 import Blip2Predictor
from openblip.predictor.explain import Explanation
from openblip.predictor.values import EncodedImages, Features, Images, ScoredText, TextScore

__all__ = [
    "BasePredictor",
    "Blip2Predictor",
    "BlipPredictor",
    "EncodedImages",
    "Explanation",
    "Features",
    "Images",
    "ScoredText",
    "TextScore",
    "load",
]

DTYPES = ("float32", "bfloat16", "float16")


def load(
    source: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    quantization: Quantization | None = None,
    encoder_token: EncoderToken | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    vision: str | os.PathLike[str] | None = None,
    language_model: str | os.PathLike[str] | None = None,
) -> BlipPredictor | Blip2Predictor:
    """A predictor from a checkpoint: a folder, a file, a name on the Hugging Face hub or of a shipped model.

    Args:
        source: what `checkpoints.loading.load_checkpoint` reads.
        device: where it runs; by default a CUDA GPU, then Apple's (mps), then the CPU, whichever there is.
        dtype: of the weights, as a torch.dtype or by name: "float32" (the default), "bfloat16", "float16", or "auto",
            which is bfloat16 on a GPU that computes with it and float32 elsewhere. For a BLIP-2 it is that of the image
            encoder and the language model only. Results are float32 always.
        quantization: "8bit" or "4bit" for the linear layers of a BLIP-2's language model, by bitsandbytes; `dtype` is
            then that of its other layers, and what 4 bits compute in.
        encoder_token: "[ENC]" or "[CLS]", the first token of texts that are read together with an image; by default
            what the checkpoint says. BLIP was trained with [ENC]; transformers leaves [CLS]; BLIP-2 knows no other.
        tokenizer: folder or hub name of the vocabulary, for a checkpoint that has none.
        vision, language_model: the frozen parts that LAVIS' .pth files of BLIP-2 leave out, see docs/checkpoints.md.

    Raises CheckpointError when there is no such checkpoint or it is not whole; ConfigError for a device that is not
    here, and for a dtype, quantization or encoder_token that does not exist or that this checkpoint cannot have;
    MissingExtraError for a quantization without bitsandbytes.
    """
    if quantization not in (None, *get_args(Quantization)):
        raise ConfigError(f"quantization is {quantization}: choose one of {', '.join(get_args(Quantization))}.")
    device = find_device(device)
    if dtype == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if dtype is None or dtype in DTYPES:
        dtype = getattr(torch, dtype or "float32")
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise ConfigError(f"dtype is {dtype}: choose one of {', '.join(DTYPES)} and auto.")
    checkpoint = load_checkpoint(source, tokenizer=tokenizer, vision=vision, language_model=language_model)
    if isinstance(checkpoint, Blip2Checkpoint):
        if encoder_token not in (None, "[CLS]"):
            raise ConfigError(f"encoder_token is {encoder_token}: BLIP-2 was trained with [CLS] only.")
        if quantization is not None:
            quantize_language_model(checkpoint.model.require_language(), quantization, dtype=dtype, device=device)
        return Blip2Predictor(checkpoint, device, dtype)
    if quantization is not None:
        raise ConfigError(f"quantization is {quantization}: only the language model of a BLIP-2 can be quantised.")
    if encoder_token is not None:
        checkpoint = checkpoint._replace(encoder_token=checked_encoder_token(encoder_token))
    return BlipPredictor(checkpoint, device, dtype)
