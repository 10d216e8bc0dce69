"""LAVIS' .pth files of BLIP-2, which hold what was trained. What was frozen is left out, and loaded from elsewhere.

A file of ours has what the format has no place for (settings, tokenizer, biases of keys) beside "model", under
"openblip". Of others' files, names and shapes of the tensors tell the settings.

The Q-Former has BERT's names, with a second feed-forward for the queries.

D width of the Q-Former, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openblip.checkpoints.checkpoint import (
    QUESTION_PROMPT,
    Blip2Checkpoint,
    Blip2Settings,
    FrozenModels,
    PathOrName,
    empty_blip2,
    read_blip2_settings,
    settings_to_dict,
)
from openblip.checkpoints.huggingface.blip import BERT_LM_HEAD_KEYS, LOG_TEMPERATURE, MATCHING_KEYS
from openblip.checkpoints.huggingface.blip2 import SHORT_QUESTION_PROMPT, qformer_layer_keys
from openblip.checkpoints.original.blip import (
    TEXT_EPS,
    PthFile,
    check_entry,
    layer_numbers,
    log_temperature,
    num_heads_of,
    pth_tokenizer,
    shape_of,
    write_pth,
)
from openblip.checkpoints.original.image_encoder import (
    ENCODER_LAYOUTS,
    ENCODER_PREFIX,
    OPENAI_CLIP,
    EncoderLayout,
    add_implied_tensors,
    drop_batch_axes,
    encoder_layout,
    infer_encoder,
)
from openblip.checkpoints.state_dict import (
    Table,
    add_prefix,
    as_float32,
    as_state_dict,
    assign_weights,
    check_tied,
    raise_on_mismatch,
    tied_copies,
    translate,
    translate_back,
)
from openblip.data.transforms import Preprocessing
from openblip.errors import CheckpointError, ConfigError
from openblip.models.config import STAGE1_HEADS, Blip2Config, LanguageConfig, QFormerConfig, TowerConfig, VisionConfig
from openblip.models.language_model import LanguageModel, has_lora
from openblip.models.vision_tower import VisionTower

BLIP2_CAPTION_PROMPT = "a photo of"  # of the released captioners
VISION_NORM_EPS = 1e-5

_QFORMER, _BERT = "Qformer", "Qformer.bert"
_QUERIES = "query_tokens"
_WORDS = f"{_BERT}.embeddings.word_embeddings.weight"
_POSITION_IDS = f"{_BERT}.embeddings.position_ids"  # a buffer, in every file
_TIED = f"{_QFORMER}.cls.predictions.decoder."  # the word embeddings and cls.predictions.bias once more
_KEY_BIAS = ".attn.k_bias"
_EXTRA_WEIGHTS = "weights"  # of our entry: weights that the format has no place for
_CLIP_TYPE = "clip_vision_model"  # model_type of transformers' CLIP
_ROTARY = ".rotary_emb.inv_freq"  # constants that older releases of transformers kept with the weights

_TRAINED: Table = {  # Blip2Qformer, and what Blip2OPT and Blip2T5 keep of it
    "vision_norm": "ln_vision",
    "qformer.embeddings.queries": _QUERIES,
    "qformer.embeddings.word": f"{_BERT}.embeddings.word_embeddings",
    "qformer.embeddings.position": f"{_BERT}.embeddings.position_embeddings",
    "qformer.embeddings.norm": f"{_BERT}.embeddings.LayerNorm",
    **add_prefix(qformer_layer_keys("self", has_text_branch=True), "qformer.", f"{_BERT}."),
    **add_prefix(BERT_LM_HEAD_KEYS, "qformer.", f"{_QFORMER}."),
    LOG_TEMPERATURE: "temp",  # the file has no logarithm
    **MATCHING_KEYS,
}


class LanguageLayout(NamedTuple):
    """How LAVIS keeps the projection to one kind of language model, and how it uses that model."""

    model_type: str
    """transformers' name of the kind."""
    projection: str
    weights: str
    """Prefix of the language model's own weights."""
    instructed: tuple[bool, ...]
    """Whether the Q-Former reads instructions: the cases for which LAVIS has models."""
    question_prompt: str
    papers: Mapping[int, str]
    """Width -> the paper's language model."""
    end_of_text: str | None = None
    changes: Mapping[str, str] = {}
    """Settings that LAVIS gives the language model in place of its own."""


