"""One shard in, one caption file out: the whole of CapFilt for a shard (BLIP section 3.3).

Idempotent and deterministic per sample: a row depends on its image, its texts, the two checkpoints and the settings,
not on batches, order, workers or earlier attempts. Every engine works on shards through `ShardWorker`.

B images of a batch, S image size.
"""

import json
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, Self

import torch

import openblip
from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.folder import ROLES, SCORED, SOURCES, CapFiltFolder, RunScores, config_hash
from openblip.data.captions import (
    EMBEDDING_IMAGE,
    CaptionRow,
    WriteEmbeddings,
    embedding_file,
    embedding_writer,
    read_judged,
    write_captions,
)
from openblip.data.config import Preprocessing
from openblip.data.images import Pixels, read_image
from openblip.data.reader import ReadBatch, in_batches, read_ahead, read_source
from openblip.data.sample import Reject, Sample, Source
from openblip.data.sources import open_source, storage
from openblip.errors import ConfigError, OpenBlipError, OutputError, SourceError, UnsupportedTaskError
from openblip.files import hash_int, write_json, write_jsonl
from openblip.predictor import BasePredictor, Captioner, ScoredText, instruction_set, load_captioner
from openblip.predictor.captioner import ImagePrompter
from openblip.predictor.values import EncodedImages
from openblip.text_counts import TextCounts, count_texts

BATCHES_AHEAD = 2
PreparedImage = tuple[Any, Pixels]
"""An image as captioner and filter take it, each uint8 (3, S, S) with its own S; a captioner that is no BLIP has inputs
of its own."""
NEEDED = {"captioner": {"caption"}, "filter": {"match", "similarity"}}
"""The calls of each model that CapFilt makes."""


def ignore(count: int) -> None:
    """What `on_images` is when nobody counts."""


class DecodedBatch(NamedTuple):
    """Samples with their images as captioner and filter take them, each uint8 (B, 3, S, S) with its own S: one tensor
    where both take the same. The rejects among them. A captioner that is no BLIP has inputs of its own.
    """

    samples: Sequence[Sample]
    pixels: Any
    filter_pixels: torch.Tensor
    rejects: Sequence[Reject]


class OpenedShard(NamedTuple):
    """A shard that is being read: the state of its file before, its first batch, if it has any, and the others, which
    threads decode.
    """

    state: Mapping[str, Any]
    first: Sequence[DecodedBatch]
    others: Generator[DecodedBatch]


@dataclass(kw_only=True)
class ComputedShard:
    """What the models hand to the thread that writes."""

    shard: str
    state: Mapping[str, Any]
    manifest: Mapping[str, Any]
    rows: SimpleQueue[list[CaptionRow] | BaseException | None] = field(default_factory=SimpleQueue)
    """Of each batch; then None, or why the shard cannot be finished."""
    rejects: list[Reject] = field(default_factory=list)
    texts: TextCounts = field(default_factory=TextCounts)
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage. `read` is the time that the models wait for images, and `write` that after the last row has come."""
    started: float = field(default_factory=time.perf_counter)

    def arriving_rows(self) -> Iterator[CaptionRow]:
        while (item := self.rows.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield from item


class WorkerFacts(NamedTuple):
    """What a worker of a run must have in common with all others."""

    config: CapFiltConfig
    """With the dtype that "auto" chose, where it is one for both models."""
    models: Mapping[str, Mapping[str, Any]]
    """As in the manifest."""
    execution: Mapping[str, Any]
    """`EXECUTION` of the manifest's config; empty in float32, where it changes no text and no decision."""


@dataclass(frozen=True, kw_only=True)
class ShardOutcome:
    """What came of a shard: its report is written, or its `failure.json` says why it could not be finished."""

    shard: str
    num_rejects: int = 0
    first_reject: Reject | None = None
    counts: Mapping[str, Any] = field(default_factory=dict)
    """The `counts` of the report: images, rejects, texts and kept texts by source."""
    unused: Mapping[str, int] = field(default_factory=dict)
    """How many files of the shard are no part of a sample, by their endings."""
    error: str | None = None
    """Why the shard could not be finished, in one line; None for a shard that is done."""

    @property
    def totals(self) -> Counter[str]:
        """How many images, texts, kept texts and rejects the shard has."""
        totals = Counter({f"{name} texts": self.counts.get(f"{name}_texts", 0) for name in SOURCES})
        totals.update({f"{name} kept": kept for name, kept in self.counts.get("kept", {}).items()})
        return totals + Counter(images=self.counts.get("images", 0), rejects=self.num_rejects)


