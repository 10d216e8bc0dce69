"""LAVIS' .pth files of BLIP-2, which hold what was trained. What was frozen is left out, and loaded from elsewhere.

A file that OpenBLIP wrote has what the format has no place for (settings, tokenizer, biases of keys) beside "model",
under "openblip". In files of others, names and shapes of the tensors tell the settings.

The Q-Former has BERT's names, with a second feed-forward for the queries.

D width of the Q-Former, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openblip.checkpoints import checkpoint as base
from openblip.checkpoints import state_dict
from openblip.checkpoints.checkpoint import QUESTION_PROMPT, Blip2Checkpoint, ImageEncoder, PathOrName
from openblip.checkpoints.huggingface.blip import BERT_LM_HEAD_KEYS, MATCHING_KEYS
from openblip.checkpoints.huggingface.blip2 import SHORT_QUESTION_PROMPT, qformer_keys
from openblip.checkpoints.original import blip as pth
from openblip.checkpoints.original import image_encoder as encoders
from openblip.checkpoints.original.image_encoder import ENCODER_PREFIX, EncoderLayout
from openblip.checkpoints.state_dict import LOG_TEMPERATURE, State, Table, add_prefix
from openblip.data.config import Preprocessing
from openblip.errors import CheckpointError, ConfigError
from openblip.models.config import STAGE1_HEADS, Blip2Config, LanguageConfig, QFormerConfig, TowerConfig, VisionConfig
from openblip.models.language_model import LanguageModel, has_lora
from openblip.models.vision_tower import VisionTower

BLIP2_CAPTION_PROMPT = "a photo of"  # of the released captioners
VISION_NORM_EPS = 1e-5

_QFORMER, _BERT = "Qformer", "Qformer.bert"
_EMBEDDINGS = f"{_BERT}.embeddings"
_WORDS = f"{_EMBEDDINGS}.word_embeddings.weight"
_POSITION_IDS = f"{_EMBEDDINGS}.position_ids"  # a buffer, in every file
_TIED = f"{_QFORMER}.cls.predictions.decoder."  # the word embeddings and cls.predictions.bias once more
_KEY_BIAS = ".attn.k_bias"
_EXTRA_WEIGHTS = "weights"  # of OpenBLIP's entry: weights that the format has no place for
_CLIP_TYPE = "clip_vision_model"  # model_type of transformers' CLIP
_ROTARY = ".rotary_emb.inv_freq"  # constants that older releases of transformers kept with the weights

_TRAINED: Table = {  # Blip2Qformer, and what Blip2OPT and Blip2T5 keep of it
    "vision_norm": "ln_vision",
    **qformer_keys(f"{_BERT}.", "self", norm=f"{_EMBEDDINGS}.LayerNorm", embeddings=_EMBEDDINGS),
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


_OPT = {2560: "facebook/opt-2.7b", 4096: "facebook/opt-6.7b"}
_T5 = {2048: "google/flan-t5-xl", 4096: "google/flan-t5-xxl"}
_VICUNA = {4096: "lmsys/vicuna-7b-v1.1", 5120: "lmsys/vicuna-13b-v1.1"}  # InstructBLIP's
_EXACT_GELU = {"dense_act_fn": "gelu"}  # in place of the tanh approximation
_LANGUAGE_LAYOUTS = (
    LanguageLayout("opt", "opt_proj", "opt_model.", (False,), QUESTION_PROMPT, _OPT, end_of_text="\n"),
    LanguageLayout("t5", "t5_proj", "t5_model.", (False, True), SHORT_QUESTION_PROMPT, _T5, changes=_EXACT_GELU),
    LanguageLayout("llama", "llm_proj", "llm_model.", (False, True), SHORT_QUESTION_PROMPT, _VICUNA),
)

# ---- frozen parts


class FrozenSources(NamedTuple):
    """What a file says about its model, and where the parts are that it leaves out."""

    settings: tuple[Blip2Config, dict[str, Any]] | None
    """What `read_settings` returns, of a file that OpenBLIP wrote; None for others."""
    layout: LanguageLayout | None
    """None in stage 1."""
    vision: PathOrName | None
    """The image encoder; None when the file holds it."""
    language_model: PathOrName | None
    """None in stage 1."""
    end_of_text: str | None
    """What ends a text of the language model; None is its tokenizer's own end."""
    changes: Mapping[str, str]
    """Settings that the language model is to have in place of its own; one that OpenBLIP saved has them."""


