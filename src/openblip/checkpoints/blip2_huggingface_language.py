"""The language model inside a folder of transformers' BLIP-2, and its words.

Its weights stand below "language_model." under the names that its own class gives them, its settings in
config.json as text_config, its tokenizer beside them. Among the words there is one that stands for a visual
prompt, "<image>": transformers puts the prompts where a text has it. Ours puts them before the text by itself
and reads folders with and without that word.
"""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from openblip.checkpoints.from_transformers import LOADING_ERRORS, quietly
from openblip.checkpoints.key_table import refuse
from openblip.errors import CheckpointError
from openblip.models.language_model import LanguageModel, has_lora, wrap_language_model

PREFIX = "language_model."
IMAGE_TOKEN = "<image>"
# transformers makes an empty tokenizer of a folder that has none of these.
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


def read_language_model(
    folder: Path,
    text_config: Any,
    theirs: Mapping[str, Tensor],
    tokenizer: str | os.PathLike[str] | None,
    end_of_text: str | None,
) -> LanguageModel:
    """The language model of a folder, in float32 on the CPU, in eval mode.

    theirs: its weights, by their names in the folder. tokenizer: where its words are, None: in the folder.
    end_of_text: what ends a text; None is what text_config says.

    Raises CheckpointError when it is neither causal nor sequence-to-sequence, when weights are missing, left
    over or wrongly shaped (it lists them), or when the tokenizer is missing or another model's.
    """
    kind = _class_of(str(folder), text_config)
    words = _read_tokenizer(folder, tokenizer)
    model = _fill(folder, kind, text_config, {name.removeprefix(PREFIX): t for name, t in theirs.items()})
    num_rows, width = model.get_input_embeddings().weight.shape
    largest = max((i for word, i in words.get_vocab().items() if word != IMAGE_TOKEN), default=0)
    if largest >= num_rows:
        raise CheckpointError(
            f"{folder}: the tokenizer has {largest + 1} entries, the language model {num_rows}; it is "
            "another model's."
        )
    _check_width(str(folder), text_config, width)
    return wrap_language_model(model.eval(), words, end_of_text or _end_of_text(text_config, words))


def _class_of(source: str, text_config: Any) -> Any:
    """Which class of transformers its BLIP-2 takes for such a language model."""
    causal = type(text_config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if causal and not text_config.is_encoder_decoder:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)]
    if not causal and type(text_config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(text_config)]
    # Of encoder-decoders that it also knows as decoders (BART, ...) transformers' BLIP-2 would take those.
    raise CheckpointError(
        f"{source}: a {text_config.model_type} is no language model that transformers' BLIP-2 can have: it "
        "takes decoders (OPT, GPT-2, Llama, ...) and T5."
    )


