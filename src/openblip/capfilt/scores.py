"""Scores of a finished CapFilt run: each is a name and a function from a batch of texts to a column.

They are written to `DIR/scores/<name>/<shard>.parquet` and joined when texts are read (`data.captions.read_texts`); the
finished caption files never change. Scores that are about single texts and images are computed first, in one pass over
the images of a shard; then those that are about the texts of all shards.

R rows (texts) and I images of a batch, E width of embeddings.
"""

import hashlib
import importlib.util
import inspect
import re
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from openblip.capfilt.config import ScoreConfig
from openblip.capfilt.duplicates import (
    GroupTable,
    TextsSeen,
    folded_text,
    hash_numbers,
    minhash_bands,
    near_any,
    perceptual_hash,
)
from openblip.capfilt.folder import CapFiltFolder, check_sources_unchanged
from openblip.capfilt.neighbours import ReferencePairs
from openblip.data.captions import (
    CAPTION_SCHEMA,
    ShardEmbeddings,
    embedding_file,
    finished_scores,
    read_embeddings,
    read_texts,
    score_file,
    text_columns,
    write_score,
)
from openblip.data.config import SourceOptions
from openblip.data.images import read_image
from openblip.data.reader import ReadBatch, in_batches, read_source, shard_items
from openblip.data.sample import Reject, Sample, Source
from openblip.data.sources import absolute_spec, open_source
from openblip.distributed import find_device
from openblip.errors import (
    CheckpointError,
    ConfigError,
    MissingExtraError,
    OpenBlipError,
    OutputError,
    SourceError,
    UnsupportedTaskError,
)
from openblip.evaluation.captioning import reference_captions
from openblip.files import changed_settings, hash_int, is_local, read_json, remove_partials, write_json
from openblip.predictor import SimilarityScorer, load_captioner, load_scorer
from openblip.progress import Progress

TEXTS_AT_ONCE = 4096  # of scores that look at no image
MAX_REJECTS_STORED = 100  # of a shard, in the report of a score
FUNCTION = re.compile(r"(?P<file>.+\.py):(?P<name>[^\W\d]\w*)")
COLUMN = re.compile(r"[^\W\d][\w-]*")
BOILERPLATE = re.compile(
    r"""
      ^\W*(?:img|dsc[nf]?|image|photo|picture|pic|screenshot|untitled|thumbnail|logo|icon|banner|null|none)?[\W\d_]*$
    | \.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|avif|heic)\b
    | https?:// | www\.\w | \b[\w-]+\.(?:com|net|org)\b | [\w.+-]+@[\w-]+\.\w
    | \b(?:click|tap)\s+(?:here|to)\b | \b(?:buy|shop|order)\s+(?:now|online)\b
    | \bfree\s+(?:shipping|download|delivery)\b | \bdownload\s+(?:now|free)\b | \badd\s+to\s+cart\b
    | \b(?:read|learn|see)\s+more\b | \bsign\s+up\b | \blog\s+in\b | \bsubscribe\b
    | \ball\s+rights\s+reserved\b | © | \(c\)\s*\d{4} | \bcopyright\b
    | \broyalty[\s-]free\b | \bstock\s+(?:photo|image|vector|illustration|footage)s?\b
    | \b(?:shutterstock|istock|getty\s+images|alamy)\b
    | [$€£¥]\s?\d | \b\d+\s?%\s+off\b
    | ^\W*(?:image|photo|picture)\s+(?:may\s+contain|not\s+found|coming\s+soon|\d+\s+of\s+\d+)
    | \bno\s+image\s+available\b
    """,
    re.IGNORECASE | re.VERBOSE,
)

ColumnValues: TypeAlias = Sequence[Any] | np.ndarray[Any, Any] | pa.Array
ReadImage: TypeAlias = Mapping[str, Any]
"""What the columns need of an image, by their names; those of one scorer have the same value."""


class ImageFile:
    """The image of a sample, decoded when it is first looked at. Raises `ImageError`."""

    def __init__(self, sample: Sample) -> None:
        self.data, self.name = sample.image, sample.place

    @cached_property
    def image(self) -> Image.Image:
        """RGB, as a person sees it."""
        return read_image(self.data, name=self.name)


@dataclass(frozen=True, kw_only=True)
class ScoreBatch:
    """Images of a shard with all their texts."""

    shard: str
    texts: pa.Table  # R rows of the caption file
    owners: np.ndarray[Any, np.dtype[np.int64]]  # (R,), of each text the position of its image in this batch
    rows: np.ndarray[Any, np.dtype[np.int64]]  # (R,), places in the caption file
    image_rows: np.ndarray[Any, np.dtype[np.int64]]  # (I,), places of the images among those of the shard
    images: list[Any] = field(default_factory=list)  # (I,), what the score's `read` made of each, where it has one

    @property
    def captions(self) -> list[str]:
        captions: list[str] = self.texts["caption"].to_pylist()
        return captions

    def by_image(self) -> list[list[str]]:
        """The texts of each image."""
        lists: list[list[str]] = [[] for _ in self.image_rows]
        for owner, caption in zip(self.owners.tolist(), self.captions, strict=True):
            lists[owner].append(caption)
        return lists

    def of_images(self, values: Sequence[Any]) -> list[Any]:
        """A value of each image as one of each text."""
        return [values[owner] for owner in self.owners.tolist()]


class Scorer(NamedTuple):
    """What computes scores."""

    columns: Mapping[str, pa.DataType | None]
    """The scores by name, with the type of their column; None is what the values say."""
    compute: Callable[[ScoreBatch], Sequence[ColumnValues]]
    """The values of each column, one for each text; null (None) where there is none."""
    read: Callable[[ImageFile], Any] | None = None
    """What is needed of an image; runs in the threads that read, and holds no model, since these may be in another
    process. None: no image is read."""


