"""`openblip.load`: from the name of a checkpoint to a predictor."""

import os

import torch

from openblip.checkpoints.blip2_native import Blip2Checkpoint
from openblip.checkpoints.loading import load_any
from openblip.checkpoints.native import EncoderToken, checked_encoder_token
from openblip.errors import ConfigError
from openblip.predictor.blip2_predictor import Blip2Predictor
from openblip.predictor.predictor import Predictor


def load(
    source: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    encoder_token: EncoderToken | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    vision: str | os.PathLike[str] | None = None,
    language_model: str | os.PathLike[str] | None = None,
) -> Predictor | Blip2Predictor:
    """A predictor from a checkpoint: a folder, a file, a name on the Hugging Face hub or of a shipped model.

    Args:
        source: what `checkpoints.loading.load_any` reads.
        device: where it runs; by default the GPU if there is one.
        dtype: of the weights, float32 by default; of BLIP-2, of its image encoder and language model only.
            Results are float32 always.
        encoder_token: "[ENC]" or "[CLS]", the first token of texts that are read together with an image; by
            default what the checkpoint says. BLIP was trained with [ENC]; transformers leaves [CLS], and
            BLIP-2 knows no other.
        tokenizer: folder or hub name of the vocabulary, for a checkpoint that has none.
        vision, language_model: where the frozen parts are that LAVIS' .pth files of BLIP-2 leave out, see
            docs/checkpoints.md.

    Raises CheckpointError when there is no such checkpoint or it is not whole.
    """
    checkpoint = load_any(source, tokenizer=tokenizer, vision=vision, language_model=language_model)
    if isinstance(checkpoint, Blip2Checkpoint):
        if encoder_token not in (None, "[CLS]"):
            raise ConfigError(f"encoder_token is {encoder_token}: BLIP-2 was trained with [CLS] only.")
        return Blip2Predictor(checkpoint, device, dtype)
    if encoder_token is not None:
        checkpoint = checkpoint._replace(encoder_token=checked_encoder_token(encoder_token))
    return Predictor(checkpoint, device, dtype)
