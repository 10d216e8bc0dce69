"""Tiny clips made on the spot, whose frames can be told apart by their colour."""

import io
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
from PIL import Image

GREY_STEP = 8


def clip(
    num_frames: int = 20,
    *,
    size: tuple[int, int] = (64, 48),
    container: str = "mp4",
    codec: str = "mpeg4",
    times: Iterable[int] | None = None,
    options: dict[str, str] | None = None,
    layout: str = "yuv420p",
    title: str = "",
) -> bytes:
    """Frame `i` is grey of level 8 * i, except for a red upper left and a blue lower right corner. `times`:
    when each is shown, in tenths of a second.
    """
    with TemporaryDirectory() as folder:  # an index at the front needs a file
        path = Path(folder) / f"clip.{container}"
        with av.open(str(path), "w", options=options or {}) as output:
            stream: Any = output.add_stream(codec, rate=10)
            stream.width, stream.height = size
            stream.pix_fmt = layout
            output.metadata["title"] = title
            if codec == "mpeg4":
                stream.codec_context.qmin = stream.codec_context.qmax = 2  # near lossless
            for i, time in zip(range(num_frames), times or range(num_frames), strict=True):
                frame = av.VideoFrame.from_ndarray(image(i, size), format="rgb24")
                frame.pts = time
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
        return path.read_bytes()


def image(number: int, size: tuple[int, int]) -> np.ndarray:
    width, height = size
    values = np.full((height, width, 3), GREY_STEP * number % 256, np.uint8)
    values[: height // 4, : width // 4] = (255, 0, 0)
    values[-(height // 4) :, -(width // 4) :] = (0, 0, 255)
    return values


def sound(container: str = "mp4", codec: str = "aac", *, cover: Image.Image | None = None) -> bytes:
    """A tenth of a second of silence, with or without an image as its cover."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=16_000)
        if cover is not None:
            encoded = io.BytesIO()
            cover.save(encoded, "JPEG")
            video: Any = output.add_stream("mjpeg", rate=10)
            (video.width, video.height), video.pix_fmt = cover.size, "yuvj420p"
            video.disposition = av.stream.Disposition.attached_pic
            packet = av.Packet(encoded.getvalue())
            packet.stream, packet.pts, packet.dts = video, 0, 0
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16_000, 0
        output.mux(stream.encode(frame))
        if cover is not None:
            output.mux(packet)
        output.mux(stream.encode())
    return buffer.getvalue()


def level(image: Image.Image) -> float:
    """Which frame of `clip` this is, by the grey in its middle."""
    return round(float(np.asarray(image)[image.height // 2, image.width // 2].mean()) / GREY_STEP, 1)
