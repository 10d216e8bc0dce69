"""Reading an image as a person sees it: upright, over white, eight bits per channel, its first frame."""

import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from openblip.data.sources import storage
from openblip.errors import ImageError, OpenBlipError

ImageInput = str | Path | Image.Image | bytes | np.ndarray

# Formats whose decoders are part of Pillow: EPS would start a Ghostscript process on a file from anywhere.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIXTEEN_BIT_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})


def read_image(image: ImageInput, *, name: str | None = None, max_pixels: int = 178_956_970) -> Image.Image:
    """Return the image as RGB: EXIF orientation applied, transparency over white, 16-bit scaled to 8 bits, CMYK
    and palettes converted, the first frame of an animation. Plain RGB comes through unchanged.

    Args:
        image: a path (or fsspec URL), encoded bytes, a `PIL.Image` (its current frame) or a uint8 array
            (H, W, 3).
        name: stands for the image in errors.
        max_pixels: a larger image is refused; its size is read from the header, before anything is decoded.

    Raises:
        ImageError: the image cannot be read. A truncated file is an error, never half an image.
    """
    name = name or _name_of(image)
    if isinstance(image, np.ndarray):
        return _from_array(image, name, max_pixels)
    if isinstance(image, Image.Image):
        return _to_rgb(image, name, max_pixels)
    try:
        payload = image if isinstance(image, bytes) else storage.read_bytes(str(image))
    except (OSError, OpenBlipError) as error:
        raise ImageError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not payload:
        raise ImageError(f"{name}: the file is empty")
    try:
        opened = Image.open(io.BytesIO(payload), formats=_formats())
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image in a known format") from error
    except Exception as error:  # Pillow's parsers raise anything on hostile bytes
        raise ImageError(f"{name}: damaged image header: {error}") from error
    return _to_rgb(opened, name, max_pixels)


@cache
def _formats() -> tuple[str, ...]:
    """The allowed formats that this build of Pillow reads; older ones lack AVIF."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _name_of(image: ImageInput) -> str:
    if isinstance(image, (str, Path)):
        return str(image)
    if isinstance(image, Image.Image):
        return str(getattr(image, "filename", "") or "image")
    if isinstance(image, (bytes, np.ndarray)):
        return "image"
    raise ImageError(f"an image must be a path, bytes, PIL.Image or uint8 array (H, W, 3), not {type(image).__name__}")


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name}: the image is empty ({width}x{height})")
    if width * height > max_pixels:
        raise ImageError(f"{name}: {width}x{height} is more than the limit of {max_pixels} pixels")


def _from_array(array: np.ndarray, name: str, max_pixels: int) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(f"{name}: an array image must be uint8 (H, W, 3), not {array.dtype} {array.shape}")
    _check_size(array.shape[1], array.shape[0], name, max_pixels)
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    _check_size(*image.size, name, max_pixels)
    try:
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        rgb = _flatten(image)
        return rgb if turn is None else rgb.transpose(turn)
    except Exception as error:  # as above: a decoder's error on damaged data may be of any kind
        raise ImageError(f"{name}: damaged image: {error}") from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; damaged EXIF counts as none, because the image itself may be fine."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # the EXIF parser, too, raises anything
        return 1
    return value if isinstance(value, int) else 1


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _SIXTEEN_BIT_MODES:
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
