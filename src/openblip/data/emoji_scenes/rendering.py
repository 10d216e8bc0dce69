"""Paints a scene: background, clutter that is never a thing, then the sprites, whole and apart."""

import math
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from openblip.data.emoji_scenes.scene import Relation, Scene, SceneObject
from openblip.data.emoji_scenes.sprites import NOMINAL_SIDE, sprite
from openblip.data.emoji_scenes.vocabulary import BACKGROUNDS

CANVAS = 128  # pixels, square
MARGIN = 2  # pixels that a sprite keeps from the edges of its room: the canvas, a half or a quarter of it
MAX_ROTATION = 12.0  # degrees
SIZE_JITTER = 0.06
OFF_AXIS = 8  # how far the centres of a pair may differ on the axis that their relation is not about
PLACEMENT_TRIES = 60
NOISE_TILES = 16

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom exclusive


@dataclass(frozen=True, slots=True)
class RenderedScene:
    """The picture of a scene, and for each of its objects the box of every copy."""

    image: Image.Image
    boxes: tuple[tuple[Box, ...], ...]


def render(scene: Scene, rng: Random) -> RenderedScene:
    """Paint `scene` on a CANVAS x CANVAS RGB picture; the same `rng` state gives the same pixels."""
    image = paint_backdrop(scene.background, rng)
    things = [thing for thing in scene.objects for _ in range(thing.count)]
    sprites, boxes = _place(scene, things, rng)
    for picture, box in zip(sprites, boxes, strict=True):
        image.paste(picture, box[:2], picture)
    remaining = iter(boxes)
    grouped = tuple(tuple(next(remaining) for _ in range(thing.count)) for thing in scene.objects)
    return RenderedScene(image, grouped)


def paint_backdrop(background: str, rng: Random) -> Image.Image:
    """What is behind the things: the colour with its shades and noise, and clutter that is never a thing."""
    image = _paint_background(background, rng)
    _paint_clutter(image, background, rng)
    return image


def _jittered_color(color: tuple[int, int, int], amount: int, rng: Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, level + rng.randint(-amount, amount))) for level in color)
    return red, green, blue


@cache
def _noise_tile(index: int) -> np.ndarray:
    """A fixed tile of pixel noise, one level per pixel."""
    levels = np.random.default_rng(index).normal(0.0, 4.0, (CANVAS, CANVAS, 1))
    return np.rint(levels).astype(np.int16)


@cache
def _gradients() -> tuple[Image.Image, ...]:
    """Soft ramps of one channel: the four sides, and light from the middle."""
    ramp = Image.linear_gradient("L").resize((CANVAS, CANVAS))
    turned = [ramp.rotate(90 * quarter) for quarter in range(4)]
    return (*turned, Image.radial_gradient("L").resize((CANVAS, CANVAS)))


def _paint_background(name: str, rng: Random) -> Image.Image:
    size = (CANVAS, CANVAS)
    base = _jittered_color(BACKGROUNDS[name], 12, rng)
    shade = rng.choice((-1, 1)) * rng.randint(8, 24)
    end = tuple(min(255, max(0, level + shade)) for level in base)
    image = Image.composite(
        Image.new("RGB", size, end), Image.new("RGB", size, base), rng.choice(_gradients())
    )
    pixels = np.asarray(image).astype(np.int16) + _noise_tile(rng.randrange(NOISE_TILES))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _paint_clutter(image: Image.Image, background: str, rng: Random) -> None:
    """Dots, lines, arcs and confetti, a little lighter or darker than the background."""
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(3, 9)):
        shade = rng.choice((-1, 1)) * rng.randint(14, 34)
        color = tuple(
            min(255, max(0, level + shade)) for level in _jittered_color(BACKGROUNDS[background], 10, rng)
        )
        x, y = rng.randrange(CANVAS), rng.randrange(CANVAS)
        shape = rng.randrange(4)
        if shape == 0:
            radius = rng.randint(1, 3)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
        elif shape == 1:
            draw.line(
                (x, y, x + rng.randint(-40, 40), y + rng.randint(-40, 40)),
                fill=color,
                width=rng.randint(1, 2),
            )
        elif shape == 2:
            radius, start = rng.randint(5, 22), rng.randrange(360)
            draw.arc(
                (x - radius, y - radius, x + radius, y + radius),
                start,
                start + rng.randint(40, 200),
                fill=color,
            )
        else:
            _paint_confetti(draw, x, y, color, rng)


