"""Films a scene: its things cross a still background on straight paths, whole and apart in every frame.

Half of them are there for a part of one half of the video only, so that one frame may not show all of them.
Each is there for so long that four frames spread evenly over the video show it.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from openblip.emoji_scenes.rendering import (
    MARGIN,
    MAX_ROTATION,
    QUARTERS,
    WHOLE,
    Box,
    draw_sprite,
    group_copies,
    paint_backdrop,
    rotate,
    spare_room,
)
from openblip.emoji_scenes.scene import Scene, SceneObject

FRAMES_PER_VIDEO = 16
FRAMES_PER_SECOND = 8
HALF_VIDEO = FRAMES_PER_VIDEO // 2
SHORTEST_STAY = 5  # frames; four evenly spread frames are never further apart
PART_TIME_PROBABILITY = 0.5
ROTATION_STEPS = 8  # number of images of a sprite that a path shows one after the other
ROUNDS = 8
ARRANGEMENT_TRIES = 4  # in a round
PATH_TRIES = 25  # in an arrangement, for each thing
# The first encoder that FFmpeg has is used. One thread: several may split the work differently each time.
ENCODERS = {
    "libx264": {"crf": "18", "preset": "veryfast", "threads": "1"},
    "mpeg4": {"qmin": "2", "qmax": "3", "threads": "1"},
}


@dataclass(frozen=True, slots=True)
class Track:
    """One copy of a thing: the frames in which it is seen, and its sprite and box in each of them."""

    frames: range
    sprites: tuple[Image.Image, ...]
    boxes: tuple[Box, ...]

    def meets(self, other: "Track") -> bool:
        """Whether the two come closer than twice MARGIN in any frame that shows both."""
        shared = range(max(self.frames.start, other.frames.start), min(self.frames.stop, other.frames.stop))
        for frame in shared:
            a, b = (track.boxes[frame - track.frames.start] for track in (self, other))
            if max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) < 2 * MARGIN:
                return True
        return False


@dataclass(frozen=True, slots=True)
class FilmedScene:
    """FRAMES_PER_VIDEO RGB frames, and for each object of the scene the track of every copy."""

    frames: tuple[Image.Image, ...]
    tracks: tuple[tuple[Track, ...], ...]

    def details(self) -> list[dict[str, Any]]:
        """Return, for each object, the frames [first, last + 1] and for every copy its box in both."""
        return [
            {
                "frames": (copies[0].frames.start, copies[0].frames.stop),
                "boxes": [(track.boxes[0], track.boxes[-1]) for track in copies],
            }
            for copies in self.tracks
        ]


def film(scene: Scene, rng: Random) -> FilmedScene:
    """Film `scene` in CANVAS x CANVAS; the same `rng` state gives the same pixels."""
    backdrop = paint_backdrop(scene.background, rng)
    # All copies of a thing come and go together: two dogs that are never seen at once could be one dog.
    things = [(thing, stay) for thing in scene.objects for stay in [_draw_stay(rng)] * thing.count]
    tracks = _draw_tracks(things, rng)
    frames = []
    for index in range(FRAMES_PER_VIDEO):
        frame = backdrop.copy()
        for track in tracks:
            if index in track.frames:
                position = track.frames.index(index)
                sprite = track.sprites[position]
                frame.paste(sprite, track.boxes[position][:2], sprite)
        frames.append(frame)
    return FilmedScene(tuple(frames), group_copies(scene, tracks))


def _draw_stay(rng: Random) -> range:
    """Draw the frames in which a thing is seen: all, or some in a row within one half of the video."""
    if rng.random() >= PART_TIME_PROBABILITY:
        return range(FRAMES_PER_VIDEO)
    length = rng.randint(SHORTEST_STAY, HALF_VIDEO)
    start = rng.choice((0, HALF_VIDEO)) + rng.randint(0, HALF_VIDEO - length)
    return range(start, start + length)


def _draw_tracks(things: list[tuple[SceneObject, range]], rng: Random) -> list[Track]:
    """Draw a track for each thing: anywhere on the canvas, or in a quarter each where these tracks meet.

    Jitter and rotation fade from round to round: at nominal size a thing that is not alone fits a quarter.
    """
    for attempt in range(ROUNDS):
        jitter = 1.0 - attempt / (ROUNDS - 1)
        turning = [(stay, _turn_sprite(thing, len(stay), jitter, rng)) for thing, stay in things]
        for _ in range(ARRANGEMENT_TRIES):
            tracks: list[Track] = []
            for stay, sprites in turning:
                paths = (_draw_track(stay, sprites, WHOLE, rng) for _ in range(PATH_TRIES))
                free = (path for path in paths if path and not any(map(path.meets, tracks)))
                track = next(free, None)
                if track is None:
                    break
                tracks.append(track)
            else:
                return tracks
        rooms = rng.sample(QUARTERS, len(turning))
        in_quarters = [_draw_track(*each, room, rng) for each, room in zip(turning, rooms, strict=True)]
        tracks = [track for track in in_quarters if track is not None]
        if len(tracks) == len(things):
            return tracks
    raise AssertionError(f"no room for {things}")


def _turn_sprite(thing: SceneObject, num_frames: int, jitter: float, rng: Random) -> tuple[Image.Image, ...]:
    """Draw the sprite in each of `num_frames` frames: it turns a little."""
    sprite = draw_sprite(thing, jitter, rng)
    first, last = (jitter * rng.uniform(-MAX_ROTATION, MAX_ROTATION) for _ in range(2))
    angles = [first + (last - first) * step / (ROTATION_STEPS - 1) for step in range(ROTATION_STEPS)]
    steps = [rotate(sprite, angle) for angle in angles]
    return tuple(steps[frame * ROTATION_STEPS // num_frames] for frame in range(num_frames))


def _draw_track(stay: range, sprites: tuple[Image.Image, ...], room: Box, rng: Random) -> Track | None:
    """Draw a straight path within `room`, MARGIN from its walls; None if a sprite is larger than the room."""
    width, height = max(sprite.width for sprite in sprites), max(sprite.height for sprite in sprites)
    spare = spare_room(room, width, height)
    if spare is None:
        return None
    corner = (room[0] + MARGIN + width / 2, room[1] + MARGIN + height / 2)
    start, end = ((corner[0] + rng.uniform(0, spare[0]), corner[1] + rng.uniform(0, spare[1])) for _ in range(2))
    boxes = []
    for index, sprite in enumerate(sprites):
        share = index / (len(stay) - 1)
        x, y = start[0] + (end[0] - start[0]) * share, start[1] + (end[1] - start[1]) * share
        left, top = int(x - sprite.width / 2), int(y - sprite.height / 2)
        boxes.append((left, top, left + sprite.width, top + sprite.height))
    return Track(stay, sprites, tuple(boxes))


def encode_video(frames: Sequence[Image.Image]) -> bytes:
    """Encode RGB frames of one size as mp4; the same frames and versions of av give the same bytes."""
    import av

    encoder = next(name for name in ENCODERS if name in av.codecs_available)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(encoder, rate=FRAMES_PER_SECOND, options=ENCODERS[encoder])
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()
