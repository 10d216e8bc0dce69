"""Folders of transformers' BLIP-2: Blip2ForConditionalGeneration, Blip2Model (which has the same weights),
Blip2ForImageTextRetrieval and InstructBlipForConditionalGeneration.

What the format has no place for (prompts, the temperature of ITC, ...) is written under "openblip" in config.json,
which transformers keeps and ignores.

The language model's weights stand below "language_model." under the names that its own class gives them, its settings
in config.json as text_config, its tokenizer beside them. One of its tokens, "<image>", stands for a visual prompt:
transformers puts the prompts where a text has it. OpenBLIP puts them before the text by itself, and reads folders with
and without that token.
"""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from openblip.checkpoints import checkpoint as base
from openblip.checkpoints import state_dict
from openblip.checkpoints.checkpoint import CONFIG_FILE, QUESTION_PROMPT, Blip2Checkpoint, PathOrName
from openblip.checkpoints.hub import LOADING_ERRORS, first_line, quietly, read_hub_tokenizer
from openblip.checkpoints.huggingface import blip as hf_blip
from openblip.checkpoints.state_dict import LOG_TEMPERATURE, WEIGHTS, Layout, State, Table, add_prefix
from openblip.errors import CheckpointError
from openblip.files import write_json
from openblip.models.config import Blip2Config, Blip2Head, LanguageConfig, QFormerConfig, VisionConfig
from openblip.models.language_model import LanguageModel, has_lora, wrap_language_model

SHORT_QUESTION_PROMPT = "Question: {} Short answer:"
"""How T5 and InstructBLIP are asked."""
HF_BLIP2_TYPES = ("blip-2", "instructblip")
"""`model_type` in config.json."""
QFORMER_TOKENIZER = "qformer_tokenizer"
"""The folder in which InstructBlipProcessor keeps the Q-Former's tokenizer."""
IMAGE_TOKEN = "<image>"

_WRITER, _RETRIEVER = "Blip2ForConditionalGeneration", "Blip2ForImageTextRetrieval"
_INSTRUCTBLIP = "InstructBlipForConditionalGeneration"
_ACTIVATIONS = ("gelu", "quick_gelu")  # of the image encoder: EVA-CLIP's and CLIP's
_OUR_LANGUAGE, _LANGUAGE = "language.", "language_model."

# ---- names of settings (configuration_blip_2) and of weights (modeling_blip_2, modeling_instructblip)

_QFORMER_SETTINGS = hf_blip.HF_TEXT_SETTINGS | {"cross_attention_every": "cross_attention_frequency"}


def qformer_keys(prefix: str, inner: str, *, norm: str, embeddings: str | None) -> dict[str, str]:
    """Key table of a Q-Former, whose names are BERT's, with a second feed-forward for the queries.

    prefix: of the layers' names. inner: name of the module in an attention that holds query, key and value. norm: name
    of the norm of the embeddings. embeddings: prefix of those of text; None without a text branch.
    """
    table = {"embeddings.norm": norm, "embeddings.queries": "query_tokens"}
    if embeddings is not None:
        table["embeddings.word"] = f"{embeddings}.word_embeddings"
        table["embeddings.position"] = f"{embeddings}.position_embeddings"
    for name, bert in hf_blip.BERT_TEXT_KEYS.items():
        if ".feed_forward." in name:
            query = bert.replace(".intermediate.", ".intermediate_query.").replace(".output.", ".output_query.")
            table[name.replace("feed_forward", "query_feed_forward")] = prefix + query
            if embeddings is not None:
                table[name.replace("feed_forward", "text_feed_forward")] = prefix + bert
        elif name.startswith("layers."):
            table[name] = prefix + bert.replace(".self.", f".{inner}.")
    return add_prefix(table, "qformer.", "")