class ScoreKind(NamedTuple):
    """How a score is prepared, and what it depends on."""

    build: "Callable[[ScoreRun], Scorer]"
    settings: tuple[str, ...] = ()
    """Fields of `ScoreConfig` that decide its values."""
    roles: tuple[str, ...] = ()
    """Models of the run that decide them."""
    requires: tuple[str, ...] = ()
    """Scores of all shards that it is made of, which are computed first."""
    is_across: bool = False
    """Whether a value depends on the texts of other shards."""
    is_central: bool = False
    """Whether something is made first that serves all shards, a table or an evaluation set; one process does that."""
    needs_embeddings: bool = False


@dataclass(kw_only=True)
class ScoreSummary:
    """What was done: scores by name with the number of shards finished now, (score, shard, error) of what failed, the
    texts without a value by score, and samples whose image can no longer be read."""

    done: dict[str, int] = field(default_factory=dict)
    num_shards: int = 0
    failed: list[tuple[str, str, str]] = field(default_factory=list)
    nulls: dict[str, int] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)

    def add(self, part: "ScoreSummary") -> None:
        """Count what was done of other shards."""
        for counts, more in (self.done, part.done), (self.nulls, part.nulls):
            counts.update({name: counts.get(name, 0) + count for name, count in more.items()})
        self.failed += part.failed
        self.rejects += part.rejects


class ScoreRun:
    """A finished run, or what is finished of it, with the models and tables that scores are computed with. They are
    made when they are first asked for, and closed with the run, which is a context manager.
    """

    def __init__(self, directory: str | Path, config: ScoreConfig, device: str | None, dtype: str) -> None:
        self.config, self.folder = config, CapFiltFolder(directory)
        self.manifest = self.folder.read_manifest()
        self.shards = self.folder.done_shards()
        if not self.shards:
            raise ConfigError(f"{directory}: no shard is finished; run the same openblip capfilt command again")
        self.device, self.dtype = device, dtype
        self._open = ExitStack()

    def __enter__(self) -> "ScoreRun":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    @cached_property
    def source(self) -> Source:
        """The original images."""
        source = open_source(self.manifest["source"], **SourceOptions.stated(self.manifest).reading)
        check_sources_unchanged(self.folder, source, self.shards)
        return source

    @cached_property
    def _counts(self) -> list[tuple[int, int]]:
        """Of each shard how many texts and images it has."""
        keys = (read_texts(self.folder.root, shard, ["key"])["key"] for shard in self.shards)
        return [(len(of_shard), len(image_starts(of_shard))) for of_shard in keys]

    @cached_property
    def num_texts(self) -> dict[str, int]:
        """How many texts each shard has."""
        return {shard: texts for shard, (texts, _) in zip(self.shards, self._counts, strict=True)}

    @cached_property
    def num_images(self) -> dict[str, int]:
        return {shard: images for shard, (_, images) in zip(self.shards, self._counts, strict=True)}

    @cached_property
    def first_text(self) -> dict[str, int]:
        """The number in the run of each shard's first text."""
        return dict(zip(self.shards, np.cumsum([0, *self.num_texts.values()])[:-1].tolist(), strict=True))

    @cached_property
    def first_image(self) -> dict[str, int]:
        """The number in the run of each shard's first image."""
        return dict(zip(self.shards, np.cumsum([0, *self.num_images.values()])[:-1].tolist(), strict=True))

    def model(self, role: str, call: str) -> Any:
        """The captioner or filter of the run; ConfigError for another one, UnsupportedTaskError without the call."""
        if role not in self._models:
            stated = self.manifest["models"][role]
            settings = self.manifest.get("config", {})
            quantization = settings.get("quantization") if role == "captioner" else None
            dtype = stated.get("dtype", settings.get("dtype", "float32"))
            model: Any = load_captioner(  # which reads filters too
                stated["checkpoint"],
                device=self.device,
                dtype=dtype,
                prompt=settings.get("prompt") if role == "captioner" else None,
                quantization=quantization,
            )
            if model.fingerprint() != stated["sha256"]:
                raise ConfigError(
                    f"{stated['checkpoint']} is no longer the {role} of {self.folder.root}: bring it back"
                )
            self._models[role] = model
        if not hasattr(self._models[role], call):
            checkpoint = self.manifest["models"][role]["checkpoint"]
            raise UnsupportedTaskError(f"{checkpoint}, the {role} of the run, cannot {call}")
        return self._models[role]

    @cached_property
    def _models(self) -> dict[str, Any]:
        return {}

    @cached_property
    def similarity(self) -> SimilarityScorer:
        """The CLIP or SigLIP."""
        assert self.config.clip is not None
        return load_scorer(self.config.clip, self.device, self.dtype)

    def embeddings(self, shard: str) -> ShardEmbeddings:
        """Those that the run kept, of a shard; of the latest only, since shards are worked on one after another."""
        if self._latest is None or self._latest[0] != shard:
            self._latest = shard, read_embeddings(self.folder.root, shard)
        return self._latest[1]

    _latest: tuple[str, ShardEmbeddings] | None = None

    def has_embeddings(self, shard: str) -> bool:
        return embedding_file(self.folder.root, shard).is_file()

    def group_table(self) -> GroupTable:
        """An empty one, in a folder that is removed with the run."""
        scores = self.folder.root / "scores"
        place = None
        if is_local(scores):
            scores.mkdir(parents=True, exist_ok=True)
            place = scores
        folder = self._open.enter_context(tempfile.TemporaryDirectory(suffix=".partial", dir=place))
        return self._open.enter_context(GroupTable.in_folder(Path(folder)))

    def evaluation_set(self) -> Source:
        """What --against names."""
        assert self.config.against is not None
        return open_source(self.config.against, images=self.config.against_images)

    @cached_property
    def references(self) -> ReferencePairs:
        """Pairs of all shards, chosen by hash, to look for neighbours among."""
        share = self.config.num_references / max(1, sum(self.num_texts.values()))
        limit = int(min(1.0, share) * 2**63)
        numbers, images, texts, owners, itc = [], [], [], [], []
        count = 0
        for shard in self.shards:
            table = read_texts(self.folder.root, shard, ["key", "itc"])
            starts = image_starts(table["key"])
            keys = table["key"].take(pa.array(starts)).to_pylist()
            chosen = np.array([hash_int(f"{shard}/{key}") < limit for key in keys], bool)  # (I,)
            image = np.repeat(np.arange(len(starts)), np.diff([*starts, len(table)]))  # (R,)
            vectors = self.embeddings(shard)
            rows = np.flatnonzero(chosen[image] & vectors.texts.any(axis=1))
            numbers.append(np.flatnonzero(chosen) + self.first_image[shard])
            images.append(vectors.images[chosen])
            texts.append(vectors.texts[rows])
            owners.append((np.cumsum(chosen) - 1)[image[rows]] + count)
            itc.append(table["itc"].to_numpy()[rows])
            count += int(chosen.sum())
        return ReferencePairs.build(
            np.concatenate(numbers),
            np.concatenate(images),
            np.concatenate(texts),
            np.concatenate(owners),
            np.concatenate(itc),
            find_device(self.device),
        )


