"""Makes explain.webp: a photograph-like picture, what the shipped models say of it, and where they look.

    python docs/images/explain.py [MODEL_FOR_QUESTIONS]

The picture is an emoji scene as a camera might see it: at an angle, unevenly lit, a little blurred, with
sensor noise, as a JPEG of 1200 x 900. The models were trained on clean scenes of 128 x 128 only. A model for
questions is one that `blip-mini-vqa` trained (docs/tasks.md).
"""

import io
import sys
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import openblip
from openblip.emoji_scenes.rendering import render
from openblip.emoji_scenes.scene import Scene, SceneObject

SEED = 5
WIDTH, HEIGHT = 1200, 900
SCENE = Scene(
    objects=(SceneObject(name="dog"), SceneObject(name="bicycle")), background="green", relation="left of"
)
CORNERS = ((-12, -4), (1206, -14), (1222, 908), (-20, 904))  # where those of the scene lie in the photograph
TEXTS = (
    "a dog to the left of a bicycle on a green background",
    "a dog to the right of a bicycle on a green background",
    "a cat to the left of a bicycle on a green background",
    "a dog to the left of a bicycle on a pink background",
)
QUESTIONS = (
    "what is to the left of the bicycle?",
    "how many dogs are there?",
    "what color is the background?",
)
TILE = (380, 285)


def photograph() -> bytes:
    rng = np.random.default_rng(SEED)
    scene = render(SCENE, Random(SEED)).image.resize((HEIGHT, HEIGHT), Image.Resampling.BICUBIC)
    picture = np.asarray(seen_at_an_angle(scene), np.float64)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    light = 1.12 - 0.35 * np.hypot((x - 420) / WIDTH, (y - 300) / HEIGHT)
    picture = picture * light[..., None] * (1.03, 1.0, 0.94) + rng.normal(0, 5, picture.shape)
    camera = Image.fromarray(picture.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.6))
    file = io.BytesIO()
    camera.save(file, "JPEG", quality=85)
    return file.getvalue()


def seen_at_an_angle(scene: Image.Image) -> Image.Image:
    """The eight numbers of the perspective come from where the four corners go."""
    side = scene.width
    rows, values = [], []
    for (x, y), (u, v) in zip(CORNERS, ((0, 0), (side, 0), (side, side), (0, side)), strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    numbers = np.linalg.solve(np.array(rows, np.float64), np.array(values, np.float64))
    return scene.transform(
        (WIDTH, HEIGHT), Image.Transform.PERSPECTIVE, numbers.tolist(), Image.Resampling.BICUBIC
    )


def labelled(tiles: list[tuple[str, Image.Image]]) -> Image.Image:
    columns = 3
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * TILE[0], rows * (TILE[1] + 34)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=19)
    for i, (label, picture) in enumerate(tiles):
        left, top = (i % columns) * TILE[0], (i // columns) * (TILE[1] + 34)
        sheet.paste(picture.resize((TILE[0] - 8, TILE[1])), (left, top))
        draw.text((left + 2, top + TILE[1] + 4), label, fill=(40, 40, 40), font=font)
    return sheet


def main() -> None:
    picture = photograph()
    captioner, matcher = openblip.load("openblip-mini-captioner"), openblip.load("openblip-mini-filter")
    written = captioner.caption(picture, return_scores=True)
    print(f"caption: {written.text} (log-probability {written.logprob:.2f})")
    for text in TEXTS:
        print(f"match: {matcher.match([picture], [text]).item():.2f}  {text}")
    caption = captioner.explain(picture, layer=2)
    match = matcher.explain(picture, TEXTS[0], layer=0)
    tiles = [("the picture", Image.open(io.BytesIO(picture)))]
    tiles += [(f'caption, at "{word}"', caption.overlay(picture, word)) for word in ("dog", "bicycle")]
    tiles += [
        (f'matching, at "{word}"', match.overlay(picture, word)) for word in ("dog", "bicycle", "green")
    ]
    labelled(tiles).save(Path(__file__).with_suffix(".webp"), quality=88)
    if len(sys.argv) > 1:
        answering = openblip.load(sys.argv[1])
        for question in QUESTIONS:
            print(f"{question} {answering.answer(picture, question)}")


if __name__ == "__main__":
    main()
