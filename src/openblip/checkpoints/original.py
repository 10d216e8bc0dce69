"""The original .pth files, of the released code and of LAVIS: one file with {"model": state dict, ...}.

A file that OpenBLIP wrote has what the format has no place for (settings, prompt, tokenizer, biases of keys) beside
"model", under "openblip". In files of others, names and shapes of the tensors tell the settings.

BLIP's image encoder has timm's names, its text transformer those that transformers took over. LAVIS' files of BLIP-2
hold what was trained: a Q-Former with BERT's names and a second feed-forward for the queries. What was frozen is left
out, and loaded from elsewhere. The image encoder is EVA-CLIP's or CLIP's; each of them has a file of its own, too.

N image tokens, D width, V vocabulary.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openblip.checkpoints import backbones, huggingface, state_dict
from openblip.checkpoints import checkpoint as base
from openblip.checkpoints.backbones import ImageEncoder, PathOrName
from openblip.checkpoints.checkpoint import QUESTION_PROMPT, Blip2Checkpoint, BlipCheckpoint, Checkpoint
from openblip.checkpoints.huggingface import MATCHING_KEYS, SHORT_QUESTION_PROMPT, TEXT_DECODER, TEXT_ENCODER
from openblip.checkpoints.state_dict import LOG_TEMPERATURE, ChooseDtype, Layout, State, Table, add_prefix
from openblip.data.config import Preprocessing
from openblip.data.tokenizer import Tokenizer
from openblip.errors import CheckpointError, ConfigError
from openblip.files import atomic_file
from openblip.models.blip import INITIAL_TEMPERATURE
from openblip.models.config import STAGE1_HEADS, Blip2Config, BlipConfig, LanguageConfig, TowerConfig
from openblip.models.language_model import has_lora
from openblip.models.vision_tower import VisionTower
from openblip.nn.config import QFormerConfig, TextConfig, VisionConfig

_BLIP_PROMPT = "a picture of "  # of every released captioner
_BLIP2_PROMPT = "a photo of"
_HEAD_WIDTH = 64  # of every released model but EVA-CLIP: ViT-B has 12 heads, ViT-L 16, BERT 12
_VISION_EPS, _TEXT_EPS = 1e-6, 1e-12  # vit.py, med_config.json
_VISION_NORM_EPS = 1e-5
_TEMPERATURE = "temp"
_ENTRY, _EXTRA_WEIGHTS = "openblip", "weights"  # weights in the entry are those that the format has no place for

# ---- files and shapes


class PthFile(NamedTuple):
    """The part of a .pth file that belongs to a model."""

    path: Path
    weights: dict[str, Tensor]
    entry: Any  # what OpenBLIP wrote beside "model"; None in a file of others


def read_pth(path: Path) -> PthFile:
    """A .pth file of {"model": state dict, ...}, or whatever else holds one, see `state_dict.as_state_dict`."""
    content = state_dict.read_tensors(path)
    entry = content.get(_ENTRY) if isinstance(content, dict) and isinstance(content.get("model"), dict) else None
    return PthFile(path, state_dict.unwrapped(state_dict.as_state_dict(content, path)), entry)


def has_original_names(file: PthFile) -> bool:
    """Whether a file is one of the released code or of LAVIS; one of transformers needs the config.json beside it."""
    return is_blip2_file(file) or any(name.startswith(_VISION) for name in file.weights)


def _write_pth(path: Path, state: State, checkpoint: Checkpoint, **extra: State) -> None:
    """Write such a file, whole or not at all, with `extra` in its entry; ConfigError unless its name ends with .pth."""
    if path.suffix != ".pth":
        raise ConfigError(f"{path}: an original checkpoint is one file; let its name end with .pth.")
    entry = base.settings_to_dict(checkpoint) | extra
    if checkpoint.tokenizer is not None:
        entry["tokenizer"] = checkpoint.tokenizer.to_json()
    # A file object, since torch.save would write the temporary file's name into the file.
    with atomic_file(path) as partial, partial.open("wb") as opened:
        torch.save({"model": dict(state), _ENTRY: entry}, opened)


def _pth_tokenizer(file: PthFile, named: PathOrName | None) -> Tokenizer:
    """The tokenizer that `named` names, else that in the file's entry, else one beside it, else BERT's from the hub."""
    if named is None and file.entry is not None and "tokenizer" in file.entry:
        try:
            return Tokenizer.from_json(str(file.entry["tokenizer"]))
        except CheckpointError as error:
            raise CheckpointError(f"{file.path}, its openblip entry: {error}") from error
    return base.find_tokenizer(file.path, file.path.parent, named)


def _read_entry(file: PthFile, config_class: type[base.ConfigT]) -> tuple[base.ConfigT, dict[str, Any]]:
    """The settings that OpenBLIP wrote; CheckpointError when they are damaged."""
    if not isinstance(file.entry, dict):
        raise CheckpointError(f"{file.path}: its openblip entry is damaged, a {type(file.entry).__name__}.")
    return base.read_settings(config_class, file.entry, f"{file.path}, its openblip entry")


def _check_temperature(state: State, path: Path) -> None:
    """Raise a CheckpointError for a temperature of ITC that is none."""
    temperature = state.get(_TEMPERATURE)
    if temperature is not None and (temperature.numel() != 1 or not 0 < temperature.item() < math.inf):
        raise CheckpointError(f"{path}: temp is {temperature.tolist()}; ITC divides by one number above 0.")


def infer_vit(
    state: State, table: Table, prefix: str, source: object, settings: Mapping[str, Any], head_width: int = _HEAD_WIDTH
) -> VisionConfig:
    """The config of a ViT whose names are those of a key table below `prefix`; `settings` are what no shape tells."""
    blocks, _, mlp = table["blocks.{i}.mlp.0"].partition(".{i}.")
    width, _, patch_size, _ = _shape_of(state, f"{prefix}{table['patch_embedding']}.weight", 4, source)
    _, num_tokens, _ = _shape_of(state, f"{prefix}{table['position_embedding']}", 3, source)
    mlp_dim, _ = _shape_of(state, f"{prefix}{blocks}.0.{mlp}.weight", 2, source)
    grid = math.isqrt(max(num_tokens - 1, 0))
    if grid < 1 or grid**2 != num_tokens - 1:
        problem = "where a class token and a square of patches are expected"
        raise CheckpointError(f"{source} has {num_tokens} image tokens, {problem}.")
    with base.as_checkpoint_errors(source):
        return VisionConfig(
            image_size=grid * patch_size,
            patch_size=patch_size,
            hidden_dim=width,
            num_layers=len(_layer_numbers(state, f"{prefix}{blocks}")),
            num_heads=_num_heads_of(width, "images", source, head_width),
            mlp_dim=mlp_dim,
            **settings,
        )


def _shape_of(state: State, name: str, num_axes: int, source: object) -> tuple[int, ...]:
    """A tensor's shape; CheckpointError when it is missing or has another number of axes."""
    if name not in state:
        state_dict.raise_on_mismatch(source, {name}, ())
    shape = tuple(state[name].shape)
    if len(shape) != num_axes or min(shape) < 1:
        raise CheckpointError(f"{source}: {name} is {shape}; it has {num_axes} axes in every BLIP.")
    return shape