def _paint_confetti(draw: ImageDraw.ImageDraw, x: int, y: int, color: tuple[int, ...], rng: Random) -> None:
    angle, length, width = rng.random() * math.pi, rng.randint(2, 4), rng.randint(1, 2)
    dx, dy = math.cos(angle), math.sin(angle)
    corners = [(length, width), (length, -width), (-length, -width), (-length, width)]
    draw.polygon([(x + a * dx - b * dy, y + a * dy + b * dx) for a, b in corners], fill=color)


def _place(scene: Scene, things: list[SceneObject], rng: Random) -> tuple[list[Image.Image], list[Box]]:
    """Sprites with jitter and their boxes; jitter fades from try to try, so that the last ones always fit."""
    for attempt in range(PLACEMENT_TRIES):
        jitter = 1.0 - attempt / PLACEMENT_TRIES
        sprites = [_jittered_sprite(thing, jitter, rng) for thing in things]
        boxes = _boxes(scene.relation, [picture.size for picture in sprites], rng)
        if boxes is not None:
            return sprites, boxes
    raise AssertionError(f"no room for {scene}")  # the sizes that scene.sizes_of admits always find room


def _boxes(relation: Relation | None, sizes: list[tuple[int, int]], rng: Random) -> list[Box] | None:
    """One box per size; None where a sprite is larger than its room."""
    if relation == "left of":
        return _in_halves(sizes, rng)
    if relation == "above":
        boxes = _in_halves([(height, width) for width, height in sizes], rng)
        return boxes and [(top, left, bottom, right) for left, top, right, bottom in boxes]
    if len(sizes) == 1:
        return _in_rooms(sizes, [(0, 0, CANVAS, CANVAS)], rng)
    half = CANVAS // 2
    quarters = [(x, y, x + half, y + half) for x in (0, half) for y in (0, half)]
    return _in_rooms(sizes, rng.sample(quarters, len(sizes)), rng)


def _jittered_sprite(thing: SceneObject, jitter: float, rng: Random) -> Image.Image:
    picture = resized_sprite(thing, jitter, rng)
    return rotated(picture, jitter * rng.uniform(-MAX_ROTATION, MAX_ROTATION))


def resized_sprite(thing: SceneObject, jitter: float, rng: Random) -> Image.Image:
    """The sprite as RGBA in canvas pixels, up to SIZE_JITTER x `jitter` larger or smaller than nominal."""
    picture = sprite(thing.name, thing.size)
    scale = 1.0 + jitter * rng.uniform(-SIZE_JITTER, SIZE_JITTER)
    factor = NOMINAL_SIDE[thing.size] * scale / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.BILINEAR)


def rotated(picture: Image.Image, angle: float) -> Image.Image:
    """Turned by `angle` degrees, and cropped to what is seen of it."""
    picture = picture.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    return picture.crop(picture.getchannel("A").getbbox())


def _in_halves(sizes: list[tuple[int, int]], rng: Random) -> list[Box] | None:
    """Two boxes, the first in the left half and the second in the right, centres at about one height."""
    half = CANVAS // 2
    tallest = max(height for _, height in sizes)
    if tallest + OFF_AXIS > CANVAS - 2 * MARGIN:
        return None
    top = rng.randint(MARGIN, CANVAS - MARGIN - tallest - OFF_AXIS)
    tops = [top + (tallest - height) // 2 + rng.randint(0, OFF_AXIS) for _, height in sizes]
    rooms = [
        (x, y - MARGIN, x + half, y + height + MARGIN)
        for x, y, (_, height) in zip((0, half), tops, sizes, strict=True)
    ]
    return _in_rooms(sizes, rooms, rng)


def _in_rooms(sizes: list[tuple[int, int]], rooms: list[Box], rng: Random) -> list[Box] | None:
    """A box anywhere in each room, MARGIN from its walls; None where one is too large."""
    boxes: list[Box] = []
    for (width, height), (left, top, right, bottom) in zip(sizes, rooms, strict=True):
        spare_x, spare_y = right - left - width - 2 * MARGIN, bottom - top - height - 2 * MARGIN
        if spare_x < 0 or spare_y < 0:
            return None
        x, y = left + MARGIN + rng.randint(0, spare_x), top + MARGIN + rng.randint(0, spare_y)
        boxes.append((x, y, x + width, y + height))
    return boxes
