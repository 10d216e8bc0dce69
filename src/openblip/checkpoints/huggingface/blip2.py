"""Folders of transformers' BLIP-2: Blip2ForConditionalGeneration, Blip2Model (which has the same weights),
Blip2ForImageTextRetrieval and InstructBlipForConditionalGeneration.

What the format has no place for (prompts, the temperature of ITC, ...) is written under "openblip" in config.json,
which transformers keeps and ignores.

The language model's weights stand below "language_model." under the names that its own class gives them, its settings
in config.json as text_config, its tokenizer beside them. One of its tokens, "<image>", stands for a visual prompt:
transformers puts the prompts where a text has it. Ours puts them before the text by itself, and reads folders with and
without that token.
"""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openblip.checkpoints.checkpoint import (
    CONFIG_FILE,
    QUESTION_PROMPT,
    Blip2Checkpoint,
    PathOrName,
    check_image_size,
    empty_blip2,
    find_tokenizer,
)
from openblip.checkpoints.hub import LOADING_ERRORS, first_line, quietly
from openblip.checkpoints.huggingface.blip import (
    BERT_TEXT_KEYS,
    HF_EVA_KEYS,
    HF_TEXT_SETTINGS,
    HF_VISION_SETTINGS,
    LOG_TEMPERATURE,
    PREPROCESSOR_CONFIG,
    Extra,
    preprocessor_config,
    read_extra,
    read_huggingface_config,
    read_preprocessing,
    read_sizes,
    unknown_class,
    write_sizes,
    write_tokenizer,
)
from openblip.checkpoints.state_dict import (
    WEIGHTS,
    Layout,
    Table,
    add_prefix,
    assign_weights,
    find_layout,
    raise_on_mismatch,
    read_folder_weights,
    translate,
    translate_back,
    write_safetensors,
)
from openblip.errors import CheckpointError, ConfigError
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

_INSTRUCTBLIP = "InstructBlipForConditionalGeneration"
_ACTIVATIONS = ("gelu", "quick_gelu")  # of the image encoder: EVA-CLIP's and CLIP's
_OUR_LANGUAGE, _LANGUAGE = "language.", "language_model."
# transformers makes an empty tokenizer of a folder that has none of these.
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")

# ---- names of settings (configuration_blip_2) and of weights (modeling_blip_2, modeling_instructblip)

_QFORMER_SETTINGS = {  # Blip2QFormerConfig
    **HF_TEXT_SETTINGS,
    "cross_attention_every": "cross_attention_frequency",
}


def qformer_layer_keys(inner: str, *, has_text_branch: bool) -> Table:
    """Key table of the Q-Former's layers, whose names are BERT's, with a second feed-forward for the queries.

    inner: name of the module in an attention that holds query, key and value.
    """
    table = {}
    for ours, theirs in BERT_TEXT_KEYS.items():
        if ".feed_forward." in ours:
            query = theirs.replace(".intermediate.", ".intermediate_query.").replace(".output.", ".output_query.")
            table[ours.replace("feed_forward", "query_feed_forward")] = query
            if has_text_branch:
                table[ours.replace("feed_forward", "text_feed_forward")] = theirs
        elif ours.startswith("layers."):
            table[ours] = theirs.replace(".self.", f".{inner}.")
    return table


_IMAGE = {
    **add_prefix(HF_EVA_KEYS, "vision.", "vision_model."),
    "vision_norm": "vision_model.post_layernorm",
    "qformer.embeddings.queries": "query_tokens",
}
_QUERIES, _TEXTS = (
    add_prefix(qformer_layer_keys("attention", has_text_branch=text), "qformer.", "qformer.") for text in (False, True)
)
_PROJECTION = {"language_proj": "language_projection"}


def _embeddings(words: str, norm: str) -> Table:
    return {
        "qformer.embeddings.word": f"{words}.word_embeddings",
        "qformer.embeddings.position": f"{words}.position_embeddings",
        "qformer.embeddings.norm": norm,
    }


_GENERATION: Layout[Blip2Head] = Layout(
    heads=("llm",),
    table={**_IMAGE, **_QUERIES, **_PROJECTION, "qformer.embeddings.norm": "qformer.layernorm"},
    derived=("qformer.embeddings.position_ids",),  # 0, 1, 2, ..., of a text branch that is not there
)
_LAYOUTS: Mapping[str, Layout[Blip2Head]] = {
    "Blip2ForConditionalGeneration": _GENERATION,
    "Blip2Model": _GENERATION,  # the same weights under another class
    "Blip2ForImageTextRetrieval": Layout(
        heads=("itc", "itm"),
        table={
            **_IMAGE,
            **_TEXTS,
            **_embeddings("embeddings", "qformer.layernorm"),
            "vision_proj": "vision_projection",
            "text_proj": "text_projection",
            "itm_head": "itm_head",
        },
        derived=("embeddings.position_ids",),
    ),
    _INSTRUCTBLIP: Layout(
        heads=("llm",),
        instructed=True,
        table={**_IMAGE, **_TEXTS, **_PROJECTION, **_embeddings("qformer.embeddings", "qformer.embeddings.layernorm")},
        derived=("qformer.embeddings.position_ids",),
    ),
}