def _layer_numbers(state: State, prefix: str, suffix: str = "") -> list[int]:
    """The numbers that stand between `prefix` and `suffix` in names of tensors, sorted."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.{re.escape(suffix)}")
    return sorted({int(match[1]) for name in state if (match := pattern.match(name))})


def _num_heads_of(width: int, what: str, source: object, head_width: int = _HEAD_WIDTH) -> int:
    """Number of heads of a released model; CheckpointError when they do not divide the width."""
    if width % head_width:
        raise CheckpointError(
            f"{source} is {width} wide for {what}, which heads of {head_width} do not divide. Released models have "
            "such heads; how many this one has cannot be told from its weights."
        )
    return width // head_width


# ---- BLIP

# State of a training that no model has. It is left out, and no error.
TRAINING_ONLY = (
    *("visual_encoder_m.", "text_encoder_m.", "vision_proj_m.", "text_proj_m."),  # momentum copies
    *("image_queue", "text_queue", "idx_queue", "queue_ptr", "ptr_queue"),  # queues of features and of image ids
)
_CROSS = "{text}.encoder.layer.{i}.crossattention"
_NLVR_KEYS: Table = {  # nlvr_encoder: cross-attention over two images
    "text.layers.{i}.cross_attention.branch.first.query": f"{_CROSS}.self0.query",
    "text.layers.{i}.cross_attention.branch.first.key_value": f"{_CROSS}.self0.key+value",
    "text.layers.{i}.cross_attention.branch.first.out": f"{_CROSS}.output.dense0",
    "text.layers.{i}.cross_attention.branch.second.query": f"{_CROSS}.self1.query",
    "text.layers.{i}.cross_attention.branch.second.key_value": f"{_CROSS}.self1.key+value",
    "text.layers.{i}.cross_attention.branch.second.out": f"{_CROSS}.output.dense1",
    "text.layers.{i}.cross_attention.branch.merge": f"{_CROSS}.output.merge_layer",  # from the middle layer on
    "nlvr_head.{i}": "cls_head.{i}",
}
_BODY = {
    **add_prefix(backbones.TIMM_VISION_KEYS, "vision.", "visual_encoder."),
    **add_prefix(backbones.BERT_TEXT_KEYS, "text.", "{text}."),
}
_BOTH = TEXT_ENCODER | TEXT_DECODER
_MATCHING = {LOG_TEMPERATURE: _TEMPERATURE, **MATCHING_KEYS}  # the file has no logarithm

_BLIP_LAYOUTS: Mapping[str, Layout] = {
    "pre-trained": huggingface.blip_layout(("itc", "itm", "lm"), _BODY, _BOTH, _MATCHING),  # BLIP_Pretrain
    "captions": huggingface.blip_layout(("lm",), _BODY, TEXT_DECODER),  # BLIP_Decoder
    "retrieval": huggingface.blip_layout(("itc", "itm"), _BODY, TEXT_ENCODER, _MATCHING),  # BLIP_Retrieval, BLIP_ITM
    "VQA": huggingface.blip_layout(("vqa",), _BODY, _BOTH),  # BLIP_VQA
    "NLVR2": huggingface.blip_layout(("nlvr",), _BODY, TEXT_ENCODER, _NLVR_KEYS),  # BLIP_NLVR
}


def load_original_blip(
    file: PthFile, tokenizer: PathOrName | None = None, dtype: ChooseDtype = state_dict.in_float32
) -> BlipCheckpoint:
    """The model of a .pth file, without the state of its training: see `TRAINING_ONLY`. `file.weights` is emptied."""
    path = file.path
    state = state_dict.without(TRAINING_ONLY, file.weights)
    config, others = infer_blip_settings(state, path) if file.entry is None else _read_entry(file, BlipConfig)
    layout = _layout_for(config)
    state_dict.check_tied(state, path)
    _check_temperature(state, path)
    model = base.empty_blip(config)
    names = model.state_dict().keys()
    if LOG_TEMPERATURE in names and _TEMPERATURE not in state:  # the model was saved without its losses
        state[_TEMPERATURE] = torch.tensor(INITIAL_TEMPERATURE)
    weights = state_dict.translate(layout, state, names, path)
    precision = dtype(state_dict.count_weights(state))
    for read in (file.weights, state):
        read.clear()  # `fill` has the only references
    state_dict.fill(model, weights, path, dtype=precision)
    checkpoint = BlipCheckpoint(model.eval(), _pth_tokenizer(file, tokenizer), **others)
    base.check_parts_fit(path, checkpoint)
    return checkpoint


def save_original_blip(path: Path, checkpoint: BlipCheckpoint) -> None:
    """Write one .pth file that the released code and `load_original_blip` read; ConfigError unless its name says so."""
    config = checkpoint.model.config
    layout = _layout_for(config)
    weights = {name: tensor.cpu() for name, tensor in checkpoint.model.state_dict().items()}
    state = state_dict.translate_back(layout, weights)
    state |= {copy: state[name] for copy, name in state_dict.tied_names(state).items()}
    for prefix in layout.text_prefixes.values():  # a buffer that the released code asks for
        state[f"{prefix}.embeddings.position_ids"] = torch.arange(config.text.max_positions)[None]
    _write_pth(path, state, checkpoint)


def _layout_for(config: BlipConfig) -> Layout:
    name = state_dict.find_layout(_BLIP_LAYOUTS, config)
    if name is None:
        kinds = ", ".join(f"{name} ({', '.join(layout.heads)})" for name, layout in _BLIP_LAYOUTS.items())
        pooled = " and a pooler" if config.pooled else ""
        raise CheckpointError(
            f"The released code has no model with the heads {', '.join(config.heads)}{pooled}; it has {kinds}. Save "
            "as openblip."
        )
    return _BLIP_LAYOUTS[name]


def infer_blip_settings(state: State, source: object) -> tuple[BlipConfig, dict[str, Any]]:
    """What `read_settings` returns, of a released file: what shapes show, and what is the same in all released models.

    Raises CheckpointError when the tensors are not those of a BLIP, or the width does not tell the number of heads.
    """
    modules = {name.partition(".")[0] for name in state}
    matches = not modules.isdisjoint(("itm_head", "vision_proj"))
    has_encoder, has_decoder = (modules >= {"visual_encoder", name} for name in ("text_encoder", "text_decoder"))
    if has_encoder and any(".crossattention.self0." in name for name in state):
        layout = _BLIP_LAYOUTS["NLVR2"]
    elif has_encoder and has_decoder:
        layout = _BLIP_LAYOUTS["pre-trained" if matches else "VQA"]
    elif has_decoder or (has_encoder and matches):
        layout = _BLIP_LAYOUTS["captions" if has_decoder else "retrieval"]
    else:
        raise CheckpointError(
            f"{source} is no BLIP for {', '.join(_BLIP_LAYOUTS)}: its weights begin with "
            f"{', '.join(sorted(modules)[:10])}. If they are those of a class of transformers, put its config.json and "
            "its tokenizer beside the file."
        )
    text = next(iter(layout.text_prefixes.values()))
    vision = infer_vit(state, backbones.TIMM_VISION_KEYS, "visual_encoder.", source, {"layer_norm_eps": _VISION_EPS})
    vocab_size, width = _shape_of(state, f"{text}.embeddings.word_embeddings.weight", 2, source)
    max_positions, _ = _shape_of(state, f"{text}.embeddings.position_embeddings.weight", 2, source)
    mlp_dim, _ = _shape_of(state, f"{text}.encoder.layer.0.intermediate.dense.weight", 2, source)
    embed_dim = BlipConfig.embed_dim
    if "itc" in layout.heads:
        embed_dim, _ = _shape_of(state, "vision_proj.weight", 2, source)
    with base.as_checkpoint_errors(source):
        text_config = TextConfig(
            vocab_size=vocab_size,
            hidden_dim=width,
            num_layers=len(_layer_numbers(state, f"{text}.encoder.layer")),
            num_heads=_num_heads_of(width, "texts", source),
            mlp_dim=mlp_dim,
            max_positions=max_positions,
            layer_norm_eps=_TEXT_EPS,
            sharing=state_dict.infer_sharing(state, layout.text_prefixes),
        )
        config = BlipConfig(vision=vision, text=text_config, embed_dim=embed_dim, heads=layout.heads)
    prompt = _BLIP_PROMPT if layout.heads == ("lm",) else ""
    return config, {"preprocessing": Preprocessing(image_size=vision.image_size), "prompt": prompt}


# ---- image encoders of BLIP-2

_VISION = "visual_encoder."  # prefix of an image encoder's names in a file of BLIP-2


class EncoderLayout(NamedTuple):
    """How LAVIS keeps one kind of ViT, and what is the same in all of that kind."""

    table: Table
    settings: Mapping[str, Any]  # of its `VisionConfig` that no shape tells
    head_width: int
    missing_axes: Mapping[str, int]  # tensors that LAVIS keeps without leading axes of length one, and their number
    released_depth: int  # number of blocks; BLIP-2 leaves the last one out (section 3.1)
    after_blocks: tuple[str, ...]  # prefixes of the names behind them, which only a whole encoder has
    papers: Mapping[int, str]  # width -> the file of the paper's encoder

    @property
    def blocks(self) -> str:
        """Prefix of the blocks' names."""
        return self.table["blocks.{i}.mlp.0"].partition("{i}")[0]