def _layout(
    heads: tuple[Blip2Head, ...], head_keys: Table, norm: str, embeddings: str | None, *, instructed: bool = False
) -> Layout:
    table = {
        **add_prefix(hf_blip.HF_EVA_KEYS, "vision.", "vision_model."),
        "vision_norm": "vision_model.post_layernorm",
        **qformer_keys("qformer.", "attention", norm=norm, embeddings=embeddings),
        **head_keys,
    }
    # 0, 1, 2, ...; a Q-Former without a text branch may have them too.
    derived = (f"{embeddings or 'qformer.embeddings'}.position_ids",)
    return Layout(heads, table, derived, instructed=instructed)


_PROJECTIONS = {"vision_proj": "vision_projection", "text_proj": "text_projection", "itm_head": "itm_head"}
_PROMPTS = {"language_proj": "language_projection"}
_QFORMER = "qformer.embeddings"
_LAYOUTS: Mapping[str, Layout] = {
    _WRITER: _layout(("llm",), _PROMPTS, "qformer.layernorm", None),
    "Blip2Model": _layout(("llm",), _PROMPTS, "qformer.layernorm", None),  # the same weights under another class
    _RETRIEVER: _layout(("itc", "itm"), _PROJECTIONS, "qformer.layernorm", "embeddings"),
    _INSTRUCTBLIP: _layout(("llm",), _PROMPTS, f"{_QFORMER}.layernorm", _QFORMER, instructed=True),
}

# ---- reading


def load_huggingface_blip2(folder: Path, tokenizer: PathOrName | None = None) -> Blip2Checkpoint:
    """Read a folder of transformers' `save_pretrained`.

    tokenizer: folder or hub name of the Q-Former's when it has a text branch, else of the language model's; None is the
    folder's own. Raises CheckpointError also for another class of model, and for a setting that BLIP-2 does not have.
    """
    config = hf_blip.read_huggingface_config(folder, _config_classes())
    state = state_dict.read_folder_weights(folder)
    instructed = config.model_type == "instructblip"
    told_by_weights = None
    if any(name.startswith(_LANGUAGE) for name in state):
        told_by_weights = _INSTRUCTBLIP if instructed else _WRITER
    elif not instructed and any(name.startswith("itm_head.") for name in state):
        told_by_weights = _RETRIEVER
    known = {name: layout for name, layout in _LAYOUTS.items() if layout.instructed == instructed}
    layout = _LAYOUTS[hf_blip.find_class(folder, config, known, told_by_weights)]
    extra = hf_blip.read_extra(folder, config)
    language = None
    if "llm" in layout.heads:
        language_tokenizer = None if layout.instructed else tokenizer
        language = _read_language_model(
            folder, config.text_config, state_dict.below(_LANGUAGE, state), language_tokenizer, extra.end_of_text
        )
        state = state_dict.without(_LANGUAGE, state)
    model = base.empty_blip2(folder, _read_config(folder, config, layout, extra, language), language=language)
    names = state_dict.without(_OUR_LANGUAGE, model.state_dict()).keys()
    weights = state_dict.translate(layout.table, state, names - {LOG_TEMPERATURE}, layout.derived, folder)
    if LOG_TEMPERATURE in names:
        weights[LOG_TEMPERATURE] = torch.tensor(extra.log_temperature)
    state_dict.assign_weights(model, weights, folder, loaded=(_OUR_LANGUAGE,))
    vocabulary = None
    if model.config.has_text_branch:
        place = folder / QFORMER_TOKENIZER if layout.instructed else folder
        vocabulary = base.find_tokenizer(folder, place, tokenizer)
        # A text in the Q-Former needs neither [DEC] nor [ENC].
        base.check_vocabulary(folder, vocabulary.num_words, "the Q-Former", model.config.qformer.vocab_size, "words,")
    preprocessing = hf_blip.read_preprocessing(folder, config.vision_config.image_size)
    base.check_image_size(folder, preprocessing.image_size, config.vision_config.patch_size)
    question_prompt = extra.question_prompt
    if question_prompt is None:  # as in the papers
        is_short = layout.instructed or (language is not None and language.is_encoder_decoder)
        question_prompt = SHORT_QUESTION_PROMPT if is_short else QUESTION_PROMPT
    return Blip2Checkpoint(model.eval(), vocabulary, preprocessing, extra.prompt, question_prompt)


