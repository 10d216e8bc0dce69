"""What a source holds, counted: the texts of every sample, and the images of some."""

import contextlib
import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from openblip.data.images import is_video, read_frames, read_image
from openblip.data.reader import read_source, shard_items
from openblip.data.sample import MissingFile, Reject, Sample, Source
from openblip.data.sources.rows import row_key
from openblip.data.texts import turns_of
from openblip.errors import ImageError, MissingExtraError, SourceError

_NUM_SHOWN, _NUM_MISSING_SHOWN = 10, 3  # of many values; of missing files


@dataclass
class Inspection:
    """Counts over a source; those of tasks are over the fields of `Sample.info` that are as docs/data.md says."""

    description: Mapping[str, object] = field(default_factory=dict)  # what the source says of itself
    num_shards: int = 0
    num_samples: int = 0  # samples whose texts can be read; counts of tasks are over all of them
    num_read: int = 0  # samples whose images were to be read; captions, sizes and `examples` are of those that could
    counts: Counter[str] = field(default_factory=Counter)  # how many samples, questions, rounds, ... of a kind
    values: defaultdict[str, Counter[Any]] = field(default_factory=lambda: defaultdict(Counter))
    """How often a value occurs, by what it is a value of."""
    examples: list[Sample] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    missing_files: list[str] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)  # files of no sample, by ending

    def add_annotations(self, info: Mapping[str, Any]) -> None:
        """Count what a sample is annotated with."""
        counts, values = self.counts, self.values
        label, answers, rounds = (info.get(name) for name in ("label", "answers", "dialog"))
        if isinstance(info.get("question"), str):
            counts["questions"] += 1
            counts["questions with choices"] += isinstance(info.get("choices"), list)
            if isinstance(answers, list) and answers:
                values["answers"].update(answer for answer in answers if isinstance(answer, str))
            else:
                counts["questions without an answer"] += 1
        if isinstance(info.get("statement"), str):
            values["statements"][str(label).lower() if isinstance(label, bool) else "unlabelled"] += 1
        elif isinstance(label, str):
            values["classes"][label] += 1
        if isinstance(rounds, list):
            counts["dialogs"] += 1
            for turn in rounds:
                if isinstance(turn, dict):
                    counts["rounds"] += 1
                    counts["rounds without an answer"] += "answer" not in turn
                    counts["rounds with relevance"] += "relevance" in turn
                    if isinstance(turn.get("options"), list):
                        values["candidates per round"][len(turn["options"])] += 1
        if info.keys() & {"instruction", "turns", "conversations"}:
            with contextlib.suppress(SourceError):
                counts["instructions"] += len(turns_of(info))
                counts["samples with instructions"] += 1
        if isinstance(info.get("domain"), str):
            values["domains"][info["domain"]] += 1

    def facts(self) -> dict[str, Any]:
        """All that was counted, by name. What no sample has is left out."""
        counts, values = self.counts, self.values
        tasks: dict[str, Any] = {}
        if counts["questions"]:
            tasks["questions"] = counts["questions"]
            tasks["questions without an answer"] = _share(counts["questions without an answer"], counts["questions"])
            tasks["answers"] = values["answers"].total()
            tasks["different answers"] = len(values["answers"])
            tasks["most frequent answers"] = dict(values["answers"].most_common(_NUM_SHOWN))
        if counts["questions with choices"]:
            tasks["questions with choices"] = counts["questions with choices"]
        if values["statements"]:
            tasks["statements"] = dict(values["statements"].most_common())
        if counts["dialogs"]:
            tasks |= {name: counts[name] for name in ("dialogs", "rounds")}
            tasks["rounds without an answer"] = _share(counts["rounds without an answer"], counts["rounds"])
            tasks["rounds with relevance"] = counts["rounds with relevance"]
            tasks["candidates per round"] = _by_number(values["candidates per round"])
        if counts["samples with instructions"]:
            tasks |= {name: counts[name] for name in ("samples with instructions", "instructions")}
        if values["classes"]:
            tasks["classes"] = len(values["classes"])
            tasks["most frequent classes"] = dict(values["classes"].most_common(_NUM_SHOWN))
        if values["domains"]:
            tasks["domains"] = dict(values["domains"].most_common())
        facts = {**self.description, "shards": self.num_shards, "samples": self.num_samples}
        if tasks:
            facts |= {"task fields counted in": self.num_samples, **tasks}
        facts["samples read"] = self.num_read
        facts |= {name: counts[name] for name in ("repeated keys", "pairs of images", "clips") if counts[name]}
        if self.missing_files:
            facts["missing images"] = f"{len(self.missing_files)} of {self.num_read}"
            facts["first missing"] = self.missing_files[:_NUM_MISSING_SHOWN]
        if self.unused:
            facts["files not used"] = dict(self.unused.most_common())
        words = sorted(values["words per caption"].elements())
        spread = {"least": words[0], "median": statistics.median(words), "most": words[-1]} if words else {}
        sizes = values["image sizes"].most_common(_NUM_SHOWN)
        return facts | {
            "rejects": len(self.rejects),
            "captions per image": _by_number(values["captions per image"]),
            "words per caption": spread,
            "image sizes": [f"{width}x{height}" for (width, height), _ in sizes],
        }


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.1%})" if whole else "0"


