"""The errors a user can act on. The command line prints them as one line and exits with their `exit_code`."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import is_dataclass
from typing import Any, NamedTuple


def causes(error: BaseException | None) -> list[BaseException]:
    """The error and those that led to it, the first of them last."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def hub_problem(error: BaseException) -> str | None:
    """Why the Hugging Face hub gave nothing, to follow its name; None for an error that is not of the hub."""
    from huggingface_hub import constants  # takes a while to import

    chain = causes(error)
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if "GatedRepoError" in kinds:
        return "gives it only to those who accepted its terms: do that on its page, and log in (hf auth login)"
    if "RepositoryNotFoundError" in kinds:
        return "has none of that name, or a private one: check the name, or log in (hf auth login)"
    unreachable = {"HfHubHTTPError", "LocalEntryNotFoundError", "OfflineModeIsEnabled", "TransportError"}
    if "RemoteEntryNotFoundError" in kinds or not kinds & unreachable:
        return None  # the hub was asked, and a file is not there or not whole
    if constants.is_offline_mode():
        return "was not asked, since offline mode is on (HF_HUB_OFFLINE), and the local cache does not have all files"
    reason = next((f"{type(link).__name__}: {link}" for link in reversed(chain) if str(link)), "no answer")
    return f"could not be asked ({' '.join(reason.split())[:200]}), and the local cache does not have all files"


def page_command(page: str) -> str:
    """The command that shows a page of docs/, or what is below a heading of it: "data.md#sources"."""
    return f"openblip docs {page.replace('.md', '')}"


class OpenBlipError(Exception):
    """An error that the caller can fix: the message says what happened, where, and what to do."""

    exit_code = 2  # nothing could start; 1 where work that had begun has failed
    page: str | None = None
    """The page of docs/ that explains it, with the heading; None where that is the guide of what was being done."""

    def __init__(self, message: str = "", *, page: str | None = None) -> None:
        """page: a page that explains more than the one of the class. Tracebacks name it below the message."""
        super().__init__(message)
        self.page = page or self.page
        if self.page:
            self.add_note(f"See `{page_command(self.page)}`")


class UnsupportedTaskError(OpenBlipError):
    """A call that this checkpoint has no weights for; the message names what it can do."""

    page = "errors.md#a-checkpoint-that-cannot-do-this"


class ImageError(OpenBlipError):
    """An image that cannot be read; the message names it."""

    page = "errors.md#images-and-videos-that-cannot-be-read"


class VideoError(ImageError):
    """A video that cannot be decoded; code that skips unreadable images skips unreadable videos."""


class SourceError(OpenBlipError):
    """A data source that is missing, empty or in an unknown format."""

    page = "data.md#sources"


class NoSampleError(SourceError):
    """All of a source was read, and there is not one sample in it that can be used."""

    exit_code = 1


class CheckpointError(OpenBlipError):
    """A checkpoint with missing, left-over or wrongly shaped weights, or no checkpoint at all."""

    page = "checkpoints.md"


class FilterCheckError(OpenBlipError):
    """A filter that does not tell own captions from others; the message says how far it does, and what would help."""

    page = "capfilt.md#checking-the-filter-first"


class ConfigError(OpenBlipError):
    """Settings that contradict each other, the data or an earlier run."""


class MissingExtraError(OpenBlipError):
    """An optional package is not installed; the message gives the pip command."""

    page = "install.md#extras"


class OutputError(OpenBlipError):
    """A file that cannot be written to its end: the disk is full, or a limit of file sizes is reached."""

    page = "errors.md#files-that-cannot-be-written"
    exit_code = 1


class Condition(NamedTuple):
    """What options need to have an effect. Classes of settings have theirs in `conditions`."""

    options: str
    """Names as on the command line, separated by spaces; that of a group stands for all options in it."""
    holds: Callable[[Any], bool]
    """Of the settings that have the options."""
    reason: str
    """Why there is no effect otherwise, as a clause."""


def refuse_unused(settings: Any, given: Collection[str], prefix: str = "") -> None:
    """Raise ConfigError for a `given` option whose condition does not hold, in settings or in those within them.

    given: names of options. prefix: what stands before those of these settings.
    """
    conditions: Sequence[Condition] = getattr(settings, "conditions", ())
    for condition in conditions:
        names = tuple(prefix + option for option in condition.options.split())
        used = [name for name in given if name in names or name.startswith(tuple(f"{name}." for name in names))]
        if used and not condition.holds(settings):
            raise ConfigError(f"--{used[0]} has no effect here: {condition.reason}")
    for field, value in vars(settings).items():
        if is_dataclass(value):
            refuse_unused(value, given, f"{prefix}{field.replace('_', '-')}.")