EVA_CLIP = EncoderLayout(
    table={
        **{name: timm_name for name, timm_name in backbones.TIMM_VISION_KEYS.items() if name != "norm"},
        # The released encoder has no bias for keys: the same bias for all keys changes no attention.
        "blocks.{i}.attention.qkv.bias": "blocks.{i}.attn.q_bias+k_bias+v_bias",
    },
    settings={"layer_norm_eps": 1e-6, "activation": "gelu", "input_norm": False, "output_norm": False},
    head_width=88,
    missing_axes={},
    released_depth=40,
    after_blocks=("norm.", "fc_norm.", "head.", "mask_token"),
    papers={1408: "LAVIS' eva_vit_g.pth"},
)
_BLOCK = "transformer.resblocks.{i}"
OPENAI_CLIP = EncoderLayout(
    table={
        "class_token": "class_embedding",
        "position_embedding": "positional_embedding",
        "patch_embedding": "conv1",
        "input_norm": "ln_pre",
        "blocks.{i}.attention_norm": f"{_BLOCK}.ln_1",
        "blocks.{i}.attention.qkv.weight": f"{_BLOCK}.attn.in_proj_weight",
        "blocks.{i}.attention.qkv.bias": f"{_BLOCK}.attn.in_proj_bias",
        "blocks.{i}.attention.out": f"{_BLOCK}.attn.out_proj",
        "blocks.{i}.mlp_norm": f"{_BLOCK}.ln_2",
        "blocks.{i}.mlp.0": f"{_BLOCK}.mlp.c_fc",
        "blocks.{i}.mlp.2": f"{_BLOCK}.mlp.c_proj",
    },
    settings={"layer_norm_eps": 1e-5, "activation": "quick_gelu", "input_norm": True, "output_norm": False},
    head_width=64,
    missing_axes={"class_embedding": 2, "positional_embedding": 1},  # they are (D,) and (N, D)
    released_depth=24,
    after_blocks=("ln_post.", "ln_final.", "proj"),
    papers={1024: "LAVIS' clip_vit_L.pth"},
)


