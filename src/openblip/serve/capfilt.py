"""The CapFilt tab: a run's images with their texts and scores, some at a time, and labels that a person gives.

Nothing is computed by a model. A request reads from one place of the run onwards, and says where the next one goes on,
so that a run of any size is browsed at the cost of what is shown. Labels go to a file of their sample,
`DIR/labels/<score>-<texts>-<seed>.jsonl`, a line for each answer, which `openblip capfilt-calibrate` reads; several
servers may append to it.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from filelock import FileLock
from pydantic import BaseModel, Field

from openblip.capfilt.folder import SCORED, SOURCES, CapFiltFolder, RunScores
from openblip.capfilt.labels import Label, TextName, label_captions, sample_texts, text_name
from openblip.capfilt.report import ShownImage, read_originals
from openblip.data.captions import read_judged
from openblip.data.decision import Decision
from openblip.errors import ConfigError
from openblip.files import hash_int, is_local, name_full_disk, read_jsonl

SHOWN_COLUMNS = ("key", "index", "source", "caption", "itm", "itc", "logprob")
COUNTED_SHARDS = 50  # that are read for the numbers of the run
SCANNED_ROWS = 200_000  # in which a request looks for images
ROWS_AT_ONCE = 2048  # that become Python objects at a time
BORDER = 0.2  # an image has a text whose ITM is at most so far from its threshold
MOST_IMAGES = 60  # of a reply
MOST_LABELS = 5000
Shown = Literal["all", "kept", "rejected", "only synthetic", "only web", "both", "neither", "borderline"]
Answer = Literal["yes", "no", "unsure", ""]
FATES_SHOWN = {
    "only synthetic": (False, True),
    "only web": (True, False),
    "both": (True, True),
    "neither": (False, False),
}


class SourceCounts(BaseModel):
    """How many texts there are of a source, and how many of them are kept."""

    texts: int
    kept: int


class RunOverview(BaseModel):
    """What a run is about; images and texts are counted in `num_counted` shards."""

    source: str
    decision: str
    thresholds: dict[str, float | None]
    models: dict[str, str]
    shards: list[str]
    num_shards: int
    num_counted: int
    num_images: int
    texts: dict[str, SourceCounts]
    can_label: bool
    calibrate: str


class ShownText(BaseModel):
    """A text of an image; `is_true` where the source says what is true of it."""

    source: str
    caption: str
    itm: float
    itc: float
    logprob: float | None
    kept: bool
    is_true: bool | None


class BrowsedImage(BaseModel):
    """An image with its texts; without a thumbnail where the source no longer has it."""

    shard: str
    key: str
    thumbnail: str | None
    noise: str | None
    texts: list[ShownText]


class BrowsedImages(BaseModel):
    """Images in the order of the run, and where the next request goes on; None at the end."""

    images: list[BrowsedImage]
    next: str | None


class AskedText(BaseModel):
    """A text that a person is asked about, and the answer that is stored."""

    number: int
    caption: str
    thumbnail: str | None
    label: Answer


class AskedTexts(BaseModel):
    """Some texts of a sample, how many of the whole sample have an answer, and the first that has none."""

    texts: list[AskedText]
    num_texts: int
    num_answered: int
    first_open: int | None
    file: str


class LabelSample(BaseModel):
    """Names a sample of texts: the same numbers draw the same texts."""

    num_texts: int = Field(200, ge=1, le=MOST_LABELS)
    by: str = Field("itm", max_length=100)
    seed: int = Field(0, ge=0, lt=2**32)


class GivenLabel(BaseModel):
    """An answer about a text of the sample; the empty one takes an answer back."""

    number: int = Field(ge=0, lt=MOST_LABELS)
    label: Answer


class GivenLabels(LabelSample):
    """Answers to the texts of a sample."""

    labels: list[GivenLabel] = Field(max_length=MOST_LABELS)


class StoredLabels(BaseModel):
    """How many texts of the sample have an answer now, and the file."""

    num_answered: int
    file: str


class CapFiltBrowser:
    """A run's folder as the tab reads it; safe to use from several threads. Raises ConfigError for no CapFilt run."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = str(directory)
        self.folder = CapFiltFolder(directory)
        self.folder.read_manifest()
        self._sample = lru_cache(maxsize=4)(self._draw)

    def summary(self) -> RunOverview:
        """The numbers of the run, counted in at most `COUNTED_SHARDS` shards that are drawn by hash."""
        manifest, shards = self.folder.read_manifest(), self.folder.done_shards()
        decision, scores = Decision.of_manifest(manifest), RunScores()
        counted = sorted(shards, key=hash_int)[:COUNTED_SHARDS]
        for shard in counted:
            scores.add_shard(read_judged(self.folder.root, shard, decision, SCORED))
        return RunOverview(
            source=manifest["source"],
            decision=str(decision),
            thresholds={name: decision.threshold_of(name) for name in SOURCES},
            models={role: model["checkpoint"] for role, model in manifest["models"].items()},
            shards=shards,
            num_shards=manifest["num_shards"],
            num_counted=len(counted),
            num_images=scores.images,
            texts={name: SourceCounts(texts=each.texts, kept=each.kept) for name, each in scores.sources.items()},
            can_label=is_local(self.folder.root),
            calibrate=f"openblip capfilt-calibrate {self.directory}",
        )

    def browse(
        self,
        *,
        shard: str | None = None,
        show: Shown = "all",
        text: str = "",
        low: float = 0.0,
        high: float = 1.0,
        start: str | None = None,
        limit: int = 24,
    ) -> BrowsedImages:
        """The next images, in the order of the run, of which a text has the words and an ITM from low to high.

        start: `next` of the reply before. Raises ConfigError for a shard that is not finished.
        """
        manifest, shards = self.folder.read_manifest(), self.folder.done_shards()
        if not (shards or shard or start):  # the run has just begun
            return BrowsedImages(images=[], next=None)
        decision = Decision.of_manifest(manifest)
        thresholds = {name: decision.threshold_of(name) for name in SOURCES}
        first_row, first_shard = self._place(start, shard or next(iter(shards), ""))
        for name in {first_shard, shard or first_shard} - set(shards):
            raise ConfigError(f"{self.directory} has no finished shard {name!r:.100}")
        words, scanned = text.strip().lower(), 0
        shown: list[ShownImage] = []
        for name in [shard] if shard else shards[shards.index(first_shard) :]:
            row = first_row if name == first_shard else 0
            for image in self._images(name, row, decision):
                if len(shown) >= limit or scanned >= SCANNED_ROWS:
                    return self._with_originals(manifest, shown, f"{row}:{name}")
                row, scanned = row + len(image.rows), scanned + len(image.rows)
                has_text = any(words in each["caption"].lower() and low <= each["itm"] <= high for each in image.rows)
                if has_text and _is_shown(image, show, thresholds):
                    shown.append(image)
        return self._with_originals(manifest, shown, None)

    def asked_texts(self, sample: LabelSample, start: int, limit: int) -> AskedTexts:
        """Texts of a sample from number `start` on, with their images and answers.

        Raises ConfigError for a score that there is not, or a run without finished shards.
        """
        labels = self._sample(sample.num_texts, sample.by, sample.seed)
        answers = self._answers(sample)
        asked = labels[start : start + limit]
        captions = label_captions(self.folder.root, asked) if asked else {}  # past the last one
        images = [ShownImage(label.shard, label.key, []) for label in asked]
        self._read_originals(self.folder.read_manifest(), images)
        texts = [
            AskedText(
                number=start + place,
                caption=captions[text_name(label)],
                thumbnail=image.thumbnail,
                label=answers.get(text_name(label), ""),
            )
            for place, (label, image) in enumerate(zip(asked, images, strict=True))
        ]
        unanswered = (number for number, label in enumerate(labels) if not answers.get(text_name(label)))
        return AskedTexts(
            texts=texts,
            num_texts=len(labels),
            num_answered=sum(bool(answer) for answer in answers.values()),
            first_open=next(unanswered, None),
            file=str(self._file(sample)),
        )

    def store_labels(self, given: GivenLabels) -> StoredLabels:
        """Append answers to the file of their sample.

        Raises ConfigError for a number that the sample has not, and for a run in a store, where nothing is appended.
        """
        labels = self._sample(given.num_texts, given.by, given.seed)
        if not is_local(self.folder.root):
            raise ConfigError(f"{self.directory}: labels are kept only for runs on this machine; copy the run here")
        lines = []
        for each in given.labels:
            if each.number >= len(labels):
                raise ConfigError(f"the sample has {len(labels)} texts, so there is no text {each.number}")
            row = asdict(labels[each.number]) | {"label": each.label}
            del row["is_true"]
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        path = self._file(given)
        path.parent.mkdir(exist_ok=True)
        lock = FileLock(f"{path}.lock")  # other servers append, too
        with lock, path.open("ab", buffering=0) as file, name_full_disk(path):
            file.truncate(max((line.end for line in read_jsonl(path)), default=0))  # a line that a killed server began
            file.write("".join(lines).encode("utf-8", "backslashreplace"))
            os.fsync(file.fileno())
        answered = sum(bool(answer) for answer in self._answers(given).values())
        return StoredLabels(num_answered=answered, file=str(path))

    def _draw(self, num_texts: int, by: str, seed: int) -> list[Label]:
        return sample_texts(self.directory, num_texts, by=by, seed=seed)

    def _file(self, sample: LabelSample) -> Path:
        return self.folder.root / "labels" / f"{sample.by}-{sample.num_texts}-{sample.seed}.jsonl"

    def _answers(self, sample: LabelSample) -> dict[TextName, Answer]:
        """The answers that are stored, by what names their texts; the last one about a text holds."""
        path = self._file(sample)
        if not is_local(self.folder.root) or not path.is_file():
            return {}
        return {text_name(line.value): line.value["label"] for line in read_jsonl(path)}

    def _place(self, start: str | None, default: str) -> tuple[int, str]:
        """The row and shard of a `next`."""
        row, _, shard = (start or f"0:{default}").partition(":")
        if not (row.isascii() and row.isdigit() and len(row) < 12):
            raise ConfigError(f"start is {start!r:.100}; give what `next` of the reply before was")
        return int(row), shard

    def _images(self, shard: str, start: int, decision: Decision) -> Iterator[ShownImage]:
        """The images of a shard from a row on, whose rows stand together."""
        table = read_judged(self.folder.root, shard, decision, SHOWN_COLUMNS).slice(start)
        rows = (row for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE) for row in batch.to_pylist())
        for key, group in groupby(rows, itemgetter("key")):
            yield ShownImage(shard, key, [{**row, "is_true": None} for row in group])

    def _with_originals(
        self, manifest: Mapping[str, Any], images: Sequence[ShownImage], start: str | None
    ) -> BrowsedImages:
        """Images with what is read of them from the source: thumbnails, and what is true of them."""
        self._read_originals(manifest, images)
        browsed = [
            BrowsedImage(
                shard=image.shard,
                key=image.key,
                thumbnail=image.thumbnail,
                noise=image.noise,
                texts=[ShownText.model_validate(row) for row in image.rows],
            )
            for image in images
        ]
        return BrowsedImages(images=browsed, next=start)

    def _read_originals(self, manifest: Mapping[str, Any], images: Sequence[ShownImage]) -> None:
        by_shard: dict[str, dict[str, list[ShownImage]]] = defaultdict(lambda: defaultdict(list))
        for image in images:
            image.is_shown = True
            by_shard[image.shard][image.key].append(image)
        for shard, same_key in by_shard.items():
            read_originals(manifest, shard, [group[0] for group in same_key.values()])
            for first, *others in same_key.values():
                for other in others:  # several texts of one image
                    other.thumbnail = first.thumbnail


