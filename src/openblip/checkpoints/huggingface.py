"""Folders of transformers' BLIP and BLIP-2: BLIP for captions, retrieval and questions, and its BlipModel;
Blip2ForConditionalGeneration, Blip2Model, Blip2ForImageTextRetrieval and InstructBlipForConditionalGeneration.

What the formats have no place for (the temperature of ITC, prompts, ...) is written under "openblip" in config.json,
which transformers keeps and ignores.

In a BLIP-2, the language model's weights stand below "language_model." under the names that its own class gives them,
its settings in config.json as text_config, its tokenizer beside them. One of its tokens, "<image>", stands for a visual
prompt: transformers puts the prompts where a text has it. OpenBLIP puts them before the text by itself, and reads
folders with and without that token.
"""

import copy
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tokenizers
import torch

from openblip.checkpoints import backbones, state_dict
from openblip.checkpoints import checkpoint as base
from openblip.checkpoints.backbones import PathOrName
from openblip.checkpoints.checkpoint import CONFIG_FILE, QUESTION_PROMPT, Blip2Checkpoint, BlipCheckpoint, Checkpoint
from openblip.checkpoints.state_dict import LOG_TEMPERATURE, WEIGHTS, ChooseDtype, Layout, State, Table, add_prefix
from openblip.data.config import Preprocessing
from openblip.data.tokenizer import IMAGE_TOKEN, Tokenizer
from openblip.errors import CheckpointError, ConfigError
from openblip.files import write_json
from openblip.models.blip import INITIAL_TEMPERATURE
from openblip.models.config import Blip2Config, BlipConfig, LanguageConfig
from openblip.models.language_model import LanguageModel, has_lora, wrap_language_model
from openblip.nn.config import QFormerConfig, TextConfig, VisionConfig

SHORT_QUESTION_PROMPT = "Question: {} Short answer:"
"""How T5 and InstructBLIP are asked."""
QFORMER_TOKENIZER = "qformer_tokenizer"
"""The folder in which InstructBlipProcessor keeps the Q-Former's tokenizer."""

_PREPROCESSOR_CONFIG, _PROCESSOR_CONFIG = "preprocessor_config.json", "processor_config.json"
_BICUBIC = 3  # PIL's number
_LOG_TEMPERATURE = math.log(INITIAL_TEMPERATURE)
_ACTIVATIONS = ("gelu", "quick_gelu")  # of a BLIP-2's image encoder: EVA-CLIP's and CLIP's
_OUR_LANGUAGE, _LANGUAGE = "language.", "language_model."

_NEVER = -100.0  # bias of a word in the decoder that is not to be written

# ---- weights (modeling_blip, modeling_blip_2, modeling_instructblip)

# Prefixes of names, also in .pth files
TEXT_ENCODER, TEXT_DECODER = {"encode": "text_encoder"}, {"decode": "text_decoder.bert"}
MATCHING_KEYS: Table = {head: head for head in ("vision_proj", "text_proj", "itm_head")}


def blip_layout(
    heads: tuple[str, ...], body: Table, prefixes: Mapping[str, str], head_keys: Table | None = None
) -> Layout:
    """The layout of a BLIP. body: key table of image encoder and text; head_keys: of the heads but the decoder's."""
    table = {**body, **(head_keys or {})}
    derived = [f"{prefix}.embeddings.position_ids" for prefix in prefixes.values()]  # 0, 1, 2, ...
    if "decode" in prefixes:
        table |= add_prefix(backbones.BERT_LM_HEAD_KEYS, "text.", "text_decoder.")
        derived.append("text_decoder.cls.predictions.decoder.")  # see `state_dict.check_tied`
    return Layout(table, tuple(derived), heads, prefixes)


def qformer_keys(prefix: str, inner: str, *, norm: str, embeddings: str | None) -> dict[str, str]:
    """Key table of a Q-Former, whose names are BERT's, with a second feed-forward for the queries.

    prefix: of the layers' names. inner: name of the module in an attention that holds query, key and value. norm: name
    of the norm of the embeddings. embeddings: prefix of those of text; None without a text branch.
    """
    table = {"embeddings.norm": norm, "embeddings.queries": "query_tokens"}
    if embeddings is not None:
        table["embeddings.word"] = f"{embeddings}.word_embeddings"
        table["embeddings.position"] = f"{embeddings}.position_embeddings"
    for name, bert in backbones.BERT_TEXT_KEYS.items():
        if ".feed_forward." in name:
            query = bert.replace(".intermediate.", ".intermediate_query.").replace(".output.", ".output_query.")
            table[name.replace("feed_forward", "query_feed_forward")] = prefix + query
            if embeddings is not None:
                table[name.replace("feed_forward", "text_feed_forward")] = prefix + bert
        elif name.startswith("layers."):
            table[name] = prefix + bert.replace(".self.", f".{inner}.")
    return add_prefix(table, "qformer.", "")