def _config_classes() -> Mapping[str, Any]:
    import transformers

    return dict(zip(HF_BLIP2_TYPES, (transformers.Blip2Config, transformers.InstructBlipConfig), strict=True))


def _read_config(
    folder: Path, config: Any, layout: Layout, extra: SimpleNamespace, language: LanguageModel | None
) -> Blip2Config:
    """The settings of a model of transformers; CheckpointError for one that BLIP-2 does not have."""
    vision, qformer = config.vision_config, config.qformer_config
    if vision.hidden_act not in _ACTIVATIONS or qformer.hidden_act != "gelu" or not vision.qkv_bias:
        raise CheckpointError(
            f"{folder} has {vision.hidden_act}/{qformer.hidden_act} and qkv_bias {vision.qkv_bias}; in BLIP-2 the "
            f"image encoder has {' or '.join(_ACTIVATIONS)} and that bias, its Q-Former gelu."
        )
    embed_dim = getattr(config, "image_text_hidden_size", None)  # InstructBLIP compares nothing
    with base.as_checkpoint_errors(folder / CONFIG_FILE):
        language_config = None
        if language is not None:
            is_own_end = extra.end_of_text is None and language.end_id == language.tokenizer.eos_token_id
            end = extra.end_of_text or str(language.tokenizer.decode([language.end_id]))
            language_config = LanguageConfig(
                name=extra.language or getattr(config.text_config, "_name_or_path", "") or str(folder),
                hidden_dim=language.hidden_dim,
                end_of_text=None if is_own_end else end,
                max_text_tokens=extra.max_text_tokens,
            )
        return Blip2Config(
            vision=VisionConfig(
                **hf_blip.read_sizes(vision, hf_blip.HF_VISION_SETTINGS),
                activation=vision.hidden_act,
                drop_path=extra.drop_path,
                output_norm=False,
            ),
            qformer=QFormerConfig(
                **hf_blip.read_sizes(qformer, _QFORMER_SETTINGS), num_queries=config.num_query_tokens
            ),
            language=language_config,
            embed_dim=extra.embed_dim or embed_dim or Blip2Config.embed_dim,
            heads=layout.heads,
            instructed=layout.instructed,
            vision_norm_eps=vision.layer_norm_eps if extra.vision_norm_eps is None else extra.vision_norm_eps,
        )


