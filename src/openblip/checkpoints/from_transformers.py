"""What transformers is asked for: settings and models by folder or hub name, quietly, with errors of ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from safetensors import SafetensorError

from openblip.errors import CheckpointError

# How transformers, the hub and safetensors say that a checkpoint is not there, unknown or torn.
LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)


class Loaded(NamedTuple):
    """A model of transformers, and how its file and its class differ in the names of their weights."""

    model: Any
    missing: set[str]
    """Weights that the file does not have; the model made them up."""
    left_over: set[str]


def read_config(source: str) -> Any:
    """The settings of a model of transformers; CheckpointError when there are none that can be read."""
    check_is_a_name(source)
    with quietly():
        try:
            return transformers.AutoConfig.from_pretrained(source)
        except LOADING_ERRORS as error:
            raise not_loaded(source, error) from error


def read_model(auto: Any, source: str, **settings: Any) -> Loaded:
    """`from_pretrained` of a class of transformers; CheckpointError when it fails.

    What the file lacks or has left over is the caller's to judge: transformers' warnings of it are silenced.
    """
    with quietly():
        try:
            model, report = auto.from_pretrained(source, output_loading_info=True, **settings)
        except LOADING_ERRORS as error:
            raise not_loaded(source, error) from error
    return Loaded(model, set(report["missing_keys"]), set(report["unexpected_keys"]))


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' warnings and its bar over weights that are on this machine.

    Bars of downloads stay. Afterwards everything is as it was.
    """
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


def not_loaded(source: str, error: Exception) -> CheckpointError:
    """The error of a source that transformers does not load."""
    reason = str(error).strip().split("\n")[0]
    where = "is neither a folder nor a model that the Hugging Face hub gives; offline, name a folder"
    if Path(source).is_dir():
        where = "cannot be read"
    return CheckpointError(f"{source} {where} ({type(error).__name__}: {reason}).")


def check_is_a_name(source: str) -> None:
    """CheckpointError for a path without folder, which must not be asked of the hub."""
    could_be_hub_name = not source.startswith((".", "/", "~")) and source.count("/") <= 1
    if not Path(source).is_dir() and not could_be_hub_name:
        raise CheckpointError(f"There is no folder {source}; name one, or a model on the Hugging Face hub.")
