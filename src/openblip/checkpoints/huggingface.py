"""Folders of transformers' BLIP: for captions, retrieval and questions, and its BlipModel.

The tables of names are in `huggingface_keys.py`. What the format has no place for (the temperature of ITC, a
captioner's prompt, ...) is written under "openblip" in config.json, which transformers keeps and ignores.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from openblip.checkpoints.huggingface_config import (
    blip_config,
    huggingface_config,
    preprocessor_config,
    read_config,
    read_preprocessing,
)
from openblip.checkpoints.huggingface_keys import LAYOUTS
from openblip.checkpoints.key_table import Layout, translate, translate_back
from openblip.checkpoints.native import (
    CONFIG,
    WEIGHTS,
    Checkpoint,
    EncoderToken,
    as_float32,
    check_parts_fit,
    checked_encoder_token,
    empty_blip,
    load_weights,
    read_json,
    read_weights,
)
from openblip.checkpoints.pickled import read_pickled, state_dict
from openblip.checkpoints.text_weights import check_tied, infer_sharing
from openblip.checkpoints.vocabulary import find_tokenizer
from openblip.data.tokenizer import Tokenizer
from openblip.errors import CheckpointError
from openblip.models.blip import INITIAL_TEMPERATURE
from openblip.models.config import BlipConfig, Sharing

PICKLED = "pytorch_model.bin"
TEMPERATURE = "log_temperature"


class _Extra(NamedTuple):
    """What their format has no place for; the defaults are for a folder that transformers wrote."""

    prompt: str = ""
    encoder_token: EncoderToken = "[ENC]"
    log_temperature: float = math.log(INITIAL_TEMPERATURE)
    sharing: Sharing | None = None
    drop_path: float = 0.0


def load_huggingface(folder: str | Path, tokenizer: str | os.PathLike[str] | None = None) -> Checkpoint:
    """Read a folder of transformers' `save_pretrained`, in float32 on the CPU, in eval mode.

    The weights may be safetensors or pytorch_model.bin, of which no code is run, whole or sharded. The
    tokenizer and preprocessing are the folder's own, unless `tokenizer` names another; without one, BERT's
    from the hub. Sizes, head counts and epsilons come from config.json.

    Raises CheckpointError for another class of model, a setting that BLIP does not have, weights that are
    missing or left over (it lists them), or a tokenizer of another model.
    """
    folder = Path(folder)
    config = read_config(folder, {"blip": transformers.BlipConfig})
    theirs = read_tensors(folder)
    name = _class_of(folder, config, theirs)
    layout = LAYOUTS[name]
    extra = _read_extra(folder, config, layout)
    check_tied(theirs, str(folder))
    sharing = extra.sharing or infer_sharing(theirs, layout.homes)
    model = empty_blip(blip_config(folder, config, layout, sharing=sharing, drop_path=extra.drop_path))
    ours = model.state_dict().keys()
    names = ours if TEMPERATURE in layout.table else ours - {TEMPERATURE}
    weights = translate(layout.table, theirs, set(names), layout.derived, str(folder), layout.homes)
    if TEMPERATURE in weights:
        weights[TEMPERATURE] = -weights[TEMPERATURE]  # theirs multiplies
    elif TEMPERATURE in ours:
        weights[TEMPERATURE] = torch.tensor(extra.log_temperature)
    load_weights(model, weights, origin=str(folder))
    words = find_tokenizer(folder, folder, tokenizer)
    if "decode" in layout.homes:
        _check_special_tokens(folder, config.text_config, words)
    preprocessing = read_preprocessing(folder, config.vision_config.image_size)
    checkpoint = Checkpoint(model.eval(), words, preprocessing, extra.prompt, extra.encoder_token)
    check_parts_fit(folder, checkpoint)
    return checkpoint


def save_huggingface(folder: str | Path, checkpoint: Checkpoint) -> None:
    """Write a folder that transformers and `load_huggingface` read; config.json comes last.

    Raises CheckpointError when none of transformers' classes can hold the model.
    """
    folder, model = Path(folder), checkpoint.model
    name = _class_for(model.config)
    layout = LAYOUTS[name]
    ours = {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}
    text, vision = model.config.text, model.config.vision
    extra: dict[str, Any] = {"prompt": checkpoint.prompt, "encoder_token": checkpoint.encoder_token}
    if TEMPERATURE in layout.table:
        ours[TEMPERATURE] = -ours[TEMPERATURE]
    elif TEMPERATURE in ours:
        extra[TEMPERATURE] = float(ours.pop(TEMPERATURE))
    extra |= {"sharing": text.sharing, "drop_path": vision.drop_path}
    theirs = translate_back(layout.table, ours, layout.homes)
    folder.mkdir(parents=True, exist_ok=True)
    copies = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in theirs.items()}
    save_file(copies, folder / WEIGHTS, metadata={"format": "pt"})
    checkpoint.tokenizer.save(folder)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    write_json(folder / "preprocessor_config.json", preprocessor_config(checkpoint.preprocessing))
    config = huggingface_config(model.config, checkpoint.tokenizer).to_dict()
    write_json(folder / CONFIG, {**config, "architectures": [name], "openblip": extra})


def _class_of(folder: Path, config: Any, theirs: Mapping[str, Tensor]) -> str:
    """Which of transformers' classes the folder is of: config.json says so, or else its weights do."""
    named: list[str] = list(config.architectures or [])
    known = [name for name in named if name in LAYOUTS]
    if len(known) == 1:
        return known[0]
    homes = {home for layout in LAYOUTS.values() for home in layout.homes.values()}
    present = {home for home in homes if any(name.startswith(f"{home}.") for name in theirs)}
    matching = [name for name, layout in LAYOUTS.items() if set(layout.homes.values()) == present]
    if len(matching) != 1:
        raise CheckpointError(
            f"{folder} holds {' and '.join(named) or 'a model of no named class'}, and its weights do not "
            f"look like those of a class that can be read: {', '.join(LAYOUTS)}."
        )
    return matching[0]


