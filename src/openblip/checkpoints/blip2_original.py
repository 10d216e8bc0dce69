"""LAVIS' .pth files of BLIP-2: what was trained. Frozen parts are left out there and come by name.

The tables of names are in `blip2_original_keys.py`, what shapes tell in `blip2_original_config.py`. A file of
ours has what the format has no place for (settings, words, biases of keys) beside "model", under "openblip".
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openblip.checkpoints.blip2_frozen_parts import (
    FrozenParts,
    FrozenSources,
    Source,
    check_sources,
    load_frozen_parts,
)
from openblip.checkpoints.blip2_native import (
    Blip2Checkpoint,
    Blip2Settings,
    empty_blip2,
    fill,
    read_blip2_settings,
    write_blip2_settings,
)
from openblip.checkpoints.blip2_original_config import (
    encoder_layout,
    infer_blip2,
    infer_encoder,
    language_layout,
)
from openblip.checkpoints.blip2_original_keys import (
    CLIP,
    ENCODER,
    ENCODERS,
    LANGUAGES,
    POSITION_IDS,
    QFORMER,
    TIED,
    TRAINED,
    EncoderLayout,
    LanguageLayout,
)
from openblip.checkpoints.encoder_files import prepare_encoder, without_batch_axes
from openblip.checkpoints.key_table import Table, translate, translate_back, within
from openblip.checkpoints.native import as_float32, check_weights
from openblip.checkpoints.original import TEMPERATURE, log_of
from openblip.checkpoints.pickled import OriginalFile, state_dict, write_original
from openblip.checkpoints.text_weights import check_tied, tied_copies
from openblip.checkpoints.vocabulary import tokenizer_of_file
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.errors import CheckpointError
from openblip.models.config import STAGE1_HEADS, Blip2Config, LanguageConfig, TowerConfig, VisionConfig
from openblip.models.vision_tower import VisionTower

CAPTION_PROMPT = "a photo of"  # of the released captioners
WITHOUT_PLACE = "weights"
KEY_BIAS = ".attn.k_bias"
CLIP_TOWER = "clip_vision_model"


def load_blip2_original(
    file: OriginalFile,
    tokenizer: Source | None = None,
    vision: Source | None = None,
    language_model: Source | None = None,
) -> Blip2Checkpoint:
    """A model of a .pth file, in float32 on the CPU, in eval mode.

    The tokenizer is found as `load_original` does. vision: where the image encoder is, for a file without it;
    anything that `load_image_encoder` takes. language_model: a folder, or a name on the hub, for stage 2. A
    file of ours knows where its tower and its language model came from; another place goes before that.

    Raises CheckpointError when the file is not whole (missing and left-over weights are listed), when a part
    that it leaves out is not named, or is not the one that it was trained with; ConfigError when a part is
    named that it does not leave out.
    """
    path, weights, entry = file
    source = str(path)
    kind = language_layout(weights, source)
    own = None if entry is None else _own(file, kind)
    sources = _sources(own, vision, language_model)
    check_sources(weights, kind, sources, source)
    written = None if own is None else own.model.language
    parts = load_frozen_parts(weights, kind, sources, written, source)
    theirs = _of_the_model(file, kind)
    settings = _released(theirs, kind, parts, sources, source) if own is None else own
    settings = settings._replace(model=_with_parts(settings.model, parts, sources))
    encoder = None if parts.encoder is None else parts.encoder.model
    model = empty_blip2(settings.model, encoder, parts.language)
    named = ("language.",) if encoder is None else ("language.", "vision.")
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(named)}
    table = _table(encoder_layout(theirs, ENCODER), kind)
    found = translate(table, theirs, set(wanted), (TIED,), source)
    if TEMPERATURE in found:
        found[TEMPERATURE] = log_of(found[TEMPERATURE], path)
    check_weights(wanted, found, source)
    fill(model, found)
    words = _words(file, settings.model, tokenizer)
    return Blip2Checkpoint(
        model.eval(), words, settings.preprocessing, settings.prompt, settings.question_prompt
    )


def save_blip2_original(path: str | Path, checkpoint: Blip2Checkpoint) -> None:
    """Write one .pth file that the released code and `load_blip2_original` read.

    As there, frozen parts are left out: the language model, and the image encoder where the model has it
    frozen or it is a CLIP of transformers.

    Raises CheckpointError when the released code has no such model, ConfigError for another name.
    """
    model, config = checkpoint.model, checkpoint.model.config
    kind, layout = _language_of(checkpoint), _encoder_of(checkpoint)
    is_left_out = isinstance(config.vision, TowerConfig) or "vision" in model.frozen
    left_out = ("language.", "vision.") if is_left_out else ("language.",)
    ours = {n: t.detach().cpu() for n, t in model.state_dict().items() if not n.startswith(left_out)}
    if TEMPERATURE in ours:
        ours[TEMPERATURE] = ours[TEMPERATURE].exp()
    theirs = without_batch_axes(translate_back(_table(layout, kind), ours), layout, ENCODER)
    theirs |= tied_copies(theirs, QFORMER)
    theirs[POSITION_IDS] = torch.arange(config.qformer.max_positions)[None]  # the released code asks for it
    entry = write_blip2_settings(checkpoint)
    entry[WITHOUT_PLACE] = {name: theirs.pop(name) for name in list(theirs) if name.endswith(KEY_BIAS)}
    if checkpoint.tokenizer is not None:
        entry["tokenizer"] = checkpoint.tokenizer.to_json()
    write_original(Path(path), theirs, entry)


def _table(layout: EncoderLayout, kind: LanguageLayout | None) -> Table:
    projection = {} if kind is None else {"language_proj": kind.projection}
    return {**TRAINED, **projection, **within(layout.table, "vision.", ENCODER)}


def _own(file: OriginalFile, kind: LanguageLayout | None) -> Blip2Settings:
    """The settings that `save_blip2_original` wrote."""
    where = f"{file.path}, its openblip entry"
    if not isinstance(file.entry, dict):
        raise CheckpointError(f"{where}: damaged, a {type(file.entry).__name__}.")
    settings = read_blip2_settings(file.entry, where)
    config = settings.model
    has_encoder = any(name.startswith(ENCODER) for name in file.weights)
    if (config.language is None) != (kind is None) or (
        has_encoder and isinstance(config.vision, TowerConfig)
    ):
        raise CheckpointError(f"{where}: damaged, of another kind of model than the weights.")
    return settings


def _sources(
    own: Blip2Settings | None, vision: Source | None, language_model: Source | None
) -> FrozenSources:
    """Where the caller says that frozen parts are, or else a file of ours."""
    if own is not None:
        if vision is None and isinstance(own.model.vision, TowerConfig):
            vision = own.model.vision.name
        if language_model is None and own.model.language is not None:
            language_model = own.model.language.name
    return FrozenSources(vision, language_model)


def _of_the_model(file: OriginalFile, kind: LanguageLayout | None) -> dict[str, Tensor]:
    """The file's weights but those of the language model, as the tables expect them."""
    beside = POSITION_IDS if kind is None else (POSITION_IDS, kind.weights)
    theirs = {name: tensor for name, tensor in file.weights.items() if not name.startswith(beside)}
    if file.entry is not None and file.entry.get(WITHOUT_PLACE):
        theirs = state_dict(file.entry[WITHOUT_PLACE], file.path) | theirs
    check_tied(theirs, str(file.path), QFORMER)
    return prepare_encoder(as_float32(theirs), encoder_layout(theirs, ENCODER), ENCODER)