@dataclass(frozen=True, kw_only=True)
class ShardWorker:
    """Both models of a run on one device: captions and scores shard by shard.

    `work` and `work_through` do whole shards; `decode` and `process` are their halves, for an engine that reads images
    in other processes than those of the models.
    """

    config: CapFiltConfig
    """With the dtype that "auto" chose, where it is one for both models."""
    folder: CapFiltFolder
    source: Source
    captioner: Captioner
    filter: BasePredictor
    in_flight: dict[str, Counter[str]] = field(default_factory=dict, compare=False)
    """By shard that is not finished, what its `ShardOutcome.totals` would be by now, for a display; the kept texts are
    those above the thresholds."""

    @classmethod
    def load(cls, config: CapFiltConfig, out: str | Path, device: str | None = None) -> Self:
        """Load both models, once where they are the same checkpoint. Nothing is written, and nothing of `out` read.

        device: as for `openblip.load`. Raises SourceError, CheckpointError and ConfigError for what cannot be opened,
        and UnsupportedTaskError for a checkpoint that cannot do its part.
        """
        source = open_source(config.source, **config.reading)
        captioner = filter_ = load_captioner(
            config.captioner, device=device, dtype=config.dtype, prompt=config.prompt, quantization=config.quantization
        )
        if config.filter != config.captioner:
            filter_ = openblip.load(config.filter, device=device, dtype=config.dtype)
        for role, checkpoint, model in (("captioner", config.captioner, captioner), ("filter", config.filter, filter_)):
            if missing := NEEDED[role] - model.tasks:
                raise UnsupportedTaskError(
                    f"{checkpoint} cannot be the {role}: it has no {', '.join(sorted(missing))}, "
                    f"only {', '.join(sorted(model.tasks))}"
                )
        assert isinstance(filter_, BasePredictor)  # no other model has these calls
        if captioner.precision == filter_.precision:  # else it stays "auto", which every worker resolves for each model
            config = replace(config, dtype=captioner.precision)
        return cls(config=config, folder=CapFiltFolder(out), source=source, captioner=captioner, filter=filter_)

    @cached_property
    def facts(self) -> WorkerFacts:
        """What the manifest says of the models. A model's hash is of everything that decides its output."""
        models = {}
        for role, checkpoint, model in (
            ("captioner", self.config.captioner, self.captioner),
            ("filter", self.config.filter, self.filter),
        ):
            models[role] = {
                "checkpoint": checkpoint,
                "parameters": model.num_parameters,
                "dtype": model.precision,
                "sha256": model.fingerprint(),
            }
        execution: dict[str, Any] = {}
        if any(model.precision != "float32" for model in (self.captioner, self.filter)):
            # Sums in lower precision depend on how kernels divide the work.
            execution = {
                "batch_size": self.config.batch_size,
                "num_threads": torch.get_num_threads(),
                "instruction_set": instruction_set(self.filter.device),
            }
        return WorkerFacts(self.config, models, execution)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the run; `ConfigError` names what this worker would do otherwise than it says."""
        manifest = self.folder.read_manifest()
        settings = manifest.get("config", {})
        for name, ours in self.facts.execution.items():
            needed = settings.get(name, ours)
            if name == "num_threads":
                torch.set_num_threads(needed)
            elif ours != needed:
                raise ConfigError(f"this worker cannot take part in the run: its {name} is {ours}, not {needed}")
        for role in ROLES:
            for name in ("sha256", "dtype"):
                ours, needed = self.facts.models[role][name], manifest["models"].get(role, {}).get(name)
                if needed is not None and ours != needed:
                    raise ConfigError(
                        f"this worker cannot take part in the run: the {name} of its {role} is {ours}, not {needed}"
                    )
        return manifest

    @cached_property
    def encodes_once(self) -> bool:
        """Whether both models encode images alike, so that what the captioner made of an image serves the filter."""
        return self.captioner.encodes_alike(self.filter)

    def work(self, shard: str, on_images: Callable[[int], None] = ignore) -> ShardOutcome:
        """Do one shard and write its files; see `work_through`."""
        (outcome,) = self.work_through([shard], on_images)
        return outcome

    def work_through(self, shards: Iterable[str], on_images: Callable[[int], None] = ignore) -> Generator[ShardOutcome]:
        """Do shards in order. While the models work on one, the next is opened and the last is written, so the outcome
        of a shard comes when the models are done with the next.

        A shard that cannot be finished gets a `failure.json`, and its outcome says why. `on_images` is told how many
        samples were just done, rejects included. Raises OutputError for a full disk, where no other shard could be
        finished either, and ConfigError where this worker would make other rows than the manifest says.
        """
        remaining = iter(shards)
        with ThreadPoolExecutor(1, "openblip-open") as opening, ThreadPoolExecutor(1, "openblip-write") as writing:
            started = [(shard, opening.submit(self._open, shard)) for shard in islice(remaining, 1)]
            written: list[tuple[str, Future[ShardOutcome]]] = []
            try:
                _ = self.manifest  # which raises where this worker cannot take part
                while started:
                    shard, opened = started.pop()
                    started += [(name, opening.submit(self._open, name)) for name in islice(remaining, 1)]
                    written.append((shard, self._compute(shard, opened.result, on_images, writing)))
                    for earlier in written[:-1]:
                        yield self._settle(*earlier)
                    del written[:-1]
                for last in written:
                    yield self._settle(*last)
            finally:
                for _, opened in started:
                    if not opened.cancel() and opened.exception() is None:
                        opened.result().others.close()

    def _open(self, shard: str) -> OpenedShard:
        state, batches = self.source.file_state(shard), self.decode(shard)
        return OpenedShard(state, list(islice(batches, 1)), batches)

    def finish(self, shard: str, opened: Callable[[], OpenedShard], on_images: Callable[[int], None]) -> ShardOutcome:
        """Do a shard that `opened` gives, or raises why it cannot be read; as `work_through` does each."""
        with ThreadPoolExecutor(1, "openblip-write") as writing:
            return self._settle(shard, self._compute(shard, opened, on_images, writing))

    def _compute(
        self,
        shard: str,
        opened: Callable[[], OpenedShard],
        on_images: Callable[[int], None],
        writing: ThreadPoolExecutor,
    ) -> Future[ShardOutcome]:
        """Run the models on a shard, while a thread of `writing` writes what they make of it."""
        try:
            state, first, others = opened()
            with closing(others):
                return self._start(shard, chain(first, others), on_images, state, writing)
        except Exception as error:
            failed: Future[ShardOutcome] = Future()
            failed.set_exception(error)
            return failed

    def _settle(self, shard: str, written: Future[ShardOutcome]) -> ShardOutcome:
        try:
            outcome = written.result()
            self.in_flight.pop(shard, None)
            return outcome
        except OutputError:
            raise
        except Exception as error:  # whatever it was, the other shards go on and this one is named
            self.in_flight.pop(shard, None)
            return self.fail(shard, error)

    def fail(self, shard: str, error: Exception) -> ShardOutcome:
        """Write why a shard could not be finished."""
        message = str(error) if isinstance(error, OpenBlipError) else f"{type(error).__name__}: {error}"
        if isinstance(error, torch.OutOfMemoryError):
            message = f"out of GPU memory; run again with a smaller --batch-size ({error})"
        return write_failure(self.folder, shard, message, "".join(traceback.format_exception(error)))

    @cached_property
    def decoder(self) -> "ShardDecoder":
        """What reads shards; it needs no model, so it may be pickled to another process."""
        return ShardDecoder(
            source=self.source,
            config=self.config,
            captioner=self.captioner.preprocessing,
            filter=self.filter.preprocessing,
        )

    def decode(self, shard: str) -> Generator[DecodedBatch]:
        """Read a shard and decode its images ahead of the models, in order and in constant memory."""
        return self.stack_ahead(self.decoder.batches(shard))

    def stack_ahead(self, batches: Generator[ReadBatch[PreparedImage]]) -> Generator[DecodedBatch]:
        """What `ShardDecoder.batches` yields as the models take it, one batch ahead of them."""

        def stack(batch: ReadBatch[PreparedImage]) -> DecodedBatch:
            pixels: Any = self.captioner.stack([of_captioner for _, (of_captioner, _) in batch.samples])
            of_filter = pixels
            if not self.decoder.is_same_size:
                of_filter = self.filter.stack([each for _, (_, each) in batch.samples])
            return DecodedBatch([sample for sample, _ in batch.samples], pixels, of_filter, batch.rejects)

        return read_ahead(batches, stack, num_workers=1, ahead=1)

    def process(
        self,
        shard: str,
        batches: Iterator[DecodedBatch],
        on_images: Callable[[int], None] = ignore,
        state: Mapping[str, Any] | None = None,
    ) -> ShardOutcome:
        """Caption and score one shard, whose samples come from `decode`, and write its files.

        The report is written last, so it means that the shard is done. Every text has a row, web texts first, then
        synthetic ones. A sample that cannot be read becomes a reject; any other error is raised and leaves nothing that
        looks finished. `on_images` is called with the number of samples just done, rejects included.

        state: of the shard's file before anything of it was read; it is recorded, and raises SourceError where it is
        another at the end. SourceError as well for a shard of which nothing can be read.
        """
        state = self.source.file_state(shard) if state is None else state
        with ThreadPoolExecutor(1, "openblip-write") as writing:
            return self._start(shard, batches, on_images, state, writing).result()

    def _start(
        self,
        shard: str,
        batches: Iterator[DecodedBatch],
        on_images: Callable[[int], None],
        state: Mapping[str, Any],
        writing: ThreadPoolExecutor,
    ) -> Future[ShardOutcome]:
        """Run the models on a shard to its end. The files are written in a thread of `writing`, whose result, or error,
        is that of the shard.
        """
        computed = ComputedShard(shard=shard, state=state, manifest=self.manifest)
        written = writing.submit(self._write, computed)
        keeping: AbstractContextManager[WriteEmbeddings | None] = nullcontext()
        if self.config.keep_embeddings:
            path = embedding_file(self.folder.root, shard)
            keeping = embedding_writer(path, self.filter.model.config.embed_dim)
        num_samples, so_far = 0, self.in_flight.setdefault(shard, Counter())
        try:
            with count_texts() as computed.texts, keeping as keep:
                while not written.done():  # early, where writing has failed
                    with _timed(computed.seconds, "read"):  # while the models wait, not while the threads work
                        batch = next(batches, None)
                    if batch is None:
                        break
                    computed.rejects.extend(batch.rejects)
                    if batch.samples:
                        rows = self._caption_and_filter(batch, shard, computed.seconds, keep)
                        computed.rows.put(rows)
                        so_far.update(self._judged(rows))
                    so_far.update(images=len(batch.samples), rejects=len(batch.rejects))
                    num_samples += len(batch.samples)
                    on_images(len(batch.samples) + len(batch.rejects))
                if computed.rejects and not num_samples:
                    first = computed.rejects[0]
                    raise SourceError(f"nothing of {shard} can be read; of {len(computed.rejects):,} rejects: {first}")
                if changes := storage.changes_of_file(state, self.source.file_state(shard)):
                    raise SourceError(f"{shard} has changed while it was read ({changes}); run the command again")
        except BaseException as error:
            computed.rows.put(error)
            if not isinstance(error, Exception):
                raise
        else:
            computed.rows.put(None)
        return written

    def _write(self, computed: "ComputedShard") -> ShardOutcome:
        """Write the files of a shard as its rows come, the report last."""
        folder, manifest, shard, seconds = self.folder, computed.manifest, computed.shard, computed.seconds
        write_captions(
            folder.file(shard, "parquet"), computed.arriving_rows(), has_ranks=self.config.candidates is not None
        )
        computed_at = time.perf_counter()
        rejects = computed.rejects
        rejected = [{"key": reject.key, "reason": reject.reason} for reject in rejects]
        write_jsonl(folder.file(shard, "rejects.jsonl"), ({"shard": shard, **reject} for reject in rejected))
        scores, decision = RunScores(), replace(self.config.decision, threshold=manifest["threshold"])
        scores.add_shard(read_judged(folder.root, shard, decision, SCORED))
        counts = {
            "images": scores.images,
            "rejects": len(rejected),
            **{f"{name}_texts": source.texts for name, source in scores.sources.items()},
            "cut_texts": len(computed.texts.cut),
            "unknown_tokens": round(computed.texts.unknown_share, 4),
            "kept": {name: source.kept for name, source in scores.sources.items()},
        }
        seconds["write"] = seconds.get("write", 0.0) + time.perf_counter() - computed_at
        seconds["total"] = time.perf_counter() - computed.started
        report = {
            "shard": shard,
            "counts": counts,
            "threshold": manifest["threshold"],
            "source_file": computed.state,
            "rejects": rejected,
            "seconds": {name: round(spent, 3) for name, spent in seconds.items()},
            "models": {role: model["sha256"] for role, model in manifest["models"].items()},
            "config": config_hash(manifest),
            "device": str(self.filter.device),
            "openblip": manifest["openblip"],
        }
        write_json(folder.file(shard, "report.json"), report)
        folder.file(shard, "failure.json").unlink(missing_ok=True)
        return ShardOutcome(
            shard=shard,
            num_rejects=len(rejects),
            first_reject=next(iter(rejects), None),
            counts=counts,
            unused=dict(self.source.unused.get(shard, {})),
        )

    def _caption_and_filter(
        self, batch: DecodedBatch, shard: str, seconds: dict[str, float], keep: WriteEmbeddings | None
    ) -> list[CaptionRow]:
        """The rows of a batch: each image is captioned, then all its texts are scored on one encoding, whose embeddings
        are given to `keep`.
        """
        config, samples = self.config, batch.samples
        with _timed(seconds, "encode"):
            images: Any = self.captioner.encode(batch.pixels, config.batch_size)
        with _timed(seconds, "caption"):
            captions = self.captioner.caption(
                images,
                prompt=config.prompt,
                decoding=config.decoding,
                num_captions=config.captions_per_image,
                batch_size=config.batch_size,
                return_scores=True,
                seeds=[image_seed(config.seed, shard, sample.key) for sample in samples],
            )
        is_one = config.captions_per_image == 1
        written: list[list[ScoredText]] = [[caption] for caption in captions] if is_one else captions
        texts = [
            [*sample.captions, *(caption.text for caption in synthetic)]
            for sample, synthetic in zip(samples, written, strict=True)
        ]
        with _timed(seconds, "encode"):
            images = images if self.encodes_once else self.filter.encode(batch.filter_pixels, config.batch_size)
        with _timed(seconds, "filter"):
            scores = self.filter.score_texts(images, texts, batch_size=config.batch_size)
            if keep is not None:
                self._keep_embeddings(batch, images, texts, keep)
        found: list[CaptionRow] = []
        for sample, synthetic, image_scores in zip(samples, written, scores, strict=True):
            rows: list[dict[str, Any]] = [
                {"source": "web", "index": i, "caption": text} for i, text in enumerate(sample.captions)
            ]
            rows += [
                {"source": "synthetic", "index": i, "caption": caption.text, "logprob": caption.logprob}
                for i, caption in enumerate(synthetic)
            ]
            if config.candidates is not None:
                first = len(sample.captions)
                of_candidates = [getattr(score, config.rank_by) for score in image_scores[first:]]
                ranks = rank_texts([caption.text for caption in synthetic], of_candidates)
                for row, rank in zip(rows[first:], ranks, strict=True):
                    row["rank"] = rank
            found += (
                CaptionRow(key=sample.key, shard=sample.shard, **row, **score._asdict())
                for row, score in zip(rows, image_scores, strict=True)
            )
        return found

    def _judged(self, rows: Sequence[CaptionRow]) -> Counter[str]:
        """How many texts there are of each source, and how many of them are above its threshold."""
        decision = replace(self.config.decision, threshold=self.manifest["threshold"])
        counts = Counter(f"{row.source} texts" for row in rows)
        for row in rows:
            threshold = decision.threshold_of(row.source)
            is_kept = bool(row.caption.strip()) and (threshold is None or row.itm > threshold)
            counts[f"{row.source} kept"] += is_kept
        return counts

    def _keep_embeddings(
        self, batch: DecodedBatch, images: EncodedImages, texts: Sequence[Sequence[str]], keep: WriteEmbeddings
    ) -> None:
        """The filter's unit vectors of each image and then of its texts; of a model with queries an image has their
        mean, and a text without words has zeros.
        """
        of_images = self.filter.embed_images(images, self.config.batch_size)  # (B, E) or (B, Q, E)
        if of_images.dim() == 3:
            of_images = torch.nn.functional.normalize(of_images.mean(dim=1), dim=1)
        flat = [text for of_image in texts for text in of_image]
        has_words = torch.tensor([bool(text.strip()) for text in flat], dtype=torch.bool)
        of_texts = self.filter.embed_texts(flat, self.config.batch_size) * has_words[:, None]  # (R, E)
        keys, sources, indices, vectors = [], [], [], []
        start = 0
        for sample, image, of_image in zip(batch.samples, of_images, texts, strict=True):
            counts = {"web": len(sample.captions), "synthetic": len(of_image) - len(sample.captions)}
            keys += [sample.key] * (1 + len(of_image))
            sources += [EMBEDDING_IMAGE, *(source for source, count in counts.items() for _ in range(count))]
            indices += [0, *(index for count in counts.values() for index in range(count))]
            vectors += [image[None], of_texts[start : start + len(of_image)]]
            start += len(of_image)
        keep(keys, sources, indices, torch.cat(vectors).numpy())


@dataclass(frozen=True, kw_only=True)
class ShardDecoder:
    """Reads the shards of a run and decodes their images for both models."""

    source: Source
    config: CapFiltConfig
    captioner: Preprocessing | ImagePrompter
    filter: Preprocessing

    @property
    def is_same_size(self) -> bool:
        """Whether both models take the same pixels."""
        return self.captioner.image_size == self.filter.image_size

    def batches(self, shard: str) -> Generator[ReadBatch[PreparedImage]]:
        """Batches of a shard's samples with their images as both models take them, in order and in constant memory."""
        scaled_for = None
        if self.config.jpeg == "scaled" and self.captioner.image_size is not None:
            scaled_for = max(self.captioner.image_size, self.filter.image_size)

        def prepare(sample: Sample) -> PreparedImage:
            with read_image(sample.image, name=f"{sample.shard}/{sample.key}", scaled_for=scaled_for) as image:
                pixels: Any = self.captioner(image)
                return pixels, pixels if self.is_same_size else self.filter(image)

        size, num_workers = self.config.batch_size, self.config.num_workers
        ahead = BATCHES_AHEAD * size
        entries = read_source(self.source, prepare, shards=[shard], num_workers=num_workers, ahead=ahead)
        return in_batches(entries, size)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time that is spent within to a stage of `seconds`."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started


