"""Films a scene: its things cross a still background on straight paths, whole and apart in every frame.

Half of them are there for a part of one half of the clip only, so that one frame may not show all of them.
Each is there for so long that four frames spread evenly over the clip do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from PIL import Image

from openblip.data.emoji_scenes.rendering import (
    CANVAS,
    MARGIN,
    MAX_ROTATION,
    Box,
    paint_backdrop,
    resized_sprite,
    rotated,
)
from openblip.data.emoji_scenes.scene import Scene, SceneObject

NUM_FRAMES = 16
FRAMES_PER_SECOND = 8
HALF_CLIP = NUM_FRAMES // 2
SHORTEST_STAY = 5  # frames; four evenly spread frames are never further apart
PART_TIME_PROBABILITY = 0.5
ROTATION_STEPS = 8  # how many pictures of a sprite a path shows one after the other
ROUNDS = 8
ARRANGEMENT_TRIES = 4  # in a round
PATH_TRIES = 25  # in an arrangement, for each thing

Point = tuple[float, float]
Turning = tuple[
    range, tuple[Image.Image, ...]
]  # when a thing is seen, and its picture in each of those frames


@dataclass(frozen=True, slots=True)
class Track:
    """One copy of a thing: in which frames it is seen, and its pictures and boxes in them."""

    frames: range
    pictures: tuple[Image.Image, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class FilmedScene:
    """NUM_FRAMES RGB frames, and for each object of the scene the track of every copy."""

    frames: tuple[Image.Image, ...]
    tracks: tuple[tuple[Track, ...], ...]


def film(scene: Scene, rng: Random) -> FilmedScene:
    """Film `scene` in CANVAS x CANVAS; the same `rng` state gives the same pixels."""
    backdrop = paint_backdrop(scene.background, rng)
    # All copies of a thing come and go together: two dogs that are never seen at once could be one dog.
    things = [(thing, stay) for thing in scene.objects for stay in [_stay(rng)] * thing.count]
    tracks = _tracks(things, rng)
    frames = tuple(_frame(backdrop, tracks, index) for index in range(NUM_FRAMES))
    remaining = iter(tracks)
    grouped = tuple(tuple(next(remaining) for _ in range(thing.count)) for thing in scene.objects)
    return FilmedScene(frames, grouped)


def _stay(rng: Random) -> range:
    """The frames in which a thing is seen: all, or some in a row within one half of the clip."""
    if rng.random() >= PART_TIME_PROBABILITY:
        return range(NUM_FRAMES)
    length = rng.randint(SHORTEST_STAY, HALF_CLIP)
    start = rng.choice((0, HALF_CLIP)) + rng.randint(0, HALF_CLIP - length)
    return range(start, start + length)


def _frame(backdrop: Image.Image, tracks: list[Track], index: int) -> Image.Image:
    frame = backdrop.copy()
    for track in tracks:
        if index in track.frames:
            position = track.frames.index(index)
            picture = track.pictures[position]
            frame.paste(picture, track.boxes[position][:2], picture)
    return frame


def _tracks(things: list[tuple[SceneObject, range]], rng: Random) -> list[Track]:
    """A track for each; jitter and rotation fade from round to round, so that the last ones always fit."""
    for round_ in range(ROUNDS):
        jitter = 1.0 - round_ / (ROUNDS - 1)
        turning = [(stay, _turning(thing, len(stay), jitter, rng)) for thing, stay in things]
        for _ in range(ARRANGEMENT_TRIES):
            tracks = _apart(turning, rng)
            if len(tracks) == len(things):
                return tracks
        tracks = _in_quarters(turning, rng)
        if len(tracks) == len(things):
            return tracks
    raise AssertionError(f"no room for {things}")  # at nominal size a thing that is not alone fits a quarter


def _apart(turning: list[Turning], rng: Random) -> list[Track]:
    """Paths anywhere on the canvas, up to the first that finds no way past those before it."""
    tracks: list[Track] = []
    for stay, pictures in turning:
        paths = (_track(stay, pictures, (0, 0, CANVAS, CANVAS), rng) for _ in range(PATH_TRIES))
        free = (path for path in paths if path and not any(_meet(path, other) for other in tracks))
        found = next(free, None)
        if found is None:
            break
        tracks.append(found)
    return tracks


def _in_quarters(turning: list[Turning], rng: Random) -> list[Track]:
    """Paths within a quarter of the canvas each, of the things that fit one."""
    half = CANVAS // 2
    quarters = [(x, y, x + half, y + half) for x in (0, half) for y in (0, half)]
    rooms = rng.sample(quarters, len(turning))
    paths = [_track(*one, room, rng) for one, room in zip(turning, rooms, strict=True)]
    return [path for path in paths if path is not None]


def _turning(thing: SceneObject, num_frames: int, jitter: float, rng: Random) -> tuple[Image.Image, ...]:
    """The sprite in each of `num_frames` frames: it turns a little."""
    picture = resized_sprite(thing, jitter, rng)
    first, last = (jitter * rng.uniform(-MAX_ROTATION, MAX_ROTATION) for _ in range(2))
    steps = [
        rotated(picture, first + (last - first) * step / (ROTATION_STEPS - 1))
        for step in range(ROTATION_STEPS)
    ]
    return tuple(steps[frame * ROTATION_STEPS // num_frames] for frame in range(num_frames))


def _track(stay: range, pictures: tuple[Image.Image, ...], room: Box, rng: Random) -> Track | None:
    """A straight path within `room`, MARGIN from its walls; None where a picture is larger than the room."""
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    left, top, right, bottom = room
    spare_x, spare_y = right - left - width - 2 * MARGIN, bottom - top - height - 2 * MARGIN
    if spare_x < 0 or spare_y < 0:
        return None
    corner = (left + MARGIN + width / 2, top + MARGIN + height / 2)
    start, end = (
        (corner[0] + rng.uniform(0, spare_x), corner[1] + rng.uniform(0, spare_y)) for _ in range(2)
    )
    middles = _points_between(start, end, len(stay))
    boxes = tuple(_box_around(middle, picture) for middle, picture in zip(middles, pictures, strict=True))
    return Track(stay, pictures, boxes)


def _points_between(start: Point, end: Point, number: int) -> Iterator[Point]:
    for index in range(number):
        share = index / (number - 1)
        yield start[0] + (end[0] - start[0]) * share, start[1] + (end[1] - start[1]) * share


def _box_around(middle: Point, picture: Image.Image) -> Box:
    left, top = int(middle[0] - picture.width / 2), int(middle[1] - picture.height / 2)
    return left, top, left + picture.width, top + picture.height


def _meet(track: Track, other: Track) -> bool:
    """Whether the two come closer than twice MARGIN in any frame that shows both."""
    for frame in range(
        max(track.frames.start, other.frames.start), min(track.frames.stop, other.frames.stop)
    ):
        a = track.boxes[frame - track.frames.start]
        b = other.boxes[frame - other.frames.start]
        if max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) < 2 * MARGIN:
            return True
    return False
