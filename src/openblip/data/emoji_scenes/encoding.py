"""How the parts of a sample become the files of a shard."""

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from openblip.data.emoji_scenes.rendering import RenderedScene
from openblip.data.emoji_scenes.scene import Scene
from openblip.errors import MissingExtraError

JPEG_QUALITY = 90
# The first encoder that FFmpeg has is used. One thread: several may split the work differently each time.
ENCODERS = {
    "libx264": {"crf": "18", "preset": "veryfast", "threads": "1"},
    "mpeg4": {"qmin": "2", "qmax": "3", "threads": "1"},
}

Member = tuple[str, bytes]  # what follows the key in the file's name (`jpg`, `left.jpg`, `json`), its content


def jpeg_bytes(image: Image.Image) -> bytes:
    """The picture, encoded."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def require_video_package() -> None:
    """Raises MissingExtraError, with the pip command, without the package that encodes clips."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise MissingExtraError('clips need PyAV; run: pip install "openblip[demo,video]"') from error


def clip_bytes(frames: Sequence[Image.Image], frames_per_second: int) -> bytes:
    """RGB frames of one size as mp4; the same frames and versions of av give the same bytes."""
    import av

    encoder = next(name for name in ENCODERS if name in av.codecs_available)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(encoder, rate=frames_per_second, options=ENCODERS[encoder])
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(frame), format="rgb24")))
        container.mux(stream.encode())
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
