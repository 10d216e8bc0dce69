"""Language models by name: loaded with transformers, quantised by it, with LoRA through peft."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from openblip.errors import CheckpointError, ConfigError, MissingExtraError
from openblip.models.language_model import LanguageModel, wrap_language_model

Quantization = Literal["8bit", "4bit"]
ADAPTER_CONFIG = "adapter_config.json"


def load_language_model(
    source: str | os.PathLike[str],
    *,
    end_of_text: str | None = None,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    changes: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """A causal or sequence-to-sequence model of transformers with its tokenizer, in eval mode.

    source: a folder, or a name on the Hugging Face hub. quantization: its linear layers in 8 or 4 bits.
    changes: settings of its config that are to be others than its own.

    Raises CheckpointError when there is no such model, it lacks weights or words, or it is neither causal nor
    sequence-to-sequence; MissingExtraError without bitsandbytes where it is quantised.
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
    loaded = read_model(auto, name, config=config, dtype=dtype, **_quantized(quantization, dtype))
    if loaded.missing:
        raise CheckpointError(f"{name} lacks weights of its model: {'; '.join(sorted(loaded.missing))}.")
    return wrap_language_model(loaded.model.eval(), tokenizer, end_of_text)


def _has_words(folder: Path, tokenizer: Any) -> bool:
    """Whether one of the files is there that this kind of tokenizer is read from."""
    return any(
        (folder / name).is_file() for name in ("tokenizer.json", *tokenizer.vocab_files_names.values())
    )


def _quantized(quantization: Quantization | None, dtype: torch.dtype) -> Mapping[str, Any]:
    if quantization is None:
        return {}
    import transformers

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            'A language model in 8 or 4 bits needs bitsandbytes: pip install "openblip[quantized]"'
        ) from error
    make: Any = transformers.BitsAndBytesConfig
    match quantization:
        case "8bit":
            config: Any = make(load_in_8bit=True)
        case "4bit":
            config = make(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)
        case _:
            raise ConfigError(f"quantization {quantization}: choose 8bit or 4bit.")
    return {"quantization_config": config}
