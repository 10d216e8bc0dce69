"""What LAVIS' .pth files of BLIP-2 leave out, because it was frozen: image encoder and language model."""

import os
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from openblip.checkpoints.blip2_original_keys import ENCODER, ENCODERS, LanguageLayout
from openblip.checkpoints.encoder_files import ImageEncoder
from openblip.checkpoints.language_models import load_language_model
from openblip.checkpoints.original_config import shape_of
from openblip.errors import CheckpointError, ConfigError
from openblip.models.config import LanguageConfig
from openblip.models.language_model import LanguageModel

Source = str | os.PathLike[str]

# Constants that older releases of transformers kept with the weights.
_ROTARY = ".rotary_emb.inv_freq"


class FrozenSources(NamedTuple):
    """Where the parts are that a file leaves out; None where it leaves nothing out."""

    vision: Source | None
    language_model: Source | None


class FrozenParts(NamedTuple):
    """Those parts."""

    encoder: ImageEncoder | None
    language: LanguageModel | None


def check_sources(
    weights: Mapping[str, Tensor], kind: LanguageLayout | None, sources: FrozenSources, path: str
) -> None:
    """CheckpointError unless what the file leaves out is named; ConfigError when something else is."""
    has_encoder = any(name.startswith(ENCODER) for name in weights)
    if has_encoder and sources.vision is not None:
        raise ConfigError(f"{path} holds its image encoder: leave vision {sources.vision} out.")
    if kind is None and sources.language_model is not None:
        raise ConfigError(
            f"{path} is of stage 1 and has no language model: leave {sources.language_model} out."
        )
    missing = []
    if not has_encoder and sources.vision is None:
        (width,) = shape_of(weights, "ln_vision.weight", 1, path)
        papers = {w: f"LAVIS' {name}" for layout in ENCODERS for w, name in layout.papers.items()}
        missing.append(f"its image encoder with vision= or --vision ({_in_the_paper(papers, width)})")
    if kind is not None and sources.language_model is None:
        width, _ = shape_of(weights, f"{kind.projection}.weight", 2, path)
        missing.append(
            "its language model with language_model= or --language-model "
            f"({_in_the_paper(kind.papers, width)})"
        )
    if missing:
        raise CheckpointError(
            f"{path} holds what BLIP-2 has trained, not what was frozen. Name {', and '.join(missing)}."
        )


def load_frozen_parts(
    weights: Mapping[str, Tensor],
    kind: LanguageLayout | None,
    sources: FrozenSources,
    written: LanguageConfig | None,
    path: str,
) -> FrozenParts:
    """The parts at `sources`. written: how a file of ours says that its language model is fed.

    Raises CheckpointError when a part cannot be loaded or is not the one that the file was trained with.
    """
    encoder = language = None
    if sources.vision is not None:
        from openblip.checkpoints.image_encoders import load_image_encoder  # which reads whole checkpoints

        encoder = load_image_encoder(sources.vision)
        (width,) = shape_of(weights, "ln_vision.weight", 1, path)
        _check_width(sources.vision, "an image encoder", encoder.config.hidden_dim, width, path)
    if kind is not None and sources.language_model is not None:
        language = load_language_model(
            sources.language_model,
            end_of_text=kind.end_of_text if written is None else written.end_of_text,
            changes=kind.changes if written is None else None,
        )
        found = language.model.config.model_type
        if found != kind.model_type:
            raise CheckpointError(
                f"{path} was trained with a language model of the kind {kind.model_type}; "
                f"{sources.language_model} is a {found}."
            )
        width, _ = shape_of(weights, f"{kind.projection}.weight", 2, path)
        _check_width(sources.language_model, "a language model", language.hidden_dim, width, path)
        _check_copies(weights, kind, language, path)
    return FrozenParts(encoder, language)


def _check_width(source: Source, what: str, found: int, expected: int, path: str) -> None:
    if found != expected:
        raise CheckpointError(
            f"{path} was trained with {what} {expected} wide; {os.fspath(source)} is {found} wide."
        )


def _check_copies(
    weights: Mapping[str, Tensor], kind: LanguageLayout, language: LanguageModel, path: str
) -> None:
    """What a file holds of the language model is what that model has.

    LAVIS means to leave all of it out, but second names of shared weights slip through: OPT's lm_head, T5's
    embed_tokens.
    """
    own = language.model.state_dict()
    unlike = []
    for name, tensor in weights.items():
        if name.startswith(kind.weights) and not name.endswith(_ROTARY):
            twin = own.get(name.removeprefix(kind.weights))
            if twin is None or twin.shape != tensor.shape or not torch.equal(twin.to(tensor.dtype), tensor):
                unlike.append(name)
    if unlike:
        raise CheckpointError(
            f"{path} holds weights of a language model that the named one does not have: "
            f"{'; '.join(sorted(unlike))}."
        )


def _in_the_paper(papers: Mapping[int, str], width: int) -> str:
    known = papers.get(width)
    return f"{width} wide" if known is None else f"{width} wide; the paper's is {known}"
