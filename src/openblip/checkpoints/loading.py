"""One entry for every checkpoint: recognises what a source is, and calls the reader or writer of its format.

An image encoder that a checkpoint leaves out is one itself, so the reader of BLIP-2's .pth files is given
`load_image_encoder`.
"""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch

from openblip.checkpoints import backbones, huggingface, original, state_dict
from openblip.checkpoints import checkpoint as base
from openblip.checkpoints.backbones import ImageEncoder, PathOrName
from openblip.checkpoints.checkpoint import CONFIG_FILE, BlipCheckpoint, Checkpoint
from openblip.checkpoints.state_dict import ChooseDtype
from openblip.errors import CheckpointError, ConfigError, hub_problem
from openblip.models.blip2 import Blip2
from openblip.models.config import TowerConfig
from openblip.models.language_model import has_lora
from openblip.models.vision_tower import VisionTower

Format = Literal["openblip", "huggingface", "original"]
PRETRAINED = Path(__file__).parents[1] / "pretrained"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/model


def load_checkpoint(
    source: PathOrName,
    *,
    tokenizer: PathOrName | None = None,
    vision: PathOrName | None = None,
    language_model: PathOrName | None = None,
    dtype: ChooseDtype = state_dict.in_float32,
) -> Checkpoint:
    """Read a checkpoint, on the CPU, in eval mode.

    source: a folder of OpenBLIP or of transformers' BLIP or BLIP-2, the run folder of a finished training, an original
    .pth file, the name of a shipped model, or owner/model on the Hugging Face hub; a file of weights beside the
    config.json that describes them; or a folder of peft's adapters, which are merged into the model of transformers
    that they name. tokenizer: folder or hub name of a vocabulary, which goes before the checkpoint's own. vision,
    language_model: the parts that an original BLIP-2 file leaves out: whatever `load_image_encoder` takes, and a folder
    or a name on the hub. language_model may also be adapters of the language model of a whole BLIP-2. dtype:
    chooses the precision, by the number of weights in the file or folder; of a BLIP-2 that of the image encoder and the
    language model. Weights are read straight into it.

    Raises CheckpointError when there is no such checkpoint or it is not whole, ConfigError when a part is named that
    the checkpoint does not leave out.
    """
    path = Path(source)
    if not path.is_dir() and (PRETRAINED / str(source)).is_dir():
        path = PRETRAINED / str(source)
    if not path.exists() and is_hub_name(str(source)):
        path = _hub_folder(str(source))
    if language_model is not None and (Path(language_model) / backbones.ADAPTER_CONFIG).is_file() and path.is_dir():
        adapted = load_checkpoint(source, tokenizer=tokenizer, vision=vision, dtype=dtype)
        language = adapted.model.language if isinstance(adapted.model, Blip2) else None
        if language is None or has_lora(language):
            problem = "has no language model" if language is None else "has adapters already"
            raise ConfigError(f"{source} {problem}: leave the adapters {language_model} out.")
        language.model = backbones.with_adapters(language.model, Path(language_model)).eval()
        return adapted
    adapter = path if (path / backbones.ADAPTER_CONFIG).is_file() else None
    if adapter is not None:
        name = backbones.adapted_model(adapter)
        path = Path(name) if Path(name).is_dir() else _hub_folder(name)
    path = _model_folder(path)
    file = original.read_pth(path) if path.is_file() else None
    state = None
    if file is not None and not original.has_original_names(file) and (path.parent / CONFIG_FILE).is_file():
        state = file.weights  # of the model that its folder describes
        path, file = path.parent, None
    if file is not None and original.is_blip2_file(file):
        return original.load_original_blip2(file, load_image_encoder, tokenizer, vision, language_model, dtype)
    for part in (vision, language_model):
        if part is not None:
            raise ConfigError(f"{source} is a whole model: leave {part} out. Only original BLIP-2 files lack parts.")
    if file is not None:
        return original.load_original_blip(file, tokenizer, dtype)
    if not (path / CONFIG_FILE).is_file():
        shipped = ", ".join(sorted(folder.name for folder in PRETRAINED.glob("*") if folder.is_dir()))
        raise CheckpointError(
            f"There is no checkpoint {source}: name a folder of OpenBLIP or of transformers' BLIP or BLIP-2, a run "
            "folder, an original .pth file, a model on the hub (owner/model), or a shipped one "
            f"({shipped or 'none is installed'}). `openblip models` lists those that are known."
        )
    config = state_dict.read_json_object(path / CONFIG_FILE)
    is_native = config.get("model_type") == base.BLIP2_TYPE or config.get("format") == base.OPENBLIP_FORMAT
    if is_native and adapter is None:
        return base.load_native(path, tokenizer, state, dtype)
    return huggingface.load_huggingface(path, tokenizer, state, adapter, dtype)


