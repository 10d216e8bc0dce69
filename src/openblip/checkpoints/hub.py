"""Models by folder or by their name on the Hugging Face hub, fetched or loaded by transformers, with errors of ours.

transformers takes a second to import and most of what reads checkpoints needs none of it, so functions import it.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from openblip.errors import CheckpointError

LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)
"""What transformers, the hub and safetensors raise for a checkpoint that is missing, unknown or torn."""

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/model
_SMALL_FILES = ["*.json", "vocab.txt"]


def is_hub_name(source: str) -> bool:
    """Whether `source` reads like owner/model."""
    return _HUB_NAME.fullmatch(source) is not None


def hub_folder(name: str) -> Path:
    """The folder of the hub's local cache with a model's files, which are fetched when they are not there yet.

    Weights are taken as safetensors, or as pytorch_model.bin or its shards where there are none. Raises CheckpointError
    when the hub does not give them.
    """
    import huggingface_hub  # takes a while to import, and few checkpoints come from there

    try:
        for weights in ("*.safetensors", "pytorch_model*.bin"):
            patterns = [*_SMALL_FILES, weights]
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
            if any(folder.glob(weights)):
                break
    except (OSError, ValueError) as error:  # offline, no such model, or not a model's name
        raise CheckpointError(
            f"{name} is no checkpoint: there is no such folder, and the Hugging Face hub has none; offline, name a "
            f"folder or a shipped model ({type(error).__name__}: {first_line(error)})."
        ) from error
    return folder


def load_from_hub(load: Callable[..., Any], name: str, **settings: Any) -> Any:
    """What a `from_pretrained` of transformers gives, which is called quietly, with errors of ours.

    Raises CheckpointError for what is neither a folder nor a name on the hub, or cannot be loaded.
    """
    could_be_hub_name = not name.startswith((".", "/", "~")) and name.count("/") <= 1
    if not Path(name).is_dir() and not could_be_hub_name:
        raise CheckpointError(f"There is no folder {name}; name one, or a model on the Hugging Face hub.")
    with quietly():
        try:
            return load(name, **settings)
        except LOADING_ERRORS as error:
            problem = "is neither a folder nor a model that the Hugging Face hub gives; offline, name a folder"
            if Path(name).is_dir():
                problem = "cannot be read"
            raise CheckpointError(f"{name} {problem} ({type(error).__name__}: {first_line(error)}).") from error


def read_hub_settings(name: str) -> dict[str, Any]:
    """What config.json says, of a folder or a model on the hub, whatever wrote it."""
    import transformers

    settings: dict[str, Any] = load_from_hub(transformers.PreTrainedConfig.get_config_dict, name)[0]
    return settings


def read_hub_config(name: str, **changes: Any) -> Any:
    """The config of a model of transformers, `changes` put in place of its own settings."""
    import transformers

    return load_from_hub(transformers.AutoConfig.from_pretrained, name, **changes)


class Loaded(NamedTuple):
    """A model of transformers, and how its file and its class differ in the names of their weights."""

    model: Any
    missing: set[str]
    """Weights that the file does not have, and that the model made up."""
    left_over: set[str]


def read_hub_model(model_class: Any, name: str, **settings: Any) -> Loaded:
    """A model of transformers.

    The caller judges what the file lacks or has left over: transformers' warnings of it are silenced.
    """
    model, report = load_from_hub(model_class.from_pretrained, name, output_loading_info=True, **settings)
    return Loaded(model, set(report["missing_keys"]), set(report["unexpected_keys"]))


@contextmanager
def quietly() -> Iterator[None]:
    """Silence transformers' warnings and its bar over weights that are on this machine.

    Bars of downloads stay. Afterwards everything is as it was.
    """
    import transformers
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    log: Any = transformers.utils.logging
    verbosity, had_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    hub_had_bars = not are_progress_bars_disabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    if hub_had_bars:
        enable_progress_bars()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if had_bars:
            log.enable_progress_bar()
            if not hub_had_bars:
                disable_progress_bars()


def first_line(error: Exception) -> str:
    """The first line of an error's message: libraries put advice about their own calls below it."""
    return str(error).strip().split("\n")[0]
