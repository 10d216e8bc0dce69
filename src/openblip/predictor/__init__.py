"""The user's side of a checkpoint: images and strings in, results out.

`load` gives a `BlipPredictor` for a BLIP and a `Blip2Predictor` for a BLIP-2; `BasePredictor` has their calls.
"""

import os
from typing import get_args

import torch

from openblip.checkpoints.backbones import Quantization, quantize_language_model
from openblip.checkpoints.checkpoint import Blip2Checkpoint, EncoderToken, checked_encoder_token
from openblip.checkpoints.loading import is_transformers_model, load_checkpoint
from openblip.distributed import find_device, has_bfloat16
from openblip.errors import ConfigError
from openblip.nn.linear import can_pack
from openblip.predictor.base import BasePredictor
from openblip.predictor.blip import BlipPredictor
from openblip.predictor.blip2 import Blip2Predictor
from openblip.predictor.captioner import TransformersCaptioner, load_transformers_captioner
from openblip.predictor.explain import Explanation
from openblip.predictor.similarity import SimilarityScorer, load_similarity_scorer
from openblip.predictor.values import EncodedImages, Features, Images, ScoredText, TextScore

__all__ = [
    "BasePredictor",
    "Blip2Predictor",
    "BlipPredictor",
    "Captioner",
    "EncodedImages",
    "Explanation",
    "Features",
    "Images",
    "ScoredText",
    "SimilarityScorer",
    "TextScore",
    "TransformersCaptioner",
    "instruction_set",
    "load",
    "load_captioner",
    "load_scorer",
]

Captioner = BlipPredictor | Blip2Predictor | TransformersCaptioner
DTYPES = ("float32", "bfloat16", "float16")
AUTO_WEIGHTS = 50_000_000
"""The number of weights above which "auto" takes bfloat16 on a CPU. Smaller models are hardly faster in it."""


def find_dtype(dtype: torch.dtype | str | None, device: torch.device, num_weights: int) -> torch.dtype:
    """The precision that a model with `num_weights` weights computes in on a device; `load` says what it may be.

    "auto" is bfloat16 where the device has instructions for it, on a CPU for large models only; float32 elsewhere. What
    "int8" does not round to 8 bits is in bfloat16 likewise. Raises ConfigError for any other.
    """
    if dtype == "int8" and device.type != "cpu":
        raise ConfigError(f"dtype is int8, which is for CPUs; on {device.type} choose auto.")
    if dtype == "int8" or (dtype == "auto" and (device.type != "cpu" or num_weights > AUTO_WEIGHTS)):
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    dtype = "float32" if dtype in (None, "auto") else dtype
    found = getattr(torch, dtype) if dtype in DTYPES else dtype
    if not (isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1):
        raise ConfigError(f"dtype is {dtype}: choose one of {', '.join(DTYPES)}, int8 and auto.")
    return found


def instruction_set(device: torch.device) -> str:
    """The kernels that a model runs with on a device; in lower precision its results depend on them by rounding."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    extensions = {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported,
        "vnni": torch.cpu._is_vnni_supported,
        "amx": torch.cpu._is_amx_tile_supported,
    }
    names = [torch.backends.cpu.get_cpu_capability(), *(name for name, is_there in extensions.items() if is_there())]
    return " ".join(names).lower()


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
            the fastest at no loss that shows (`find_dtype`). The Q-Former of a BLIP-2 stays in float32 where it is
            float16. "int8" is for a BLIP on a CPU: weights inside the transformers, and the activations
            that they are multiplied with, have 8 bits. Results are float32 always.
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
    if dtype != "auto":
        find_dtype(dtype, device, 0)  # says what it cannot be before anything is read
    checkpoint = load_checkpoint(
        source,
        tokenizer=tokenizer,
        vision=vision,
        language_model=language_model,
        dtype=lambda num_weights: find_dtype(dtype, device, num_weights),
    )
    precision = next(checkpoint.model.vision.parameters()).dtype
    if isinstance(checkpoint, Blip2Checkpoint):
        if encoder_token not in (None, "[CLS]"):
            raise ConfigError(f"encoder_token is {encoder_token}: BLIP-2 was trained with [CLS] only.")
        if quantization is not None:
            quantize_language_model(checkpoint.model.require_language(), quantization, dtype=precision, device=device)
        if dtype == "int8":
            raise ConfigError(
                "dtype is int8, which is for a BLIP; of a BLIP-2 the language model can have 8 bits: quantization."
            )
        blip2 = Blip2Predictor(checkpoint, device, precision)  # the Q-Former too, which is read in float32
        if can_pack(device, precision):
            blip2.model.pack()
        return blip2
    if quantization is not None:
        raise ConfigError(f"quantization is {quantization}: only the language model of a BLIP-2 can be quantised.")
    if encoder_token is not None:
        checkpoint = checkpoint._replace(encoder_token=checked_encoder_token(encoder_token))
    predictor = BlipPredictor(checkpoint, device)
    if can_pack(device, precision):
        predictor.model.pack(int8=dtype == "int8")
    elif dtype == "int8":
        raise ConfigError("dtype is int8, which needs a torch with oneDNN; choose auto.")
    return predictor


def load_captioner(
    source: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    prompt: str | None = None,
    quantization: Quantization | None = None,
) -> Captioner:
    """What `load` reads, or any other image-text-to-text model of transformers, by folder or hub name, to write
    captions.

    prompt: what a model that `load` does not read is asked for every image; a BLIP takes its prompt with the call.
    device, dtype, quantization: as in `load`; without "int8", and with the linear layers of the whole model quantised,
    for a model that `load` does not read. Raises what `load` raises.
    """
    if not is_transformers_model(source):
        return load(source, device, dtype, quantization=quantization)
    found = find_device(device)
    if dtype == "int8":
        raise ConfigError(f"dtype is int8, which is for a BLIP, and {source} is none; choose auto.")
    return load_transformers_captioner(
        source,
        found,
        lambda num_weights: find_dtype(dtype, found, num_weights),
        prompt=prompt,
        quantization=quantization,
    )


def load_scorer(
    source: str | os.PathLike[str], device: str | torch.device | None = None, dtype: torch.dtype | str | None = None
) -> SimilarityScorer:
    """Any CLIP or SigLIP of transformers, by folder or hub name, to score how similar images and texts are.

    device, dtype: as in `load`, without "int8". Raises CheckpointError when there is no such model or it is of another
    kind, ConfigError for a device or dtype that cannot be.
    """
    found = find_device(device)
    if dtype == "int8":
        raise ConfigError("dtype is int8, which is for a BLIP; choose auto.")
    return load_similarity_scorer(source, found, lambda num_weights: find_dtype(dtype, found, num_weights))
