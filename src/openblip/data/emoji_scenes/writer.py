"""Writes emoji scenes as standard tar shards: the same request gives the same bytes, however many processes work."""

import io
import json
import multiprocessing
import os
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from openblip.data.emoji_scenes.noise import noisy_caption
from openblip.data.emoji_scenes.phrasing import references
from openblip.data.emoji_scenes.rendering import RenderedScene, render
from openblip.data.emoji_scenes.scene import Scene, draw_scene
from openblip.data.emoji_scenes.sprites import ATTRIBUTION, require_demo_packages
from openblip.data.emoji_scenes.vocabulary import SPLITS, Split
from openblip.errors import ConfigError

JPEG_QUALITY = 90
MAX_REDRAWS = 5000  # in a row, before a split counts as exhausted
LICENSE_FILE = "LICENSE.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneRequest:
    """What decides every byte that is written."""

    split: Split
    num_samples: int
    seed: int
    noise: float
    samples_per_shard: int

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ConfigError(f"emoji scenes have no split '{self.split}'; choose one of {', '.join(SPLITS)}")
        if self.num_samples < 1 or self.samples_per_shard < 1:
            raise ConfigError("num_samples and samples_per_shard must be at least 1")
        if not 0.0 <= self.noise <= 1.0:
            raise ConfigError(f"noise is a probability, so it lies in 0..1, not at {self.noise}")

    def rng(self, index: int, purpose: str) -> Random:
        """A stream of its own for each sample and purpose, so that samples do not depend on each other."""
        return Random(f"{self.split}/{self.seed}/{index}/{purpose}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmojiSample:
    """One sample before it is packed; `noise` is None or the kind of noise in `caption`."""

    key: str
    scene: Scene
    rendered: RenderedScene
    caption: str
    references: tuple[str, ...]
    noise: str | None

    def jpeg(self) -> bytes:
        """The picture, encoded."""
        file = io.BytesIO()
        self.rendered.image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return file.getvalue()

    def json(self) -> bytes:
        """Caption, references, noise and the scene with its boxes."""
        scene = self.scene.as_json()
        for thing, boxes in zip(scene["objects"], self.rendered.boxes, strict=True):
            thing["boxes"] = boxes
        content: dict[str, Any] = {
            "caption": self.caption,
            "references": self.references,
            "noise": self.noise,
            "scene": scene,
        }
        return json.dumps(content, ensure_ascii=False).encode()


def write_emoji_scenes(
    out: str | os.PathLike[str],
    *,
    split: Split,
    num_samples: int,
    seed: int = 0,
    noise: float = 0.4,
    samples_per_shard: int = 1000,
    num_workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write `num_samples` scenes of `split` to OUT/0000.tar, OUT/0001.tar, ... and the licence of the sprites.

    `noise` is the share of noisy captions of split web; the other splits have none. The same request writes the same
    bytes for any `num_workers` (None: one for each processor). Scenes of val and of test are distinct: no two of one
    split share a true caption.

    Raises ConfigError for an impossible request or a folder that is not empty (`overwrite` replaces the shards in
    it), MissingExtraError without the demo packages.
    """
    request = SceneRequest(
        split=split,
        num_samples=num_samples,
        seed=seed,
        noise=noise if split == "web" else 0.0,
        samples_per_shard=samples_per_shard,
    )
    if num_workers is not None and num_workers < 1:
        raise ConfigError("num_workers must be at least 1")
    require_demo_packages()
    scenes = draw_distinct_scenes(request) if split in ("val", "test") else None
    folder = _empty_folder(Path(out), overwrite)
    starts = range(0, num_samples, samples_per_shard)
    jobs = [
        _ShardJob(
            path=folder / f"{number:04d}.tar",
            request=request,
            start=start,
            stop=min(start + samples_per_shard, num_samples),
            scenes=None if scenes is None else scenes[start : start + samples_per_shard],
        )
        for number, start in enumerate(starts)
    ]
    (folder / LICENSE_FILE).write_text(ATTRIBUTION, encoding="utf-8")
    _run(jobs, min(num_workers or os.cpu_count() or 1, len(jobs)), progress)
    return folder


def draw_distinct_scenes(request: SceneRequest) -> list[Scene]:
    """All scenes of a request, no two of which share a true caption; ConfigError when the split has no more."""
    scenes: list[Scene] = []
    said: set[str] = set()
    for index in range(request.num_samples):
        rng = request.rng(index, "scene")
        for _ in range(MAX_REDRAWS):
            scene = draw_scene(rng, request.split)
            captions = references(scene)
            if said.isdisjoint(captions):
                break
        else:
            raise ConfigError(
                f"split {request.split} has no {request.num_samples} distinct scenes: after {len(scenes)} no new one "
                "was found; ask for fewer samples"
            )
        said.update(captions)
        scenes.append(scene)
    return scenes


def make_sample(request: SceneRequest, index: int, scene: Scene | None = None) -> EmojiSample:
    """Sample `index` of a request; `scene` where it was drawn before (val and test)."""
    if scene is None:
        scene = draw_scene(request.rng(index, "scene"), request.split)
    truths = references(scene)
    caption, noise = request.rng(index, "caption").choice(truths), None
    rng = request.rng(index, "noise")
    if rng.random() < request.noise:
        others = _captions_of_others(request, index, rng)
        caption, noise = noisy_caption(scene, truths, request.split, rng, lambda: next(others))
    return EmojiSample(
        key=f"{index:09d}",
        scene=scene,
        rendered=render(scene, request.rng(index, "image")),
        caption=caption,
        references=truths,
        noise=noise,
    )


def _captions_of_others(request: SceneRequest, index: int, rng: Random) -> Iterator[str]:
    """True captions of other images of the same request (of images after its end when it has few)."""
    pool = max(request.num_samples, 1000)
    while True:
        other = rng.randrange(pool)
        if other != index:
            scene = draw_scene(request.rng(other, "scene"), request.split)
            yield request.rng(other, "caption").choice(references(scene))


def _empty_folder(folder: Path, overwrite: bool) -> Path:
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; name a folder for the shards")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise ConfigError(
                f"{folder} is not empty; name a new folder, or replace its shards with --overwrite"
            )
        for file in (*folder.glob("*.tar"), *folder.glob("*.tar.partial")):
            file.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class _ShardJob:
    path: Path
    request: SceneRequest
    start: int
    stop: int
    scenes: list[Scene] | None

    def write(self) -> int:
        """Write the shard under a temporary name, then rename it: a shard that is there is whole."""
        partial = self.path.with_name(self.path.name + ".partial")
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(self.start, self.stop):
                scene = None if self.scenes is None else self.scenes[index - self.start]
                sample = make_sample(self.request, index, scene)
                _add(tar, f"{sample.key}.jpg", sample.jpeg())
                _add(tar, f"{sample.key}.json", sample.json())
        partial.replace(self.path)
        return self.stop - self.start


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # its defaults are fixed: owner 0, time 0, mode 644
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _run(jobs: list[_ShardJob], num_workers: int, show: bool) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not show) as progress:
        task = progress.add_task("emoji scenes", total=sum(job.stop - job.start for job in jobs))
        for written in _written(jobs, num_workers):
            progress.advance(task, written)


def _written(jobs: list[_ShardJob], num_workers: int) -> Iterable[int]:
    if num_workers == 1:
        yield from (job.write() for job in jobs)
        return
    # Spawned, not forked: the caller may hold threads (a progress bar, torch).
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        for future in as_completed([pool.submit(job.write) for job in jobs]):
            yield future.result()