_LANGUAGE_LAYOUTS = (
    LanguageLayout(
        "opt",
        "opt_proj",
        "opt_model.",
        (False,),
        QUESTION_PROMPT,
        {2560: "facebook/opt-2.7b", 4096: "facebook/opt-6.7b"},
        end_of_text="\n",
    ),
    LanguageLayout(
        "t5",
        "t5_proj",
        "t5_model.",
        (False, True),
        SHORT_QUESTION_PROMPT,
        {2048: "google/flan-t5-xl", 4096: "google/flan-t5-xxl"},
        changes={"dense_act_fn": "gelu"},
    ),
    LanguageLayout(  # InstructBLIP's
        "llama",
        "llm_proj",
        "llm_model.",
        (False, True),
        SHORT_QUESTION_PROMPT,
        {4096: "lmsys/vicuna-7b-v1.1", 5120: "lmsys/vicuna-13b-v1.1"},
    ),
)

# ---- frozen parts


class FrozenSources(NamedTuple):
    """What a file says about its model, and where the parts are that it leaves out."""

    settings: Blip2Settings | None
    """Those that OpenBLIP wrote; None in a file of others."""
    layout: LanguageLayout | None
    """None in stage 1."""
    vision: PathOrName | None
    """The image encoder; None when the file holds it."""
    language_model: PathOrName | None
    """None in stage 1."""

    @property
    def end_of_text(self) -> str | None:
        """What ends a text of the language model; None is its tokenizer's own end."""
        if self.settings is None:
            return None if self.layout is None else self.layout.end_of_text
        return None if self.settings.model.language is None else self.settings.model.language.end_of_text

    @property
    def changes(self) -> Mapping[str, str]:
        """Settings that the language model is to have in place of its own; one that we have saved has them."""
        return {} if self.layout is None or self.settings is not None else self.layout.changes


def frozen_sources(
    file: PthFile, vision: PathOrName | None = None, language_model: PathOrName | None = None
) -> FrozenSources:
    """The parts that a file of BLIP-2 leaves out, at the places that the caller names.

    A file of ours knows where its tower and its language model came from; a named place goes before that.

    Raises CheckpointError when a part is left out and not named, ConfigError when one is named that is not left out.
    """
    path, weights = str(file.path), file.weights
    layouts = [layout for layout in _LANGUAGE_LAYOUTS if f"{layout.projection}.weight" in weights]
    if len(layouts) > 1:
        raise CheckpointError(f"{path} is for {' and for '.join(layout.model_type for layout in layouts)}.")
    layout = layouts[0] if layouts else None
    has_encoder = any(name.startswith(ENCODER_PREFIX) for name in weights)
    settings = None
    if file.entry is not None:
        entry_name = check_entry(file)
        settings = read_blip2_settings(file.entry, entry_name)
        own_vision, own_language = settings.model.vision, settings.model.language
        if (own_language is None) != (layout is None) or (has_encoder and isinstance(own_vision, TowerConfig)):
            raise CheckpointError(f"{entry_name}: damaged, of another kind of model than the weights.")
        if vision is None and isinstance(own_vision, TowerConfig):
            vision = own_vision.name
        if language_model is None and own_language is not None:
            language_model = own_language.name
    if has_encoder and vision is not None:
        raise ConfigError(f"{path} holds its image encoder: leave vision {vision} out.")
    if layout is None and language_model is not None:
        raise ConfigError(f"{path} is of stage 1 and has no language model: leave {language_model} out.")
    missing = []
    if not has_encoder and vision is None:
        (width,) = shape_of(weights, "ln_vision.weight", 1, path)
        papers = {w: f"LAVIS' {name}" for encoder in ENCODER_LAYOUTS for w, name in encoder.papers.items()}
        missing.append(f"its image encoder with vision= or --vision ({_in_the_paper(papers, width)})")
    if layout is not None and language_model is None:
        width, _ = shape_of(weights, f"{layout.projection}.weight", 2, path)
        paper = _in_the_paper(layout.papers, width)
        missing.append(f"its language model with language_model= or --language-model ({paper})")
    if missing:
        raise CheckpointError(
            f"{path} holds what BLIP-2 has trained, not what was frozen. Name {', and '.join(missing)}."
        )
    return FrozenSources(settings, layout, vision, language_model)


