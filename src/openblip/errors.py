"""The errors a user can act on. The command line prints them as one line and exits with 2."""


class OpenBlipError(Exception):
    """An error that the caller can fix: the message says what happened, where, and what to do."""


class UnsupportedTaskError(OpenBlipError):
    """A call that this checkpoint has no weights for; the message names what it can do."""


class ImageError(OpenBlipError):
    """An image that cannot be read; the message names it."""


class VideoError(ImageError):
    """A video that cannot be decoded; code that skips unreadable images skips unreadable videos."""


class SourceError(OpenBlipError):
    """A data source that is missing, empty or in an unknown format."""


class NoSampleError(SourceError):
    """All of a source was read, and there is not one sample in it that can be used; the command line exits with 1."""


class CheckpointError(OpenBlipError):
    """A checkpoint with missing, left-over or wrongly shaped weights, or no checkpoint at all."""


class ConfigError(OpenBlipError):
    """Settings that contradict each other, the data or an earlier run."""


class MissingExtraError(OpenBlipError):
    """An optional package is not installed; the message gives the pip command."""