def write_failure(folder: CapFiltFolder, shard: str, error: str, details: str = "") -> ShardOutcome:
    """Write the `failure.json` of a shard. details: the traceback, if there is one."""
    error = " ".join(error.split())
    write_json(folder.file(shard, "failure.json"), {"shard": shard, "error": error, "traceback": details})
    return ShardOutcome(shard=shard, error=error)


def rank_texts(texts: Sequence[str], scores: Sequence[float]) -> list[int]:
    """The place of each candidate of an image, from 1, by its score, of equal scores the first. One that says what a
    better one says, but for case and spaces, comes after all others, and one without words last.
    """
    order = sorted(range(len(texts)), key=lambda row: -scores[row])
    said: set[str] = set()
    places: list[tuple[int, int]] = []
    for place, row in enumerate(order):
        normalized = " ".join(texts[row].casefold().split())
        places.append((2 if not normalized else int(normalized in said), place))
        said.add(normalized)
    ranks = [0] * len(texts)
    for rank, (_, place) in enumerate(sorted(places), start=1):
        ranks[order[place]] = rank
    return ranks


def image_seed(seed: int, shard: str, key: str) -> int:
    """The sampling seed of an image, a stable hash: the same in any batch, order, process or resumed run."""
    return hash_int(json.dumps([seed, shard, key]))
