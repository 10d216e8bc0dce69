"""Models of transformers that stay as they are: its classes read them, with what turns images and texts into their
input. Captioners and scorers that are no BLIP are such models (`predictor/captioner.py`, `predictor/similarity.py`).
"""

import hashlib
import importlib.util
import json
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self, cast

import torch

from openblip.checkpoints import state_dict
from openblip.checkpoints.backbones import (
    PathOrName,
    Quantization,
    load_from_hub,
    quantized_settings,
    quietly,
    read_hub_model,
)
from openblip.checkpoints.state_dict import ChooseDtype
from openblip.errors import CheckpointError, MissingExtraError

# Code of transformers that reads models without these, or with others, gives the same results.
_NO_SETTINGS = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "architectures")


@dataclass(frozen=True, kw_only=True, eq=False)
class TransformersModel:
    """A model of transformers in eval mode on its device, and the processor of its images and texts."""

    model: Any
    processor: Any

    @classmethod
    def load(
        cls,
        source: PathOrName,
        auto_class: Any,
        device: torch.device,
        dtype: ChooseDtype,
        quantization: Quantization | None = None,
    ) -> Self:
        """Read a folder or a name on the hub with one of transformers' auto classes. dtype: chooses the precision by
        the number of weights; with a quantization, that of what is not quantised.

        Raises CheckpointError for a model that is missing, damaged or of a kind that the class does not know, and
        MissingExtraError where its processor or the quantization needs a package that is not installed.
        """
        import transformers

        name = os.fspath(source)
        config: Any = load_from_hub(transformers.AutoConfig.from_pretrained, name)
        with quietly(), torch.device("meta"):
            try:
                num_weights = sum(parameter.numel() for parameter in auto_class.from_config(config).parameters())
            except ValueError as error:
                kind = auto_class.__name__.removeprefix("AutoModel").removeprefix("For") or "model"
                raise CheckpointError(
                    f"{name} is a {config.model_type}, which is no {kind} of transformers."
                ) from error
        processor = _read_processor(name, config)
        precision = dtype(num_weights)
        settings = quantized_settings(quantization, precision)
        if settings:
            settings = {**settings, "device_map": {"": device}}
        model, missing, _ = read_hub_model(auto_class, name, dtype=precision, **settings)
        state_dict.raise_on_mismatch(name, missing, ())
        return cls(model=model.eval() if settings else model.eval().to(device), processor=processor)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return cast(torch.device, self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of its weights."""
        return cast(torch.dtype, self.model.dtype)

    def fingerprint(self, prompt: str = "") -> str:
        """A SHA-256 of the settings, a prompt, the processor's files and the current weights, wherever they lie."""
        settings = {"prompt": prompt, **_without(_NO_SETTINGS, self.model.config.to_dict())}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        with tempfile.TemporaryDirectory() as folder, quietly():
            self.processor.save_pretrained(folder)
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    digest.update(path.name.encode() + path.read_bytes())
        state_dict.add_weights(digest, self.model.state_dict())
        return digest.hexdigest()


def _without(names: tuple[str, ...], settings: Any) -> Any:
    """Settings, and those within them, without some names."""
    if not isinstance(settings, dict):
        return settings
    return {name: _without(names, value) for name, value in settings.items() if name not in names}


def _read_processor(name: str, config: Any) -> Any:
    """The processor of a model. One that also takes videos needs torchvision for them; without it, it takes images."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    processor_class: Any = PROCESSOR_MAPPING.get(type(config), None)
    with quietly():
        try:
            if processor_class is None or importlib.util.find_spec("torchvision") is not None:
                return load_from_hub(transformers.AutoProcessor.from_pretrained, name)
            if "video_processor" not in processor_class.get_attributes():
                return load_from_hub(processor_class.from_pretrained, name)
            return load_from_hub(lambda folder: _images_only(processor_class, folder), name)
        except ImportError as error:
            problem = " ".join(str(error).split())
            raise MissingExtraError(f"The processor of {name} needs another package: {problem}") from error


class _NoVideos:
    """Stands where a processor would have one of videos."""

    model_input_names: tuple[str, ...] = ()


def _images_only(processor_class: Any, name: str) -> Any:
    """A processor of transformers without its part for videos, which cannot be made without torchvision."""
    import transformers

    makers: dict[str, Any] = {
        "tokenizer": transformers.AutoTokenizer.from_pretrained,
        "image_processor": transformers.AutoImageProcessor.from_pretrained,
        "video_processor": lambda _: _NoVideos(),
    }
    parts = [makers[attribute](name) for attribute in processor_class.get_attributes()]
    settings = processor_class.get_processor_dict(name)[0]
    return _without_videos(processor_class).from_args_and_dict(parts, settings)


@cache
def _without_videos(processor_class: Any) -> Any:
    """A class of processors that takes a `_NoVideos`."""

    class ImagesOnly(processor_class):  # type: ignore[misc]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if not isinstance(argument, _NoVideos):
                return super().check_argument_for_proper_class(argument_name, argument)

        def __repr__(self) -> str:  # that of transformers writes json of all parts
            return f"{processor_class.__name__} for images"

        def __reduce__(self) -> Any:  # a class within a function has no name to be pickled by
            return _restored, (processor_class, self.__dict__)

        def save_pretrained(self, folder: str) -> None:
            """What decides the inputs: the parts, and how a conversation is written."""
            self.image_processor.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            Path(folder, "chat_template").write_text(str(self.chat_template))

    return ImagesOnly


def _restored(processor_class: Any, attributes: dict[str, Any]) -> Any:
    """A processor that was pickled."""
    processor = object.__new__(_without_videos(processor_class))
    vars(processor).update(attributes)
    return processor
