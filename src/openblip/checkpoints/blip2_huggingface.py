"""Folders of transformers' BLIP-2: Blip2ForConditionalGeneration, Blip2Model (which has the same weights),
Blip2ForImageTextRetrieval and InstructBlipForConditionalGeneration.

The tables of names are in `blip2_huggingface_keys.py`, the language model is read and written by
`blip2_huggingface_language.py`. What the format has no place for (prompts, the temperature of ITC, ...) is
written under "openblip" in config.json, which transformers keeps and ignores.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from openblip.checkpoints.blip2_huggingface_config import (
    CONFIG_CLASSES,
    blip2_config,
    extra_of,
    huggingface_config,
    question_prompt_of,
    read_extra,
)
from openblip.checkpoints.blip2_huggingface_keys import LAYOUTS
from openblip.checkpoints.blip2_huggingface_language import (
    PREFIX,
    read_language_model,
    text_config_of,
    weights_of,
    with_row,
    writable,
    write_tokenizer,
)
from openblip.checkpoints.blip2_native import Blip2Checkpoint, empty_blip2, fill
from openblip.checkpoints.huggingface import TEMPERATURE, read_tensors, write_json
from openblip.checkpoints.huggingface_config import preprocessor_config, read_config, read_preprocessing
from openblip.checkpoints.key_table import translate, translate_back
from openblip.checkpoints.native import CONFIG, WEIGHTS, check_weights, read_json
from openblip.checkpoints.vocabulary import find_tokenizer
from openblip.data.tokenizer import Tokenizer
from openblip.errors import CheckpointError
from openblip.models.blip2 import Blip2
from openblip.models.config import Blip2Config, VisionConfig

QFORMER_TOKENIZER = "qformer_tokenizer"  # the folder that InstructBlipProcessor keeps it in
_INSTRUCTED = "InstructBlipForConditionalGeneration"
_OURS_OF_LANGUAGE = "language."


def is_blip2_huggingface(folder: str | Path) -> bool:
    """Whether the folder is one of transformers' BLIP-2 or InstructBLIP."""
    return read_json(Path(folder) / CONFIG).get("model_type") in CONFIG_CLASSES


def load_blip2_huggingface(
    folder: str | Path, tokenizer: str | os.PathLike[str] | None = None
) -> Blip2Checkpoint:
    """Read a folder of transformers' `save_pretrained`, in float32 on the CPU, in eval mode.

    The weights may be safetensors or pytorch_model.bin, of which no code is run, whole or sharded.
    tokenizer: of the Q-Former where it reads text, else of the language model; None is the folder's own.

    Raises CheckpointError for another class of model, a setting that BLIP-2 does not have, weights that are
    missing, left over or wrongly shaped (it lists them), or a tokenizer that is missing or of another model.
    """
    folder = Path(folder)
    config = read_config(folder, CONFIG_CLASSES)
    theirs = read_tensors(folder)
    layout = LAYOUTS[_class_of(folder, config, theirs)]
    extra = read_extra(folder, config)
    language = None
    if "llm" in layout.heads:
        language = read_language_model(
            folder,
            config.text_config,
            {name: t for name, t in theirs.items() if name.startswith(PREFIX)},
            None if layout.instructed else tokenizer,
            extra.end_of_text,
        )
        theirs = {name: t for name, t in theirs.items() if not name.startswith(PREFIX)}
    model = empty_blip2(blip2_config(folder, config, layout, extra, language), language=language)
    expected = {name: t for name, t in model.state_dict().items() if not name.startswith(_OURS_OF_LANGUAGE)}
    weights = translate(layout.table, theirs, expected.keys() - {TEMPERATURE}, layout.derived, str(folder))
    if TEMPERATURE in expected:
        weights[TEMPERATURE] = torch.tensor(extra.log_temperature)
    check_weights(expected, weights, str(folder))
    fill(model, weights)
    words = None
    if model.config.has_text_branch:
        words = find_tokenizer(folder, folder / QFORMER_TOKENIZER if layout.instructed else folder, tokenizer)
    preprocessing = read_preprocessing(folder, config.vision_config.image_size)
    checkpoint = Blip2Checkpoint(
        model.eval(),
        words,
        preprocessing,
        extra.prompt,
        question_prompt_of(extra, language, layout.instructed),
    )
    _check_parts_fit(folder, checkpoint)
    return checkpoint


