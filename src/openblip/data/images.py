"""Reading images and the frames of videos as a person sees them: upright, over white, eight bits per channel."""

import io
import itertools
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from openblip.data.config import Preprocessing
from openblip.data.sources import storage
from openblip.errors import ConfigError, ImageError, MissingExtraError, OpenBlipError, VideoError


class SupportsArray(Protocol):
    """An array of numpy, a tensor of torch, or what else numpy can read as an array."""

    def __array__(self) -> Any: ...


FileInput = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
ImageInput = FileInput | Image.Image | SupportsArray
FILE_FORMS = "a path or URL, encoded bytes, an open binary file"
IMAGE_FORMS = (
    f"{FILE_FORMS}, a PIL.Image, or an array or tensor (H, W), (H, W, C) or (C, H, W) of 1 to 4 channels in uint8, "
    "uint16, bool, or floats from 0 to 1"
)
_CHANNELS = range(1, 5)  # gray, gray with alpha, RGB, RGB with alpha
_ROUNDING = 1e-3  # by which floats may miss the range from 0 to 1
# A caller's file or PIL.Image that several threads give at once is read in one of them at a time.
_INPUT_LOCKS = tuple(Lock() for _ in range(64))

# Formats whose decoders are part of Pillow: EPS would start a Ghostscript process on a file from anywhere.
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "QOI", "TGA")
# The containers that a source's suffixes stand for; all of them state their length. FFmpeg would also take a
# playlist, and open the files that it names, here or on the net.
_VIDEO_FORMATS = "mov,mp4,matroska,webm,avi"
# The share of the stated length that may be missing at the end: with sound of a variable rate the length is a guess.
_MISSING_SHARE = 0.1

_WIDE_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N", "F"})  # gray of more than eight bits
_DEEP_COLOUR = re.compile(r"(RGBA?;16)([LBN])")  # Pillow's name of such pixels, of either byte order or the machine's
_FULL_SCALES = (255, 1023, 4095, 16383, 65535)  # of 8, 10, 12, 14 and 16 bits, all of which 16-bit files hold
_ORIENTATION_TAG = 0x0112
_SMALLEST_SIDE = 576  # to which a large JPEG is scaled as it is decoded: a smaller one is decoded quickly anyway
_UPRIGHT = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Whether x and y, as the image is shown, run backwards at the orientations 1 to 4, and 5 to 8, which swap the axes.
_BACKWARDS = ((False, False), (True, False), (True, True), (False, True))