def is_blip2_file(file: PthFile) -> bool:
    """Whether a .pth file is one of a BLIP-2."""
    return any(name.startswith(f"{_QFORMER}.") for name in file.weights)


def holds_encoder(file: PthFile) -> bool:
    """Whether a .pth file is one for `read_encoder`."""
    names = [f"{layout.table['patch_embedding']}.weight" for layout in (EVA_CLIP, OPENAI_CLIP)]
    return is_blip2_file(file) or any(name in file.weights for name in names)


def read_encoder(file: PthFile) -> ImageEncoder:
    """The image encoder of a .pth file.

    A file of an encoder alone gives all blocks but the last one, and not what follows it (BLIP-2 section 3.1); one that
    was cut there already is read as it is. A file of a BLIP-2 gives the encoder that it holds, if it does.
    """
    if is_blip2_file(file):
        state = state_dict.below(_VISION, file.weights)
        if not state:
            raise CheckpointError(
                f"{file.path} holds no image encoder: a frozen one is left out there. Name the encoder's own file "
                "(LAVIS' eva_vit_g.pth or clip_vit_L.pth), or a folder.",
                page="checkpoints.md#blip-2s-pth-files",
            )
        layout = _encoder_layout(state)
    else:
        state, layout = file.weights, _encoder_layout(file.weights)
        depth = len(_layer_numbers(state, layout.blocks.removesuffix(".")))
        if depth == layout.released_depth or any(name.startswith(layout.after_blocks) for name in state):
            state = state_dict.without((f"{layout.blocks}{depth - 1}.", *layout.after_blocks), state)
    state = _add_implied_tensors(state, layout)
    config = infer_vit(state, layout.table, "", file.path, layout.settings, layout.head_width)
    weights = state_dict.translate(Layout(layout.table), state, backbones.empty_vit(config).state_dict(), file.path)
    model = backbones.build_vit(config, weights, file.path)
    return ImageEncoder(model.eval(), config, Preprocessing(image_size=config.image_size))