def is_transformers_model(source: PathOrName) -> bool:
    """Whether this is a model of images and texts, in a folder or on the hub, that transformers knows and
    `load_checkpoint` does not read.
    """
    name = os.fspath(source)
    if Path(name).is_file() or (not Path(name).is_dir() and ((PRETRAINED / name).is_dir() or not is_hub_name(name))):
        return False
    if Path(name).is_dir() and not (Path(name) / CONFIG_FILE).is_file():
        return False
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    try:
        settings = backbones.load_from_hub(transformers.PreTrainedConfig.get_config_dict, name)[0]
    except CheckpointError:
        return False  # whoever reads it says what is wrong
    model_type = settings.get("model_type")
    if settings.get("format") == base.OPENBLIP_FORMAT or model_type in huggingface.CONFIG_CLASSES:
        return False
    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def is_hub_name(source: str) -> bool:
    """Whether `source` reads like owner/model."""
    return _HUB_NAME.fullmatch(source) is not None


def _hub_folder(name: str) -> Path:
    """The folder of the hub's local cache with a model's files; weights are safetensors, or .bin if there are none."""
    import huggingface_hub  # takes a while to import, and few checkpoints come from there

    try:
        for weights in (["*.safetensors"], ["pytorch_model*.bin", "adapter_model.bin"]):
            patterns = ["*.json", "vocab.txt", *weights]
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
            if any(any(folder.glob(pattern)) for pattern in weights):
                break
    except (OSError, ValueError) as error:  # offline, no such model, or not a model's name
        problem = hub_problem(error) or f"gives none ({type(error).__name__}: {backbones.first_line(error)})"
        raise CheckpointError(
            f"There is no checkpoint {name}: there is no such folder, and the Hugging Face hub {problem}. Without the "
            "hub, name a folder or a shipped model. `openblip models` lists those that are known."
        ) from error
    return folder


def _model_folder(folder: Path) -> Path:
    """`model/` of the run folder of a finished training, and any path but a training's state as it is."""
    if folder.match("checkpoints/step_*") and not (folder / CONFIG_FILE).exists():
        run = folder.parent.parent
        raise CheckpointError(
            f"{folder} is the state from which a training goes on, and no model: name its run folder {run}, or "
            f"{run / 'best'}, the best model so far, where there is one."
        )
    if not (folder / CONFIG_FILE).is_file() or "recipe" not in state_dict.read_json_object(folder / CONFIG_FILE):
        return folder
    if (folder / "model" / CONFIG_FILE).is_file():
        return folder / "model"
    problem = f"{folder} is the run folder of a training that has not finished, so it has no model/ yet."
    if (folder / "best" / CONFIG_FILE).is_file():
        problem += f" Name {folder / 'best'}, the best model so far."
    if (folder / "checkpoints").is_dir():
        problem += f" Its checkpoints/ hold the state from which `openblip train --resume {folder}` goes on."
    raise CheckpointError(problem)