def _blip2_layout(
    *heads: str, head_keys: Table, norm: str = "qformer.layernorm", embeddings: str | None = None
) -> Layout:
    table = {
        **add_prefix(backbones.HF_EVA_KEYS, "vision.", "vision_model."),
        "vision_norm": "vision_model.post_layernorm",
        **qformer_keys("qformer.", "attention", norm=norm, embeddings=embeddings),
        **head_keys,
    }
    # 0, 1, 2, ...; a Q-Former without a text branch may have them too.
    return Layout(table, (f"{embeddings or 'qformer.embeddings'}.position_ids",), heads)


_BODY = {
    **add_prefix(backbones.HF_VISION_KEYS, "vision.", "vision_model."),
    **add_prefix(backbones.BERT_TEXT_KEYS, "text.", "{text}."),
}
_POOLED_HEAD_KEYS = {
    LOG_TEMPERATURE: "logit_scale",
    "text_pooler": "text_model.pooler.dense",
    "vision_proj": "visual_projection",
    "text_proj": "text_projection",
}
_PROJECTIONS = {"vision_proj": "vision_projection", "text_proj": "text_projection", "itm_head": "itm_head"}
_PROMPTS = {"language_proj": "language_projection"}
_WRITER, _RETRIEVER = "Blip2ForConditionalGeneration", "Blip2ForImageTextRetrieval"
_QFORMER = "qformer.embeddings"
_CLASSES: Mapping[str, Mapping[str, Layout]] = {  # model_type in config.json -> class -> layout
    "blip": {
        "BlipForConditionalGeneration": blip_layout(("lm",), _BODY, TEXT_DECODER),
        "BlipForImageTextRetrieval": blip_layout(("itc", "itm"), _BODY, TEXT_ENCODER, MATCHING_KEYS),
        "BlipForQuestionAnswering": blip_layout(("vqa",), _BODY, TEXT_ENCODER | TEXT_DECODER),
        "BlipModel": blip_layout(("itc",), _BODY, {"encode": "text_model"}, _POOLED_HEAD_KEYS)._replace(pooled=True),
    },
    "blip-2": {
        _WRITER: _blip2_layout("llm", head_keys=_PROMPTS),
        "Blip2Model": _blip2_layout("llm", head_keys=_PROMPTS),  # the same weights under another class
        _RETRIEVER: _blip2_layout("itc", "itm", head_keys=_PROJECTIONS, embeddings="embeddings"),
    },
    "instructblip": {
        "InstructBlipForConditionalGeneration": _blip2_layout(
            "llm", head_keys=_PROMPTS, norm=f"{_QFORMER}.layernorm", embeddings=_QFORMER
        )
    },
}


def _class_of(folder: Path, config: Any, state: State) -> str:
    """The name of the class that a folder holds: config.json names it, or else its weights tell."""
    known = _CLASSES[config.model_type]
    named: list[str] = list(config.architectures or [])
    matching = [name for name in named if name in known]
    if len(matching) != 1 and config.model_type == "blip":
        prefixes = {prefix for layout in known.values() for prefix in layout.text_prefixes.values()}
        present = {prefix for prefix in prefixes if any(name.startswith(f"{prefix}.") for name in state)}
        matching = [name for name, layout in known.items() if set(layout.text_prefixes.values()) == present]
    elif len(matching) != 1 and any(name.startswith(_LANGUAGE) for name in state):
        matching = [next(iter(known))]
    elif len(matching) != 1 and any(name.startswith("itm_head.") for name in state):
        matching = [name for name in known if name == _RETRIEVER]
    if len(matching) != 1:
        raise CheckpointError(
            f"{folder} holds {' and '.join(named) or 'a model of no named class'}, and its weights do not look like "
            f"those of a class that can be read: {', '.join(known)}."
        )
    return matching[0]


# ---- settings (configuration_blip, configuration_blip_2)

CONFIG_CLASSES = {"blip": "BlipConfig", "blip-2": "Blip2Config", "instructblip": "InstructBlipConfig"}
_QFORMER_SETTINGS = backbones.HF_TEXT_SETTINGS | {"cross_attention_every": "cross_attention_frequency"}
# What the formats have no place for: conversion -> names, and their values in a folder that transformers wrote.
_EXTRA: Mapping[Callable[[Any], object], Mapping[str, object]] = {
    str: {"prompt": "", "sharing": None, "question_prompt": None, "end_of_text": None, "language": None},
    float: {"log_temperature": _LOG_TEMPERATURE, "drop_path": 0.0, "vision_norm_eps": None},
    int: {"max_text_tokens": LanguageConfig.max_text_tokens, "embed_dim": None},
    base.checked_encoder_token: {"encoder_token": None},
}