def _in_the_paper(papers: Mapping[int, str], width: int) -> str:
    known = papers.get(width)
    return f"{width} wide" if known is None else f"{width} wide; the paper's is {known}"


def _check_frozen_parts(file: PthFile, parts: FrozenModels, sources: FrozenSources) -> None:
    """Raise a CheckpointError unless the parts are those that the file was trained with."""
    path, weights, layout = str(file.path), file.weights, sources.layout
    widths = []
    if parts.encoder is not None:
        (width,) = shape_of(weights, "ln_vision.weight", 1, path)
        widths.append(("an image encoder", width, sources.vision, parts.encoder.config.hidden_dim))
    if layout is not None and parts.language is not None:
        model_type = parts.language.model.config.model_type
        if model_type != layout.model_type:
            raise CheckpointError(
                f"{path} was trained with a language model of the kind {layout.model_type}; {sources.language_model} "
                f"is a {model_type}."
            )
        width, _ = shape_of(weights, f"{layout.projection}.weight", 2, path)
        widths.append(("a language model", width, sources.language_model, parts.language.hidden_dim))
    for part, expected, source, width in widths:
        if width != expected:
            raise CheckpointError(f"{path} was trained with {part} {expected} wide; {source} is {width} wide.")
    if layout is not None and parts.language is not None:
        _check_language_copies(file, layout, parts.language)


def _check_language_copies(file: PthFile, layout: LanguageLayout, language: LanguageModel) -> None:
    """Raise a CheckpointError unless the language model has what the file holds of it.

    LAVIS means to leave all of it out, but second names of shared weights slip through: OPT's lm_head, T5's
    embed_tokens.
    """
    state = language.model.state_dict()
    different = []
    for name, tensor in file.weights.items():
        if name.startswith(layout.weights) and not name.endswith(_ROTARY):
            ours = state.get(name.removeprefix(layout.weights))
            if ours is None or ours.shape != tensor.shape or not torch.equal(ours.to(tensor.dtype), tensor):
                different.append(name)
    if different:
        raise CheckpointError(
            f"{file.path} holds weights of a language model that the named one does not have: "
            f"{'; '.join(sorted(different))}."
        )


# ---- reading


def load_original_blip2(
    file: PthFile, sources: FrozenSources, parts: FrozenModels, tokenizer: PathOrName | None = None
) -> Blip2Checkpoint:
    """The model of a .pth file around the frozen parts that it leaves out.

    sources: those of `frozen_sources`; parts: what was loaded from there. The tokenizer is that of `pth_tokenizer`.

    Raises CheckpointError also when a part is not the one that the file was trained with.
    """
    path, source = file.path, str(file.path)
    _check_frozen_parts(file, parts, sources)
    state = _model_state(file, sources.layout)
    settings = sources.settings or _infer_settings(state, parts, sources, source)
    config = settings.model
    if parts.encoder is not None:
        config = replace(config, vision=parts.encoder.config)
    if config.language is not None:
        config = replace(config, language=replace(config.language, name=str(sources.language_model)))
    model = empty_blip2(config, parts.encoder and parts.encoder.model, parts.language)
    loaded = ("language.",) if parts.encoder is None else ("language.", "vision.")
    names = [name for name in model.state_dict() if not name.startswith(loaded)]
    table = _table(encoder_layout(state, ENCODER_PREFIX), sources.layout)
    weights = translate(table, state, names, (_TIED,), source)
    if LOG_TEMPERATURE in weights:
        weights[LOG_TEMPERATURE] = log_temperature(weights[LOG_TEMPERATURE], path)
    assign_weights(model, weights, source, loaded)
    words = None
    if config.has_text_branch or tokenizer is not None:
        words = pth_tokenizer(file, tokenizer)
        if words.vocab_size > config.qformer.vocab_size + 1:  # [ENC], the last one, does not exist in BLIP-2
            raise CheckpointError(
                f"{path}: the tokenizer has {words.vocab_size} entries, with [DEC] and [ENC], the Q-Former "
                f"{config.qformer.vocab_size}; it is another model's."
            )
    return Blip2Checkpoint(model.eval(), words, *settings[1:])