def _fill(folder: Path, kind: Any, text_config: Any, weights: Mapping[str, Tensor]) -> Any:
    """A model of transformers with these weights; what it ties may be there once or more."""
    with quietly():  # what it warns of is checked below
        try:
            model, report = kind.from_pretrained(
                None,
                config=copy.deepcopy(text_config),
                state_dict=dict(weights),
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except (*LOADING_ERRORS, TypeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise CheckpointError(
                f"{folder}: its {text_config.model_type} cannot be made: {reason}."
            ) from error
    refuse(
        str(folder),
        {f"{PREFIX}{name}" for name in report["missing_keys"]},
        {f"{PREFIX}{name}" for name in report["unexpected_keys"]},
    )
    wrong = [
        f"{PREFIX}{name} is {tuple(found)}, the config says {tuple(expected)}"
        for name, found, expected in sorted(report["mismatched_keys"])
    ]
    if wrong or report["error_msgs"]:
        problems = "; ".join([*wrong, *report["error_msgs"]])
        raise CheckpointError(f"{folder} does not fit its config: {problems}.")
    return model


def _check_width(source: str, text_config: Any, width: int) -> None:
    if text_config.hidden_size != width:
        raise CheckpointError(
            f"{source}: the language model's words are {width} wide, and transformers' BLIP-2 makes visual "
            f"prompts of the width of its layers, {text_config.hidden_size}. It cannot run such a model."
        )


def _read_tokenizer(folder: Path, named: str | os.PathLike[str] | None) -> Any:
    source = folder if named is None else Path(named)
    if source.is_dir() and not any((source / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{source} has no tokenizer of the language model: put its tokenizer.json and "
            "tokenizer_config.json there, or name the folder that has them as the tokenizer."
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(os.fspath(named or folder))
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{source}: the language model's tokenizer cannot be read: {reason}."
        ) from error


def _end_of_text(text_config: Any, tokenizer: Any) -> str | None:
    """What ends a text by the config, where that is not the tokenizer's own end: "\\n" for OPT in BLIP-2."""
    named = getattr(text_config, "eos_token_id", None)
    ends = named if isinstance(named, list) else [named]
    if named is None or not ends or tokenizer.eos_token_id in ends:
        return None
    return str(tokenizer.decode([ends[0]]))


def write_tokenizer(folder: Path, language: LanguageModel) -> int:
    """Write the language model's words, "<image>" among them, and return which that is."""
    words = copy.deepcopy(language.tokenizer)  # the caller's stays as it is
    image = transformers.AddedToken(IMAGE_TOKEN, normalized=False, special=True)
    words.add_tokens([image], special_tokens=True)
    # Prompts of different lengths: a decoder goes on from the last place of a row, so padding comes first.
    words.padding_side = "right" if language.is_encoder_decoder else "left"
    words.init_kwargs["padding_side"] = words.padding_side  # which is what is written
    words.save_pretrained(folder)
    return int(words.convert_tokens_to_ids(IMAGE_TOKEN))


def writable(language: LanguageModel) -> Any:
    """The language model as one that transformers' BLIP-2 can hold.

    Raises CheckpointError when it cannot, LoRA adapters that are not merged included.
    """
    model = language.model
    if has_lora(language):
        raise CheckpointError(
            "transformers' BLIP-2 has no place for the language model's LoRA adapters: merge them into it "
            "(model.language.model.merge_and_unload()), or save as openblip."
        )
    if getattr(model, "is_quantized", False):
        raise CheckpointError(
            "The language model is quantised, and transformers' BLIP-2 would read it as if it were not: "
            "save as openblip."
        )
    _class_of("The checkpoint", model.config)
    _check_width("The checkpoint", model.config, language.hidden_dim)
    return model


def text_config_of(model: Any, language: LanguageModel) -> dict[str, Any]:
    """Its settings, with the end that it was taught and that transformers' `generate` stops at."""
    config: dict[str, Any] = model.config.to_dict()
    padding = config.get("pad_token_id")
    return {
        **config,
        "eos_token_id": language.end_id,
        "pad_token_id": language.pad_id if padding is None else padding,
    }


def with_row(model: Any, index: int) -> Any:
    """The model with a word embedding for `index`; itself where it has one to spare.

    A row that is added is the mean of the others, in its head too: a word that is never the most likely.
    """
    num_rows = len(model.get_input_embeddings().weight)
    if index < num_rows:
        return model
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(index + 1, mean_resizing=False)
    for table in (larger.get_input_embeddings(), larger.get_output_embeddings()):
        _fill_with_mean(table, num_rows)
    return larger


@torch.no_grad()
def _fill_with_mean(table: nn.Module | None, num_rows: int) -> None:
    """Rows behind the first `num_rows` become their mean, of a table's weight and of its bias."""
    for rows in (getattr(table, "weight", None), getattr(table, "bias", None)):
        if rows is not None:
            rows[num_rows:] = rows[:num_rows].mean(dim=0)


def weights_of(model: Any) -> dict[str, Tensor]:
    """The weights by their names in a folder, what is tied once."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    tied: Mapping[str, str] = model.all_tied_weights_keys
    return {
        f"{PREFIX}{name}": tensor.contiguous()
        for name, tensor in state.items()
        if name not in tied or not torch.equal(tensor, state[tied[name]])
    }