# ---- reading


def load_huggingface_blip2(folder: Path, tokenizer: PathOrName | None = None) -> Blip2Checkpoint:
    """Read a folder of transformers' `save_pretrained`.

    tokenizer: folder or hub name of the Q-Former's when it has a text branch, else of the language model's; None is the
    folder's own.

    Raises CheckpointError also for another class of model, and for a setting that BLIP-2 does not have.
    """
    config = read_huggingface_config(folder, _config_classes())
    state = read_folder_weights(folder)
    layout = _LAYOUTS[_class_of(folder, config, state)]
    extra = read_extra(folder, config, Extra())
    language = None
    if "llm" in layout.heads:
        language = _read_language_model(
            folder,
            config.text_config,
            {n.removeprefix(_LANGUAGE): t for n, t in state.items() if n.startswith(_LANGUAGE)},
            None if layout.instructed else tokenizer,
            extra.end_of_text,
        )
        state = {name: t for name, t in state.items() if not name.startswith(_LANGUAGE)}
    model = empty_blip2(_blip2_config(folder, config, layout, extra, language), language=language)
    names = {name for name in model.state_dict() if not name.startswith(_OUR_LANGUAGE)}
    weights = translate(layout.table, state, names - {LOG_TEMPERATURE}, layout.derived, str(folder))
    if LOG_TEMPERATURE in names:
        weights[LOG_TEMPERATURE] = torch.tensor(extra.log_temperature)
    assign_weights(model, weights, str(folder), loaded=(_OUR_LANGUAGE,))
    words = None
    if model.config.has_text_branch:
        words = find_tokenizer(folder, folder / QFORMER_TOKENIZER if layout.instructed else folder, tokenizer)
        if words.num_words > model.config.qformer.vocab_size:
            raise CheckpointError(
                f"{folder}: the tokenizer has {words.num_words} words, the Q-Former "
                f"{model.config.qformer.vocab_size}; it is another model's."
            )
    preprocessing = read_preprocessing(folder, config.vision_config.image_size)
    check_image_size(folder, preprocessing.image_size, config.vision_config.patch_size)
    question_prompt = extra.question_prompt
    if question_prompt is None:  # as in the papers
        is_short = layout.instructed or (language is not None and language.is_encoder_decoder)
        question_prompt = SHORT_QUESTION_PROMPT if is_short else QUESTION_PROMPT
    return Blip2Checkpoint(model.eval(), words, preprocessing, extra.prompt, question_prompt)


def _config_classes() -> Mapping[str, Any]:
    import transformers

    return dict(zip(HF_BLIP2_TYPES, (transformers.Blip2Config, transformers.InstructBlipConfig), strict=True))


def _class_of(folder: Path, config: Any, state: Mapping[str, Tensor]) -> str:
    """The class of transformers that a folder holds: config.json says so, or else its weights do."""
    named: list[str] = list(config.architectures or [])
    instructed = config.model_type == "instructblip"
    known = [name for name in named if name in _LAYOUTS and _LAYOUTS[name].instructed == instructed]
    if len(known) == 1:
        return known[0]
    if any(name.startswith(_LANGUAGE) for name in state):
        return _INSTRUCTBLIP if instructed else "Blip2ForConditionalGeneration"
    if not instructed and any(name.startswith("itm_head.") for name in state):
        return "Blip2ForImageTextRetrieval"
    raise unknown_class(folder, named, _LAYOUTS)


def _blip2_config(
    folder: Path, config: Any, layout: Layout[Blip2Head], extra: Extra, language: LanguageModel | None
) -> Blip2Config:
    """Our settings of a model of transformers; CheckpointError for one that BLIP-2 does not have."""
    vision, qformer = config.vision_config, config.qformer_config
    if vision.hidden_act not in _ACTIVATIONS or qformer.hidden_act != "gelu" or not vision.qkv_bias:
        raise CheckpointError(
            f"{folder} has {vision.hidden_act}/{qformer.hidden_act} and qkv_bias {vision.qkv_bias}; in BLIP-2 the "
            f"image encoder has {' or '.join(_ACTIVATIONS)} and that bias, its Q-Former gelu."
        )
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
    embed_dim = getattr(config, "image_text_hidden_size", None)  # InstructBLIP compares nothing
    try:
        return Blip2Config(
            vision=VisionConfig(
                **read_sizes(vision, HF_VISION_SETTINGS),
                activation=vision.hidden_act,
                drop_path=extra.drop_path,
                output_norm=False,
            ),
            qformer=QFormerConfig(**read_sizes(qformer, _QFORMER_SETTINGS), num_queries=config.num_query_tokens),
            language=language_config,
            embed_dim=extra.embed_dim or embed_dim or Blip2Config.embed_dim,
            heads=layout.heads,
            instructed=layout.instructed,
            vision_norm_eps=(vision.layer_norm_eps if extra.vision_norm_eps is None else extra.vision_norm_eps),
        )
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from error