def _model_state(file: PthFile, layout: LanguageLayout | None) -> dict[str, Tensor]:
    """The file's weights but those of the language model, as the tables expect them."""
    ignored = (_POSITION_IDS,) if layout is None else (_POSITION_IDS, layout.weights)
    state = {name: tensor for name, tensor in file.weights.items() if not name.startswith(ignored)}
    if file.entry is not None and file.entry.get(_EXTRA_WEIGHTS):
        state = as_state_dict(file.entry[_EXTRA_WEIGHTS], file.path) | state
    check_tied(state, str(file.path), _QFORMER)
    return add_implied_tensors(as_float32(state), encoder_layout(state, ENCODER_PREFIX), ENCODER_PREFIX)


def _table(encoder: EncoderLayout, language: LanguageLayout | None) -> Table:
    projection = {} if language is None else {"language_proj": language.projection}
    return {**_TRAINED, **projection, **add_prefix(encoder.table, "vision.", ENCODER_PREFIX)}


# ---- settings from names and shapes of tensors


def _infer_settings(
    state: Mapping[str, Tensor], parts: FrozenModels, sources: FrozenSources, source: str
) -> Blip2Settings:
    """The settings of a file that does not say them."""
    layout = sources.layout
    vision: VisionConfig | TowerConfig
    if parts.encoder is None:
        vision = infer_encoder(state, encoder_layout(state, ENCODER_PREFIX), source, ENCODER_PREFIX)
        preprocessing = Preprocessing(image_size=vision.image_size)
    else:
        vision, preprocessing = parts.encoder.config, parts.encoder.preprocessing
    language = None
    if layout is not None and parts.language is not None:
        language = LanguageConfig(
            name=str(sources.language_model), hidden_dim=parts.language.hidden_dim, end_of_text=layout.end_of_text
        )
    is_captioner = layout is not None and parts.encoder is None  # fine-tuned together with its encoder
    return Blip2Settings(
        infer_blip2_config(state, vision, language, source),
        preprocessing,
        BLIP2_CAPTION_PROMPT if is_captioner else "",
        QUESTION_PROMPT if layout is None else layout.question_prompt,
    )


def infer_blip2_config(
    state: Mapping[str, Tensor], vision: VisionConfig | TowerConfig, language: LanguageConfig | None, source: str
) -> Blip2Config:
    """The model's settings: what shapes show, and what is the same in all released models.

    Raises CheckpointError as `infer_encoder`.
    """
    has_text_branch = language is None or _WORDS in state
    embed_dim = Blip2Config.embed_dim
    if language is None:
        embed_dim, _ = shape_of(state, "vision_proj.weight", 2, source)
    try:
        return Blip2Config(
            vision=vision,
            qformer=_infer_qformer(state, has_text_branch, source),
            language=language,
            embed_dim=embed_dim,
            heads=STAGE1_HEADS if language is None else ("llm",),
            instructed=language is not None and has_text_branch,
            vision_norm_eps=VISION_NORM_EPS,
        )
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _infer_qformer(state: Mapping[str, Tensor], has_text_branch: bool, source: str) -> QFormerConfig:
    _, num_queries, width = shape_of(state, _QUERIES, 3, source)
    layers = f"{_BERT}.encoder.layer"
    mlp_dim, _ = shape_of(state, f"{layers}.0.intermediate_query.dense.weight", 2, source)
    vocab_size, max_positions = QFormerConfig.vocab_size, QFormerConfig.max_positions
    if has_text_branch:
        vocab_size, _ = shape_of(state, _WORDS, 2, source)
        max_positions, _ = shape_of(state, f"{_BERT}.embeddings.position_embeddings.weight", 2, source)
    num_layers = len(layer_numbers(state, layers))
    crossing = layer_numbers(state, layers, "crossattention.")
    if not crossing:
        raise_on_mismatch(source, {f"{layers}.0.crossattention"}, ())
    every = crossing[1] - crossing[0] if len(crossing) > 1 else num_layers
    if crossing != list(range(0, num_layers, every)):
        raise CheckpointError(
            f"{source} has cross-attention in the layers {', '.join(map(str, crossing))} of {num_layers}; it must be "
            "in layer 0, and from there in layers at equal distances."
        )
    return QFormerConfig(
        num_queries=num_queries,
        hidden_dim=width,
        num_layers=num_layers,
        num_heads=num_heads_of(width, "the Q-Former", source),
        mlp_dim=mlp_dim,
        cross_attention_every=every,
        vocab_size=vocab_size,
        max_positions=max_positions,
        layer_norm_eps=TEXT_EPS,
    )