def image_starts(keys: pa.ChunkedArray) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The rows at which images begin, (I,): the rows of an image stand together."""
    key = keys.combine_chunks()
    starts = np.ones(len(key), bool)
    if len(key) > 1:
        starts[1:] = pc.not_equal(key[1:], key[:-1]).to_numpy(zero_copy_only=False)
    return np.flatnonzero(starts)


# What is computed of a text


def _of_texts(name: str, kind: pa.DataType, function: Callable[[str], Any]) -> ScoreKind:
    """A score of a text alone."""

    def build(run: ScoreRun) -> Scorer:
        return Scorer({name: kind}, lambda batch: [[function(caption) for caption in batch.captions]])

    return ScoreKind(build)


def is_boilerplate(text: str) -> bool:
    """Whether a text is a file name, an address, an offer or the like, and says nothing of an image."""
    return BOILERPLATE.search(text) is not None


def _build_language(run: ScoreRun) -> Scorer:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise MissingExtraError('py3langid is not installed: pip install "openblip[capfilt]"') from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def identify(text: str) -> tuple[str | None, float | None]:
        if not any(map(str.isalpha, text)):
            return None, None
        language, probability = identifier.classify(text)
        return language, float(probability)

    def compute(batch: ScoreBatch) -> Sequence[ColumnValues]:
        return list(zip(*map(identify, batch.captions), strict=True)) or [[], []]

    return Scorer({"language": pa.string(), "language_probability": pa.float32()}, compute)


def _build_minhash(run: ScoreRun) -> Scorer:
    def compute(batch: ScoreBatch) -> Sequence[ColumnValues]:
        return [minhash_bands([folded_text(caption) for caption in batch.captions], run.config.text_similarity)]

    return Scorer({"text_minhash": pa.binary()}, compute)


def _build_sieve(run: ScoreRun) -> Scorer:
    """SIEVE (Mahmoud et al. 2024) compares web texts with generated ones in the space of a sentence encoder; here it is
    that of the filter, whose embeddings may be there already.
    """

    def vectors(batch: ScoreBatch) -> np.ndarray[Any, Any]:
        if run.has_embeddings(batch.shard):
            kept: np.ndarray[Any, Any] = run.embeddings(batch.shard).texts[batch.rows].astype(np.float32)
            return kept
        model, captions = run.model("filter", "embed_texts"), batch.captions
        has_words = np.array([[bool(caption.strip())] for caption in captions], bool).reshape(-1, 1)
        embedded: np.ndarray[Any, Any] = model.embed_texts(captions, run.config.batch_size).numpy() * has_words
        return embedded

    def compute(batch: ScoreBatch) -> Sequence[ColumnValues]:
        texts = vectors(batch)  # (R, E)
        is_web = pc.equal(batch.texts["source"], "web").to_numpy(zero_copy_only=False)
        has_words = texts.any(axis=1)
        web, synthetic = np.flatnonzero(is_web & has_words), np.flatnonzero(~is_web & has_words)
        best = np.full(len(texts), -np.inf)
        for owner in np.unique(batch.owners[web]):
            ours = web[batch.owners[web] == owner]
            others = synthetic[batch.owners[synthetic] == owner]
            if len(others):
                best[ours] = (texts[ours] @ texts[others].T).max(axis=1)
        return [pa.array(best, pa.float32(), mask=~np.isfinite(best))]

    return Scorer({"sieve": pa.float32()}, compute)


# What is computed of an image, and of an image with its texts


def _of_images(kinds: Mapping[str, pa.DataType], read: Callable[[ImageFile], tuple[Any, ...]]) -> ScoreKind:
    """Scores that all texts of an image share."""

    def build(run: ScoreRun) -> Scorer:
        def compute(batch: ScoreBatch) -> Sequence[ColumnValues]:
            return [batch.of_images(values) for values in zip(*batch.images, strict=True)]

        return Scorer(kinds, compute, read)

    return ScoreKind(build)


def _read_size(file: ImageFile) -> tuple[int, int, float]:
    width, height = file.image.size
    return width, height, width / height


def _build_logprob(run: ScoreRun) -> Scorer:
    captioner = run.model("captioner", "score_captions")
    prompt, preprocessing = run.manifest.get("config", {}).get("prompt"), captioner.preprocessing

    def compute(batch: ScoreBatch) -> Sequence[ColumnValues]:
        pixels = captioner.stack(batch.images)
        different = [list(dict.fromkeys(texts)) for texts in batch.by_image()]  # candidates often repeat each other
        scores = captioner.score_captions(pixels, different, prompt, run.config.batch_size)
        by_text = [dict(zip(*of_image, strict=True)) for of_image in zip(different, scores, strict=True)]
        flat = [by_text[owner][caption] for owner, caption in zip(batch.owners.tolist(), batch.captions, strict=True)]
        known = zip(flat, batch.captions, strict=True)
        sums = [score.logprob if caption.strip() else None for score, caption in known]
        counts = (score.num_tokens for score in flat)
        return [sums, [None if value is None else value / count for value, count in zip(sums, counts, strict=True)]]

    def read(file: ImageFile) -> Any:
        return preprocessing(file.image)

    return Scorer({"text_logprob": pa.float32(), "token_logprob": pa.float32()}, compute, read)


def _build_clip(run: ScoreRun) -> Scorer:
    scorer, reader = run.similarity, run.similarity.image_reader

    def compute(batch: ScoreBatch) -> Sequence[ColumnValues]:
        scores = scorer.score(batch.images, batch.by_image(), run.config.batch_size)
        return [[score for of_image in scores for score in of_image]]

    return Scorer({"clip": pa.float32()}, compute, lambda file: reader(file.image))


def _match_function(spec: str) -> re.Match[str]:
    if found := FUNCTION.fullmatch(spec):
        return found
    raise ConfigError(f"capfilt-score: {spec} is no FILE.py:FUNCTION")


def _of_function(spec: str, column: str) -> ScoreKind:
    """The score of a user's function, `FILE.py:FUNCTION`, which is loaded at once.

    It is called with a list of the rows of some texts, each a dict with the columns of the caption file, and, where it
    has a second parameter, with the image (RGB, `PIL.Image`) of each row. It returns one value for each row, numbers,
    booleans or strings, or None. Raises `ConfigError` when there is no such function.
    """
    found = _match_function(spec)
    path = Path(found["file"])
    module_spec = importlib.util.spec_from_file_location(f"openblip_score_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # the user's code may do anything
        raise ConfigError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    function = getattr(module, found["name"], None)
    if not callable(function):
        raise ConfigError(f"{path} has no function {found['name']}")
    try:
        num_parameters = len(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        num_parameters = 2
    if num_parameters not in (1, 2):
        raise ConfigError(f"{spec} has {num_parameters} parameters; give it one, rows, or two, rows and images")

    def compute(batch: ScoreBatch) -> Sequence[ColumnValues]:
        rows = batch.texts.to_pylist()
        arguments = (rows, batch.of_images(batch.images)) if num_parameters == 2 else (rows,)
        try:
            values = list(function(*arguments))
        except Exception as error:
            raise ConfigError(f"{spec} failed: {type(error).__name__}: {error}") from error
        if len(values) != len(rows):
            raise ConfigError(f"{spec} returned {len(values)} values for {len(rows)} rows")
        return [[value.item() if isinstance(value, np.generic) else value for value in values]]

    scorer = Scorer({column: None}, compute, (lambda file: file.image) if num_parameters == 2 else None)
    return ScoreKind(lambda run: scorer)


# What is computed of all shards


def _group_values(run: ScoreRun, table: GroupTable, column: str, bands: str | None = None) -> None:
    """Add the images, or where there are bands the texts, of all shards."""
    for shard in run.shards:
        texts = read_texts(run.folder.root, shard, [column, *filter(None, [bands])])
        if column == "caption":
            folded = pa.array([folded_text(text) or None for text in texts[column].to_pylist()], pa.string())
            table.add(run.first_text[shard], folded, None if bands is None else texts[bands].combine_chunks())
        else:
            starts = image_starts(read_texts(run.folder.root, shard, ["key"])["key"])
            values = texts[column].take(pa.array(starts)).combine_chunks()
            if column == "image_hash":
                numbers = hash_numbers(values.fill_null("0").to_pylist())
                values = pa.array(numbers, mask=values.is_null().to_numpy(zero_copy_only=False))
            table.add(run.first_image[shard], values)


def _of_groups(
    names: tuple[str, ...], column: str, fill: Callable[[ScoreRun, GroupTable], None]
) -> "Callable[[ScoreRun], Scorer]":
    """Groups of texts, or of images, whose texts then share a value; `fill` adds all shards and makes the groups."""
    of_texts = column == "caption"

    def build(run: ScoreRun) -> Scorer:
        table = run.group_table()
        fill(run, table)

        def compute(batch: ScoreBatch) -> Sequence[ColumnValues]:
            places = batch.rows if of_texts else batch.image_rows
            first = (run.first_text if of_texts else run.first_image)[batch.shard] + int(places[0])
            groups = table.read(first, len(places))[: len(names)]
            return groups if of_texts else [group.take(pa.array(batch.owners)) for group in groups]

        return Scorer(dict.fromkeys(names, pa.int64()), compute)

    return build


def _fill_exact_images(run: ScoreRun, table: GroupTable) -> None:
    _group_values(run, table, "image_sha256")
    table.group_equal()


def _fill_near_images(run: ScoreRun, table: GroupTable) -> None:
    _group_values(run, table, "image_hash")
    table.group_near_hashes(run.config.image_distance)


def _fill_exact_texts(run: ScoreRun, table: GroupTable) -> None:
    _group_values(run, table, "caption")
    table.group_equal()


def _fill_near_texts(run: ScoreRun, table: GroupTable) -> None:
    _group_values(run, table, "caption", "text_minhash")
    table.group_near_texts(run.config.text_similarity)


def _build_leaked_image(run: ScoreRun) -> Scorer:
    def read(sample: Sample) -> str:
        return perceptual_hash(ImageFile(sample).image)

    source = run.evaluation_set()
    entries = read_source(source, read, num_workers=run.config.num_workers, keep_going=True)
    others = hash_numbers({entry[1] for entry in entries if not isinstance(entry, Reject)})
    if not len(others):
        raise SourceError(f"{source.name}: no image of the evaluation set can be read")

    def compute(batch: ScoreBatch) -> Sequence[ColumnValues]:
        hashes = batch.texts["image_hash"].combine_chunks()
        known = hashes.is_valid().to_numpy(zero_copy_only=False)
        is_near = near_any(hash_numbers(hashes.fill_null("0").to_pylist()), others, run.config.image_distance)
        return [pa.array(is_near, mask=~known)]

    return Scorer({"leaked_image": pa.bool_()}, compute)


def _build_leaked_text(run: ScoreRun) -> Scorer:
    def texts(source: Source) -> Iterator[str]:
        for shard in source.shards():
            for item in shard_items(source.read(shard, images=False), shard):
                if isinstance(item, Sample):
                    yield from (*item.captions, *reference_captions(item))

    seen = TextsSeen(texts(run.evaluation_set()), run.config.text_similarity)
    return Scorer({"leaked_text": pa.bool_()}, lambda batch: [seen.has(batch.captions)])


def _build_lemon(run: ScoreRun) -> Scorer:
    references = run.references

    def compute(batch: ScoreBatch) -> Sequence[ColumnValues]:
        vectors = run.embeddings(batch.shard)
        numbers = batch.image_rows + run.first_image[batch.shard]
        images, texts = vectors.images[batch.image_rows], vectors.texts[batch.rows]
        found = references.look_around(numbers, images, texts, batch.owners, run.config.num_neighbours)
        itc = batch.texts["itc"].to_numpy()
        has_words = texts.any(axis=1)
        columns = (found.images.numpy(), found.texts.numpy(), itc + found.images.numpy() + found.texts.numpy())
        return [pa.array(column, pa.float32(), mask=~(has_words & np.isfinite(column))) for column in columns]

    return Scorer(dict.fromkeys(("lemon_image", "lemon_text", "lemon"), pa.float32()), compute)


_LANGUAGE = ScoreKind(_build_language)
_SIZE = _of_images({"width": pa.int32(), "height": pa.int32(), "aspect": pa.float32()}, _read_size)
_LOGPROB = ScoreKind(_build_logprob, roles=("captioner",))
_NEAR_IMAGES = ScoreKind(
    _of_groups(("image_group", "image_repeat"), "image_hash", _fill_near_images),
    settings=("image_distance",), requires=("image_hash",), is_across=True, is_central=True,
)  # fmt: skip
_NEAR_TEXTS = ScoreKind(
    _of_groups(("text_group", "text_repeat"), "caption", _fill_near_texts),
    settings=("text_similarity",), requires=("text_minhash",), is_across=True, is_central=True,
)  # fmt: skip
_LEMON = ScoreKind(
    _build_lemon, settings=("num_neighbours", "num_references"), roles=("filter",), is_across=True,
    needs_embeddings=True,
)  # fmt: skip
_AGAINST = ("against", "against_images")
SCORE_KINDS: dict[str, ScoreKind] = {
    "num_words": _of_texts("num_words", pa.int32(), lambda text: len(text.split())),
    "num_characters": _of_texts("num_characters", pa.int32(), len),
    "language": _LANGUAGE,
    "language_probability": _LANGUAGE,
    "boilerplate": _of_texts("boilerplate", pa.bool_(), is_boilerplate),
    "sieve": ScoreKind(_build_sieve, roles=("filter",)),
    "text_logprob": _LOGPROB,
    "token_logprob": _LOGPROB,
    "clip": ScoreKind(_build_clip),
    "width": _SIZE,
    "height": _SIZE,
    "aspect": _SIZE,
    "image_sha256": _of_images(
        {"image_sha256": pa.string()}, lambda file: (hashlib.sha256(file.data).hexdigest(),)
    ),
    "image_hash": _of_images({"image_hash": pa.string()}, lambda file: (perceptual_hash(file.image),)),
    "text_minhash": ScoreKind(_build_minhash, settings=("text_similarity",)),
    "exact_image_group": ScoreKind(
        _of_groups(("exact_image_group",), "image_sha256", _fill_exact_images),
        requires=("image_sha256",), is_across=True, is_central=True,
    ),
    "image_group": _NEAR_IMAGES,
    "image_repeat": _NEAR_IMAGES,
    "exact_text_group": ScoreKind(
        _of_groups(("exact_text_group",), "caption", _fill_exact_texts), is_across=True, is_central=True
    ),
    "text_group": _NEAR_TEXTS,
    "text_repeat": _NEAR_TEXTS,
    "leaked_image": ScoreKind(
        _build_leaked_image, settings=(*_AGAINST, "image_distance"), requires=("image_hash",), is_central=True
    ),
    "leaked_text": ScoreKind(_build_leaked_text, settings=(*_AGAINST, "text_similarity"), is_central=True),
    "lemon_image": _LEMON,
    "lemon_text": _LEMON,
    "lemon": _LEMON,
}  # fmt: skip


# One command


class PlannedScore(NamedTuple):
    """A column that a command adds."""

    name: str
    score: str
    """What it is called by its scorer, before --column."""
    kind: ScoreKind
    settings: dict[str, Any]
    """Everything that decides its values; they stand in its reports."""

    @property
    def stage(self) -> int:
        """0: of single shards; 1: made of scores that are finished then, or of all shards."""
        return int(self.kind.is_across or bool(self.kind.requires))


class ShardScores(NamedTuple):
    """A unit of work: a shard, and the columns that are computed of it."""

    shard: str
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ScoreDecoder:
    """Reads what scores need of the images of a shard. It holds no model, so it may be pickled to another process."""

    root: Path
    source: Source | None
    """None where no image is needed: then it may be gone."""
    reads: Mapping[str, Callable[[ImageFile], Any]]
    """By column; those of one scorer share one."""
    batch_size: int
    num_workers: int | None

    def batches(self, unit: ShardScores) -> Generator[ReadBatch[ReadImage]]:
        """The samples that have texts in the run, in order and without their files, each with what is needed of it;
        nothing where no image is needed.
        """
        reads = {name: self.reads[name] for name in unit.names if name in self.reads}
        if not reads:
            return
        assert self.source is not None
        keys = set(read_texts(self.root, unit.shard, ["key"])["key"].to_pylist())

        def prepare(sample: Sample) -> ReadImage:
            file = ImageFile(sample)
            of_reads = {read: read(file) for read in dict.fromkeys(reads.values())}
            return {name: of_reads[read] for name, read in reads.items()}

        entries = read_source(
            self.source, prepare, shards=[unit.shard], skip=lambda _, key: key not in keys,
            num_workers=self.num_workers, ahead=self.batch_size,
        )  # fmt: skip
        with closing(in_batches(entries, self.batch_size)) as batches:
            for batch in batches:
                samples = [(replace(sample, image=b""), prepared) for sample, prepared in batch.samples]
                yield ReadBatch(samples, [reject for reject in batch.rejects if reject.key in keys])


class ScoreWorker:
    """Computes and writes the planned columns of shards; each scorer is built when it is first needed."""

    def __init__(self, run: ScoreRun, plan: Sequence[PlannedScore]) -> None:
        self.run, self.plan = run, {planned.name: planned for planned in plan}
        self._scorers: dict[ScoreKind, Scorer] = {}

    def scorer(self, name: str) -> Scorer:
        """What computes a column."""
        kind = self.plan[name].kind
        if kind not in self._scorers:
            self._scorers[kind] = kind.build(self.run)
        return self._scorers[kind]

    def decoder(self, names: Iterable[str], num_workers: int | None) -> ScoreDecoder:
        """What reads the images for these columns."""
        reads = {name: scorer.read for name in names if (scorer := self.scorer(name)).read is not None}
        return ScoreDecoder(
            root=self.run.folder.root,
            source=self.run.source if reads else None,
            reads=reads,
            batch_size=self.run.config.batch_size,
            num_workers=num_workers,
        )

    def work(
        self, unit: ShardScores, batches: Iterator[ReadBatch[ReadImage]], on_images: Callable[[int], None]
    ) -> ScoreSummary:
        """Do a unit, whose images come from `ScoreDecoder.batches`. on_images: is told how many images were just done.
        What fails is named in the summary; raised is what would fail with any other shard, too.
        """
        summary, num_done = ScoreSummary(), 0

        def counted() -> Iterator[ReadBatch[ReadImage]]:
            nonlocal num_done
            for batch in batches:
                yield batch
                num_done += len(batch.samples)
                on_images(len(batch.samples))

        num_threads = self.run.manifest.get("config", {}).get("num_threads")
        if num_threads is not None:  # of a run in lower precision, where sums depend on it
            torch.set_num_threads(num_threads)
        for reads in (False, True):  # apart, since a text has its own scores where its image cannot be read
            part = [self.plan[name] for name in unit.names if (self.scorer(name).read is not None) == reads]
            if part:
                _score_shard(self, unit.shard, part, counted() if reads else None, summary)
        on_images(self.run.num_images[unit.shard] - num_done)
        return summary


class ScoreEngine:
    """Where scores are computed: in this process, one shard after another."""

    def clip_settings(self, run: ScoreRun) -> dict[str, str]:
        """What decides the values of the score clip."""
        return {"clip": run.similarity.fingerprint(), "dtype": str(run.similarity.loaded.dtype)}

    def work(
        self, worker: ScoreWorker, units: Sequence[ShardScores], on_images: Callable[[int], None]
    ) -> Iterator[ScoreSummary]:
        """Do the units, in any order."""
        names = dict.fromkeys(name for unit in units for name in unit.names)
        decoder = worker.decoder(names, worker.run.config.num_workers)
        for unit in units:
            with closing(decoder.batches(unit)) as batches:
                yield worker.work(unit, batches, on_images)

    def close(self) -> None:
        """End what `clip_settings` and `work` have started."""


def score_run(
    directory: str | Path,
    config: ScoreConfig,
    *,
    device: str | None = None,
    dtype: str = "auto",
    engine: ScoreEngine | None = None,
) -> ScoreSummary:
    """Add scores to every finished shard of a CapFilt run; the same call again resumes.

    A column of a shard is written whole, and its report after it. A shard that fails is named and the others go on. A
    score across shards is computed anew when the run has more shards than before.

    device: of the models; dtype: of the one that `config.clip` names, since the run's own have the run's precision.
    engine: this process unless given; scores for which a table of all shards is made are its work always.

    Raises ConfigError for a folder that is no run, a score of earlier settings, missing embeddings, and a function that
    fails; SourceError, CheckpointError and UnsupportedTaskError for what is missing of the run's data and models.
    """
    with ScoreRun(directory, config, device, dtype) as run, closing(engine or ScoreEngine()) as engine_of_run:
        scores = run.folder.root / "scores"
        remove_partials(scores)
        plan = plan_scores(run, engine_of_run)
        for planned in plan:
            remove_partials(scores / planned.name)
            _remove_earlier(run, planned)
        worker = ScoreWorker(run, plan)
        summary = ScoreSummary(num_shards=len(run.shards), done={planned.name: 0 for planned in plan})
        _run_stage(worker, engine_of_run, [planned for planned in plan if planned.stage == 0], summary)
        failed = {name for name, _, _ in summary.failed}
        rest = [planned for planned in plan if planned.stage == 1]
        for planned in rest:
            if lacking := sorted(failed & set(planned.kind.requires)):
                summary.failed.append((planned.name, "all shards", f"needs {lacking[0]} of every shard"))
        rest = [planned for planned in rest if not failed & set(planned.kind.requires)]
        _run_stage(worker, engine_of_run, rest, summary)
    return summary


def plan_scores(run: ScoreRun, engine: "ScoreEngine") -> list[PlannedScore]:
    """The columns to compute, with those that they are made of."""
    config, plan = run.config, []
    stored = {*text_columns(run.folder.root, run.shards[0])} - {*finished_scores(run.folder.root, run.shards[0])}
    asked = config.names
    required = (needed for name in asked if name in SCORE_KINDS for needed in SCORE_KINDS[name].requires)
    for name in dict.fromkeys([*required, *asked]):
        function = None if name in SCORE_KINDS else _match_function(name)
        score = name if function is None else config.column or function["name"]
        column = config.column if config.column is not None and name in asked else score
        is_taken = column in stored or (column in SCORE_KINDS and column != name)
        if is_taken or not COLUMN.fullmatch(column):
            raise ConfigError(f"capfilt-score: {column!r} cannot be the name of a column; choose another with --column")
        if function is None:
            kind, settings = SCORE_KINDS[name], {"score": name}
        else:
            kind = _of_function(name, score)
            settings = {"score": name, "sha256": hashlib.sha256(Path(function["file"]).read_bytes()).hexdigest()}
        settings |= {setting: getattr(config, setting) for setting in kind.settings}
        if settings.get("against"):
            settings["against"] = absolute_spec(settings["against"])
        settings |= {role: run.manifest["models"][role]["sha256"] for role in kind.roles}
        if name == "clip":
            settings |= engine.clip_settings(run)
        if kind.needs_embeddings and (missing := [shard for shard in run.shards if not run.has_embeddings(shard)]):
            shards = "any shard" if len(missing) == len(run.shards) else missing[0]
            raise ConfigError(
                f"the score {name} needs the filter's embeddings, and {run.folder.root} has none of {shards}: run "
                "`openblip capfilt --keep-embeddings` into another --out"
            )
        if kind.is_across:
            settings["shards"] = hashlib.sha256("\n".join(run.shards).encode()).hexdigest()[:16]
        plan.append(PlannedScore(column, score, kind, settings))
    return plan


def _remove_earlier(run: ScoreRun, planned: PlannedScore) -> None:
    """Remove a column that is computed anew; `ConfigError` for one of other settings."""
    folder = score_file(run.folder.root, planned.name, "").parent
    reports = sorted(folder.glob("*.report.json"))
    changed = changed_settings(read_json(reports[0])["settings"], planned.settings) if reports else {}
    if not changed:
        return
    if list(changed) != ["shards"] and not run.config.overwrite:
        raise ConfigError(
            f"{folder} was computed with other settings: {'; '.join(changed.values())}. Repeat the earlier ones, give "
            "--overwrite to compute it anew, or --column with another name for it",
            page="capfilt.md#more-scores",
        )
    for report in reports:  # first, so that values of two settings never count as one score
        report.unlink()
    for file in folder.glob("*.parquet"):
        file.unlink()


def _run_stage(worker: ScoreWorker, engine: ScoreEngine, stage: list[PlannedScore], summary: ScoreSummary) -> None:
    """Compute some scores of all shards that lack them."""
    run = worker.run
    missing: dict[bool, list[ShardScores]] = {False: [], True: []}  # by whether this process does them
    for shard in run.shards if stage else ():
        finished = finished_scores(run.folder.root, shard)
        for is_central, units in missing.items():
            lacking = [p.name for p in stage if p.kind.is_central == is_central and p.name not in finished]
            units += [ShardScores(shard, tuple(lacking))] if lacking else []
    units = [*missing[False], *missing[True]]
    if not units:
        return
    names = ", ".join(dict.fromkeys(name for unit in units for name in unit.names))
    with Progress("scoring", total=sum(run.num_images[unit.shard] for unit in units), unit="images") as bar:
        bar.note(f"computing {names}")
        for where, part in (engine, missing[False]), (ScoreEngine(), missing[True]):
            for done in where.work(worker, part, bar.advance) if part else ():
                summary.add(done)
                for shard, message in dict.fromkeys((shard, message) for _, shard, message in done.failed):
                    bar.note(f"{shard} could not be finished: {message}")


def _score_shard(
    worker: ScoreWorker,
    shard: str,
    planned: list[PlannedScore],
    batches: Iterator[ReadBatch[ReadImage]] | None,
    summary: ScoreSummary,
) -> None:
    """Compute and write scores of one shard, all of which read images or none does."""
    started = time.perf_counter()
    run, rejects = worker.run, list[Reject]()
    try:
        columns = _compute_columns(worker, shard, planned, batches, rejects)
    except (ConfigError, CheckpointError, MissingExtraError, UnsupportedTaskError, OutputError):
        raise  # no other shard could be finished either
    except (OpenBlipError, OSError) as error:
        message = " ".join(str(error).split())
        summary.failed += [(each.name, shard, message) for each in planned]
        return
    for each in planned:
        values = columns[each.name]
        write_score(run.folder.root, shard, each.name, values)
        report = {
            "score": each.name,
            "shard": shard,
            "texts": len(values),
            "nulls": values.null_count,
            "rejects": [{"key": reject.key, "reason": reject.reason} for reject in rejects[:MAX_REJECTS_STORED]],
            "seconds": round(time.perf_counter() - started, 3),
            "settings": each.settings,
            "openblip": version("openblip"),
        }
        write_json(score_file(run.folder.root, each.name, shard, "report.json"), report)
        summary.done[each.name] = 1
        summary.nulls[each.name] = values.null_count
    summary.rejects += rejects


def _compute_columns(
    worker: ScoreWorker,
    shard: str,
    planned: Sequence[PlannedScore],
    read_batches: Iterator[ReadBatch[ReadImage]] | None,
    rejects: list[Reject],
) -> dict[str, pa.Array]:
    """The columns by name, one value for each text of a shard, null where the image cannot be read; samples that
    cannot be read join `rejects`. read_batches: of `ScoreDecoder.batches`, for columns that need images.
    """
    required = dict.fromkeys(name for each in planned for name in each.kind.requires)
    texts = read_texts(worker.run.folder.root, shard, [*CAPTION_SCHEMA.names, *required])
    scorers = {each.kind: (worker.scorer(each.name), each.name) for each in planned}
    parts: dict[tuple[ScoreKind, str], list[ColumnValues]] = {(each.kind, each.score): [] for each in planned}
    rows = [np.zeros(0, np.int64)]
    whole = _text_batches(shard, texts) if read_batches is None else _image_batches(shard, texts, read_batches, rejects)
    for batch, images in whole:
        rows.append(batch.rows)
        for kind, (scorer, name) in scorers.items():
            values = scorer.compute(replace(batch, images=[image[name] for image in images]))
            for column, of_column in zip(scorer.columns, values, strict=True):
                if (kind, column) in parts:
                    parts[kind, column].append(of_column)
    scored = np.concatenate(rows)
    if len(texts) and not len(scored):
        raise SourceError(f"{shard}: none of its images can be read: {rejects[0].why if rejects else 'they are gone'}")
    place = np.full(len(texts), -1)  # of each text among the values; -1 without one
    place[scored] = np.arange(len(scored))
    order = pa.array(place, mask=place < 0)
    kinds = {each.name: scorers[each.kind][0].columns[each.score] for each in planned}
    return {each.name: _to_array(parts[each.kind, each.score], kinds[each.name]).take(order) for each in planned}


def _to_array(parts: Sequence[ColumnValues], kind: pa.DataType | None) -> pa.Array:
    """The values of all batches as one array. Of a user's function numbers become float64."""
    if kind is not None:
        arrays = [part.cast(kind) if isinstance(part, pa.Array) else pa.array(part, kind) for part in parts]
        return pa.concat_arrays(arrays) if arrays else pa.nulls(0, kind)
    values = [value for part in parts for value in part]
    types = {type(value) for value in values if value is not None}
    for allowed, kind in ({bool}, pa.bool_()), ({str}, pa.string()), ({int, float}, pa.float64()):
        if types <= allowed:
            return pa.array(values, kind if types else pa.float64())
    names = ", ".join(sorted(each.__name__ for each in types))
    raise ConfigError(f"a function for a score returned {names}; its values are all numbers, booleans or strings")