def _encoder_layout(state: State, prefix: str = "") -> EncoderLayout:
    """The kind of image encoder below `prefix`."""
    is_clip = any(name.startswith(f"{prefix}{OPENAI_CLIP.blocks}") for name in state)
    return OPENAI_CLIP if is_clip else EVA_CLIP


def _add_implied_tensors(state: State, layout: EncoderLayout, prefix: str = "") -> dict[str, Tensor]:
    """The tensors below `prefix` with what the table expects of them: leading axes, and key biases of zeros."""
    complete = dict(state)
    for name, tensor in state.items():
        if name.startswith(prefix) and name.endswith(".attn.q_bias"):
            complete.setdefault(name.replace(".q_bias", ".k_bias"), torch.zeros_like(tensor))
    for name, num_axes in layout.missing_axes.items():
        if prefix + name in complete:
            complete[prefix + name] = complete[prefix + name][(None,) * num_axes]
    return complete


# ---- BLIP-2: what is trained, and frozen language models

_QFORMER, _BERT = "Qformer", "Qformer.bert"
_EMBEDDINGS = f"{_BERT}.embeddings"
_WORDS = f"{_EMBEDDINGS}.word_embeddings.weight"
_POSITION_IDS = f"{_EMBEDDINGS}.position_ids"  # a buffer, in every file
_TIED = f"{_QFORMER}.cls.predictions.decoder."  # the word embeddings and cls.predictions.bias once more
_ROTARY = ".rotary_emb.inv_freq"  # constants that older releases of transformers kept with the weights
_TRAINED: Table = {  # Blip2Qformer, and what Blip2OPT and Blip2T5 keep of it
    "vision_norm": "ln_vision",
    **huggingface.qformer_keys(f"{_BERT}.", "self", norm=f"{_EMBEDDINGS}.LayerNorm", embeddings=_EMBEDDINGS),
    **add_prefix(backbones.BERT_LM_HEAD_KEYS, "qformer.", f"{_QFORMER}."),
    LOG_TEMPERATURE: _TEMPERATURE,
    **MATCHING_KEYS,
}


class LanguageLayout(NamedTuple):
    """How LAVIS keeps the projection to one kind of language model, and how it uses that model."""

    model_type: str  # transformers' name of the kind
    projection: str
    weights: str  # prefix of the language model's own weights
    instructed: tuple[bool, ...]  # whether the Q-Former reads instructions: the cases for which LAVIS has models
    question_prompt: str
    papers: Mapping[int, str]  # width -> the paper's language model
    end_of_text: str | None = None  # None is the end of its tokenizer
    changes: Mapping[str, str] = {}  # settings that LAVIS gives the language model in place of its own