# ---- the language model of a folder


def _read_language_model(
    folder: Path, text_config: Any, state: Mapping[str, Tensor], tokenizer: PathOrName | None, end_of_text: str | None
) -> LanguageModel:
    """The language model of a folder.

    state: its weights under their own names. tokenizer: where its tokenizer is; None is the folder. end_of_text: what
    ends a text; None is what text_config says.

    Raises CheckpointError also when it is neither causal nor sequence-to-sequence.
    """
    model_class = _language_class(str(folder), text_config)
    words = _read_language_tokenizer(folder, tokenizer)
    with quietly():  # what it warns of is checked below
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
    # Of what a class ties, a file may have one copy or more.
    raise_on_mismatch(
        str(folder),
        {f"{_LANGUAGE}{name}" for name in report["missing_keys"]},
        {f"{_LANGUAGE}{name}" for name in report["unexpected_keys"]},
    )
    problems = [
        f"{_LANGUAGE}{name} is {tuple(shape)}, the config says {tuple(expected)}"
        for name, shape, expected in sorted(report["mismatched_keys"])
    ]
    problems += report["error_msgs"]
    if problems:
        raise CheckpointError(f"{folder} does not fit its config: {'; '.join(problems)}.")
    num_rows, width = model.get_input_embeddings().weight.shape
    largest = max((i for word, i in words.get_vocab().items() if word != IMAGE_TOKEN), default=0)
    if largest >= num_rows:
        raise CheckpointError(
            f"{folder}: the tokenizer has {largest + 1} entries, the language model {num_rows}; it is another model's."
        )
    _check_language_width(str(folder), text_config, width)
    if end_of_text is None:  # what the config says, when that is not the tokenizer's own end: a line break for OPT
        named = getattr(text_config, "eos_token_id", None)
        ends = named if isinstance(named, list) else [named]
        if named is not None and ends and words.eos_token_id not in ends:
            end_of_text = str(words.decode([ends[0]]))
    return wrap_language_model(model.eval(), words, end_of_text)