def save_blip2_huggingface(folder: str | Path, checkpoint: Blip2Checkpoint) -> None:
    """Write a folder that transformers, its processor and `load_blip2_huggingface` read; config.json last.

    Raises CheckpointError when none of transformers' classes can hold the model.
    """
    folder, model = Path(folder), checkpoint.model
    name = _class_for(model.config)
    layout = LAYOUTS[name]
    model_type = "instructblip" if layout.instructed else "blip-2"
    text_config = language = None
    if model.language is not None:
        language = writable(model.language)
        text_config = text_config_of(language, model.language)
    huggingface_config(model_type, model.config, text_config, None)  # refuses before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    image_token = None
    if model.language is not None and text_config is not None:
        image_token = write_tokenizer(folder, model.language)
        language = with_row(language, image_token)
        text_config["vocab_size"] = language.config.vocab_size
    temperature = _write_weights(folder, model, language, name)
    _write_processor(folder, checkpoint, image_token)
    config = huggingface_config(model_type, model.config, text_config, image_token).to_dict()
    extra = extra_of(model.config, checkpoint.prompt, checkpoint.question_prompt, temperature)
    write_json(folder / CONFIG, {**config, "architectures": [name], "openblip": extra._asdict()})


def _class_of(folder: Path, config: Any, theirs: Mapping[str, Tensor]) -> str:
    """Which of transformers' classes the folder is of: config.json says so, or else its weights do."""
    named: list[str] = list(config.architectures or [])
    instructed = config.model_type == "instructblip"
    known = [name for name in named if name in LAYOUTS and LAYOUTS[name].instructed == instructed]
    if len(known) == 1:
        return known[0]
    if any(name.startswith(PREFIX) for name in theirs):
        return _INSTRUCTED if instructed else "Blip2ForConditionalGeneration"
    if not instructed and any(name.startswith("itm_head.") for name in theirs):
        return "Blip2ForImageTextRetrieval"
    raise CheckpointError(
        f"{folder} holds {' and '.join(named) or 'a model of no named class'}, and its weights do not look "
        f"like those of a class that can be read: {', '.join(LAYOUTS)}."
    )


def _class_for(config: Blip2Config) -> str:
    """Which of transformers' classes holds a model of ours."""
    for name, layout in LAYOUTS.items():
        if set(layout.heads) == set(config.heads) and layout.instructed == config.instructed:
            return name
    itg = " It has none for itg, with which the Q-Former itself writes." if "itg" in config.heads else ""
    raise CheckpointError(
        f"No model of transformers has the heads {', '.join(config.heads)}: it has retrieval models (itc and "
        f"itm) and models with a language model (llm).{itg} Fine-tune one of these, or save as openblip."
    )


def _write_weights(folder: Path, model: Blip2, language: Any, name: str) -> float | None:
    """Write all weights; returns what the format has no place for, the logarithm of the temperature."""
    ours = {
        key: tensor.detach().cpu()
        for key, tensor in model.state_dict().items()
        if not key.startswith(_OURS_OF_LANGUAGE)
    }
    temperature = ours.pop(TEMPERATURE, None)
    theirs = translate_back(LAYOUTS[name].table, ours)
    copies = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in theirs.items()}
    if language is not None:
        copies |= weights_of(language)
    partial = folder / f"{WEIGHTS}.partial"
    save_file(copies, partial, metadata={"format": "pt"})
    os.replace(partial, folder / WEIGHTS)
    return None if temperature is None else float(temperature)


def _write_processor(folder: Path, checkpoint: Blip2Checkpoint, image_token: int | None) -> None:
    """What transformers' Blip2Processor or InstructBlipProcessor reads, but the language model's words.

    A retrieval model gets no image tokens: transformers would cut as many tokens off every text, also of one
    that was prepared without its picture.
    """
    config = checkpoint.model.config
    processor = "InstructBlipProcessor" if config.instructed else "Blip2Processor"
    if checkpoint.tokenizer is not None and config.has_text_branch:
        words = folder / QFORMER_TOKENIZER if config.instructed else folder
        _write_words(words, checkpoint.tokenizer)
    write_json(folder / "preprocessor_config.json", preprocessor_config(checkpoint.preprocessing, processor))
    num_queries = None if image_token is None else config.qformer.num_queries
    write_json(
        folder / "processor_config.json", {"processor_class": processor, "num_query_tokens": num_queries}
    )


def _write_words(folder: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(folder)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True})


def _check_parts_fit(source: Path, checkpoint: Blip2Checkpoint) -> None:
    """What would otherwise fail at the first unlucky word or picture."""
    config, words = checkpoint.model.config, checkpoint.tokenizer
    if words is not None and words.num_words > config.qformer.vocab_size:
        raise CheckpointError(
            f"{source}: the tokenizer has {words.num_words} words, the Q-Former {config.qformer.vocab_size}; "
            "it is another model's."
        )
    size = checkpoint.preprocessing.image_size
    if isinstance(config.vision, VisionConfig) and (size < 1 or size % config.vision.patch_size):
        raise CheckpointError(
            f"{source}: preprocessing.image_size {size} is no multiple of the patch size "
            f"{config.vision.patch_size}."
        )
