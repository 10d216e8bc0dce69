"""How the parts of a sample become the files of a shard."""

import io
import json
from typing import Any

from PIL import Image

from openblip.data.emoji_scenes.rendering import RenderedScene
from openblip.data.emoji_scenes.scene import Scene

JPEG_QUALITY = 90

Member = tuple[str, bytes]  # what follows the key in the file's name (`jpg`, `left.jpg`, `json`), its content


def jpeg_bytes(image: Image.Image) -> bytes:
    """The picture, encoded."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def json_bytes(content: Any) -> bytes:
    """UTF-8, in the order of the keys."""
    return json.dumps(content, ensure_ascii=False).encode()


def scene_json(scene: Scene, rendered: RenderedScene) -> dict[str, Any]:
    """The scene with the box of every thing, as plain values."""
    described = scene.as_json()
    for thing, boxes in zip(described["objects"], rendered.boxes, strict=True):
        thing["boxes"] = boxes
    return described