def frozen_sources(
    file: pth.PthFile, vision: PathOrName | None = None, language_model: PathOrName | None = None
) -> FrozenSources:
    """The parts that a file of BLIP-2 leaves out, at the places that the caller names.

    A file of OpenBLIP knows where its tower and its language model came from; a named place goes before that. Raises
    CheckpointError when a part is left out and not named, ConfigError when one is named that is not left out.
    """
    path = file.path
    layouts = [layout for layout in _LANGUAGE_LAYOUTS if f"{layout.projection}.weight" in file.weights]
    if len(layouts) > 1:
        raise CheckpointError(f"{path} is for {' and for '.join(layout.model_type for layout in layouts)}.")
    layout = layouts[0] if layouts else None
    has_encoder = any(name.startswith(ENCODER_PREFIX) for name in file.weights)
    settings = None
    end_of_text, changes = (None, {}) if layout is None else (layout.end_of_text, layout.changes)
    if file.entry is not None:
        entry_name = pth.check_entry(file)
        settings = base.read_settings(Blip2Config, file.entry, entry_name)
        written_vision, written_language = settings[0].vision, settings[0].language
        has_tower = isinstance(written_vision, TowerConfig)
        if (written_language is None) != (layout is None) or (has_encoder and has_tower):
            raise CheckpointError(f"{entry_name} is damaged: it describes another kind of model than the weights.")
        if vision is None and isinstance(written_vision, TowerConfig):
            vision = written_vision.name
        if language_model is None and written_language is not None:
            language_model = written_language.name
        end_of_text, changes = None if written_language is None else written_language.end_of_text, {}
    if has_encoder and vision is not None:
        raise ConfigError(f"{path} holds its image encoder: leave vision {vision} out.")
    if layout is None and language_model is not None:
        raise ConfigError(f"{path} is of stage 1 and has no language model: leave {language_model} out.")
    missing = []
    if not has_encoder and vision is None:
        papers = {w: f"LAVIS' {name}" for encoder in encoders.ENCODER_LAYOUTS for w, name in encoder.papers.items()}
        paper = _in_the_paper(papers, _vision_dim(file))
        missing.append(f"its image encoder with vision= or --vision ({paper})")
    if layout is not None and language_model is None:
        paper = _in_the_paper(layout.papers, _language_dim(file, layout))
        missing.append(f"its language model with language_model= or --language-model ({paper})")
    if missing:
        raise CheckpointError(
            f"{path} holds what BLIP-2 has trained, not what was frozen. Name {', and '.join(missing)}."
        )
    return FrozenSources(settings, layout, vision, language_model, end_of_text, changes)


def _vision_dim(file: pth.PthFile) -> int:
    """Width of the image features that a file was trained with."""
    return pth.shape_of(file.weights, "ln_vision.weight", 1, file.path)[0]


def _language_dim(file: pth.PthFile, layout: LanguageLayout) -> int:
    """Width of the language model's word embeddings that a file was trained with."""
    return pth.shape_of(file.weights, f"{layout.projection}.weight", 2, file.path)[0]


def _in_the_paper(papers: Mapping[int, str], width: int) -> str:
    known = papers.get(width)
    return f"{width} wide" if known is None else f"{width} wide; the paper's is {known}"