def read_image(
    image: ImageInput, *, name: str | None = None, max_pixels: int = 178_956_970, scaled_for: int | None = None
) -> Image.Image:
    """Return the image as RGB: EXIF orientation applied, transparency over white, more than 8 bits scaled to 8
    (`scale_to_bytes` says how), CMYK and palettes converted, the first frame of an animation. Plain RGB comes through
    unchanged. Raises `ImageError` for an image that cannot be read; a truncated file is an error, never half an image.

    image: one of `IMAGE_FORMS`; a file is read from its start on, of a `PIL.Image` the current frame. Raises
    ConfigError for anything else, and for an array that may mean several things. name: stands for the image in errors.
    max_pixels: a larger image is refused; its size is read from the header, before anything is decoded.
    scaled_for: the side of the square that the image is resized to afterwards. A JPEG file is then decoded to a half, a
    quarter or an eighth of its size, whichever is the smallest with at least 1.5 times this side, and 576 pixels, in
    width and height. Of 12 megapixels this takes a quarter of the time. The resized image then differs from that of
    the whole one by a third of one of 255 steps on average, a drawing with hard edges by up to 1.5, which is as much as
    two ways of resizing differ. None decodes the whole.
    """
    name = name or input_name(image) or "image"
    given = _as_array(image, name)
    if isinstance(given, Image.Image):
        opened = given
    elif isinstance(given, np.ndarray):
        opened = _image_of_array(given, name, max_pixels, is_hwc=isinstance(image, np.ndarray))
    else:
        opened = _open_image(_read_input(given, name, ImageError, IMAGE_FORMS), name)
    _check_size(*opened.size, name, max_pixels)
    try:
        if scaled_for is not None and opened is not image:
            side = max(3 * scaled_for // 2, _SMALLEST_SIDE)
            opened.draft(None, (side, side))  # changes nothing but JPEG files
        with _lock_of(image) if opened is image else nullcontext():
            file, tiles = getattr(opened, "fp", None), [*getattr(opened, "tile", ())]  # gone once it is loaded
            opened.load()
            is_deep = isinstance(file, io.BytesIO) and any(_DEEP_COLOUR.search(str(tile[3])) for tile in tiles)
            return _turn_upright(_flatten(_read_deep(opened, file) if is_deep else opened), _orientation(opened))
    except Exception as error:  # a decoder's error on damaged data may be of any kind
        raise ImageError(f"{name}: damaged image: {error}") from error


def upright_size(payload: bytes, name: str) -> tuple[int, int]:
    """Width and height of an encoded image as a person sees it, by its header, also of a JPEG that `read_image` scales
    down as it is decoded. Raises `ImageError` for what is no image.
    """
    opened = _open_image(payload, name)
    width, height = opened.size
    return (height, width) if _orientation(opened) in (5, 6, 7, 8) else (width, height)


def input_name(item: object) -> str | None:
    """What an input calls itself: its path, or that of an open file; None for one without a name."""
    if isinstance(item, str | os.PathLike):
        return _path(item)
    name = getattr(item, "filename", None) or getattr(item, "name", None)
    return name if isinstance(name, str) else None


def _path(item: str | os.PathLike[str]) -> str:
    return str(item) if storage.is_remote(str(item)) else os.fsdecode(item)


def _lock_of(item: object) -> Lock:
    return _INPUT_LOCKS[id(item) // 64 % len(_INPUT_LOCKS)]


def _read_input(item: object, name: str, error_class: type[OpenBlipError], forms: str) -> bytes:
    """The bytes of an encoded image or video. Raises `error_class` when they cannot be read, ConfigError for an input
    of another kind.
    """
    try:
        if isinstance(item, str | os.PathLike):
            payload: object = storage.read_bytes(_path(item))
        elif isinstance(item, bytes | bytearray | memoryview):
            payload = item
        elif callable(read := getattr(item, "read", None)):
            with _lock_of(item):
                with suppress(AttributeError, io.UnsupportedOperation):  # a stream has no way back
                    item.seek(0)  # type: ignore[attr-defined]
                payload = read()
        else:
            payload = None
    except (OSError, ValueError, OpenBlipError) as error:  # ValueError: a file that is closed
        raise error_class(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(payload, bytes | bytearray | memoryview):
        what = "a file that is not open in binary mode" if payload is not None else type(item).__name__
        raise ConfigError(f"{name} is {what}; give {forms}.")
    if not payload:
        raise error_class(f"{name}: the file is empty")
    return bytes(payload)


def _as_array(item: Any, name: str) -> Any:
    """An array of what numpy can read as one, a tensor of any device and precision too; else the input itself. One of
    uint8 in one dimension is an encoded image. Raises ConfigError for a tensor that is sparse, say.
    """
    if isinstance(item, str | bytes | Image.Image) or not hasattr(item, "__array__"):  # numpy has strings with arrays
        return item
    try:
        if hasattr(item, "detach"):  # a tensor of torch
            item = item.detach().cpu()
            item = item.float() if item.is_floating_point() else item  # numpy has no bfloat16
        pixels = np.asarray(item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{name} cannot be read as an array ({error}); give {IMAGE_FORMS}.") from error
    return pixels.tobytes() if pixels.ndim == 1 and pixels.dtype == np.uint8 else pixels


def _image_of_array(pixels: np.ndarray, name: str, max_pixels: int, *, is_hwc: bool) -> Image.Image:
    """An image in 8 bits. is_hwc: whether three channels stand last, where both ends could be channels."""
    shape, what = pixels.shape, f"{name} is an array of {pixels.dtype} {pixels.shape}"
    if pixels.ndim == 3:
        last, first = shape[2] in _CHANNELS, shape[0] in _CHANNELS
        if last and first and not (is_hwc and shape[2] == 3):
            raise ConfigError(f"{what}, whose channels may be first or last; give a PIL.Image.")
        pixels = pixels if last or not first else pixels.transpose(1, 2, 0)
    is_image = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in _CHANNELS)
    if not is_image or not (pixels.dtype.kind == "f" or pixels.dtype in (np.uint8, np.uint16, np.bool_)):
        raise ConfigError(f"{what}; give {IMAGE_FORMS}.")
    _check_size(pixels.shape[1], pixels.shape[0], name, max_pixels)
    if pixels.dtype.kind in "fb":
        lowest, highest = float(pixels.min()), float(pixels.max())
        if not (lowest >= -_ROUNDING and highest <= 1 + _ROUNDING):  # nor if they are not numbers
            raise ConfigError(f"{what} with values from {lowest:g} to {highest:g}; floats must be from 0 to 1.")
        pixels = pixels.astype(np.float64).clip(0, 1)
    if pixels.dtype != np.uint8:
        pixels = scale_to_bytes(pixels)
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))


def _open_image(payload: bytes, name: str) -> Image.Image:
    Image.init()
    formats = [name for name in _IMAGE_FORMATS if name in Image.OPEN]  # older builds of Pillow lack AVIF
    try:
        return Image.open(io.BytesIO(payload), formats=formats)
    except UnidentifiedImageError as error:
        what = storage.describe_content(payload[:512])
        raise ImageError(f"{name}: not an image in a known format{what and f', {what}'}") from error
    except Exception as error:  # Pillow's parsers raise anything on hostile bytes
        raise ImageError(f"{name}: damaged image header: {error}") from error


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name}: the image is empty ({width}x{height})")
    if width * height > max_pixels:
        raise ImageError(f"{name}: {width}x{height} is more than the limit of {max_pixels} pixels")