def _read_language_model(
    folder: Path, text_config: Any, state: State, tokenizer: PathOrName | None, end_of_text: str | None
) -> LanguageModel:
    """The language model of a folder.

    state: its weights under their own names. tokenizer: where its tokenizer is; None is the folder. end_of_text: what
    ends a text; None is what text_config says.
    """
    model_class = _language_class(folder, text_config)
    vocabulary = read_hub_tokenizer(os.fspath(folder if tokenizer is None else tokenizer))
    with quietly():  # transformers warns of wrong names and shapes, which are errors below
        try:
            model, report = model_class.from_pretrained(
                None,
                config=copy.deepcopy(text_config),
                state_dict=dict(state),
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except (*LOADING_ERRORS, TypeError) as error:
            raise CheckpointError(
                f"{folder}: its {text_config.model_type} cannot be made: {first_line(error)}."
            ) from error
    # A file may have one copy or more of weights that a class ties.
    missing, left_over = ([_LANGUAGE + name for name in report[f"{kind}_keys"]] for kind in ("missing", "unexpected"))
    shapes = [
        f"{_LANGUAGE}{name} is {tuple(shape)}, the model has {tuple(expected)}"
        for name, shape, expected in report["mismatched_keys"]
    ]
    state_dict.raise_on_mismatch(folder, missing, left_over, [*shapes, *report["error_msgs"]])
    num_rows, width = model.get_input_embeddings().weight.shape
    largest = max((i for entry, i in vocabulary.get_vocab().items() if entry != IMAGE_TOKEN), default=0)
    base.check_vocabulary(folder, largest + 1, "the language model", num_rows)
    _check_language_width(folder, text_config, width)
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


def save_huggingface_blip2(folder: Path, checkpoint: Blip2Checkpoint) -> None:
    """Write a folder that transformers, its processor and `load_huggingface_blip2` read; config.json last."""
    model, config = checkpoint.model, checkpoint.model.config
    class_name = _class_for(config)
    text_config: dict[str, Any] | None = None
    language = image_token = None
    if model.language is not None:
        language = _writable_language_model(model.language)
        text_config = language.config.to_dict()
        # The token that ends a text in training, at which transformers' `generate` is to stop.
        text_config["eos_token_id"] = model.language.end_id
        if text_config.get("pad_token_id") is None:
            text_config["pad_token_id"] = model.language.pad_id
    _write_config(config, text_config, None)  # raises before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    if model.language is not None and text_config is not None:
        image_token = _write_language_tokenizer(folder, model.language)
        language = _with_row(language, image_token)
        text_config["vocab_size"] = language.config.vocab_size
    weights = state_dict.without(_OUR_LANGUAGE, model.state_dict())
    log_temperature = weights.pop(LOG_TEMPERATURE, None)
    state = state_dict.translate_back(_LAYOUTS[class_name].table, weights)
    state_dict.write_safetensors(folder / WEIGHTS, state | ({} if language is None else _language_state(language)))
    _write_processor(folder, checkpoint, image_token)
    hf_config = _write_config(config, text_config, image_token)
    extra = {  # see `hf_blip.read_extra`
        "prompt": checkpoint.prompt,
        "question_prompt": checkpoint.question_prompt,
        "end_of_text": None if config.language is None else config.language.end_of_text,
        "language": None if config.language is None else config.language.name,
        "max_text_tokens": (config.language or LanguageConfig).max_text_tokens,
        "log_temperature": hf_blip.DEFAULT_LOG_TEMPERATURE if log_temperature is None else float(log_temperature),
        "vision_norm_eps": config.vision_norm_eps,
        "drop_path": getattr(config.vision, "drop_path", 0.0),
        "embed_dim": config.embed_dim,
    }
    write_json(folder / CONFIG_FILE, {**hf_config, "architectures": [class_name], "openblip": extra})


def _class_for(config: Blip2Config) -> str:
    """The class of transformers that can hold such a model; CheckpointError when there is none."""
    name = state_dict.find_layout(_LAYOUTS, config)
    if name is None:
        itg = " It has none for itg, with which the Q-Former itself writes." if "itg" in config.heads else ""
        raise CheckpointError(
            f"No model of transformers has the heads {', '.join(config.heads)}: it has retrieval models (itc and itm) "
            f"and models with a language model (llm).{itg} Fine-tune one of these, or save as openblip."
        )
    return name


def _write_config(
    config: Blip2Config, text_config: Mapping[str, Any] | None, image_token: int | None
) -> dict[str, Any]:
    """config.json as transformers writes it. image_token: id of the token that stands for a visual prompt."""
    vision, qformer = config.vision, config.qformer
    if not isinstance(vision, VisionConfig) or vision.input_norm or vision.output_norm:
        is_vit = isinstance(vision, VisionConfig)
        problem = "has CLIP's first norm or a last norm" if is_vit else "is not OpenBLIP's ViT"
        raise CheckpointError(
            f"transformers' BLIP-2 has one kind of image encoder, and this model's {problem}: save as openblip."
        )
    settings: dict[str, Any] = {
        "vision_config": hf_blip.write_sizes(vision, hf_blip.HF_VISION_SETTINGS) | {"hidden_act": vision.activation},
        "qformer_config": {
            **hf_blip.write_sizes(qformer, _QFORMER_SETTINGS),
            "attention_probs_dropout_prob": qformer.dropout,
            "encoder_hidden_size": vision.hidden_dim,
        },
        "num_query_tokens": qformer.num_queries,
        "image_token_index": image_token,
    }
    if text_config is not None:
        settings["text_config"] = dict(text_config)
    if not config.instructed:
        settings["image_text_hidden_size"] = config.embed_dim
        settings["qformer_config"]["use_qformer_text_input"] = config.has_text_branch
    return dict(_config_classes()["instructblip" if config.instructed else "blip-2"](**settings).to_dict())


def _write_processor(folder: Path, checkpoint: Blip2Checkpoint, image_token: int | None) -> None:
    """Write what transformers' Blip2Processor or InstructBlipProcessor reads, but the language model's tokenizer."""
    config = checkpoint.model.config
    processor = "InstructBlipProcessor" if config.instructed else "Blip2Processor"
    if checkpoint.tokenizer is not None and config.has_text_branch:
        place = folder / QFORMER_TOKENIZER if config.instructed else folder
        hf_blip.write_tokenizer(place, checkpoint.tokenizer)
    images = hf_blip.preprocessor_config(checkpoint.preprocessing, processor)
    write_json(folder / hf_blip.PREPROCESSOR_CONFIG, images)
    # A retrieval model gets no image tokens: transformers would cut as many tokens off a text without its image too.
    num_queries = None if image_token is None else config.qformer.num_queries
    write_json(folder / "processor_config.json", {"processor_class": processor, "num_query_tokens": num_queries})


def _writable_language_model(language: LanguageModel) -> Any:
    """transformers' model of a language model; CheckpointError when transformers' BLIP-2 cannot hold it."""
    model = language.model
    if has_lora(language):
        raise CheckpointError(
            "transformers' BLIP-2 has no place for the language model's LoRA adapters: merge them into it "
            "(model.language.model.merge_and_unload()), or save as openblip."
        )
    if getattr(model, "is_quantized", False):
        raise CheckpointError(
            "The language model is quantised, and transformers' BLIP-2 would read it as if it were not: save as "
            "openblip."
        )
    _language_class("The checkpoint", model.config)
    _check_language_width("The checkpoint", model.config, language.hidden_dim)
    return model


def _write_language_tokenizer(folder: Path, language: LanguageModel) -> int:
    """Write the language model's tokenizer with the token "<image>", and return the id of that."""
    import transformers

    tokenizer = copy.deepcopy(language.tokenizer)  # the caller's stays as it is
    image = transformers.AddedToken(IMAGE_TOKEN, normalized=False, special=True)
    tokenizer.add_tokens([image], special_tokens=True)
    # Prompts have different lengths, and a decoder goes on from the last place of a row: padding comes first.
    tokenizer.padding_side = "right" if language.is_encoder_decoder else "left"
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side  # which is what is written
    tokenizer.save_pretrained(folder)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def _with_row(model: Any, index: int) -> Any:
    """The model with a word embedding for `index`; itself when it has one to spare.

    An added row is the mean of the others, in the output layer too: a token that is never the most likely.
    """
    num_rows = len(model.get_input_embeddings().weight)
    if index < num_rows:
        return model
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(index + 1, mean_resizing=False)
    with torch.no_grad():
        for layer in (larger.get_input_embeddings(), larger.get_output_embeddings()):
            for rows in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
                if rows is not None:
                    rows[num_rows:] = rows[:num_rows].mean(dim=0)
    return larger


def _language_state(model: nn.Module) -> dict[str, Tensor]:
    """The language model's weights by their names in a folder, with one copy of what is tied."""
    state = model.state_dict()
    tied: Mapping[str, str] = model.all_tied_weights_keys  # type: ignore[assignment]
    return {
        f"{_LANGUAGE}{name}": tensor
        for name, tensor in state.items()
        if name not in tied or not torch.equal(tensor, state[tied[name]])
    }