# ---- writing


def save_original_blip2(path: Path, checkpoint: Blip2Checkpoint) -> None:
    """Write one .pth file that the released code and `load_original_blip2` read.

    As there, frozen parts are left out: the language model, and the image encoder when the model has it frozen or it is
    a CLIP of transformers. Raises ConfigError unless the file's name ends with .pth.
    """
    model, config = checkpoint.model, checkpoint.model.config
    language, encoder = _language_layout_for(checkpoint), _encoder_layout_for(checkpoint)
    is_left_out = isinstance(config.vision, TowerConfig) or "vision" in model.frozen
    left_out = ("language.", "vision.") if is_left_out else ("language.",)
    weights = {n: t.detach().cpu() for n, t in model.state_dict().items() if not n.startswith(left_out)}
    if LOG_TEMPERATURE in weights:
        weights[LOG_TEMPERATURE] = weights[LOG_TEMPERATURE].exp()
    state = drop_batch_axes(translate_back(_table(encoder, language), weights), encoder, ENCODER_PREFIX)
    state |= tied_copies(state, _QFORMER)
    state[_POSITION_IDS] = torch.arange(config.qformer.max_positions)[None]  # the released code asks for it
    entry = settings_to_dict(checkpoint)
    entry[_EXTRA_WEIGHTS] = {name: state.pop(name) for name in list(state) if name.endswith(_KEY_BIAS)}
    if checkpoint.tokenizer is not None:
        entry["tokenizer"] = checkpoint.tokenizer.to_json()
    write_pth(path, state, entry)


def _language_layout_for(checkpoint: Blip2Checkpoint) -> LanguageLayout | None:
    """How the released code keeps such a model; None in stage 1. CheckpointError when it has none."""
    config = checkpoint.model.config
    if config.language is None:
        if set(config.heads) == set(STAGE1_HEADS):
            return None
        raise _not_released(f"with the heads {', '.join(config.heads)} alone")
    language = checkpoint.model.require_language()
    if has_lora(language):
        raise _not_released("with adapters in its language model")
    model_type: Any = language.model.config.model_type
    if config.heads == ("llm",):
        for layout in _LANGUAGE_LAYOUTS:
            if layout.model_type == model_type and config.instructed in layout.instructed:
                return layout
    reads = "that reads instructions " if config.instructed else ""
    raise _not_released(f"{reads}with the heads {', '.join(config.heads)} and a {model_type}")


def _encoder_layout_for(checkpoint: Blip2Checkpoint) -> EncoderLayout:
    """How the released code keeps the image encoder; CheckpointError when it has no such one."""
    config, encoder = checkpoint.model.config.vision, checkpoint.model.vision
    if isinstance(config, TowerConfig):
        if isinstance(encoder, VisionTower) and encoder.model.config.model_type == _CLIP_TYPE:
            return OPENAI_CLIP
        raise _not_released(f"with the image encoder {config.name}")
    for layout in ENCODER_LAYOUTS:
        if all(getattr(config, name) == value for name, value in layout.settings.items()):
            return layout
    raise _not_released("with such an image encoder: only with EVA-CLIP's or CLIP's, without a last norm,")


def _not_released(what: str) -> CheckpointError:
    return CheckpointError(f"The released code has no BLIP-2 {what}. Save as openblip.")