def _check_frozen_parts(
    file: pth.PthFile, sources: FrozenSources, encoder: ImageEncoder | None, language: LanguageModel | None
) -> None:
    """Raise a CheckpointError unless the parts are those that the file was trained with."""
    path, layout = file.path, sources.layout
    widths = []
    if encoder is not None:
        widths.append(("an image encoder", _vision_dim(file), sources.vision, encoder.config.hidden_dim))
    if layout is not None and language is not None:
        model_type = language.model.config.model_type
        if model_type != layout.model_type:
            raise CheckpointError(
                f"{path} was trained with a language model of the kind {layout.model_type}; {sources.language_model} "
                f"is a {model_type}."
            )
        widths.append(("a language model", _language_dim(file, layout), sources.language_model, language.hidden_dim))
    for part, expected, source, width in widths:
        if width != expected:
            raise CheckpointError(f"{path} was trained with {part} {expected} wide; {source} is {width} wide.")
    if layout is None or language is None:
        return
    # LAVIS means to leave out all of the language model, but second names of shared weights slip through: OPT's
    # lm_head, T5's embed_tokens.
    state, different = language.model.state_dict(), []
    for name, tensor in state_dict.below(layout.weights, file.weights).items():
        loaded = state.get(name)
        is_same = loaded is not None and loaded.shape == tensor.shape and torch.equal(loaded.to(tensor.dtype), tensor)
        if not is_same and not name.endswith(_ROTARY):
            different.append(layout.weights + name)
    if different:
        raise CheckpointError(
            f"{path} holds weights of a language model that the named one does not have: "
            f"{'; '.join(sorted(different))}."
        )


# ---- reading


def load_original_blip2(
    file: pth.PthFile,
    sources: FrozenSources,
    encoder: ImageEncoder | None,
    language: LanguageModel | None,
    tokenizer: PathOrName | None = None,
) -> Blip2Checkpoint:
    """The model of a .pth file around the frozen parts that it leaves out.

    sources: those of `frozen_sources`. encoder, language: what was loaded from there; None for a part that the file
    holds or does not have. Raises CheckpointError also when a part is not the one that the file was trained with.
    """
    path = file.path
    _check_frozen_parts(file, sources, encoder, language)
    state = _model_state(file, sources.layout)
    config, others = sources.settings or _infer_settings(state, sources, encoder, language, path)
    if encoder is not None:
        config = replace(config, vision=encoder.config)
    if config.language is not None:
        config = replace(config, language=replace(config.language, name=str(sources.language_model)))
    model = base.empty_blip2(path, config, encoder and encoder.model, language)
    loaded = ("language.",) if encoder is None else ("language.", "vision.")
    names = state_dict.without(loaded, model.state_dict())
    table = _table(encoders.encoder_layout(state, ENCODER_PREFIX), sources.layout)
    weights = pth.with_log_temperature(state_dict.translate(table, state, names, (_TIED,), path), path)
    state_dict.assign_weights(model, weights, path, loaded)
    vocabulary = None
    if config.has_text_branch or tokenizer is not None:
        vocabulary = pth.pth_tokenizer(file, tokenizer)
        # [ENC], the last entry, does not exist in BLIP-2.
        base.check_vocabulary(
            path, vocabulary.vocab_size - 1, "the Q-Former", config.qformer.vocab_size, "entries, with [DEC],"
        )
    return Blip2Checkpoint(model.eval(), vocabulary, **others)


def _model_state(file: pth.PthFile, layout: LanguageLayout | None) -> dict[str, Tensor]:
    """The file's weights but those of the language model, as the tables expect them."""
    state = state_dict.without((_POSITION_IDS,) if layout is None else (_POSITION_IDS, layout.weights), file.weights)
    if file.entry is not None and file.entry.get(_EXTRA_WEIGHTS):
        state = state_dict.as_state_dict(file.entry[_EXTRA_WEIGHTS], file.path) | state
    state_dict.check_tied(state, file.path, _QFORMER)
    encoder = encoders.encoder_layout(state, ENCODER_PREFIX)
    return encoders.add_implied_tensors(state_dict.as_float32(state), encoder, ENCODER_PREFIX)


def _table(encoder: EncoderLayout, language: LanguageLayout | None) -> Table:
    projection = {} if language is None else {"language_proj": language.projection}
    return {**_TRAINED, **projection, **add_prefix(encoder.table, "vision.", ENCODER_PREFIX)}


# ---- settings from names and shapes of tensors