def _text_batches(shard: str, texts: pa.Table) -> Iterator[tuple[ScoreBatch, list[ReadImage]]]:
    """All texts of a shard, without images."""
    starts = [*image_starts(texts["key"]).tolist(), len(texts)]
    first = 0
    while first < len(starts) - 1:
        last = first + 1
        while last < len(starts) - 1 and starts[last + 1] - starts[first] <= TEXTS_AT_ONCE:
            last += 1
        yield _batch(shard, texts, starts, range(first, last)), []
        first = last


def _image_batches(
    shard: str, texts: pa.Table, batches: Iterator[ReadBatch[ReadImage]], rejects: list[Reject]
) -> Iterator[tuple[ScoreBatch, list[ReadImage]]]:
    """The texts of a shard whose images can be read, in order, with what is needed of the images."""
    starts = [*image_starts(texts["key"]).tolist(), len(texts)]
    keys = texts["key"].take(pa.array(starts[:-1], pa.int64())).to_pylist()
    image_of_key = {key: number for number, key in enumerate(keys)}
    for read_batch in batches:
        rejects.extend(read_batch.rejects)
        if read_batch.samples:
            numbers = [image_of_key[sample.key] for sample, _ in read_batch.samples]
            yield _batch(shard, texts, starts, numbers), [needed for _, needed in read_batch.samples]


def _batch(shard: str, texts: pa.Table, starts: Sequence[int], numbers: Sequence[int]) -> ScoreBatch:
    """The images of these numbers in the shard, with their texts."""
    spans = [range(starts[number], starts[number + 1]) for number in numbers]
    rows = np.array([row for span in spans for row in span], np.int64)
    owners = np.repeat(np.arange(len(spans)), [len(span) for span in spans])
    return ScoreBatch(
        shard=shard, texts=texts.take(pa.array(rows)), owners=owners, rows=rows, image_rows=np.array(numbers, np.int64)
    )
