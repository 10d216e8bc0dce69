"""One shard in, one caption file out: the whole of CapFilt for a shard (BLIP section 3.3).

Idempotent and deterministic per sample: a row depends on its image, its texts, the two checkpoints and the
settings, not on batches, order, workers or earlier attempts. B images and R texts of a batch, S side of a
picture.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.decode import DecodedSample, decode_samples
from openblip.capfilt.folder import CapFiltFolder, write_json, write_json_lines
from openblip.capfilt.manifest import config_hash
from openblip.capfilt.scores import read_scores
from openblip.data.captions import CaptionRow, write_captions
from openblip.data.sample import Reject
from openblip.data.sources import Source
from openblip.predictor import BasePredictor

BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Models:
    """The two checkpoints of a run, on their device."""

    captioner: BasePredictor
    filter: BasePredictor


@dataclass
class Stopwatch:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def process(
    shard: str,
    *,
    source: Source,
    folder: CapFiltFolder,
    models: Models,
    config: CapFiltConfig,
    manifest: Mapping[str, Any],
    on_images: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Captions and scores one shard, writes its files and returns its report.

    The report is written last: it means done. Every text has a row, web texts first, then synthetic ones. A
    sample that cannot be read becomes a reject; any other error is raised and leaves nothing that looks
    finished.

    Args:
        on_images: called with the number of samples just done, rejects included.
    """
    watch = Stopwatch()
    with watch.stage("total"):
        with watch.stage("index"):
            index = source.index(shard)
        rejects = list(index.rejects)

        def rows() -> Iterator[CaptionRow]:
            entries = decode_samples(
                index.records,
                models.captioner.preprocessing,
                models.filter.preprocessing,
                num_workers=config.num_workers,
                ahead=BATCHES_AHEAD * config.batch_size,
            )
            with closing(entries):
                for batch, unreadable in _batches(entries, config.batch_size, watch):
                    rejects.extend(unreadable)
                    if batch:
                        yield from _caption_and_filter(batch, shard, models, config, watch)
                    on_images(len(batch) + len(unreadable))

        write_captions(folder.captions(shard), rows())
        write_json_lines(
            folder.rejects(shard),
            ({"shard": shard, "key": reject.key, "reason": reject.reason} for reject in rejects),
        )
    report = _report(shard, folder, rejects, watch, manifest, models)
    write_json(folder.report(shard), report)
    folder.failure(shard).unlink(missing_ok=True)
    return report


def image_seed(seed: int, shard: str, key: str) -> int:
    """The sampling seed of an image, a stable hash: the same in any batch, order, process or resumed run."""
    name = json.dumps([seed, shard, key]).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) >> 1  # 63 bits: fits an int64


def _batches(
    entries: Iterator[DecodedSample | Reject], batch_size: int, watch: Stopwatch
) -> Iterator[tuple[list[DecodedSample], list[Reject]]]:
    """Batches of readable samples, with the rejects met on the way."""
    while True:
        samples: list[DecodedSample] = []
        rejects: list[Reject] = []
        with watch.stage("read"):  # what the models wait for, not what the threads spend
            for entry in entries:
                if isinstance(entry, Reject):
                    rejects.append(entry)
                else:
                    samples.append(entry)
                if len(samples) == batch_size:
                    break
        if samples or rejects:
            yield samples, rejects
        if len(samples) < batch_size:
            return


def _caption_and_filter(
    samples: Sequence[DecodedSample], shard: str, models: Models, config: CapFiltConfig, watch: Stopwatch
) -> list[CaptionRow]:
    """The rows of a batch: each image is captioned, then all its texts are scored on one encoding."""
    with watch.stage("caption"):
        written = models.captioner.caption(
            _stack([sample.captioner_pixels for sample in samples]),
            prompt=config.prompt,
            decoding=config.decoding,
            num_captions=config.num_captions,
            batch_size=config.batch_size,
            return_scores=True,
            seeds=[image_seed(config.seed, shard, sample.key) for sample in samples],
        )
    synthetic = [[captions] if config.num_captions == 1 else captions for captions in written]
    with watch.stage("filter"):
        scores = models.filter.score_texts(
            _stack([sample.filter_pixels for sample in samples]),
            [
                [*sample.web, *(caption.text for caption in captions)]
                for sample, captions in zip(samples, synthetic, strict=True)
            ],
            batch_size=len(samples),
        )
    rows = []
    for sample, captions, scored in zip(samples, synthetic, scores, strict=True):
        score = iter(scored)
        rows += [
            CaptionRow(
                key=sample.key, shard=shard, source="web", index=index, caption=text, **next(score)._asdict()
            )
            for index, text in enumerate(sample.web)
        ]
        rows += [
            CaptionRow(
                key=sample.key,
                shard=shard,
                source="synthetic",
                index=index,
                caption=caption.text,
                logprob=caption.logprob,
                **next(score)._asdict(),
            )
            for index, caption in enumerate(captions)
        ]
    return rows


def _stack(pictures: Sequence[np.ndarray[Any, Any]]) -> Tensor:
    return torch.from_numpy(np.stack(pictures))  # uint8 (B, 3, S, S)


def _report(
    shard: str,
    folder: CapFiltFolder,
    rejects: Sequence[Reject],
    watch: Stopwatch,
    manifest: Mapping[str, Any],
    models: Models,
) -> dict[str, Any]:
    """What report.json says. `kept` is at the manifest's threshold of this moment; the rows outlive it."""
    scores = read_scores(folder.captions(shard), manifest["threshold"])
    return {
        "shard": shard,
        "images": scores.images,
        "web_texts": scores.sources["web"].texts,
        "synthetic_texts": scores.sources["synthetic"].texts,
        "threshold": manifest["threshold"],
        "kept": {name: found.kept for name, found in scores.sources.items()},
        "rejects": [{"key": reject.key, "reason": reject.reason} for reject in rejects],
        "seconds": {name: round(spent, 3) for name, spent in watch.seconds.items()},
        "captioner": manifest["captioner"]["sha256"],
        "filter": manifest["filter"]["sha256"],
        "config": config_hash(manifest),
        "device": str(models.filter.device),
        "openblip": manifest["openblip"],
    }