_OPT = {2560: "facebook/opt-2.7b", 4096: "facebook/opt-6.7b"}
_T5 = {2048: "google/flan-t5-xl", 4096: "google/flan-t5-xxl"}
_VICUNA = {4096: "lmsys/vicuna-7b-v1.1", 5120: "lmsys/vicuna-13b-v1.1"}  # InstructBLIP's
_EXACT_GELU = {"dense_act_fn": "gelu"}  # in place of the tanh approximation
_LANGUAGE_LAYOUTS = (
    LanguageLayout("opt", "opt_proj", "opt_model.", (False,), QUESTION_PROMPT, _OPT, end_of_text="\n"),
    LanguageLayout("t5", "t5_proj", "t5_model.", (False, True), SHORT_QUESTION_PROMPT, _T5, changes=_EXACT_GELU),
    LanguageLayout("llama", "llm_proj", "llm_model.", (False, True), SHORT_QUESTION_PROMPT, _VICUNA),
)


def frozen_sources(
    file: PthFile, vision: PathOrName | None = None, language_model: PathOrName | None = None
) -> tuple[tuple[Blip2Config, dict[str, Any]] | None, LanguageLayout | None, PathOrName | None, PathOrName | None]:
    """What a file of BLIP-2 says about its model, and where the parts are that it leaves out: settings as of
    `read_settings` or None in files of others, the layout of the language model or None in stage 1, the image encoder
    or None when the file holds it, and the language model.

    A file of OpenBLIP knows where its tower and its language model came from; a place that the caller names goes before
    that. Raises CheckpointError when a part is left out and not named, ConfigError when one is named that is not left
    out.
    """
    path = file.path
    layouts = [layout for layout in _LANGUAGE_LAYOUTS if f"{layout.projection}.weight" in file.weights]
    if len(layouts) > 1:
        raise CheckpointError(f"{path} is for {' and for '.join(layout.model_type for layout in layouts)}.")
    layout = layouts[0] if layouts else None
    has_encoder = any(name.startswith(_VISION) for name in file.weights)
    settings = None
    if file.entry is not None:
        settings = _read_entry(file, Blip2Config)
        tower, language = settings[0].vision, settings[0].language
        if (language is None) != (layout is None) or (has_encoder and isinstance(tower, TowerConfig)):
            problem = "its openblip entry is damaged: it describes another kind of model than the weights"
            raise CheckpointError(f"{path}, {problem}.")
        if vision is None and isinstance(tower, TowerConfig):
            vision = tower.name
        if layout is not None and language is not None:
            language_model = language.name if language_model is None else language_model
            # A language model that OpenBLIP saved has been changed.
            layout = layout._replace(end_of_text=language.end_of_text, changes={})
    if has_encoder and vision is not None:
        raise ConfigError(f"{path} holds its image encoder: leave vision {vision} out.")
    if layout is None and language_model is not None:
        raise ConfigError(f"{path} is of stage 1 and has no language model: leave {language_model} out.")
    missing = []
    if not has_encoder and vision is None:
        paper = _in_the_paper({**EVA_CLIP.papers, **OPENAI_CLIP.papers}, _vision_dim(file))
        missing.append(f"its image encoder with vision= or --vision ({paper})")
    if layout is not None and language_model is None:
        paper = _in_the_paper(layout.papers, _language_dim(file, layout))
        missing.append(f"its language model with language_model= or --language-model ({paper})")
    if missing:
        problem = "holds what BLIP-2 has trained, not what was frozen"
        raise CheckpointError(f"{path} {problem}. Name {', and '.join(missing)}.")
    return settings, layout, vision, language_model


def _check_width(path: Path, part: str, expected: int, source: PathOrName, width: int) -> None:
    if width != expected:
        raise CheckpointError(f"{path} was trained with {part} {expected} wide; {source} is {width} wide.")


def _vision_dim(file: PthFile) -> int:
    return _shape_of(file.weights, "ln_vision.weight", 1, file.path)[0]


def _language_dim(file: PthFile, layout: LanguageLayout) -> int:
    return _shape_of(file.weights, f"{layout.projection}.weight", 2, file.path)[0]


def _in_the_paper(papers: Mapping[int, str], width: int) -> str:
    return f"{width} wide; the paper's is {papers[width]}" if width in papers else f"{width} wide"


