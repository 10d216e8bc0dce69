"""`openblip.load`: from the name of a checkpoint to a predictor."""

import os

import torch

from openblip.checkpoints.checkpoint import Blip2Checkpoint, EncoderToken, checked_encoder_token
from openblip.checkpoints.loading import load_checkpoint
from openblip.errors import ConfigError
from openblip.predictor.blip2_predictor import Blip2Predictor
from openblip.predictor.predictor import BlipPredictor
from openblip.predictor.runtime import chosen_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    source: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    encoder_token: EncoderToken | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    vision: str | os.PathLike[str] | None = None,
    language_model: str | os.PathLike[str] | None = None,
) -> BlipPredictor | Blip2Predictor:
    """A predictor from a checkpoint: a folder, a file, a name on the Hugging Face hub or of a shipped model.

    Args:
        source: what `checkpoints.loading.load_any` reads.
        device: where it runs; by default the GPU if there is one.
        dtype: of the weights, as a torch.dtype or by name: "float32" (the default), "bfloat16", "float16", or
            "auto", which is bfloat16 on a GPU that computes with it and float32 elsewhere. For a BLIP-2 it is
            that of the image encoder and the language model only. Results are float32 always.
        encoder_token: "[ENC]" or "[CLS]", the first token of texts that are read together with an image; by
            default what the checkpoint says. BLIP was trained with [ENC]; transformers leaves [CLS], and
            BLIP-2 knows no other.
        tokenizer: folder or hub name of the vocabulary, for a checkpoint that has none.
        vision, language_model: where the frozen parts are that LAVIS' .pth files of BLIP-2 leave out, see
            docs/checkpoints.md.

    Raises CheckpointError when there is no such checkpoint or it is not whole.
    """
    checkpoint = load_checkpoint(source, tokenizer=tokenizer, vision=vision, language_model=language_model)
    device = chosen_device(device)
    dtype = chosen_dtype(dtype, device)
    if isinstance(checkpoint, Blip2Checkpoint):
        if encoder_token not in (None, "[CLS]"):
            raise ConfigError(f"encoder_token is {encoder_token}: BLIP-2 was trained with [CLS] only.")
        return Blip2Predictor(checkpoint, device, dtype)
    if encoder_token is not None:
        checkpoint = checkpoint._replace(encoder_token=checked_encoder_token(encoder_token))
    return BlipPredictor(checkpoint, device, dtype)


def chosen_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The precision asked for; ConfigError, which names the choices, for one that there is not."""
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if dtype is None or dtype in DTYPES:
        return DTYPES[dtype or "float32"]
    raise ConfigError(f"dtype is {dtype}: choose one of {', '.join(DTYPES)} and auto.")