def _read_hf_config(folder: Path) -> Any:
    """The folder's config, of the class of its model_type; CheckpointError when damaged."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    model_type = str(state_dict.read_json_object(folder / CONFIG_FILE).get("model_type"))
    if model_type not in CONFIG_CLASSES:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} does not describe a BLIP or BLIP-2: its model_type is {model_type}. A language "
            "model or a vision model is only a part of a BLIP-2."
        )
    try:
        return getattr(transformers, CONFIG_CLASSES[model_type]).from_pretrained(folder)
    except (StrictDataclassError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).strip().replace("\n", " ").partition(". Should contain one of")[0]
        raise CheckpointError(f"{folder / CONFIG_FILE}: {reason}.") from error


def _read_extra(folder: Path, config: Any) -> SimpleNamespace:
    """The attributes that OpenBLIP wrote into the folder's config, or their defaults; CheckpointError if damaged."""
    written: Any = getattr(config, "openblip", None)
    values: dict[str, object] = {}
    try:
        for convert, names in _EXTRA.items():
            for name, default in names.items():
                value = None if written is None else written.get(name)
                values[name] = default if value is None else convert(value)
    except (AttributeError, TypeError, ValueError, CheckpointError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: its openblip entry is damaged: {error}.") from error
    return SimpleNamespace(**values)


def _read_sizes(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Settings under our names, by a table to transformers' names; ConfigError for values that are no sizes."""
    values = {name: getattr(config, hf_name) for name, hf_name in names.items()}
    lowest = dict.fromkeys(names, 1) | {"dropout": 0, "layer_norm_eps": 0}
    is_size = {name: isinstance(value, int | float) and value >= lowest[name] for name, value in values.items()}
    strange = [f"{names[name]} {value}" for name, value in values.items() if not is_size[name]]
    if strange:
        raise ConfigError(f"{', '.join(strange)}: BLIP's settings are single numbers, sizes above 0.")
    return values


def _write_sizes(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """The same settings under transformers' names, the inverse of `_read_sizes`."""
    return {hf_name: getattr(config, name) for name, hf_name in names.items()}


def _read_preprocessing(folder: Path, image_size: int) -> Preprocessing:
    """The folder's preprocessing, or BLIP's where it says nothing; CheckpointError for one that BLIP does not have."""
    settings: dict[str, Any] = {}
    if (folder / _PREPROCESSOR_CONFIG).is_file():
        settings = state_dict.read_json_object(folder / _PREPROCESSOR_CONFIG)
    elif (folder / _PROCESSOR_CONFIG).is_file():
        settings = state_dict.read_json_object(folder / _PROCESSOR_CONFIG).get("image_processor", {})
    try:
        size = settings.get("size", image_size)
        height, width = (size["height"], size["width"]) if isinstance(size, dict) else (size, size)
        steps = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
        same = height == width and settings.get("resample", _BICUBIC) == _BICUBIC
        same = same and all(settings.get(step, True) for step in steps)
        if not same or abs(settings.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
            raise ValueError("another preprocessing")
        mean = backbones.rgb(settings.get("image_mean", Preprocessing.mean))
        std = backbones.rgb(settings.get("image_std", Preprocessing.std))
        return Preprocessing(image_size=int(height), mean=mean, std=std)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        problem = "prepares images unlike any BLIP (bicubic to a square, 1/255)"
        raise CheckpointError(f"{folder} {problem}: {settings}.") from error


def write_preprocessing(folder: Path, preprocessing: Preprocessing, processor: str) -> None:
    """Write what transformers' BlipImageProcessor reads, on its own or as part of `processor`."""
    settings = {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": processor,
        "do_resize": True,
        "size": {"height": preprocessing.image_size, "width": preprocessing.image_size},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
        "do_convert_rgb": True,
    }
    write_json(folder / _PREPROCESSOR_CONFIG, settings)


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer that transformers reads too."""
    tokenizer.save(folder)
    wordpiece = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    named = [("[CLS]", tokenizer.cls_id), ("[SEP]", tokenizer.sep_id)]
    wordpiece.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=named
    )
    wordpiece.save(str(folder / "tokenizer.json"))
    rules = json.loads(tokenizer.to_json())["normalizer"] or {}
    settings: dict[str, Any]
    if rules.get("type") == "BertNormalizer":
        settings = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": rules["lowercase"],
            "strip_accents": rules["strip_accents"],
            "tokenize_chinese_chars": rules["handle_chinese_chars"],
        }
    else:  # BertTokenizer would put its own rules in the place of these
        settings = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Without, a tokenizer gives token types as well, which `generate` of transformers' BLIP refuses.
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    write_json(folder / "tokenizer_config.json", settings)


# ---- reading


def load_huggingface(
    folder: Path,
    tokenizer: PathOrName | None = None,
    state: dict[str, torch.Tensor] | None = None,
    adapter: Path | None = None,
    dtype: ChooseDtype = state_dict.in_float32,
) -> Checkpoint:
    """Read a folder of transformers' `save_pretrained`; CheckpointError also for a class or setting that is not known.

    tokenizer: folder or hub name of BLIP's or of the Q-Former's when it has a text branch, else of the language
    model's; None is the folder's own, or BERT's from the hub when BLIP or the Q-Former has none. state: weights in
    place of the folder's. adapter: folder of peft's adapters of this model or of its language model, to merge into it.
    """
    import transformers

    config = _read_hf_config(folder)
    state = state_dict.read_folder_weights(folder) if state is None else state
    class_name = _class_of(folder, config, state)
    layout = _CLASSES[config.model_type][class_name]
    if adapter is not None:
        theirs = backbones.build_theirs(
            folder, getattr(transformers, class_name), config, state, ignored=layout.ignored
        )
        backbones.with_adapters(theirs, adapter).merge_and_unload()  # in place
        state = theirs.state_dict()
    extra = _read_extra(folder, config)
    if config.model_type == "blip":
        return _load_blip(folder, tokenizer, config, state, layout, extra, dtype)
    return _load_blip2(folder, tokenizer, config, state, layout, extra, dtype)


def _rows_of(state: State) -> dict[str, torch.Tensor]:
    """Word embeddings of BLIP or of a Q-Former, and what else has one row for each of their words."""
    suffixes = ("embeddings.word_embeddings.weight", "cls.predictions.bias")
    return {n: t for n, t in state.items() if n.endswith(suffixes) and not n.startswith(_LANGUAGE)}


def _fit_words(
    folder: Path,
    state: dict[str, torch.Tensor],
    vocabulary: Tokenizer,
    dec_row: int | None = None,
    enc_row: int | None = None,
) -> int:
    """Give what `_rows_of` finds a row for every entry of a tokenizer, at its place, and spare rows behind them.

    Returns the number of rows.

    dec_row, enc_row: where those of [DEC] and [ENC] are in the file; None when no text begins with them. transformers
    puts added words behind the words of BERT, which is onto these rows: a word and [DEC] that have one row get one
    each, and only the word of the two is ever written. [ENC] without a row gets that of [CLS], which transformers reads
    in its place, and words without one get the mean of all rows. Of a model that answers, transformers gives rows to
    the added words of questions, and none to those of answers.
    """
    rows = _rows_of(state)
    fewest, most = min(map(len, rows.values())), max(map(len, rows.values()))
    special: dict[int, int] = {}
    unneeded = {vocabulary.dec_id, vocabulary.enc_id, vocabulary.entries.get(IMAGE_TOKEN)}
    if dec_row is not None and enc_row is not None:
        special = {vocabulary.dec_id: dec_row, vocabulary.enc_id: enc_row if enc_row < fewest else vocabulary.cls_id}
        unneeded = set()
    num_entries = 1 + max(index for index in vocabulary.entries.values() if index not in unneeded)
    sources = [special.get(index, index) for index in range(num_entries)]
    taken = [index for index, row in special.items() if row != index and sources.index(row) != index]
    without_row = [index for index, row in enumerate(sources) if row >= fewest]
    if without_row:
        backbones.warn_of_rows(folder, vocabulary.pieces(without_row))
    first_spare = num_entries if dec_row in (None, vocabulary.dec_id) else vocabulary.dec_id
    sources += [row for row in range(first_spare, most) if row not in special.values()]
    for name, tensor in rows.items():
        mean = tensor.float().mean(dim=0, keepdim=True).to(tensor)
        state[name] = torch.cat([tensor, *[mean] * (max(sources) + 1 - len(tensor))])[sources]
        if name.endswith(".bias"):
            state[name][taken] = _NEVER
    return len(sources)


def _load_blip(
    folder: Path,
    tokenizer: PathOrName | None,
    config: Any,
    state: dict[str, torch.Tensor],
    layout: Layout,
    extra: SimpleNamespace,
    dtype: ChooseDtype,
) -> BlipCheckpoint:
    state_dict.check_tied(state, folder)
    vision, text = config.vision_config, config.text_config
    if (vision.hidden_act, text.hidden_act) != ("gelu", "gelu"):
        raise CheckpointError(f"{folder} computes with {vision.hidden_act}/{text.hidden_act}; BLIP's layers are gelu.")
    if text.encoder_hidden_size != vision.hidden_size:
        raise CheckpointError(
            f"{folder}: the text attends to image tokens of width {text.encoder_hidden_size}, but those of the image "
            f"encoder are {vision.hidden_size}."
        )
    if "vqa" in layout.heads and text.hidden_size != vision.hidden_size:
        raise CheckpointError(
            f"{folder}: answers attend to questions of width {text.hidden_size} with cross-attention for images, of "
            f"width {vision.hidden_size}. transformers cannot run such a model either; both widths must be the same."
        )
    vocabulary = base.find_tokenizer(folder, folder, tokenizer)
    lengths = [len(rows) for rows in _rows_of(state).values()]
    num_rows = min(lengths, default=text.vocab_size)
    state_dict.check_vocabulary(folder, vocabulary.num_words, "the model", num_rows, "words,")
    dec_row, enc_row = vocabulary.dec_id, vocabulary.enc_id
    if isinstance(text.bos_token_id, int) and vocabulary.num_words <= text.bos_token_id < dec_row:
        dec_row, enc_row = text.bos_token_id, text.bos_token_id + 1
    if text.vocab_size in lengths:  # else the difference is an error below
        text.vocab_size = _fit_words(folder, state, vocabulary, dec_row, enc_row)
    sharing = extra.sharing or state_dict.infer_sharing(state, layout.text_prefixes)
    with base.as_checkpoint_errors(folder / CONFIG_FILE):
        blip_config = BlipConfig(
            vision=VisionConfig(**_read_sizes(vision, backbones.HF_VISION_SETTINGS), drop_path=extra.drop_path),
            text=TextConfig(**_read_sizes(text, backbones.HF_TEXT_SETTINGS), sharing=sharing),
            embed_dim=config.projection_dim if layout.pooled else config.image_text_hidden_size,
            heads=layout.heads,
            pooled=layout.pooled,
        )
    model = base.empty_blip(blip_config)
    names = model.state_dict().keys()
    weights = state_dict.translate(layout, state, names, folder)
    if LOG_TEMPERATURE in names:
        weights.setdefault(LOG_TEMPERATURE, torch.tensor(extra.log_temperature))
    precision = dtype(state_dict.count_weights(state))
    state.clear()  # `fill` has the only references
    state_dict.fill(model, weights, folder, dtype=precision)
    if "decode" in layout.text_prefixes:  # captions begin and end with the tokens that config.json names
        named, expected = (text.bos_token_id, text.sep_token_id), (dec_row, vocabulary.sep_id)
        if named != expected:
            raise CheckpointError(
                f"{folder}: [DEC] and [SEP] are {named} in config.json and {expected} in the tokenizer; they belong to "
                "different models."
            )
    preprocessing = _read_preprocessing(folder, vision.image_size)
    # BlipModel is the one class that no conversion of BLIP's own weights uses: its models were trained with [CLS].
    has_enc = enc_row < num_rows and not layout.pooled
    encoder_token: base.EncoderToken = extra.encoder_token or ("[ENC]" if has_enc else "[CLS]")
    checkpoint = BlipCheckpoint(model.eval(), vocabulary, preprocessing, extra.prompt, encoder_token)
    base.check_parts_fit(folder, checkpoint)
    return checkpoint


def _load_blip2(
    folder: Path,
    tokenizer: PathOrName | None,
    config: Any,
    state: dict[str, torch.Tensor],
    layout: Layout,
    extra: SimpleNamespace,
    dtype: ChooseDtype,
) -> Blip2Checkpoint:
    instructed, vision, qformer = config.model_type == "instructblip", config.vision_config, config.qformer_config
    precision, language, language_config = dtype(state_dict.count_weights(state)), None, None
    if "llm" in layout.heads:
        tokenizer_source = os.fspath(folder if instructed or tokenizer is None else tokenizer)
        end_of_text = extra.end_of_text
        language = _load_language_model(folder, tokenizer_source, config.text_config, state, end_of_text, precision)
        state = state_dict.without(_LANGUAGE, state)
    vocabulary, lengths = None, [len(rows) for rows in _rows_of(state).values()]
    if lengths and (instructed or language is None):
        vocabulary = base.find_tokenizer(folder, folder / QFORMER_TOKENIZER if instructed else folder, tokenizer)
        state_dict.check_vocabulary(folder, vocabulary.num_words, "the Q-Former", min(lengths), "words,")
        # transformers does not write their number after a resize.
        qformer.vocab_size = _fit_words(folder, state, vocabulary)
    if vision.hidden_act not in _ACTIVATIONS or qformer.hidden_act != "gelu" or not vision.qkv_bias:
        raise CheckpointError(
            f"{folder} has {vision.hidden_act}/{qformer.hidden_act} and qkv_bias {vision.qkv_bias}; in BLIP-2 the "
            f"image encoder has {' or '.join(_ACTIVATIONS)} and that bias, its Q-Former gelu."
        )
    embed_dim = getattr(config, "image_text_hidden_size", None)  # InstructBLIP compares nothing
    with base.as_checkpoint_errors(folder / CONFIG_FILE):
        if language is not None:
            is_own_end = extra.end_of_text is None and language.end_id == language.tokenizer.eos_token_id
            end = extra.end_of_text or str(language.tokenizer.decode([language.end_id]))
            language_config = LanguageConfig(
                name=extra.language or getattr(config.text_config, "_name_or_path", "") or str(folder),
                hidden_dim=language.hidden_dim,
                end_of_text=None if is_own_end else end,
                max_text_tokens=extra.max_text_tokens,
            )
        vision_sizes = _read_sizes(vision, backbones.HF_VISION_SETTINGS)
        qformer_sizes = _read_sizes(qformer, _QFORMER_SETTINGS)
        activation, drop_path = vision.hidden_act, extra.drop_path
        blip2_config = Blip2Config(
            vision=VisionConfig(**vision_sizes, activation=activation, drop_path=drop_path, output_norm=False),
            qformer=QFormerConfig(**qformer_sizes, num_queries=config.num_query_tokens),
            language=language_config,
            embed_dim=extra.embed_dim or embed_dim or Blip2Config.embed_dim,
            heads=layout.heads,
            instructed=instructed,
            vision_norm_eps=vision.layer_norm_eps if extra.vision_norm_eps is None else extra.vision_norm_eps,
        )
    model = base.empty_blip2(folder, blip2_config, language=language)
    expected = state_dict.without(_OUR_LANGUAGE, model.state_dict())
    weights = state_dict.translate(layout, state, expected, folder)
    if LOG_TEMPERATURE in expected:
        weights[LOG_TEMPERATURE] = torch.tensor(extra.log_temperature)
    state_dict.fill(model, weights, folder, expected, dtype=precision, prefix="vision.")
    preprocessing = _read_preprocessing(folder, vision.image_size)
    base.check_image_size(folder, preprocessing.image_size, vision.patch_size)
    question_prompt = extra.question_prompt
    if question_prompt is None:  # as in the papers
        is_short = instructed or (language is not None and language.is_encoder_decoder)
        question_prompt = SHORT_QUESTION_PROMPT if is_short else QUESTION_PROMPT
    image_token = language is None and config.image_token_index is not None
    return Blip2Checkpoint(model.eval(), vocabulary, preprocessing, extra.prompt, question_prompt, image_token)


def _load_language_model(
    folder: Path, tokenizer: str, text_config: Any, state: State, end_of_text: str | None, dtype: torch.dtype
) -> LanguageModel:
    """The language model of a folder. end_of_text: what ends a text; None is what text_config says."""
    model_class = _language_class(folder, text_config)
    vocabulary = backbones.read_hub_tokenizer(tokenizer)
    weights = state_dict.below(_LANGUAGE, state)
    model = backbones.build_theirs(folder, model_class, text_config, weights, _LANGUAGE, dtype=dtype)
    _check_language_width(folder, text_config, model.get_input_embeddings().weight.shape[1])
    model = backbones.with_all_words(folder, model, vocabulary)
    if end_of_text is None:  # then config.json says it, where it is not the tokenizer's own end: a line break for OPT
        named = getattr(text_config, "eos_token_id", None)
        ends = named if isinstance(named, list) else [named]
        if named is not None and ends and vocabulary.eos_token_id not in ends:
            end_of_text = str(vocabulary.decode([ends[0]]))
    return wrap_language_model(model.eval(), vocabulary, end_of_text)


def _language_class(source: object, text_config: Any) -> Any:
    """The class of transformers that its BLIP-2 takes for such a language model."""
    from transformers.models.auto import modeling_auto

    causal = type(text_config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    if causal and not text_config.is_encoder_decoder:
        return modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)]
    if not causal and type(text_config) in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(text_config)]
    # For an encoder-decoder that transformers also has as a decoder (BART, ...), its BLIP-2 would take the decoder.
    raise CheckpointError(
        f"{source}: a {text_config.model_type} is no language model that transformers' BLIP-2 can have: it takes "
        "decoders (OPT, GPT-2, Llama, ...) and T5."
    )


def _check_language_width(source: object, text_config: Any, width: int) -> None:
    if text_config.hidden_size != width:
        raise CheckpointError(
            f"{source}: the language model's word embeddings are {width} wide, and transformers' BLIP-2 makes visual "
            f"prompts of the width of its layers, {text_config.hidden_size}. It cannot run such a model."
        )


# ---- writing


def save_huggingface_blip(folder: Path, checkpoint: BlipCheckpoint) -> None:
    """Write a folder that transformers and `load_huggingface` read; config.json comes last."""
    import transformers

    config, tokenizer = checkpoint.model.config, checkpoint.tokenizer
    class_name = state_dict.find_layout(_CLASSES["blip"], config)
    if class_name is None:
        pooled = " and a pooler" if config.pooled else ""
        raise CheckpointError(
            f"No model of transformers has the heads {', '.join(config.heads)}{pooled}: it has captioners (lm), "
            "retrieval models (itc and itm), question answering (vqa), and BlipModel (itc with a pooler). Fine-tune "
            "one of these, or save as openblip."
        )
    if "vqa" in config.heads and config.text.hidden_dim != config.vision.hidden_dim:
        raise CheckpointError(
            f"transformers' {class_name} needs text as wide as its images: {config.text.hidden_dim} and "
            f"{config.vision.hidden_dim} are not. Save as openblip or original."
        )
    layout, weights = _CLASSES["blip"][class_name], checkpoint.model.state_dict()
    extra: dict[str, Any] = {"prompt": checkpoint.prompt, "encoder_token": checkpoint.encoder_token}
    if LOG_TEMPERATURE in weights and LOG_TEMPERATURE not in layout.table:
        extra[LOG_TEMPERATURE] = float(weights[LOG_TEMPERATURE])
    extra |= {"sharing": config.text.sharing, "drop_path": config.vision.drop_path}
    state_dict.write_safetensors(folder / WEIGHTS, state_dict.translate_back(layout, weights))
    write_tokenizer(folder, tokenizer)
    write_preprocessing(folder, checkpoint.preprocessing, "BlipProcessor")
    hf_config = transformers.BlipConfig(
        vision_config=_write_sizes(config.vision, backbones.HF_VISION_SETTINGS),
        text_config={
            **_write_sizes(config.text, backbones.HF_TEXT_SETTINGS),
            "attention_probs_dropout_prob": config.text.dropout,
            "encoder_hidden_size": config.vision.hidden_dim,
            "bos_token_id": tokenizer.dec_id,
            "eos_token_id": tokenizer.sep_id,
            "sep_token_id": tokenizer.sep_id,
            "pad_token_id": tokenizer.pad_id,
        },
        projection_dim=config.embed_dim,
        image_text_hidden_size=config.embed_dim,
    )
    if "lm" in config.heads:
        _write_generation(folder, hf_config, prompt=checkpoint.prompt)
    write_json(folder / CONFIG_FILE, {**hf_config.to_dict(), "architectures": [class_name], "openblip": extra})


def save_huggingface_blip2(folder: Path, checkpoint: Blip2Checkpoint) -> None:
    """Write a folder that transformers, its processor and `load_huggingface` read; config.json comes last."""
    import transformers

    model, config = checkpoint.model, checkpoint.model.config
    vision, qformer, instructed = config.vision, config.qformer, config.instructed
    layouts = _CLASSES["instructblip" if instructed else "blip-2"]
    class_name = state_dict.find_layout(layouts, config)
    if class_name is None:
        itg = " It has none for itg, with which the Q-Former itself writes." if "itg" in config.heads else ""
        raise CheckpointError(
            f"No model of transformers has the heads {', '.join(config.heads)}: it has retrieval models (itc and itm) "
            f"and models with a language model (llm).{itg} Fine-tune one of these, or save as openblip."
        )
    if not isinstance(vision, VisionConfig) or vision.input_norm or vision.output_norm:
        is_vit = isinstance(vision, VisionConfig)
        problem = "has CLIP's first norm or a last norm" if is_vit else "is not OpenBLIP's ViT"
        raise CheckpointError(
            f"transformers' BLIP-2 has one kind of image encoder, and this model's {problem}: save as openblip."
        )
    language: Any = None
    if model.language is not None:
        language = model.language.model
        if has_lora(model.language):
            raise CheckpointError(
                "transformers' BLIP-2 has no place for the language model's LoRA adapters: merge them into it "
                "(model.language.model.merge_and_unload()), or save as openblip."
            )
        if getattr(language, "is_quantized", False):
            problem = "transformers' BLIP-2 would read it as if it were not"
            raise CheckpointError(f"The language model is quantised, and {problem}: save as openblip.")
        _language_class("The checkpoint", language.config)
        _check_language_width("The checkpoint", language.config, model.language.hidden_dim)
    folder.mkdir(parents=True, exist_ok=True)
    state = state_dict.translate_back(layouts[class_name], state_dict.without(_OUR_LANGUAGE, model.state_dict()))
    settings: dict[str, Any] = {
        "vision_config": _write_sizes(vision, backbones.HF_VISION_SETTINGS) | {"hidden_act": vision.activation},
        "qformer_config": {
            **_write_sizes(qformer, _QFORMER_SETTINGS),
            "attention_probs_dropout_prob": qformer.dropout,
            "encoder_hidden_size": vision.hidden_dim,
        },
        "num_query_tokens": qformer.num_queries,
        "image_token_index": None,
    }
    if checkpoint.image_token and checkpoint.tokenizer is not None:  # their processor puts it at the end by itself
        settings["image_token_index"] = checkpoint.tokenizer.entries.get(IMAGE_TOKEN, checkpoint.tokenizer.vocab_size)
    if not instructed:
        settings["image_text_hidden_size"] = config.embed_dim
        settings["qformer_config"]["use_qformer_text_input"] = config.has_text_branch
    if model.language is not None:
        settings["image_token_index"] = _write_language_tokenizer(folder, model.language)
        # The token that ends a text in training, at which transformers' `generate` is to stop.
        text_config = language.config.to_dict() | {"eos_token_id": model.language.end_id}
        if text_config.get("pad_token_id") is None:
            text_config["pad_token_id"] = model.language.pad_id
        language = backbones.with_rows(language, settings["image_token_index"] + 1)
        settings["text_config"] = text_config | {"vocab_size": language.config.vocab_size}
        language_state, tied = language.state_dict(), language.all_tied_weights_keys
        for name, tensor in language_state.items():  # one copy of what is tied
            if name not in tied or not torch.equal(tensor, language_state[tied[name]]):
                state[_LANGUAGE + name] = tensor
    state_dict.write_safetensors(folder / WEIGHTS, state)
    if checkpoint.tokenizer is not None and config.has_text_branch:
        write_tokenizer(folder / QFORMER_TOKENIZER if instructed else folder, checkpoint.tokenizer)
    processor = "InstructBlipProcessor" if instructed else "Blip2Processor"
    write_preprocessing(folder, checkpoint.preprocessing, processor)
    # A retrieval model gets image tokens only if it had some: with them transformers also cuts a text without an image.
    num_queries = None if settings["image_token_index"] is None else qformer.num_queries
    write_json(folder / _PROCESSOR_CONFIG, {"processor_class": processor, "num_query_tokens": num_queries})
    extra = {  # see `_EXTRA`
        "prompt": checkpoint.prompt,
        "question_prompt": checkpoint.question_prompt,
        "end_of_text": None if config.language is None else config.language.end_of_text,
        "language": None if config.language is None else config.language.name,
        "max_text_tokens": (config.language or LanguageConfig).max_text_tokens,
        "log_temperature": float(model.state_dict().get(LOG_TEMPERATURE, _LOG_TEMPERATURE)),
        "vision_norm_eps": config.vision_norm_eps,
        "drop_path": vision.drop_path,
        "embed_dim": config.embed_dim,
    }
    config_class = transformers.InstructBlipConfig if instructed else transformers.Blip2Config
    hf_config = config_class(**settings)
    if language is not None:
        _write_generation(folder, hf_config, prompt=checkpoint.prompt, question_prompt=checkpoint.question_prompt)
    write_json(folder / CONFIG_FILE, {**hf_config.to_dict(), "architectures": [class_name], "openblip": extra})


def _write_generation(folder: Path, hf_config: Any, **prompts: str) -> None:
    """Write what transformers would derive from the config, and the prompts: `generate` ignores them, and users may ask
    `model.generation_config` for what to give to the processor.
    """
    import transformers

    generation: Any = transformers.GenerationConfig.from_model_config(hf_config)
    settings = generation.to_diff_dict()
    settings.pop("_from_model_config", None)  # with which transformers would derive them anew
    write_json(folder / "generation_config.json", {**settings, **prompts})


def _write_language_tokenizer(folder: Path, language: LanguageModel) -> int:
    """Write the language model's tokenizer with the token "<image>", and return the id of that."""
    import transformers

    tokenizer = copy.deepcopy(language.tokenizer)  # the caller's stays as it is
    tokenizer.add_tokens([transformers.AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
    # Prompts have different lengths, and a decoder goes on from the last place of a row: padding comes first.
    tokenizer.padding_side = "right" if language.is_encoder_decoder else "left"
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side  # which is what is written
    tokenizer.save_pretrained(folder)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
