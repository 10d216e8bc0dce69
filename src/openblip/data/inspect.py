"""What a source holds, counted: the texts of every sample, and the images of some."""

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from openblip.data.fields import turns_of
from openblip.data.images import read_image
from openblip.data.reader import read_source
from openblip.data.sample import MissingFile, Reject, Sample, Source
from openblip.data.video import is_video, read_frames
from openblip.errors import ImageError, MissingExtraError, SourceError

_MOST_FREQUENT = 10


@dataclass
class TaskCounts:
    """Counts over the `info` of samples: questions, statements, dialogs, instructions, classes and domains,
    under the names of docs/data.md. Fields of other types than the documented ones are not counted.
    """

    questions: int = 0
    unanswered: int = 0
    with_choices: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    statements: Counter[str] = field(default_factory=Counter)
    dialogs: int = 0
    rounds: int = 0
    rounds_unanswered: int = 0
    rounds_with_relevance: int = 0
    options: Counter[int] = field(default_factory=Counter)
    instructed: int = 0
    instructions: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    domains: Counter[str] = field(default_factory=Counter)

    def add(self, info: Mapping[str, Any]) -> None:
        """Count what a sample is annotated with."""
        label = info.get("label")
        if isinstance(info.get("question"), str):
            self._add_question(info)
        if isinstance(info.get("statement"), str):
            self.statements[str(label).lower() if isinstance(label, bool) else "unlabelled"] += 1
        elif isinstance(label, str):
            self.classes[label] += 1
        if isinstance(info.get("dialog"), list):
            self._add_dialog(info["dialog"])
        if info.keys() & {"instruction", "turns", "conversations"}:
            with contextlib.suppress(SourceError):
                self.instructions += len(turns_of(info))
                self.instructed += 1
        if isinstance(info.get("domain"), str):
            self.domains[info["domain"]] += 1

    def _add_question(self, info: Mapping[str, Any]) -> None:
        answers = info.get("answers")
        self.questions += 1
        if isinstance(answers, list) and answers:
            self.answers.update(answer for answer in answers if isinstance(answer, str))
        else:
            self.unanswered += 1
        self.with_choices += isinstance(info.get("choices"), list)

    def _add_dialog(self, rounds: list[Any]) -> None:
        self.dialogs += 1
        for turn in rounds:
            if isinstance(turn, dict):
                self.rounds += 1
                self.rounds_unanswered += "answer" not in turn
                self.rounds_with_relevance += "relevance" in turn
                if isinstance(turn.get("options"), list):
                    self.options[len(turn["options"])] += 1

    def facts(self) -> dict[str, Any]:
        """The counts by name, without those of tasks that no sample is annotated for."""
        facts: dict[str, Any] = {}
        if self.questions:
            facts |= {
                "questions": self.questions,
                "questions without an answer": _share(self.unanswered, self.questions),
                "answers": self.answers.total(),
                "different answers": len(self.answers),
                "most frequent answers": dict(self.answers.most_common(_MOST_FREQUENT)),
            }
        if self.with_choices:
            facts["questions with choices"] = self.with_choices
        if self.statements:
            facts["statements"] = dict(self.statements.most_common())
        if self.dialogs:
            facts |= {
                "dialogs": self.dialogs,
                "rounds": self.rounds,
                "rounds without an answer": _share(self.rounds_unanswered, self.rounds),
                "rounds with relevance": self.rounds_with_relevance,
                "candidates per round": {str(size): rounds for size, rounds in sorted(self.options.items())},
            }
        if self.instructed:
            facts |= {"samples with instructions": self.instructed, "instructions": self.instructions}
        if self.classes:
            facts["classes"] = len(self.classes)
            facts["most frequent classes"] = dict(self.classes.most_common(_MOST_FREQUENT))
        if self.domains:
            facts["domains"] = dict(self.domains.most_common())
        return facts


@dataclass
class Inspection:
    """Counts over a source."""

    description: Mapping[str, object] = field(default_factory=dict)
    """What the source says of itself."""
    num_shards: int = 0
    num_samples: int = 0
    """Samples whose texts can be read; `tasks` counts all of them."""
    num_read: int = 0
    """Samples whose images were to be read; what follows up to `examples` counts those that could be."""
    num_pairs: int = 0
    num_videos: int = 0
    captions_per_image: Counter[int] = field(default_factory=Counter)
    caption_words: list[int] = field(default_factory=list)
    image_sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    examples: list[Sample] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    missing_files: list[str] = field(default_factory=list)
    tasks: TaskCounts = field(default_factory=TaskCounts)

    def add(self, sample: Sample, image_sizes: list[tuple[int, int]], num_examples: int) -> None:
        """Count a sample whose images have these sizes."""
        self.num_pairs += sample.second_image is not None
        self.num_videos += is_video(sample.image)
        self.image_sizes.update(image_sizes)
        self.captions_per_image[len(sample.captions)] += 1
        self.caption_words += [len(caption.split()) for caption in sample.captions]
        if len(self.examples) < num_examples:
            self.examples.append(sample)


def inspect_source(
    source: Source, *, num_read: int | None = 200, num_examples: int = 5, on_shard: Callable[[], None] = lambda: None
) -> Inspection:
    """Read the texts of every sample, and the images of `num_read` samples spread evenly over the source.

    Args:
        num_read: None reads and decodes all images. One that cannot be read becomes a reject.
        num_examples: keep this many samples to show.
        on_shard: called after each shard.

    Raises:
        SourceError: a whole shard cannot be opened.
    """
    result = Inspection(source.describe())
    shards = source.shards()
    quota = 0
    for number, shard in enumerate(shards):
        count = 0
        for _, item in source.read(shard, images=False):
            if isinstance(item, Reject):
                result.rejects.append(item)
            else:
                result.tasks.add(item.info)
                count += 1
        if num_read is None:
            quota = count
        else:
            quota += num_read * (number + 1) // len(shards) - num_read * number // len(shards)
        num_chosen = min(quota, count)
        quota -= num_chosen  # what a small shard lacks comes from the next ones
        _read_some(source, shard, {i * count // num_chosen for i in range(num_chosen)}, result, num_examples)
        result.num_samples += count
        result.num_shards += 1
        on_shard()
    return result


def _read_some(source: Source, shard: str, chosen: set[int], result: Inspection, num_examples: int) -> None:
    """Read and decode the chosen samples of a shard, by their places among its samples."""
    if not chosen:
        return
    place = -1

    def is_skipped(shard: str, key: str) -> bool:
        nonlocal place
        place += 1
        return place not in chosen

    known = set(result.rejects)  # reading the texts has given some of them already
    for entry in read_source(source, _image_sizes, shards=[shard], skip=is_skipped):
        if not isinstance(entry, Reject):
            result.add(*entry, num_examples)
        elif isinstance(entry, MissingFile):
            result.missing_files.append(entry.path)
            result.rejects.append(Reject(entry.shard, entry.key, "no such file as its image"))
        elif entry not in known:
            result.rejects.append(entry)
    result.num_read += len(chosen)


def _image_sizes(sample: Sample) -> list[tuple[int, int]]:
    """The sizes of the images that can be decoded; of a video that of its first frame."""
    name = f"{sample.shard}/{sample.key}"
    try:
        images: list[Image.Image] = [
            read_frames(sample.image, 1, name=name)[0]
            if is_video(sample.image)
            else read_image(sample.image, name=name)
        ]
        if sample.second_image is not None:
            images.append(read_image(sample.second_image, name=f"{name} (right)"))
    except MissingExtraError as error:
        raise ImageError(str(error)) from error
    return [image.size for image in images]


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.1%})" if whole else "0"
