"""Paints a scene: background, clutter that is never a thing, then the sprites, whole and apart."""

import math
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from openblip.data.emoji_scenes.scene import Scene, SceneObject
from openblip.data.emoji_scenes.sprites import NOMINAL_SIDE, sprite
from openblip.data.emoji_scenes.vocabulary import BACKGROUNDS, Size

CANVAS = 128  # pixels, square
MARGIN = 2  # sprites keep this far from the edge
GAP = 4  # and this far from each other
MAX_ROTATION = 20.0  # degrees
SIZE_JITTER = 0.06
BIG_ALONE = (1.0, 1.25)  # a big thing that is alone may be larger still
OFF_AXIS = 9  # how far the centres of a pair may differ on the axis that their relation is not about
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
    image = _paint_background(scene.background, rng)
    _paint_clutter(image, scene.background, rng)
    things = [thing for thing in scene.objects for _ in range(thing.count)]
    sprites, boxes = _place(scene, things, rng)
    for picture, box in zip(sprites, boxes, strict=True):
        image.paste(picture, box[:2], picture)
    remaining = iter(boxes)
    grouped = tuple(tuple(next(remaining) for _ in range(thing.count)) for thing in scene.objects)
    return RenderedScene(image, grouped)


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
    for _ in range(rng.randint(4, 14)):
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
    alone = len(things) == 1
    for attempt in range(PLACEMENT_TRIES):
        jitter = 1.0 - attempt / PLACEMENT_TRIES
        sprites = [_jittered_sprite(thing, alone, jitter, rng) for thing in things]
        sizes = [picture.size for picture in sprites]
        if scene.relation == "above":
            boxes = _in_line([(height, width) for width, height in sizes], rng)
            boxes = (
                None if boxes is None else [(top, left, bottom, right) for left, top, right, bottom in boxes]
            )
        elif scene.relation == "left of":
            boxes = _in_line(sizes, rng)
        else:
            boxes = _scattered(sizes, rng)
        if boxes is not None:
            return sprites, boxes
    raise AssertionError(f"no room for {scene}")  # the sizes that scene.fits admits always find room


def _jittered_sprite(thing: SceneObject, alone: bool, jitter: float, rng: Random) -> Image.Image:
    picture = sprite(thing.name, thing.size)
    scale = 1.0 + jitter * rng.uniform(-SIZE_JITTER, SIZE_JITTER)
    if alone and thing.size == "big":
        scale *= rng.uniform(*BIG_ALONE)
    longest = _longest_side(thing.size, scale)
    factor = longest / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    angle = jitter * rng.uniform(-MAX_ROTATION, MAX_ROTATION)
    picture = picture.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    return picture.crop(picture.getchannel("A").getbbox())


def _longest_side(size: Size, scale: float) -> float:
    return NOMINAL_SIDE[size] * scale


def _in_line(sizes: list[tuple[int, int]], rng: Random) -> list[Box] | None:
    """Two boxes side by side, the first on the left, their centres at about one height; None if too wide."""
    (first_width, first_height), (second_width, second_height) = sizes
    spare = CANVAS - 2 * MARGIN - first_width - second_width - GAP
    if spare < 0:
        return None
    left = MARGIN + rng.randint(0, spare)
    second_left = rng.randint(left + first_width + GAP, CANVAS - MARGIN - second_width)
    tallest = max(first_height, second_height)
    room = CANVAS - 2 * MARGIN - tallest
    if room < 0:
        return None
    middle = MARGIN + tallest / 2 + rng.uniform(0, room)
    boxes = []
    for x, width, height in ((left, first_width, first_height), (second_left, second_width, second_height)):
        wanted = round(middle + rng.uniform(-OFF_AXIS / 2, OFF_AXIS / 2) - height / 2)
        y = min(max(MARGIN, wanted), CANVAS - MARGIN - height)
        boxes.append((x, y, x + width, y + height))
    return boxes


def _scattered(sizes: list[tuple[int, int]], rng: Random) -> list[Box] | None:
    """Boxes anywhere, apart from each other; None when the first tries leave no room."""
    boxes: list[Box] = []
    for width, height in sizes:
        for _ in range(20):
            if width > CANVAS - 2 * MARGIN or height > CANVAS - 2 * MARGIN:
                return None
            x = rng.randint(MARGIN, CANVAS - MARGIN - width)
            y = rng.randint(MARGIN, CANVAS - MARGIN - height)
            box = (x, y, x + width, y + height)
            if not any(_touch(box, other) for other in boxes):
                boxes.append(box)
                break
        else:
            return None
    return boxes


def _touch(first: Box, second: Box) -> bool:
    apart_x = first[2] + GAP <= second[0] or second[2] + GAP <= first[0]
    apart_y = first[3] + GAP <= second[1] or second[3] + GAP <= first[1]
    return not (apart_x or apart_y)
