"""`openblip caption`: one JSON line per caption, and a text file beside each image on request."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from openblip.cli import lines
from openblip.cli.options import DecodingOptions, ModelOptions, only_with
from openblip.cluster import EngineOptions
from openblip.data.sample import Sample, Source, safe_name
from openblip.errors import Condition, ConfigError, SourceError
from openblip.files import write_bytes
from openblip.generation.decoding import Decoding, check_decoding

if TYPE_CHECKING:
    from openblip.predictor import BasePredictor


@dataclass(frozen=True, kw_only=True)
class SidecarOptions:
    """Text files with the captions beside the images, as trainers of diffusion models read them."""

    conditions: ClassVar = (
        Condition(
            "prefix suffix extension overwrite append",
            lambda o: o.sidecar,
            "it is for the text files that --sidecar writes; add --sidecar",
        ),
    )

    sidecar: bool = False
    """Write the captions of a.jpg to a.txt beside it, one a line; images that have one with text are left alone."""
    prefix: str = ""
    """Sidecar: stands before every caption, with a space between."""
    suffix: str = ""
    """Sidecar: stands behind every caption, with a space between unless it begins with one or with punctuation."""
    extension: str = ".txt"
    """Sidecar: the ending of the text files, in place of the image's."""
    overwrite: bool = False
    """Sidecar: caption also images that have a text file, and write it anew."""
    append: bool = False
    """Sidecar: caption also images that have a text file, and add the captions that are not among its lines."""

    def __post_init__(self) -> None:
        if self.append and self.overwrite:
            raise ConfigError("--append keeps what text files hold and --overwrite does not; give one of them")
        ending = self.extension
        if not ending.startswith(".") or len(ending) < 2 or "/" in ending or os.sep in ending:
            raise ConfigError(f"--extension {ending!r} is no ending of a file, as .txt and .caption are")
        if lines.is_media(f"a{ending}"):
            raise ConfigError(f"--extension {ending} is that of images or videos, which would be written over")
        if len((self.prefix + self.suffix).splitlines()) > 1:
            raise ConfigError("--prefix and --suffix must be one line: each line of a text file is a caption")

    def text_file(self, image: str) -> Path:
        return Path(image).with_suffix(self.extension)

    def line(self, caption: str) -> str:
        """Put a caption between prefix and suffix, in one line."""
        text = " ".join(caption.splitlines())
        if self.prefix:
            text = f"{self.prefix}{'' if self.prefix[-1].isspace() or not text else ' '}{text}"
        if self.suffix:
            is_joined = self.suffix[0].isspace() or self.suffix.startswith(tuple(",.;:!?)")) or not text
            text = f"{text}{'' if is_joined or text[-1].isspace() else ' '}{self.suffix}"
        return text

    def write(self, image: str, captions: Sequence[str]) -> None:
        """Write the text file of an image, whole or not at all."""
        file, earlier = self.text_file(image), b""
        written = [self.line(caption) for caption in captions]
        if self.append and file.exists():
            earlier = file.read_bytes()
            present = {line.strip() for line in earlier.decode("utf-8-sig").splitlines()}
            written = [line for line in dict.fromkeys(written) if line.strip() not in present]
            if earlier.strip() and not earlier.endswith(b"\n"):
                earlier += b"\n"
        write_bytes(file, earlier + "".join(f"{line}\n" for line in written).encode())

    def has_text(self, image: str) -> bool:
        """Whether the text file of an image is there and not empty; ConfigError for text that cannot be added to."""
        file = self.text_file(image)
        try:
            return file.exists() and (not file.is_file() or bool(file.read_text(encoding="utf-8-sig").strip()))
        except UnicodeDecodeError as error:
            if self.append:
                raise ConfigError(f"{file} is not UTF-8 text ({error}), so --append cannot add to it") from error
            return True

    def choose(self, sources: Sequence[Source]) -> tuple[list[str], int]:
        """Return the images to write for, and how many are left alone because they have a text file.

        Raises `SourceError` when a source has no image files of this machine or two images share a text file, and
        `ConfigError` when a folder cannot be written into.
        """
        paths: list[str] = []
        for source in sources:
            if not isinstance(source, lines.FileSource) or any("://" in path for path in source.paths):
                advice = "for --sidecar name image files or folders of them, or leave it out and name --out"
                problem = "is no image file on this machine, so no text file can stand beside it"
                raise SourceError(f"{source.name} {problem}; {advice}")
            paths += source.paths
        has_text = {path: self.has_text(path) for path in paths}
        chosen = [path for path in paths if self.overwrite or self.append or not has_text[path]]
        image_of_text: dict[str, str] = {}
        pairs = [(image_of_text.setdefault(os.path.abspath(self.text_file(path)), path), path) for path in chosen]
        if shared := [(first, path) for first, path in pairs if first is not path]:
            first, second = shared[0]
            more = f", and {len(shared) - 1} more such images" if len(shared) > 1 else ""
            raise SourceError(f"{first} and {second} would share {self.text_file(first)}{more}; rename or move one")
        # An image that is not there is reported where it is read.
        for folder in dict.fromkeys(Path(path).parent for path in chosen if Path(path).exists()):
            if not os.access(folder, os.W_OK | os.X_OK):
                advice = "change its permissions, or leave --sidecar out and name --out"
                raise ConfigError(f"{folder} cannot be written into, so its images can have no text files; {advice}")
        return chosen, len(paths) - len(chosen)