def _language_class(source: str, text_config: Any) -> Any:
    """The class of transformers that its BLIP-2 takes for such a language model."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    causal = type(text_config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if causal and not text_config.is_encoder_decoder:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)]
    if not causal and type(text_config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(text_config)]
    # Of encoder-decoders that transformers also has as decoders (BART, ...) its BLIP-2 would take the
    # decoder.
    raise CheckpointError(
        f"{source}: a {text_config.model_type} is no language model that transformers' BLIP-2 can have: it takes "
        "decoders (OPT, GPT-2, Llama, ...) and T5."
    )


def _check_language_width(source: str, text_config: Any, width: int) -> None:
    if text_config.hidden_size != width:
        raise CheckpointError(
            f"{source}: the language model's word embeddings are {width} wide, and transformers' BLIP-2 makes visual "
            f"prompts of the width of its layers, {text_config.hidden_size}. It cannot run such a model."
        )


def _read_language_tokenizer(folder: Path, named: PathOrName | None) -> Any:
    import transformers

    source = folder if named is None else Path(named)
    if source.is_dir() and not any((source / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{source} has no tokenizer of the language model: put its tokenizer.json and tokenizer_config.json "
            "there, or name the folder that has them as the tokenizer."
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(os.fspath(named or folder))
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
        raise CheckpointError(
            f"{source}: the language model's tokenizer cannot be read: {first_line(error)}."
        ) from error


# ---- writing


def save_huggingface_blip2(folder: Path, checkpoint: Blip2Checkpoint) -> None:
    """Write a folder that transformers, its processor and `load_huggingface_blip2` read; config.json last."""
    model, config = checkpoint.model, checkpoint.model.config
    class_name = _class_for(config)
    layout = _LAYOUTS[class_name]
    text_config: dict[str, Any] | None = None
    language = image_token = None
    if model.language is not None:
        language = _writable_language_model(model.language)
        text_config = language.config.to_dict()
        # The end that the model was taught, at which transformers' `generate` is to stop.
        text_config["eos_token_id"] = model.language.end_id
        if text_config.get("pad_token_id") is None:
            text_config["pad_token_id"] = model.language.pad_id
    _huggingface_config(config, text_config, None)  # raises before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    if model.language is not None and text_config is not None:
        image_token = _write_language_tokenizer(folder, model.language)
        language = _with_row(language, image_token)
        text_config["vocab_size"] = language.config.vocab_size
    weights = {n: t for n, t in model.state_dict().items() if not n.startswith(_OUR_LANGUAGE)}
    temperature = weights.pop(LOG_TEMPERATURE, None)
    state = translate_back(layout.table, weights)
    write_safetensors(folder / WEIGHTS, state | ({} if language is None else _language_state(language)))
    _write_processor(folder, checkpoint, image_token)
    hf_config = _huggingface_config(config, text_config, image_token).to_dict()
    extra = _extra_to_dict(checkpoint, None if temperature is None else float(temperature))
    write_json(folder / CONFIG_FILE, {**hf_config, "architectures": [class_name], "openblip": extra})


def _class_for(config: Blip2Config) -> str:
    """The class of transformers that can hold a model of ours."""
    name = find_layout(_LAYOUTS, config.heads, instructed=config.instructed)
    if name is None:
        itg = " It has none for itg, with which the Q-Former itself writes." if "itg" in config.heads else ""
        raise CheckpointError(
            f"No model of transformers has the heads {', '.join(config.heads)}: it has retrieval models (itc and itm) "
            f"and models with a language model (llm).{itg} Fine-tune one of these, or save as openblip."
        )
    return name


def _huggingface_config(config: Blip2Config, text_config: Mapping[str, Any] | None, image_token: int | None) -> Any:
    """transformers' settings of a model of ours. image_token: id of the token that stands for a visual prompt."""
    vision, qformer = config.vision, config.qformer
    if not isinstance(vision, VisionConfig) or vision.input_norm or vision.output_norm:
        is_ours = isinstance(vision, VisionConfig)
        problem = "has CLIP's first norm or a last norm" if is_ours else "is not ours"
        raise CheckpointError(
            f"transformers' BLIP-2 has one kind of image encoder, and this model's {problem}: save as openblip."
        )
    settings: dict[str, Any] = {
        "vision_config": {**write_sizes(vision, HF_VISION_SETTINGS), "hidden_act": vision.activation},
        "qformer_config": {
            **write_sizes(qformer, _QFORMER_SETTINGS),
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
    return _config_classes()["instructblip" if config.instructed else "blip-2"](**settings)


def _extra_to_dict(checkpoint: Blip2Checkpoint, log_temperature: float | None) -> dict[str, Any]:
    """What a model of ours has that transformers' format has no place for."""
    config, language = checkpoint.model.config, checkpoint.model.config.language
    return {
        "prompt": checkpoint.prompt,
        "question_prompt": checkpoint.question_prompt,
        "end_of_text": None if language is None else language.end_of_text,
        "language": None if language is None else language.name,
        "max_text_tokens": LanguageConfig.max_text_tokens if language is None else language.max_text_tokens,
        "log_temperature": Extra().log_temperature if log_temperature is None else log_temperature,
        "vision_norm_eps": config.vision_norm_eps,
        "drop_path": config.vision.drop_path if isinstance(config.vision, VisionConfig) else 0.0,
        "embed_dim": config.embed_dim,
    }


def _write_processor(folder: Path, checkpoint: Blip2Checkpoint, image_token: int | None) -> None:
    """Write what transformers' Blip2Processor or InstructBlipProcessor reads, but the language model's tokenizer.

    A retrieval model gets no image tokens: transformers would cut as many tokens off every text, also of one that was
    prepared without its image.
    """
    config = checkpoint.model.config
    processor = "InstructBlipProcessor" if config.instructed else "Blip2Processor"
    if checkpoint.tokenizer is not None and config.has_text_branch:
        write_tokenizer(folder / QFORMER_TOKENIZER if config.instructed else folder, checkpoint.tokenizer)
    write_json(folder / PREPROCESSOR_CONFIG, preprocessor_config(checkpoint.preprocessing, processor))
    num_queries = None if image_token is None else config.qformer.num_queries
    write_json(folder / "processor_config.json", {"processor_class": processor, "num_query_tokens": num_queries})


def _writable_language_model(language: LanguageModel) -> Any:
    """transformers' model of a language model; CheckpointError when transformers' BLIP-2 cannot hold it.

    It cannot hold LoRA adapters that are not merged.
    """
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

    words = copy.deepcopy(language.tokenizer)  # the caller's stays as it is
    image = transformers.AddedToken(IMAGE_TOKEN, normalized=False, special=True)
    words.add_tokens([image], special_tokens=True)
    # Prompts have different lengths, and a decoder goes on from the last place of a row: padding comes first.
    words.padding_side = "right" if language.is_encoder_decoder else "left"
    words.init_kwargs["padding_side"] = words.padding_side  # which is what is written
    words.save_pretrained(folder)
    return int(words.convert_tokens_to_ids(IMAGE_TOKEN))


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