def _class_for(config: BlipConfig) -> str:
    """Which of transformers' classes holds a model of ours."""
    heads = ", ".join(config.heads)
    for name, layout in LAYOUTS.items():
        if set(layout.heads) == set(config.heads) and layout.pooled == config.pooled:
            if "vqa" in config.heads and config.text.hidden_dim != config.vision.hidden_dim:
                raise CheckpointError(
                    f"transformers' {name} needs text as wide as its images: {config.text.hidden_dim} and "
                    f"{config.vision.hidden_dim} are not. Save as openblip or original."
                )
            return name
    pooled = " and a pooler" if config.pooled else ""
    raise CheckpointError(
        f"No model of transformers has the heads {heads}{pooled}: it has captioners (lm), retrieval models "
        "(itc and itm), question answering (vqa), and BlipModel (itc with a pooler). Fine-tune one of these, "
        "or save as openblip."
    )


def _read_extra(folder: Path, config: Any, layout: Layout) -> _Extra:
    written = getattr(config, "openblip", None)
    if written is None:
        # The one class of theirs that no conversion of BLIP's own weights uses: what trained it read [CLS].
        return _Extra(encoder_token="[CLS]") if layout.pooled else _Extra()
    default = _Extra()
    try:
        sharing = written.get("sharing")
        if sharing is not None and sharing not in get_args(Sharing):
            raise ValueError(f"sharing {sharing}")
        return _Extra(
            prompt=str(written.get("prompt", default.prompt)),
            encoder_token=checked_encoder_token(written.get("encoder_token", default.encoder_token)),
            log_temperature=float(written.get(TEMPERATURE, default.log_temperature)),
            sharing=sharing,
            drop_path=float(written.get("drop_path", default.drop_path)),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG}: its openblip entry is damaged: {error}.") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder, floating ones as float32."""
    for whole, read in ((WEIGHTS, read_weights), (PICKLED, _read_bin)):
        if (folder / whole).is_file():
            return read(folder / whole)
        index = folder / f"{whole}.index.json"
        if index.is_file():
            return {name: t for shard in _shards(index) for name, t in read(folder / shard).items()}
    raise CheckpointError(
        f"{folder} has no weights: neither {WEIGHTS} nor {PICKLED}, nor an index of shards."
    )


def _shards(index: Path) -> list[str]:
    """The files that an index names; CheckpointError unless they are names of files beside it."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} names no shards.")
    shards = sorted({str(shard) for shard in places.values()})
    elsewhere = [shard for shard in shards if Path(shard).name != shard]
    if elsewhere:
        raise CheckpointError(f"{index} names files outside its folder: {', '.join(elsewhere)}.")
    return shards


def _read_bin(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"There is no {path}; the checkpoint is incomplete.")
    return as_float32(state_dict(read_pickled(path), path))


def _check_special_tokens(folder: Path, text: Any, tokenizer: Tokenizer) -> None:
    """Captions and answers begin and end with the tokens that config.json names."""
    for name, theirs, ours in (
        ("[DEC]", text.bos_token_id, tokenizer.dec_id),
        ("[SEP]", text.sep_token_id, tokenizer.sep_id),
    ):
        if theirs != ours:
            raise CheckpointError(
                f"{folder}: {name} is {theirs} in config.json and {ours} in the tokenizer; of two models."
            )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A file that is either there as a whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
