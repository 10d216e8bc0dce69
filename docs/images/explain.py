"""Make explain.webp: an image like a photograph, and where the shipped models look in it.

    python docs/images/explain.py [MODEL_FOR_QUESTIONS]

The image is an emoji scene as a camera might see it: at an angle, unevenly lit, a little blurred, with sensor
noise, as a JPEG of 1200 x 900 pixels. The models were trained only on clean scenes of 128 x 128 pixels. The
script prints the models' caption and match probabilities; with a model for questions, one that
`blip-mini-vqa` trained (docs/train.md), it also prints answers.
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
SCENE = Scene(objects=(SceneObject(name="dog"), SceneObject(name="bicycle")), background="green", relation="left of")
CORNERS = ((-12, -4), (1206, -14), (1222, 908), (-20, 904))  # of the scene, as pixels of the photograph
TEXTS = (
    "a dog to the left of a bicycle on a green background",
    "a dog to the right of a bicycle on a green background",
    "a cat to the left of a bicycle on a green background",
    "a dog to the left of a bicycle on a pink background",
)
QUESTIONS = ("what is to the left of the bicycle?", "how many dogs are there?", "what color is the background?")
TILE = (380, 285)


def photograph() -> bytes:
    """Return the scene as a JPEG that a camera might have taken."""
    rng = np.random.default_rng(SEED)
    scene = render(SCENE, Random(SEED)).image.resize((HEIGHT, HEIGHT), Image.Resampling.BICUBIC)
    pixels = np.asarray(seen_at_an_angle(scene), np.float64)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    light = 1.12 - 0.35 * np.hypot((x - 420) / WIDTH, (y - 300) / HEIGHT)
    pixels = pixels * light[..., None] * (1.03, 1.0, 0.94) + rng.normal(0, 5, pixels.shape)
    camera = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.6))
    file = io.BytesIO()
    camera.save(file, "JPEG", quality=85)
    return file.getvalue()


def seen_at_an_angle(scene: Image.Image) -> Image.Image:
    """Return the scene with its corners at `CORNERS` of a photograph.

    Four pairs of corners determine the eight coefficients of the perspective transform.
    """
    side = scene.width
    rows, values = [], []
    for (x, y), (u, v) in zip(CORNERS, ((0, 0), (side, 0), (side, side), (0, side)), strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    coefficients = np.linalg.solve(np.array(rows, np.float64), np.array(values, np.float64))
    return scene.transform(
        (WIDTH, HEIGHT), Image.Transform.PERSPECTIVE, coefficients.tolist(), Image.Resampling.BICUBIC
    )


def labelled(tiles: list[tuple[str, Image.Image]]) -> Image.Image:
    """Return a sheet with three images in a row, each with its label below."""
    columns = 3
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * TILE[0], rows * (TILE[1] + 34)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=19)
    for i, (label, image) in enumerate(tiles):
        left, top = (i % columns) * TILE[0], (i // columns) * (TILE[1] + 34)
        sheet.paste(image.resize((TILE[0] - 8, TILE[1])), (left, top))
        draw.text((left + 2, top + TILE[1] + 4), label, fill=(40, 40, 40), font=font)
    return sheet


def main() -> None:
    image = photograph()
    captioner, matcher = openblip.load("openblip-mini-captioner"), openblip.load("openblip-mini-filter")
    written = captioner.caption(image, return_scores=True)
    print(f"caption: {written.text} (log-probability {written.logprob:.2f})")
    for text in TEXTS:
        print(f"match: {matcher.match([image], [text]).item():.2f}  {text}")
    caption = captioner.explain(image, layer=2)
    match = matcher.explain(image, TEXTS[0], layer=0)
    tiles = [("the image", Image.open(io.BytesIO(image)))]
    tiles += [(f'caption, at "{word}"', caption.overlay(image, word)) for word in ("dog", "bicycle")]
    tiles += [(f'matching, at "{word}"', match.overlay(image, word)) for word in ("dog", "bicycle", "green")]
    labelled(tiles).save(Path(__file__).with_suffix(".webp"), quality=88)
    if len(sys.argv) > 1:
        answering = openblip.load(sys.argv[1])
        for question in QUESTIONS:
            print(f"{question} {answering.answer(image, question)}")


if __name__ == "__main__":
    main()
