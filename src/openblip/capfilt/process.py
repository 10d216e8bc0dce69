"""One shard in, one caption file out: the whole of CapFilt for a shard (BLIP section 3.3).

Idempotent and deterministic per sample: a row depends on its image, its texts, the two checkpoints and the settings,
not on batches, order, workers or earlier attempts.

B images of a batch, S image size.
"""

import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.folder import CapFiltFolder, RunScores, config_hash
from openblip.data.captions import CaptionRow, write_captions
from openblip.data.images import Pixels, read_image
from openblip.data.reader import ReadBatch, in_batches, read_ahead, read_source
from openblip.data.sample import Reject, Sample, Source
from openblip.files import hash_int, write_json, write_jsonl
from openblip.predictor import BasePredictor, ScoredText
from openblip.text_counts import count_texts

BATCHES_AHEAD = 2


class DecodedBatch(NamedTuple):
    """Samples with their images as captioner and filter take them, each uint8 (B, 3, S, S) with its own S: one tensor
    where both take the same. The rejects among them.
    """

    samples: Sequence[Sample]
    pixels: torch.Tensor
    filter_pixels: torch.Tensor
    rejects: Sequence[Reject]


@dataclass(frozen=True, kw_only=True)
class ShardProcessor:
    """Captions and scores the shards of a run, with both models on their device."""

    source: Source
    captioner: BasePredictor
    filter: BasePredictor
    config: CapFiltConfig
    folder: CapFiltFolder
    manifest: Mapping[str, Any]

    @cached_property
    def encodes_once(self) -> bool:
        """Whether both models encode images alike, so that what the captioner made of an image serves the filter."""
        return self.captioner.encodes_alike(self.filter)

    def decode(self, shard: str) -> Generator[DecodedBatch]:
        """Read a shard and decode its images ahead of the models, in order and in constant memory."""
        captioner, filter_ = self.captioner.preprocessing, self.filter.preprocessing
        is_same_size = captioner.image_size == filter_.image_size
        scaled_for = max(captioner.image_size, filter_.image_size) if self.config.jpeg == "scaled" else None

        def prepare(sample: Sample) -> tuple[Pixels, Pixels]:
            with read_image(sample.image, name=f"{sample.shard}/{sample.key}", scaled_for=scaled_for) as image:
                pixels = captioner(image)
                return pixels, pixels if is_same_size else filter_(image)

        def stack(batch: ReadBatch[tuple[Pixels, Pixels]]) -> DecodedBatch:
            pixels = self.captioner.stack([of_captioner for _, (of_captioner, _) in batch.samples])
            of_filter = pixels if is_same_size else self.filter.stack([each for _, (_, each) in batch.samples])
            return DecodedBatch([sample for sample, _ in batch.samples], pixels, of_filter, batch.rejects)

        size, num_workers = self.config.batch_size, self.config.num_workers
        entries = read_source(self.source, prepare, shards=[shard], num_workers=num_workers, ahead=BATCHES_AHEAD * size)
        return read_ahead(in_batches(entries, size), stack, num_workers=1, ahead=1)

    def process(
        self, shard: str, batches: Iterator[DecodedBatch], on_images: Callable[[int], None] = lambda count: None
    ) -> list[Reject]:
        """Caption and score one shard, whose samples come from `decode`, write its files, and return its rejects.

        The report is written last, so it means that the shard is done. Every text has a row, web texts first, then
        synthetic ones. A sample that cannot be read becomes a reject; any other error is raised and leaves nothing that
        looks finished. `on_images` is called with the number of samples just done, rejects included.
        """
        seconds: dict[str, float] = {}
        rejects: list[Reject] = []

        def rows() -> Iterator[CaptionRow]:
            while True:
                with _timed(seconds, "read"):  # the time that the models wait, not the time that the threads work
                    batch = next(batches, None)
                if batch is None:
                    return
                rejects.extend(batch.rejects)
                if batch.samples:
                    yield from self._caption_and_filter(batch, shard, seconds)
                on_images(len(batch.samples) + len(batch.rejects))

        folder, manifest = self.folder, self.manifest
        with _timed(seconds, "total"), count_texts() as texts:
            write_captions(folder.file(shard, "parquet"), rows())
            rejected = [{"key": reject.key, "reason": reject.reason} for reject in rejects]
            write_jsonl(folder.file(shard, "rejects.jsonl"), ({"shard": shard, **reject} for reject in rejected))
        scores = RunScores()
        scores.add_shard(folder.file(shard, "parquet"), manifest["threshold"])
        report = {
            "shard": shard,
            "counts": {
                "images": scores.images,
                "rejects": len(rejected),
                **{f"{name}_texts": source.texts for name, source in scores.sources.items()},
                "cut_texts": len(texts.cut),
                "unknown_tokens": round(texts.unknown_share, 4),
                "kept": {name: source.kept for name, source in scores.sources.items()},
            },
            "threshold": manifest["threshold"],
            "rejects": rejected,
            "seconds": {name: round(spent, 3) for name, spent in seconds.items()},
            "models": {role: model["sha256"] for role, model in manifest["models"].items()},
            "config": config_hash(manifest),
            "device": str(self.filter.device),
            "openblip": manifest["openblip"],
        }
        write_json(folder.file(shard, "report.json"), report)
        folder.file(shard, "failure.json").unlink(missing_ok=True)
        return rejects

    def _caption_and_filter(self, batch: DecodedBatch, shard: str, seconds: dict[str, float]) -> Iterator[CaptionRow]:
        """The rows of a batch: each image is captioned, then all its texts are scored on one encoding."""
        config, samples = self.config, batch.samples
        with _timed(seconds, "caption"):
            images = self.captioner.encode(batch.pixels, config.batch_size)
            captions = self.captioner.caption(
                images,
                prompt=config.prompt,
                decoding=config.decoding,
                num_captions=config.num_captions,
                batch_size=config.batch_size,
                return_scores=True,
                seeds=[image_seed(config.seed, shard, sample.key) for sample in samples],
            )
        written: list[list[ScoredText]] = [[caption] for caption in captions] if config.num_captions == 1 else captions
        texts = [
            [*sample.captions, *(caption.text for caption in synthetic)]
            for sample, synthetic in zip(samples, written, strict=True)
        ]
        with _timed(seconds, "filter"):
            images = images if self.encodes_once else self.filter.encode(batch.filter_pixels, config.batch_size)
            scores = self.filter.score_texts(images, texts, batch_size=config.batch_size)
        for sample, synthetic, image_scores in zip(samples, written, scores, strict=True):
            rows: list[dict[str, Any]] = [
                {"source": "web", "index": i, "caption": text} for i, text in enumerate(sample.captions)
            ]
            rows += [
                {"source": "synthetic", "index": i, "caption": caption.text, "logprob": caption.logprob}
                for i, caption in enumerate(synthetic)
            ]
            for row, score in zip(rows, image_scores, strict=True):
                yield CaptionRow(key=sample.key, shard=sample.shard, **row, **score._asdict())


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time that is spent within to a stage of `seconds`."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started


def image_seed(seed: int, shard: str, key: str) -> int:
    """The sampling seed of an image, a stable hash: the same in any batch, order, process or resumed run."""
    return hash_int(json.dumps([seed, shard, key]))