def _is_shown(image: ShownImage, show: Shown, thresholds: Mapping[str, float | None]) -> bool:
    if show == "all":
        return True
    if show in ("kept", "rejected"):
        return any(row["kept"] == (show == "kept") for row in image.rows)
    if show == "borderline":
        return image.distance(thresholds) <= BORDER
    return image.fate == FATES_SHOWN[show]


def capfilt_router(directory: str | Path) -> APIRouter:
    """The routes of the CapFilt tab, below /capfilt. Raises ConfigError where the folder is no CapFilt run."""
    browser, router = CapFiltBrowser(directory), APIRouter(prefix="/capfilt", tags=["capfilt"])

    @router.get("")
    def capfilt_summary() -> RunOverview:
        """What the run is about, and how many texts are kept."""
        return browser.summary()

    @router.get("/images")
    def capfilt_images(
        shard: Annotated[str | None, Query(max_length=500)] = None,
        show: Shown = "all",
        text: Annotated[str, Query(max_length=500)] = "",
        low: Annotated[float, Query(ge=0, le=1)] = 0.0,
        high: Annotated[float, Query(ge=0, le=1)] = 1.0,
        start: Annotated[str | None, Query(max_length=600)] = None,
        limit: Annotated[int, Query(ge=1, le=MOST_IMAGES)] = 24,
    ) -> BrowsedImages:
        """The next images of the run with their texts, scores and verdicts."""
        return browser.browse(shard=shard, show=show, text=text, low=low, high=high, start=start, limit=limit)

    @router.get("/labels")
    def capfilt_sample(
        sample: Annotated[LabelSample, Query()],
        start: Annotated[int, Query(ge=0, lt=MOST_LABELS)] = 0,
        limit: Annotated[int, Query(ge=1, le=MOST_IMAGES)] = 20,
    ) -> AskedTexts:
        """Texts for a person to label, drawn as `openblip capfilt-sample` draws them, and the answers so far."""
        return browser.asked_texts(sample, start, limit)

    @router.post("/labels")
    def capfilt_labels(given: GivenLabels) -> StoredLabels:
        """Keep a person's answers in the run's folder, for `openblip capfilt-calibrate`."""
        return browser.store_labels(given)

    return router