def _released(
    theirs: Mapping[str, Tensor],
    kind: LanguageLayout | None,
    parts: FrozenParts,
    sources: FrozenSources,
    source: str,
) -> Blip2Settings:
    """The settings of a file that does not say them."""
    vision: VisionConfig | TowerConfig
    if parts.encoder is None:
        vision = infer_encoder(theirs, encoder_layout(theirs, ENCODER), source, ENCODER)
        preprocessing = Preprocessing(image_size=vision.image_size)
    else:
        vision, preprocessing = parts.encoder.config, parts.encoder.preprocessing
    language = None
    if kind is not None and parts.language is not None:
        language = LanguageConfig(
            name=str(sources.language_model),
            hidden_dim=parts.language.hidden_dim,
            end_of_text=kind.end_of_text,
        )
    is_captioner = kind is not None and parts.encoder is None  # fine-tuned together with its encoder
    return Blip2Settings(
        infer_blip2(theirs, vision, language, source),
        preprocessing,
        CAPTION_PROMPT if is_captioner else "",
        Blip2Checkpoint._field_defaults["question_prompt"] if kind is None else kind.question_prompt,
    )


def _with_parts(config: Blip2Config, parts: FrozenParts, sources: FrozenSources) -> Blip2Config:
    """The settings around the parts that were loaded, with the names of where they are."""
    if parts.encoder is not None:
        config = replace(config, vision=parts.encoder.config)
    if config.language is not None:
        config = replace(config, language=replace(config.language, name=str(sources.language_model)))
    return config


def _words(file: OriginalFile, config: Blip2Config, named: Source | None) -> Tokenizer | None:
    """The Q-Former's, None where it reads no text."""
    if not config.has_text_branch and named is None:
        return None
    words = tokenizer_of_file(file.path, file.entry, named)
    if words.vocab_size > config.qformer.vocab_size + 1:  # [ENC], the last one, does not exist in BLIP-2
        raise CheckpointError(
            f"{file.path}: the tokenizer has {words.vocab_size} entries, with [DEC] and [ENC], the Q-Former "
            f"{config.qformer.vocab_size}; it is another model's."
        )
    return words


def _language_of(checkpoint: Blip2Checkpoint) -> LanguageLayout | None:
    """How the released code keeps such a model; None in stage 1. CheckpointError where it has none."""
    config = checkpoint.model.config
    if config.language is None:
        if set(config.heads) == set(STAGE1_HEADS):
            return None
        raise _not_released(f"with the heads {', '.join(config.heads)} alone")
    model: Any = checkpoint.model.require_language().model
    if hasattr(model, "peft_config"):
        raise _not_released("with adapters in its language model")
    if config.heads == ("llm",):
        for layout in LANGUAGES:
            if layout.model_type == model.config.model_type and config.instructed in layout.instructed:
                return layout
    reads = "that reads instructions " if config.instructed else ""
    raise _not_released(f"{reads}with the heads {', '.join(config.heads)} and a {model.config.model_type}")


def _encoder_of(checkpoint: Blip2Checkpoint) -> EncoderLayout:
    """How the released code keeps the image encoder; CheckpointError where it has no such one."""
    config, encoder = checkpoint.model.config.vision, checkpoint.model.vision
    if isinstance(config, TowerConfig):
        if isinstance(encoder, VisionTower) and encoder.model.config.model_type == CLIP_TOWER:
            return CLIP
        raise _not_released(f"with the image encoder {config.name}")
    for layout in ENCODERS:
        same = (layout.activation, layout.input_norm, layout.layer_norm_eps, False)
        if (config.activation, config.input_norm, config.layer_norm_eps, config.output_norm) == same:
            return layout
    raise _not_released("with such an image encoder: only with EVA-CLIP's or CLIP's, without a last norm,")


def _not_released(what: str) -> CheckpointError:
    return CheckpointError(f"The released code has no BLIP-2 {what}. Save as openblip.")