@dataclass(frozen=True, kw_only=True)
class CaptionTask(lines.LineTask):
    """What `openblip caption` asks of each image."""

    prompt: str | None
    decoding: Decoding
    num_captions: int
    confidences: bool

    @property
    def fields(self) -> Sequence[str]:
        return ("caption", "logprob", *(("tokens", "token_logprobs") if self.confidences else ()))

    @property
    def settings(self) -> Mapping[str, Any]:
        shown = {name: getattr(self, name) for name in ("prompt", "num_captions", "confidences")}
        return {
            "command": "caption",
            **shown,
            "decoding": type(self.decoding).__name__.lower(),
            **asdict(self.decoding),
        }

    @property
    def num_lines(self) -> int:
        return self.num_captions

    def resolved(self, predictor: "BasePredictor") -> "CaptionTask":
        predictor.caption([], prompt=self.prompt, decoding=self.decoding)  # raises what it cannot do
        return replace(self, prompt=predictor.prompt if self.prompt is None else self.prompt)

    def texts(self, sample: Sample) -> Sequence[str]:
        return ()

    def rows(
        self, predictor: "BasePredictor", batch: lines.EncodedBatch, batch_size: int
    ) -> Iterator[Mapping[str, Any]]:
        captions = predictor.caption(
            batch.images, self.prompt, self.decoding, self.num_captions, batch_size=batch_size, return_scores=True
        )
        for caption in captions if self.num_captions == 1 else chain.from_iterable(captions):
            row: dict[str, Any] = {"caption": caption.text, "logprob": round(caption.logprob, 6)}
            if self.confidences:
                row["tokens"] = list(caption.tokens)
                row["token_logprobs"] = [round(logprob, 6) for logprob in caption.token_logprobs]
            yield row


@only_with(
    Condition(
        "confidences",
        lambda o: o.reading.out is not None or not o.sidecar.sidecar,
        "text files hold captions alone, and --sidecar prints no lines; add --out",
    ),
    Condition("encoder-token", lambda o: False, "a caption begins with [DEC]; it is for texts that are read"),
)
def command(
    sources: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE...", help_behavior_hint="")],
    /,
    *,
    model: ModelOptions,
    reading: lines.ReadingOptions,
    engine: EngineOptions,
    sidecar: SidecarOptions,
    prompt: str | None = None,
    num_captions: int = 1,
    confidences: bool = False,
    decoding: DecodingOptions,
    seed: int = 0,
) -> int:
    """Captions images and videos: one JSON line {"key", "caption", "logprob"} per caption.

    Images that cannot be read are named on standard error and skipped; the exit code is then 1. With --out, the same
    command again continues where it was stopped, and one with other settings is refused. So it does with --sidecar,
    which prints no lines; together with --overwrite or --append it needs --out to know what is done.

    Args:
        sources: image and video files, folders of them (searched recursively), or data sources ("shards/*.tar").
        prompt: the first words of every caption; the checkpoint's own when not given.
        num_captions: captions per image.
        confidences: add "tokens", the word pieces, and "token_logprobs" to each line.
        seed: nucleus: with the image it decides the sampled captions, whatever the order or batch.
    """
    strategy = decoding.build(seed)
    check_decoding(strategy, num_captions)
    inputs, left_alone = lines.find_sources(sources, reading), ""
    path_of_key: dict[str, str] = {}
    if sidecar.sidecar:
        paths, num_left_alone = sidecar.choose(inputs)
        unused = {source.name: count for source in inputs for count in source.unused.values()}
        inputs = [lines.FileSource("images", paths, unused=unused)]
        path_of_key = {safe_name(path): path for path in paths}
        if num_left_alone:
            left_alone = f", left {num_left_alone} alone that have a {sidecar.extension} file"
    task = CaptionTask(prompt=prompt, decoding=strategy, num_captions=num_captions, confidences=confidences)
    output = lines.OutputLines(inputs, reading, model, engine, task, printed=not sidecar.sidecar)
    # A run that was stopped has written these lines, and maybe not their text files.
    for (_, key), present in output.present.items():
        if key in path_of_key:
            sidecar.write(path_of_key[key], [row["caption"] for row in present])
    for written in output.write(label="captioning"):
        for sample, rows in written if sidecar.sidecar else ():
            sidecar.write(path_of_key[sample.key], [row["caption"] for row in rows])
    return output.finish("captioned", left_alone)
