"""Samples with captions: a picture, what its caption says, and all that could truly be said."""

from collections.abc import Iterator
from random import Random
from typing import Any

from openblip.data.emoji_scenes.encoding import Member, jpeg_bytes, json_bytes, scene_json
from openblip.data.emoji_scenes.noise import noisy_caption
from openblip.data.emoji_scenes.phrasing import references
from openblip.data.emoji_scenes.rendering import render
from openblip.data.emoji_scenes.request import SceneRequest
from openblip.data.emoji_scenes.scene import Scene, draw_scene
from openblip.data.emoji_scenes.sprites import require_demo_packages
from openblip.data.emoji_scenes.vocabulary import Split


class CaptionSamples:
    """`jpg` and `json` with `caption`, `references` (all true ones), `noise` (kind or null), `scene`."""

    def require_packages(self) -> None:
        require_demo_packages()

    def draw(self, rng: Random, split: Split) -> Scene:
        return draw_scene(rng, split)

    def claims(self, scene: Scene) -> tuple[str, ...]:
        """Its true captions: retrieval over distinct scenes has one right answer."""
        return references(scene)

    def members(self, request: SceneRequest, index: int, scene: Scene) -> list[Member]:
        truths = references(scene)
        caption, noise = self._caption(request, index, scene, truths)
        rendered = render(scene, request.rng(index, "image"))
        content = {
            "caption": caption,
            "references": truths,
            "noise": noise,
            "scene": scene_json(scene, rendered),
        }
        return [("jpg", jpeg_bytes(rendered.image)), ("json", json_bytes(content))]

    def companions(self) -> dict[str, Any]:
        return {}

    def _caption(
        self, request: SceneRequest, index: int, scene: Scene, truths: tuple[str, ...]
    ) -> tuple[str, str | None]:
        """The caption and its kind of noise."""
        rng = request.rng(index, "noise")
        if rng.random() < request.noise:
            others = self._captions_of_others(request, index, rng)
            return noisy_caption(scene, truths, request.split, rng, lambda: next(others))
        return request.rng(index, "caption").choice(truths), None

    def _captions_of_others(self, request: SceneRequest, index: int, rng: Random) -> Iterator[str]:
        """True captions of other images of the same request (of images after its end when it has few)."""
        pool = max(request.num_samples, 1000)
        while True:
            other = rng.randrange(pool)
            if other != index:
                scene = self.draw(request.rng(other, "scene"), request.split)
                yield request.rng(other, "caption").choice(references(scene))