def load_original_blip2(
    file: PthFile,
    load_image_encoder: Callable[..., ImageEncoder],
    tokenizer: PathOrName | None = None,
    vision: PathOrName | None = None,
    language_model: PathOrName | None = None,
    dtype: ChooseDtype = state_dict.in_float32,
) -> Blip2Checkpoint:
    """The model of a .pth file with the frozen parts that it leaves out, which must be those it was trained with.

    vision, language_model: see `frozen_sources`.
    """
    path = file.path
    settings, layout, vision, language_model = frozen_sources(file, vision, language_model)
    state = state_dict.without(_POSITION_IDS, file.weights)
    precision, encoder, language, language_config = dtype(state_dict.count_weights(state)), None, None, None
    if vision is not None:
        encoder = load_image_encoder(vision, dtype=precision)
        _check_width(path, "an image encoder", _vision_dim(file), vision, encoder.config.hidden_dim)
    if layout is not None and language_model is not None:
        end_of_text, name = layout.end_of_text, str(language_model)
        language = backbones.load_language_model(
            language_model, end_of_text=end_of_text, dtype=precision, changes=layout.changes
        )
        model_type = language.model.config.model_type
        if model_type != layout.model_type:
            raise CheckpointError(
                f"{path} was trained with a language model of the kind {layout.model_type}; {name} is a {model_type}."
            )
        _check_width(path, "a language model", _language_dim(file, layout), name, language.hidden_dim)
        language_config = LanguageConfig(name=name, hidden_dim=language.hidden_dim, end_of_text=end_of_text)
        state = state_dict.without(layout.weights, state)
        # LAVIS means to leave out all of the language model, but second names of shared weights slip through: OPT's
        # lm_head, T5's embed_tokens.
        own_state, different = language.model.state_dict(), []
        for weight, tensor in state_dict.below(layout.weights, file.weights).items():
            own = own_state.get(weight)
            # Either may be the other, rounded to its own precision.
            is_same = own is not None and own.shape == tensor.shape
            is_same = is_same and (torch.equal(own.to(tensor), tensor) or torch.equal(own, tensor.to(own)))
            if not is_same and not weight.endswith(_ROTARY):
                different.append(layout.weights + weight)
        if different:
            raise CheckpointError(
                f"{path} holds weights of a language model that the named one does not have: "
                f"{'; '.join(sorted(different))}."
            )
    if file.entry is not None and file.entry.get(_EXTRA_WEIGHTS):
        state = state_dict.as_state_dict(file.entry[_EXTRA_WEIGHTS], path) | state
    state_dict.check_tied(state, path, _QFORMER)
    _check_temperature(state, path)
    kind = _encoder_layout(state, _VISION)
    state = _add_implied_tensors(state, kind, _VISION)
    if settings is not None:
        config, others = settings
    else:
        if encoder is None:
            vit = infer_vit(state, kind.table, _VISION, path, kind.settings, kind.head_width)
            config = infer_blip2_config(state, vit, language_config, path)
            preprocessing = Preprocessing(image_size=vit.image_size)
        else:
            config = infer_blip2_config(state, encoder.config, language_config, path)
            preprocessing = encoder.preprocessing
        is_captioner = layout is not None and encoder is None  # fine-tuned together with its encoder
        others = {
            "preprocessing": preprocessing,
            "prompt": _BLIP2_PROMPT if is_captioner else "",
            "question_prompt": QUESTION_PROMPT if layout is None else layout.question_prompt,
        }
    if encoder is not None:
        config = replace(config, vision=encoder.config)
    if config.language is not None:
        config = replace(config, language=replace(config.language, name=str(language_model)))
    model = base.empty_blip2(path, config, encoder and encoder.model, language)
    left_out = ("language.",) if encoder is None else ("language.", "vision.")
    expected = state_dict.without(left_out, model.state_dict())
    weights = state_dict.translate(_layout(kind, layout), state, expected, path)
    state_dict.fill(model, weights, path, expected, dtype=precision, prefix="vision.")
    vocabulary = None
    if config.has_text_branch or tokenizer is not None:
        vocabulary = _pth_tokenizer(file, tokenizer)
        # [ENC], the last entry, does not exist in BLIP-2.
        num_entries, num_rows = vocabulary.vocab_size - 1, config.qformer.vocab_size
        state_dict.check_vocabulary(path, num_entries, "the Q-Former", num_rows, "entries, with [DEC],")
    return Blip2Checkpoint(model.eval(), vocabulary, **others)


def _layout(encoder: EncoderLayout, language: LanguageLayout | None) -> Layout:
    projection = {} if language is None else {"language_proj": language.projection}
    return Layout({**_TRAINED, **projection, **add_prefix(encoder.table, "vision.", _VISION)}, (_TIED,))


