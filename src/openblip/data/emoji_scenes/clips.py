"""Samples with captions of a clip: what moves through it, whenever and wherever."""

from random import Random
from typing import Any

from openblip.data.emoji_scenes.encoding import Member, clip_bytes, json_bytes, require_video_package
from openblip.data.emoji_scenes.filming import FRAMES_PER_SECOND, FilmedScene, film
from openblip.data.emoji_scenes.phrasing import references
from openblip.data.emoji_scenes.request import SceneRequest
from openblip.data.emoji_scenes.scene import Scene, draw_moving_scene
from openblip.data.emoji_scenes.sprites import require_demo_packages
from openblip.data.emoji_scenes.vocabulary import Split


class ClipSamples:
    """`mp4` and `json` with `caption`, `references` (all true ones) and `scene`."""

    def require_packages(self) -> None:
        require_demo_packages()
        require_video_package()

    def draw(self, rng: Random, split: Split) -> Scene:
        return draw_moving_scene(rng, split)

    def claims(self, scene: Scene) -> tuple[str, ...]:
        """Its true captions: retrieval over distinct clips has one right answer."""
        return references(scene)

    def members(self, request: SceneRequest, index: int, scene: Scene) -> list[Member]:
        truths = references(scene)
        filmed = film(scene, request.rng(index, "image"))
        content = {
            "caption": request.rng(index, "caption").choice(truths),
            "references": truths,
            "scene": moving_scene_json(scene, filmed),
        }
        return [("mp4", clip_bytes(filmed.frames, FRAMES_PER_SECOND)), ("json", json_bytes(content))]

    def companions(self) -> dict[str, Any]:
        return {}


def moving_scene_json(scene: Scene, filmed: FilmedScene) -> dict[str, Any]:
    """The scene with the frames [first, last + 1] of each object, and for every copy its box in both."""
    described = scene.as_json()
    for thing, tracks in zip(described["objects"], filmed.tracks, strict=True):
        thing["frames"] = (tracks[0].frames.start, tracks[0].frames.stop)
        thing["boxes"] = [(track.boxes[0], track.boxes[-1]) for track in tracks]
    return described