def _infer_settings(
    state: State, sources: FrozenSources, encoder: ImageEncoder | None, language: LanguageModel | None, source: object
) -> tuple[Blip2Config, dict[str, Any]]:
    """What `read_settings` returns, of a file that does not say it."""
    layout = sources.layout
    vision: VisionConfig | TowerConfig
    if encoder is None:
        vision = encoders.infer_encoder(state, encoders.encoder_layout(state, ENCODER_PREFIX), source, ENCODER_PREFIX)
        preprocessing = Preprocessing(image_size=vision.image_size)
    else:
        vision, preprocessing = encoder.config, encoder.preprocessing
    language_config = None
    if layout is not None and language is not None:
        name, end_of_text = str(sources.language_model), layout.end_of_text
        language_config = LanguageConfig(name=name, hidden_dim=language.hidden_dim, end_of_text=end_of_text)
    is_captioner = layout is not None and encoder is None  # fine-tuned together with its encoder
    return infer_blip2_config(state, vision, language_config, source), {
        "preprocessing": preprocessing,
        "prompt": BLIP2_CAPTION_PROMPT if is_captioner else "",
        "question_prompt": QUESTION_PROMPT if layout is None else layout.question_prompt,
    }


def infer_blip2_config(
    state: State, vision: VisionConfig | TowerConfig, language: LanguageConfig | None, source: object
) -> Blip2Config:
    """The model's settings: what shapes show, and what is the same in all released models."""
    has_text_branch = language is None or _WORDS in state
    embed_dim = Blip2Config.embed_dim
    if language is None:
        embed_dim, _ = pth.shape_of(state, "vision_proj.weight", 2, source)
    with base.as_checkpoint_errors(source):
        return Blip2Config(
            vision=vision,
            qformer=_infer_qformer(state, has_text_branch, source),
            language=language,
            embed_dim=embed_dim,
            heads=STAGE1_HEADS if language is None else ("llm",),
            instructed=language is not None and has_text_branch,
            vision_norm_eps=VISION_NORM_EPS,
        )


def _infer_qformer(state: State, has_text_branch: bool, source: object) -> QFormerConfig:
    _, num_queries, width = pth.shape_of(state, "query_tokens", 3, source)
    layers = f"{_BERT}.encoder.layer"
    mlp_dim, _ = pth.shape_of(state, f"{layers}.0.intermediate_query.dense.weight", 2, source)
    vocab_size, max_positions = QFormerConfig.vocab_size, QFormerConfig.max_positions
    if has_text_branch:
        vocab_size, _ = pth.shape_of(state, _WORDS, 2, source)
        max_positions, _ = pth.shape_of(state, f"{_EMBEDDINGS}.position_embeddings.weight", 2, source)
    num_layers = len(pth.layer_numbers(state, layers))
    crossing = pth.layer_numbers(state, layers, "crossattention.")
    if not crossing:
        state_dict.raise_on_mismatch(source, {f"{layers}.0.crossattention"}, ())
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
        num_heads=pth.num_heads_of(width, "the Q-Former", source),
        mlp_dim=mlp_dim,
        cross_attention_every=every,
        vocab_size=vocab_size,
        max_positions=max_positions,
        layer_norm_eps=pth.TEXT_EPS,
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
    weights = pth.with_temperature(state_dict.without(left_out, model.state_dict()))
    state = state_dict.translate_back(_table(encoder, language), weights)
    state = encoders.drop_batch_axes(state, encoder, ENCODER_PREFIX)
    state |= state_dict.tied_copies(state, _QFORMER)
    state[_POSITION_IDS] = torch.arange(config.qformer.max_positions)[None]  # the released code asks for it
    entry = base.settings_to_dict(checkpoint)
    entry[_EXTRA_WEIGHTS] = {name: state.pop(name) for name in list(state) if name.endswith(_KEY_BIAS)}
    if checkpoint.tokenizer is not None:
        entry["tokenizer"] = checkpoint.tokenizer.to_json()
    pth.write_pth(path, state, entry)


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
            return encoders.OPENAI_CLIP
        raise _not_released(f"with the image encoder {config.name}")
    for layout in encoders.ENCODER_LAYOUTS:
        if all(getattr(config, name) == value for name, value in layout.settings.items()):
            return layout
    raise _not_released("with such an image encoder: only with EVA-CLIP's or CLIP's, without a last norm,")


def _not_released(what: str) -> CheckpointError:
    return CheckpointError(f"The released code has no BLIP-2 {what}. Save as openblip.")