def _orientation(image: Image.Image) -> object:
    """What the EXIF says; 1 also where it is damaged, because the image itself may be fine."""
    with suppress(Exception):  # the EXIF parser raises anything
        return image.getexif().get(_ORIENTATION_TAG, 1)
    return 1


def _turn_upright(image: Image.Image, orientation: object) -> Image.Image:
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _WIDE_MODES:
        return Image.fromarray(scale_to_bytes(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def scale_to_bytes(values: np.ndarray) -> np.ndarray:
    """Brightnesses of any range as uint8. Floats up to 1 are shares of white. Whole numbers up to 65535 are those of
    the fewest bits among 8, 10, 12, 14 and 16 that hold the largest. Any others, which have no known range, are scaled
    by their own, from zero or from the smallest if that is negative. Raises `ImageError` for infinity and what is no
    number.
    """
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageError("it holds values that are not numbers")
    is_float, black, white = values.dtype.kind == "f", min(float(low), 0.0), max(float(high), 0.0)
    if black == 0 and is_float and white <= 1:
        white = 1
    elif black == 0 and white <= _FULL_SCALES[-1] and not (is_float and (values % 1).any()):
        white = next(scale for scale in _FULL_SCALES if white <= scale)
    return np.floor((values - np.float64(black)) * (255 / (white - black)) + 0.5).astype(np.uint8)


def _read_deep(image: Image.Image, file: Any) -> Image.Image:
    """A colour image of 16 bits per channel, of which Pillow reads the upper eight. If it uses at most 14 bits, it is
    scaled as `scale_to_bytes` does, with the lower eight, which Pillow reads as the upper ones of the other byte order.
    """
    upper = np.asarray(image)  # (H, W, 3 or 4)
    if upper[..., :3].max() >= 64:
        return image
    again: Any = Image.open(file, formats=[str(image.format)])
    for number, (*where, given) in enumerate(again.tile):
        raw_mode, *others = (given,) if isinstance(given, str) else given
        swapped = _DEEP_COLOUR.sub(lambda match: match[1] + ("L" if match[2] == "B" else "B"), raw_mode)
        again.tile[number] = (*where, (swapped, *others) if others else swapped)
    values = (upper[..., :3].astype(np.uint16) << 8) | np.asarray(again)[..., :3]
    return Image.fromarray(np.concatenate([scale_to_bytes(values), upper[..., 3:]], axis=-1))


def is_video(payload: bytes) -> bool:
    """Whether the first bytes are those of mp4 and its kin, Matroska or AVI; AVIF and HEIC are images."""
    if payload[4:8] == b"ftyp":
        return payload[8:12] not in (b"avif", b"avis", b"heic", b"heix", b"mif1")
    return payload.startswith(b"\x1aE\xdf\xa3") or (payload.startswith(b"RIFF") and payload[8:11] == b"AVI")


def read_frames(
    video: FileInput,
    num_frames: int,
    *,
    name: str | None = None,
    max_pixels: int = 7680 * 4320,
    max_frames: int = 108_000,
) -> list[Image.Image]:
    """Return RGB frames spread evenly over a video, decoded by PyAV (FFmpeg).

    Of its n frames, in the order they are shown, these have the indexes floor(i * n / num_frames) for
    i = 0 .. num_frames - 1. A video of fewer frames repeats some. Rotation and mirroring that the container states are
    applied; pixels that are not square stay as stored. Frames are counted, whatever the header says, and only the
    wanted ones are kept in memory.

    The paper (section 5.6) samples frames uniformly. The released code asks `numpy.arange` for integers in steps of
    n / num_frames, which steps by floor(n / num_frames) instead, so that the end of a short video is never seen, and it
    may give one frame more than asked for.

    video: one of `FILE_FORMS`; a file is read from its start on. name: stands for the video in errors. max_pixels,
    max_frames: a larger frame and a longer video (by default than an hour at 30 frames per second) are refused.

    Raises VideoError for a video that is damaged, without frames, too large, or cut off (where only times tell, as in
    webm, a missing tenth goes unnoticed), MissingExtraError without PyAV, and ConfigError for `num_frames` below 1 and
    for what is no video.
    """
    if num_frames < 1:
        raise ConfigError(f"num_frames must be at least 1, not {num_frames}")
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise MissingExtraError('videos need PyAV: pip install "openblip[video]"') from error
    name = name or input_name(video) or "video"
    if isinstance(video, str | os.PathLike):
        try:
            file = storage.open_binary(_path(video))
        except (OSError, OpenBlipError) as error:
            raise VideoError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    else:
        file = io.BytesIO(_read_input(video, name, VideoError, FILE_FORMS))
    with file:
        try:
            return _Video(file, storage.file_size(file), name, max_pixels, max_frames).frames(num_frames)
        except VideoError:
            raise
        except Exception as error:  # FFmpeg's errors are of many kinds, and so are those of what wraps it
            why = getattr(error, "strerror", None) or error
            raise VideoError(f"{name}: not a video that can be decoded: {why}") from error


@dataclass(frozen=True, slots=True)
class _Video:
    """A video in an open file of `size` bytes, which is read from its start as often as needed."""

    file: BinaryIO
    size: int
    name: str
    max_pixels: int
    max_frames: int

    def frames(self, num_frames: int) -> list[Image.Image]:
        """The evenly spread frames. A packet mostly holds one frame. Where it does not, the frames that decoding has
        counted tell which ones are wanted, and the video is decoded again.
        """
        total = self._count_packets()
        while True:
            indexes = [i * total // num_frames for i in range(num_frames)]
            kept, counted = self._decode(set(indexes))
            if counted == total:
                break
            total = counted
        if not total:
            raise VideoError(f"{self.name}: no frame in it")
        return [kept[index] for index in indexes]

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """The container and its video stream, at the start of the file."""
        import av

        self.file.seek(0)
        # FFmpeg decodes a frame to examine it: its own limit holds then, and counts the frame's padding, too.
        decoding = {"max_pixels": str(2 * self.max_pixels + (1 << 20))}
        options = {"format_whitelist": _VIDEO_FORMATS, **decoding}
        try:
            container = av.open(self.file, options=options, metadata_errors="replace")
        except av.FFmpegError as error:
            what = "not a video in a known format (mp4, mov, webm, mkv, avi), or cut off"
            raise VideoError(f"{self.name}: {what if self.size else 'the file is empty'}") from error
        with container:
            stream = container.streams.best("video")
            # An audio file's cover is a video stream of one image.
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise VideoError(f"{self.name}: no video in it")
            decoder: Any = stream.codec_context
            if decoder is None:
                raise VideoError(f"{self.name}: this build of PyAV cannot decode its video")
            self._check_frame_size(decoder)
            decoder.thread_type, decoder.thread_count = "NONE", 1
            decoder.options = decoding
            yield container, stream

    def _check_frame_size(self, frame: Any) -> None:
        if not frame.width or not frame.height:
            raise VideoError(f"{self.name}: its frames have no size, or far more than {self.max_pixels} pixels")
        if frame.width * frame.height > self.max_pixels:
            size = f"{frame.width}x{frame.height}"
            raise VideoError(f"{self.name}: {size} is more than the limit of {self.max_pixels} pixels")

    def _check_count(self, count: int) -> None:
        if count > self.max_frames:
            raise VideoError(f"{self.name}: more than the limit of {self.max_frames} frames")

    def _cut_off(self, why: str) -> VideoError:
        return VideoError(f"{self.name}: the video is cut off or damaged: {why}")

    def _count_packets(self) -> int:
        """The number of the video's packets, without decoding any. Raises `VideoError` when it is cut off."""
        times: list[float] = []
        count, last = 0, 0.0
        with self._opened() as (container, stream):
            if any(entry.pos + entry.size > self.size for entry in stream.index_entries):
                raise self._cut_off("its index reaches beyond the file's end")
            for packet in container.demux():
                if packet.is_corrupt:
                    raise self._cut_off("a packet is not whole")
                if packet.pts is not None:
                    last = max(last, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream is stream and packet.size:
                    count += 1
                    self._check_count(count)
                    if packet.pts is not None:
                        times.append(float(packet.pts * packet.time_base))
            # The index of an mp4 or mov was exact (see above), and its edits move times.
            is_exact = container.format.name.startswith("mov")
            promised = 0.0 if is_exact else (container.duration or 0) / 1e6
            # The last frame may be shown as long as any other.
            longest = max((later - earlier for earlier, later in itertools.pairwise(sorted(times))), default=0.0)
            if promised - last > max(_MISSING_SHARE * promised, longest):
                raise self._cut_off(f"it ends after {last:.1f} of {promised:.1f} seconds")
        return count

    def _decode(self, wanted: set[int]) -> tuple[dict[int, Image.Image], int]:
        """The wanted frames by their index, and how many frames there are."""
        kept: dict[int, Image.Image] = {}
        total = 0
        with self._opened() as (container, stream):
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise self._cut_off(f"frame {total} cannot be decoded whole")
                if total in wanted:
                    self._check_frame_size(frame)
                    layout = "rgba" if any(part.is_alpha for part in frame.format.components) else "rgb24"
                    values = frame.reformat(format=layout, threads=1).to_ndarray()  # (H, W, 3 or 4)
                    image = read_image(Image.fromarray(values), name=self.name, max_pixels=self.max_pixels)
                    kept[total] = _turn_upright(image, _frame_orientation(frame))
                total += 1
                self._check_count(total)
        return kept, total


def _frame_orientation(frame: Any) -> int:
    """The EXIF orientation that does what the display matrix does; any angle counts as the nearest right one."""
    from av.sidedata.sidedata import Type

    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return 1
    x_to_x, x_to_y, _, y_to_x, y_to_y = struct.unpack("=5i", bytes(matrix)[:20])
    if abs(x_to_x) + abs(y_to_y) >= abs(x_to_y) + abs(y_to_x):
        return 1 + _BACKWARDS.index((x_to_x < 0, y_to_y < 0))
    return 5 + _BACKWARDS.index((y_to_x < 0, x_to_y < 0))


@dataclass(frozen=True)
class FrameReader:
    """Reads images and videos as a model takes them. S image size, F frames."""

    preprocessing: Preprocessing
    scales_jpegs: bool = False
    """Whether large JPEG files are decoded to a fraction of their size, which is faster; see `read_image`."""

    def read_image(self, image: ImageInput, name: str | None = None) -> Pixels:
        """Read and resize one image: uint8 (3, S, S). Raises `ImageError`, in which `name` stands for it."""
        scaled_for = self.preprocessing.image_size if self.scales_jpegs else None
        return self.preprocessing(read_image(image, name=name, scaled_for=scaled_for))

    def read_video(self, video: FileInput, num_frames: int, name: str | None = None) -> Pixels:
        """Read and resize frames spread evenly over one video: uint8 (F, 3, S, S).

        Raises VideoError for a video that cannot be decoded, and MissingExtraError without PyAV.
        """
        return np.stack([self.preprocessing(frame) for frame in read_frames(video, num_frames, name=name)])
