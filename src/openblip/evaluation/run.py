"""A source walked through for evaluation: every process its share, in batches, with rejects.

The model is anything with the calls of `openblip.BlipPredictor` that the task needs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from openblip.data.sample import Record, Reject, Sample, Source
from openblip.distributed import gather_objects, rank, world_size
from openblip.errors import ImageError, SourceError
from openblip.progress import Progress

READ_AT_ONCE = 64

Result = TypeVar("Result")
Work = Callable[[list[Sample]], Sequence[Result]]


class Walked(NamedTuple):
    """What the work gave for every sample that could be used, in the source's order, and what could not."""

    results: list[Any]
    rejects: list[Reject]


def walk(
    source: Source,
    work: Work[Result],
    *,
    label: str,
    accept: Callable[[Sample], object],
    limit: int | None = None,
    at_once: int = READ_AT_ONCE,
) -> Walked:
    """What `work` makes of the samples, one result for each; on every process the same, whoever did the work.

    accept: raises `SourceError` for a sample that lacks what the task needs. limit: only the first so many
    samples of the source. A sample that is not accepted, or whose picture or clip cannot be decoded, becomes
    a reject. Raises `SourceError` when no sample is left.
    """
    results: list[tuple[int, Result]] = []
    rejects: list[tuple[int, Reject]] = []
    records, found = _records(source, limit)
    share = range(rank(), len(records), world_size())
    with Progress(label, total=len(share), unit="samples", visible=rank() == 0) as bar:
        for start in range(0, len(share), at_once):
            numbers = list(share[start : start + at_once])
            samples: list[tuple[int, Sample]] = []
            for number in numbers:
                try:
                    sample = records[number].read()
                    accept(sample)
                    samples.append((number, sample))
                except (SourceError, OSError) as error:
                    rejects.append((number, _reject(records[number], error)))
            done, failed = _worked(samples, work)
            results += done
            rejects += failed
            bar.advance(len(numbers))
    in_order = sorted(gather_objects(results), key=lambda pair: pair[0])
    rejected = [reject for _, reject in sorted(gather_objects(rejects), key=lambda pair: pair[0])]
    if not in_order:
        reasons = "".join(f"; {r.shard}/{r.key}: {r.reason}" for r in rejected[:3])
        raise SourceError(f"{source.name} has no sample that can be used{reasons}.")
    return Walked([result for _, result in in_order], rejected + found)


def pictures(model: Any, samples: Sequence[Sample], num_frames: int | None, batch_size: int | None) -> Any:
    """What a model's calls take as images: the pictures, or its encoding of `num_frames` of each clip."""
    encoded = [sample.image for sample in samples]
    return encoded if num_frames is None else model.encode_videos(encoded, num_frames, batch_size)


def _records(source: Source, limit: int | None) -> tuple[list[Record], list[Reject]]:
    records: list[Record] = []
    rejects: list[Reject] = []
    for shard in source.shards():
        index = source.index(shard)
        records += index.records
        rejects += index.rejects
        if limit is not None and len(records) >= limit:
            break
    return records[:limit], rejects


def _worked(
    samples: Sequence[tuple[int, Sample]], work: Work[Result]
) -> tuple[list[tuple[int, Result]], list[tuple[int, Reject]]]:
    """The work on a batch; one by one where a picture in it cannot be decoded."""
    try:
        done = work([sample for _, sample in samples]) if samples else []
        return list(zip((number for number, _ in samples), done, strict=True)), []
    except ImageError as error:
        if len(samples) == 1:
            number, sample = samples[0]
            return [], [(number, Reject(sample.shard, sample.key, str(error)))]
    results: list[tuple[int, Result]] = []
    rejects: list[tuple[int, Reject]] = []
    for one in samples:
        done_one, failed = _worked([one], work)
        results += done_one
        rejects += failed
    return results, rejects


def _reject(record: Record, error: Exception) -> Reject:
    return Reject(record.shard, record.key, str(error))
