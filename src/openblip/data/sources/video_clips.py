"""The clips of a data set that names them without a path or a suffix: looked for by name in a folder."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from openblip.data.sample import VIDEO_SUFFIXES
from openblip.data.sources import storage
from openblip.errors import SourceError


@dataclass(frozen=True, slots=True)
class ClipFolder:
    """The clips in a folder and its sub-folders, by name without suffix."""

    path: str
    clips: dict[str, str] = field(repr=False)

    @classmethod
    def of(cls, path: str) -> "ClipFolder":
        """Lists the folder once. Of clips of one name the one in the fewest sub-folders counts. Raises
        `SourceError` when there is none.
        """
        clips: dict[str, str] = {}
        found = storage.list_files(path, recursive=True)
        for file in sorted(found, key=lambda file: (file.count("/"), file)):
            name, _, suffix = os.path.basename(file).rpartition(".")
            if suffix.lower() in VIDEO_SUFFIXES:
                clips.setdefault(name, file)
        if not clips:
            raise SourceError(
                f"{path}: no clip ({', '.join(sorted(VIDEO_SUFFIXES))}) in this folder or below"
            )
        return cls(path, clips)

    def find(self, *names: str) -> str:
        """The path of the first clip that is there; raises `SourceError` that says what was looked for."""
        for name in names:
            if name in self.clips:
                return self.clips[name]
        suffixes = ", ".join(sorted(VIDEO_SUFFIXES))
        raise SourceError(f"no clip {' or '.join(names)} ({suffixes}) in {self.path} or below")

    def lacking(self, names: Sequence[str]) -> str:
        """How many of the clips are not there, and one of them; empty when all are."""
        wanted = dict.fromkeys(names)
        missing = [name for name in wanted if name not in self.clips]
        return f"{len(missing)} of {len(wanted)} clips, as {missing[0]}" if missing else ""
