"""Models by folder or by their name on the Hugging Face hub, fetched or loaded by transformers.

Errors of transformers and of the hub become CheckpointErrors here. transformers takes a second to import and most of
what reads checkpoints needs none of it, so functions import it.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

    Weights are safetensors, or pytorch_model.bin or its shards where there are none.
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
            f"There is no checkpoint {name}: there is no such folder, and the Hugging Face hub has none of that name; "
            f"offline, name a folder or a shipped model ({type(error).__name__}: {first_line(error)})."
        ) from error
    return folder


def load_from_hub(load: Callable[..., Any], name: str, **settings: Any) -> Any:
    """Call a `from_pretrained` of transformers without its warnings; CheckpointError for what cannot be loaded."""
    is_folder = Path(name).is_dir()
    if not is_folder and (name.startswith((".", "/", "~")) or name.count("/") > 1):  # no name on the hub
        raise CheckpointError(f"There is no folder {name}; name one, or a model on the Hugging Face hub.")
    problem = "is neither a folder nor a model that the Hugging Face hub gives; offline, name a folder"
    with quietly():
        try:
            return load(name, **settings)
        except LOADING_ERRORS as error:
            raise CheckpointError(
                f"{name} {'cannot be read' if is_folder else problem} ({type(error).__name__}: {first_line(error)})."
            ) from error


def read_hub_config(name: str, **changes: Any) -> Any:
    """The config of a model of transformers, `changes` put in place of its own settings."""
    import transformers

    return load_from_hub(transformers.AutoConfig.from_pretrained, name, **changes)


def read_hub_model(model_class: Any, name: str, **settings: Any) -> tuple[Any, set[str], set[str]]:
    """A model of transformers, the names of weights that its file lacks, and of those that the model does not have.

    The model made up what its file lacks. The caller has to judge that: transformers' warnings about it are silenced.
    """
    model, report = load_from_hub(model_class.from_pretrained, name, output_loading_info=True, **settings)
    return model, set(report["missing_keys"]), set(report["unexpected_keys"])


def read_hub_tokenizer(name: str) -> Any:
    """The tokenizer of a language model of transformers.

    Raises CheckpointError also for a folder without a vocabulary, for which transformers makes an empty tokenizer.
    """
    import transformers

    try:
        tokenizer = load_from_hub(transformers.AutoTokenizer.from_pretrained, name)
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
        raise CheckpointError(f"{name}: the language model's tokenizer cannot be read: {first_line(error)}.") from error
    files = ("tokenizer.json", *tokenizer.vocab_files_names.values())
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in files):
        raise CheckpointError(
            f"{name} has no tokenizer of the language model: put its tokenizer.json and tokenizer_config.json there, "
            "or name the folder that has them as the tokenizer."
        )
    return tokenizer


@contextmanager
def quietly() -> Iterator[None]:
    """Silence transformers' warnings and its progress bar over weights, but not the bars of downloads."""
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