def save_checkpoint(checkpoint: Checkpoint, path: PathOrName, format: Format = "openblip") -> None:
    """Write a checkpoint that `load_checkpoint` reads: a folder, or for "original" a file whose name ends with .pth.

    Raises CheckpointError when the format has no place for the model's heads, ConfigError when there is no such format.
    """
    if format not in get_args(Format):
        raise ConfigError(f'Format "{format}" cannot be written; choose one of {", ".join(get_args(Format))}.')
    if format == "openblip":
        base.save_native(Path(path), checkpoint)
    elif isinstance(checkpoint, BlipCheckpoint):
        save_blip = huggingface.save_huggingface_blip if format == "huggingface" else original.save_original_blip
        save_blip(Path(path), checkpoint)
    else:
        config = checkpoint.model.config
        if config.connector is not None or config.gated is not None or config.projection != "linear":
            what = "a connector in place of the Q-Former, gated layers, or a projection of two layers"
            raise CheckpointError(f"No other format has {what}: save as openblip.")
        save_blip2 = huggingface.save_huggingface_blip2 if format == "huggingface" else original.save_original_blip2
        save_blip2(Path(path), checkpoint)


def load_image_encoder(
    source: PathOrName, *, layer: int | None = None, image_size: int | None = None, dtype: torch.dtype = torch.float32
) -> ImageEncoder:
    """An image encoder for BLIP-2 to freeze, on the CPU, in eval mode: read at one of its layers, without last norm.

    Images are squashed to a square, bicubic, whatever the encoder's own processor does (most crop), so that nothing at
    the sides is lost; size, mean and standard deviation are its own.

    source: any checkpoint that `load_checkpoint` takes; a .pth file of LAVIS (eva_vit_g.pth, clip_vit_L.pth, or of a
    BLIP-2 that holds its encoder); or a folder or hub name of a vision model of transformers, or of a model of images
    and texts. layer: the layer whose output is taken, as an index into the hidden states: 0 is the embeddings, -1 the
    last layer. None is BLIP-2's choice, the second last; an encoder that was cut there already is taken whole.
    image_size: side in pixels; None is the checkpoint's own, from which position embeddings are interpolated.

    Raises CheckpointError when there is no such checkpoint, or it is not whole, does not have the layer, gives no
    tokens of an image, or does not take images of this size.
    """
    import transformers

    name = os.fspath(source)
    if Path(name).is_dir():
        name = str(_model_folder(Path(name)))
    # Shipped models and .pth files have no settings that transformers could read.
    has_none = Path(name).is_file() or (not Path(name).is_dir() and (PRETRAINED / name).is_dir())
    settings = {} if has_none else backbones.load_from_hub(transformers.PreTrainedConfig.get_config_dict, name)[0]
    model_type = settings.get("model_type")
    if has_none or settings.get("format") == base.OPENBLIP_FORMAT or model_type == "blip":
        encoder = _cut_encoder(name, layer)
    else:
        encoder = backbones.read_transformers_encoder(
            name, str(model_type), layer=layer, image_size=image_size, dtype=dtype
        )
    if image_size is not None:
        encoder = backbones.resize_encoder(encoder, image_size)
    encoder.model.to(dtype).eval()
    return encoder


def _cut_encoder(name: str, layer: int | None) -> ImageEncoder:
    """The image encoder of a BLIP, of a BLIP-2 or of a .pth file of its own, up to a layer; None is BLIP-2's choice."""
    file = original.read_pth(Path(name)) if Path(name).is_file() else None
    if file is not None and original.holds_encoder(file):
        model, config, preprocessing = original.read_encoder(file)
    else:
        checkpoint = load_checkpoint(name)
        model, config = checkpoint.model.vision, checkpoint.model.config.vision
        preprocessing = checkpoint.preprocessing
    if isinstance(config, TowerConfig):
        assert isinstance(model, VisionTower)  # the model was built by this config
        layer = config.layer if layer is None else layer
        return ImageEncoder(VisionTower(model.model, layer), replace(config, layer=layer), preprocessing)
    if layer is None:
        layer = -2 if config.output_norm else -1
    cut = backbones.cut_vit(config, layer)
    return ImageEncoder(backbones.build_vit(cut, model.state_dict(), name), cut, preprocessing)
