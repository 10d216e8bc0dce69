"""Language models by name: loaded with transformers, quantised by it, with LoRA through peft.

A folder is one of transformers; adapters, where a model has them, are in its folder `adapter`, apart from the
weights that they change.
"""

import logging
import os
import shutil
import warnings
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from openblip.checkpoints.native import check_weights
from openblip.errors import CheckpointError, ConfigError, MissingExtraError
from openblip.models.language_model import LanguageModel, has_lora, wrap_language_model

Quantization = Literal["8bit", "4bit"]
ADAPTER, ADAPTER_WEIGHTS = "adapter", "adapter_model.safetensors"


def load_language_model(
    source: str | os.PathLike[str],
    *,
    end_of_text: str | None = None,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    changes: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """A causal or sequence-to-sequence model of transformers with its tokenizer, in eval mode.

    source: a folder, or a name on the Hugging Face hub. quantization: its linear layers in 8 bits, or in the
    normal floats of 4 bits of QLoRA; dtype is then of the rest, and of what is computed. changes: settings of
    its config that are to be others than its own.

    Raises CheckpointError when there is no such model, it lacks weights or words, or it is neither causal nor
    sequence-to-sequence; MissingExtraError without bitsandbytes where it is quantised, without peft where it
    has adapters.
    """
    import transformers  # takes seconds

    from openblip.checkpoints.from_transformers import (
        LOADING_ERRORS,
        check_is_a_name,
        not_loaded,
        quietly,
        read_model,
    )

    name = os.fspath(source)
    check_is_a_name(name)
    with quietly():
        try:
            config = transformers.AutoConfig.from_pretrained(name, **(changes or {}))
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        except LOADING_ERRORS as error:
            raise not_loaded(name, error) from error
    if Path(name).is_dir() and not _has_words(Path(name), tokenizer):
        raise CheckpointError(f"{name} has no vocabulary; transformers would go on with an empty one.")
    auto: Any = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        auto = transformers.AutoModelForSeq2SeqLM
    if getattr(config, "quantization_config", None) is not None:  # it was saved so
        _require_bitsandbytes()
    loaded = read_model(auto, name, config=config, dtype=dtype, **_quantized(quantization, dtype))
    if loaded.missing:
        raise CheckpointError(f"{name} lacks weights of its model: {'; '.join(sorted(loaded.missing))}.")
    model = loaded.model
    if (Path(name) / ADAPTER).is_dir():
        model = _with_adapters(model, Path(name) / ADAPTER)
    return wrap_language_model(model.eval(), tokenizer, end_of_text)


def save_language_model(folder: Path, language: LanguageModel) -> None:
    """Write a folder that `load_language_model` reads, in the model's own precision."""
    from openblip.checkpoints.from_transformers import quietly

    if (folder / ADAPTER).is_dir():
        shutil.rmtree(folder / ADAPTER)  # of an earlier model
    with quietly():
        model = language.model
        if has_lora(language):
            _without_adapters(model).save_pretrained(folder)
            model.save_pretrained(folder / ADAPTER)
        else:
            model.save_pretrained(folder)
        language.tokenizer.save_pretrained(folder)


def _without_adapters(model: Any) -> Any:
    """The model that adapters were added to, as it was before, sharing its weights; the given one stays."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return deepcopy(model, shared).unload()


def _with_adapters(model: Any, folder: Path) -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError(
            f'{folder} holds LoRA adapters, which need peft: pip install "openblip[language]"'
        ) from error
    path = folder / ADAPTER_WEIGHTS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing weights, which are checked here
            adapted = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True)
        written = load_file(path)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder} does not hold adapters of its model: {error}") from error
    check_weights(peft.get_peft_model_state_dict(adapted), written, str(path))
    return adapted


def _has_words(folder: Path, tokenizer: Any) -> bool:
    """Whether one of the files is there that this kind of tokenizer is read from."""
    return any(
        (folder / name).is_file() for name in ("tokenizer.json", *tokenizer.vocab_files_names.values())
    )


def _quantized(quantization: Quantization | None, dtype: torch.dtype) -> Mapping[str, Any]:
    if quantization is None:
        return {}
    import transformers

    _require_bitsandbytes()
    make: Any = transformers.BitsAndBytesConfig
    match quantization:
        case "8bit":
            config: Any = make(load_in_8bit=True)
        case "4bit":
            config = make(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        case _:
            raise ConfigError(f"quantization {quantization}: choose 8bit or 4bit.")
    return {"quantization_config": config}


def _require_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            'A language model in 8 or 4 bits needs bitsandbytes: pip install "openblip[quantized]"'
        ) from error
    # At every layer of every step it says that it computes in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