def _by_number(values: Counter[int]) -> dict[str, int]:
    return {str(number): count for number, count in sorted(values.items())}


def inspect_source(
    source: Source, *, num_read: int | None = 200, num_examples: int = 5, on_shard: Callable[[], None] = lambda: None
) -> Inspection:
    """Read the texts of every sample, and the images of `num_read` samples spread evenly over the source, or all. An
    image that cannot be read becomes a reject. `num_examples` samples are kept to show. `on_shard` is called after each
    shard. A shard that cannot be opened is a reject.
    """
    missing = {"missing": source.lacks} if source.lacks else {}
    result = Inspection({**source.describe(), **missing})
    shards = source.shards()
    quota = 0
    for number, shard in enumerate(shards):
        count = 0
        for item in shard_items(source.read(shard, images=False), shard):
            if isinstance(item, Reject):
                result.rejects.append(item)
            else:
                result.add_annotations(item.info)
                own_key, _, repeat = item.key.rpartition("-")
                result.counts["repeated keys"] += repeat.isdigit() and own_key == row_key(item.info, -1)
                count += 1
        if num_read is None:
            quota = count
        else:
            quota += num_read * (number + 1) // len(shards) - num_read * number // len(shards)
        num_chosen = min(quota, count)
        quota -= num_chosen  # what a small shard lacks comes from the next ones
        if num_chosen:
            _read_some(source, shard, {i * count // num_chosen for i in range(num_chosen)}, result, num_examples)
        result.num_read += num_chosen
        result.num_samples += count
        result.num_shards += 1
        on_shard()
    result.unused = source.count_unused()
    return result


def _read_some(source: Source, shard: str, chosen: set[int], result: Inspection, num_examples: int) -> None:
    """Read and decode the chosen samples of a shard, by their places among its samples."""
    places = itertools.count()
    known = set(result.rejects)  # reading the texts has given some of them already
    for entry in read_source(source, _image_sizes, shards=[shard], skip=lambda shard, key: next(places) not in chosen):
        if isinstance(entry, MissingFile):
            result.missing_files.append(entry.path)
            result.rejects.append(Reject(entry.shard, entry.key, "no such file as its image"))
        elif isinstance(entry, Reject):
            if entry not in known:
                result.rejects.append(entry)
        else:
            sample, image_sizes = entry
            result.counts["pairs of images"] += sample.second_image is not None
            result.counts["clips"] += is_video(sample.image)
            result.values["image sizes"].update(image_sizes)
            result.values["captions per image"][len(sample.captions)] += 1
            result.values["words per caption"].update(len(caption.split()) for caption in sample.captions)
            if len(result.examples) < num_examples:
                result.examples.append(sample)


def _image_sizes(sample: Sample) -> list[tuple[int, int]]:
    """The sizes of the images that can be decoded; of a video that of its first frame."""
    name = f"{sample.shard}/{sample.key}"
    try:
        images = (
            read_frames(sample.image, 1, name=name) if is_video(sample.image) else [read_image(sample.image, name=name)]
        )
    except MissingExtraError as error:
        raise ImageError(str(error)) from error
    if sample.second_image is not None:
        images.append(read_image(sample.second_image, name=f"{name} (right)"))
    return [image.size for image in images]
