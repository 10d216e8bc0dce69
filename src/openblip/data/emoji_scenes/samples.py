"""Samples of the embedded world: each is decided by the request and its index alone."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from openblip.data.emoji_scenes.noise import noisy_caption
from openblip.data.emoji_scenes.phrasing import references
from openblip.data.emoji_scenes.rendering import RenderedScene, render
from openblip.data.emoji_scenes.scene import Scene, draw_scene
from openblip.data.emoji_scenes.vocabulary import SPLITS, Split
from openblip.errors import ConfigError

JPEG_QUALITY = 90
MAX_REDRAWS = 5000  # in a row, before a split counts as exhausted


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


def draw_distinct_scenes(request: SceneRequest) -> list[Scene]:
    """All scenes of a request, no two with a true caption in common; ConfigError if the split has too few."""
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
                f"split {request.split} has no {request.num_samples} distinct scenes: after {len(scenes)} "
                "no new one was found; ask for fewer samples"
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