def infer_blip2_config(
    state: State, vision: VisionConfig | TowerConfig, language: LanguageConfig | None, source: object
) -> Blip2Config:
    """The model's settings: what shapes show, and what is the same in all released models."""
    embed_dim, has_text_branch = Blip2Config.embed_dim, language is None or _WORDS in state
    if language is None:
        embed_dim, _ = _shape_of(state, "vision_proj.weight", 2, source)
    _, num_queries, width = _shape_of(state, "query_tokens", 3, source)
    layers = f"{_BERT}.encoder.layer"
    mlp_dim, _ = _shape_of(state, f"{layers}.0.intermediate_query.dense.weight", 2, source)
    vocab_size, max_positions = QFormerConfig.vocab_size, QFormerConfig.max_positions
    if has_text_branch:
        vocab_size, _ = _shape_of(state, _WORDS, 2, source)
        max_positions, _ = _shape_of(state, f"{_EMBEDDINGS}.position_embeddings.weight", 2, source)
    num_layers, crossing = len(_layer_numbers(state, layers)), _layer_numbers(state, layers, "crossattention.")
    if not crossing:
        state_dict.raise_on_mismatch(source, {f"{layers}.0.crossattention"}, ())
    every = crossing[1] - crossing[0] if len(crossing) > 1 else num_layers
    if crossing != list(range(0, num_layers, every)):
        raise CheckpointError(
            f"{source} has cross-attention in the layers {', '.join(map(str, crossing))} of {num_layers}; it must be "
            "in layer 0, and from there in layers at equal distances."
        )
    with base.as_checkpoint_errors(source):
        qformer = QFormerConfig(
            num_queries=num_queries,
            hidden_dim=width,
            num_layers=num_layers,
            num_heads=_num_heads_of(width, "the Q-Former", source),
            mlp_dim=mlp_dim,
            cross_attention_every=every,
            vocab_size=vocab_size,
            max_positions=max_positions,
            layer_norm_eps=_TEXT_EPS,
        )
        return Blip2Config(
            vision=vision,
            qformer=qformer,
            language=language,
            embed_dim=embed_dim,
            heads=STAGE1_HEADS if language is None else ("llm",),
            instructed=language is not None and has_text_branch,
            vision_norm_eps=_VISION_NORM_EPS,
        )


def save_original_blip2(path: Path, checkpoint: Blip2Checkpoint) -> None:
    """Write one .pth file that the released code and `load_original_blip2` read; ConfigError unless its name says so.

    As there, frozen parts are left out: the language model, and the image encoder when it is frozen or a CLIP of
    transformers.
    """
    model, config = checkpoint.model, checkpoint.model.config
    language, encoder = _language_layout_for(checkpoint), _encoder_layout_for(checkpoint)
    is_left_out = isinstance(config.vision, TowerConfig) or "vision" in model.frozen
    left_out = ("language.", "vision.") if is_left_out else ("language.",)
    weights = {name: t.cpu() for name, t in state_dict.without(left_out, model.state_dict()).items()}
    state = state_dict.translate_back(_layout(encoder, language), weights)
    for name, num_axes in encoder.missing_axes.items():
        if _VISION + name in state:
            state[_VISION + name] = state[_VISION + name][(0,) * num_axes]
    state |= {copy: state[name] for copy, name in state_dict.tied_names(state, _QFORMER).items()}
    state[_POSITION_IDS] = torch.arange(config.qformer.max_positions)[None]  # the released code asks for it
    key_biases = {name: state.pop(name) for name in list(state) if name.endswith(".attn.k_bias")}
    _write_pth(path, state, checkpoint, **{_EXTRA_WEIGHTS: key_biases})


def _language_layout_for(checkpoint: Blip2Checkpoint) -> LanguageLayout | None:
    """How the released code keeps such a model; None in stage 1. CheckpointError when it has none."""
    config = checkpoint.model.config
    heads = ", ".join(config.heads)
    if config.language is None:
        if set(config.heads) == set(STAGE1_HEADS):
            return None
        raise _not_released(f"with the heads {heads} alone")
    language = checkpoint.model.require_language()
    if has_lora(language):
        raise _not_released("with adapters in its language model")
    kind: Any = language.model.config.model_type
    for layout in _LANGUAGE_LAYOUTS:
        if config.heads == ("llm",) and layout.model_type == kind and config.instructed in layout.instructed:
            return layout
    raise _not_released(f"{'that reads instructions ' if config.instructed else ''}with the heads {heads} and a {kind}")


def _encoder_layout_for(checkpoint: Blip2Checkpoint) -> EncoderLayout:
    """How the released code keeps the image encoder; CheckpointError when it has no such one."""
    config, encoder = checkpoint.model.config.vision, checkpoint.model.vision
    if isinstance(config, TowerConfig):
        if isinstance(encoder, VisionTower) and encoder.model.config.model_type == "clip_vision_model":
            return OPENAI_CLIP
        raise _not_released(f"with the image encoder {config.name}")
    for layout in (EVA_CLIP, OPENAI_CLIP):
        if all(getattr(config, name) == value for name, value in layout.settings.items()):
            return layout
    raise _not_released("with such an image encoder: only with EVA-CLIP's or CLIP's, without a last norm,")


def _not_released(what: str) -> CheckpointError:
    return CheckpointError(f"The released code has no BLIP-2 {what}. Save as openblip.")
