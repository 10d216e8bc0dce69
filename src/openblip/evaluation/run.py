"""One pass of a model over a source, shared by all benchmarks.

Under torchrun every process reads and predicts its share; afterwards all of them hold all results, in the
source's order. A sample that cannot be used is named and skipped. No image stays in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

from openblip.data.reader import read_source
from openblip.data.sample import Reject, Sample, Source
from openblip.distributed import gather_objects, rank, world_size
from openblip.errors import ImageError, NoSampleError, SourceError
from openblip.predictor import BasePredictor, Images
from openblip.progress import Progress

SAMPLES_PER_BATCH = 64
LISTS = ("predictions", "results", "rejects", "curves", "reliability")
"""What a report lists sample by sample or point by point."""

Result = TypeVar("Result")
Outcome = Reject | tuple[Sample, Result]  # the sample without its images


class EvaluationResults(NamedTuple, Generic[Result]):
    """Every sample that could be used, without its images, and its result; a reject for every other one."""

    samples: list[Sample]
    results: list[Result]
    rejects: list[Reject]

    def pairs(self) -> Iterator[tuple[Sample, Result]]:
        """Every sample with its result."""
        return zip(self.samples, self.results, strict=True)

    def named(self, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The row of every sample, after the sample's shard and key."""
        pairs = zip(self.samples, rows, strict=True)
        return [{"shard": sample.shard, "key": sample.key, **row} for sample, row in pairs]

    def report(self, counts: Mapping[str, int], scores: Mapping[str, Any], **lists: Any) -> dict[str, Any]:
        """What an evaluation returns: counts, scores, the `lists` (predictions, ...), and the rejects."""
        rejects = [asdict(reject) for reject in self.rejects]
        return {**counts, "num_rejects": len(rejects), **scores, **lists, "rejects": rejects}


def run_evaluation(
    source: Source,
    predict: Callable[[list[Sample]], Sequence[Result]],
    *,
    label: str,
    check_sample: Callable[[Sample], object],
    limit: int | None = None,
    samples_per_batch: int = SAMPLES_PER_BATCH,
) -> EvaluationResults[Result]:
    """Predict all samples of a source and return the results, the same on every process.

    `predict` returns one result for each sample of a batch. When it raises `ImageError`, the samples of the batch are
    predicted one by one, and those for which it raises again become rejects. `check_sample` raises `SourceError` for a
    sample without what the benchmark needs. `limit`: use only this many samples of the source. `label` is what the
    progress display calls the work. A shard that cannot be opened is a reject. Raises `NoSampleError` when no sample
    can be used.
    """
    index, count = rank(), world_size()
    entries = enumerate(read_source(source, check_sample, share=(index, count), limit=limit, keep_going=True))
    outcomes: list[tuple[int, Outcome[Result]]] = []  # by number in the source
    shards_seen: set[str] = set()
    with Progress(label, unit="samples", visible=index == 0) as bar:
        while batch := list(islice(entries, samples_per_batch)):
            samples: list[tuple[int, Sample]] = []
            for place, entry in batch:
                number, item = place * count + index, entry if isinstance(entry, Reject) else entry[0]
                shards_seen.add(item.shard)
                if isinstance(item, Reject):
                    outcomes.append((number, item))
                else:
                    samples.append((number, item))
            outcomes += _predict(samples, predict)
            bar.advance(len(batch))
            bar.estimate_total(len(shards_seen) - 1, len(source.shards()))
    run: EvaluationResults[Result] = EvaluationResults([], [], [])
    for _, outcome in sorted(gather_objects(outcomes), key=lambda numbered: numbered[0]):
        if isinstance(outcome, Reject):
            run.rejects.append(outcome)
        else:
            run.samples.append(outcome[0])
            run.results.append(outcome[1])
    if not run.results:
        reasons = "".join(f"; {reject}" for reject in run.rejects[:3])
        raise NoSampleError(f"{source.name} has no sample that can be used{reasons}.")
    return run


def sample_images(
    predictor: BasePredictor, samples: Sequence[Sample], num_frames: int | None, batch_size: int | None
) -> Images:
    """The samples' images for a call of the predictor; with `num_frames` their videos, encoded."""
    encoded = [sample.image for sample in samples]
    return encoded if num_frames is None else predictor.encode_videos(encoded, num_frames, batch_size)


def without_lists(report: Mapping[str, Any]) -> dict[str, Any]:
    """The counts and scores of a report, without what it lists one by one."""
    return {
        name: without_lists(value) if isinstance(value, dict) else value
        for name, value in report.items()
        if name not in LISTS
    }


def require_caption(sample: Sample) -> None:
    """Raise `SourceError` for a sample without a caption."""
    if not sample.captions:
        raise SourceError("no caption")


def _predict(
    samples: Sequence[tuple[int, Sample]], predict: Callable[[list[Sample]], Sequence[Result]]
) -> list[tuple[int, Outcome[Result]]]:
    if not samples:
        return []
    try:
        results = predict([sample for _, sample in samples])
    except ImageError as error:
        if len(samples) > 1:
            return [outcome for one in samples for outcome in _predict([one], predict)]
        ((number, sample),) = samples
        return [(number, Reject(sample.shard, sample.key, str(error)))]
    return [
        (number, (replace(sample, image=b"", second_image=None, info=dict(sample.info)), result))
        for (number, sample), result in zip(samples, results, strict=True)
    ]
