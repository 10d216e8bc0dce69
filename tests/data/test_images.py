import io
import mmap
import os
import struct
import zipfile
import zlib
from functools import partial
from pathlib import PurePath

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from openblip.data.images import read_image
from openblip.errors import ConfigError, ImageError


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corner_image():
    """Red in the upper left corner, blue elsewhere, wider than high."""
    image = Image.new("RGB", (40, 20), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 10, 10))
    return image


def close(pixel, expected, tolerance=6):
    return all(abs(int(a) - b) <= tolerance for a, b in zip(pixel, expected, strict=True))


def test_plain_rgb_is_unchanged_however_it_comes(tmp_path, random_image):
    expected = np.asarray(random_image)
    path = tmp_path / "ünï code.png"
    random_image.save(path)
    for given in (path, str(path), path.read_bytes(), random_image, expected, expected[:, ::-1][:, ::-1]):
        image = read_image(given)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), expected)


CORNERS = [(2, 2), (37, 2), (37, 17), (2, 17), (2, 2), (17, 2), (17, 37), (2, 37)]  # at the orientations 1 to 8


@pytest.mark.parametrize(("orientation", "red"), [*enumerate(CORNERS, 1), (99, (2, 2))])
def test_exif_orientation(orientation, red):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_image(encode(corner_image(), "JPEG", exif=exif.tobytes(), quality=95))
    assert image.size == ((20, 40) if 5 <= orientation <= 8 else (40, 20))
    assert close(image.getpixel(red), (254, 0, 0), 12)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_orientation():
    payload = encode(corner_image(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 30)
    assert read_image(payload).size == (40, 20)


def test_transparency_is_over_white():
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (255, 0, 0, 128))
    for kind in ("PNG", "WEBP"):
        image = read_image(encode(rgba, kind, lossless=True))
        assert image.getpixel((0, 0)) == (255, 0, 0)
        assert close(image.getpixel((1, 0)), (255, 127, 127), 2)
        assert image.getpixel((3, 3)) == (255, 255, 255)
    gray = Image.new("LA", (2, 1), (0, 0))
    assert read_image(gray).getpixel((0, 0)) == (255, 255, 255)


def test_palette_and_colour_key_transparency():
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    image = read_image(encode(palette, "PNG", transparency=1))
    assert image.getpixel((0, 0)) == (10, 20, 30)
    assert image.getpixel((1, 0)) == (255, 255, 255)
    keyed = Image.new("RGB", (2, 1), (1, 2, 3))
    keyed.putpixel((1, 0), (9, 9, 9))
    image = read_image(encode(keyed, "PNG", transparency=(1, 2, 3)))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (9, 9, 9)]


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = read_image(encode(Image.fromarray(values), "PNG"))
    assert [image.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]
    assert read_image(encode(Image.fromarray(values), "TIFF")).getpixel((2, 0)) == (128, 128, 128)
    assert read_image(Image.fromarray(values.astype(np.int32))).getpixel((3, 0)) == (255, 255, 255)


GRAYS = {  # values of a gray image, and the grays from 0 to 255 that they are shown as
    "floats from 0 to 1": (np.array([0, 0.25, 0.5, 1], np.float32), (0, 64, 128, 255)),
    "floats from 0 to 255": (np.array([0, 1, 128, 255], np.float32), (0, 1, 128, 255)),
    "floats of 16 bits": (np.array([0, 257, 32896, 65535], np.float32), (0, 1, 128, 255)),
    "floats of no known range": (np.array([0, 0.5, 5, 10], np.float32), (0, 13, 128, 255)),
    "negative floats": (np.array([-1, -0.5, 0, 1], np.float32), (0, 64, 128, 255)),
    "negative alone": (np.full(4, -5, np.float32), (0,) * 4),
    "one value": (np.full(4, 0.5, np.float32), (128,) * 4),
    "black floats": (np.zeros(4, np.float32), (0,) * 4),
    "10 bits": (np.array([0, 4, 512, 1023], np.uint16), (0, 1, 128, 255)),
    "12 bits": (np.array([0, 16, 2048, 4095], np.uint16), (0, 1, 128, 255)),
    "14 bits": (np.array([0, 64, 8192, 16383], np.uint16), (0, 1, 128, 255)),
    "8 bits": (np.array([0, 1, 128, 255], np.uint16), (0, 1, 128, 255)),
    "black": (np.zeros(4, np.uint16), (0,) * 4),
    "16 bits in 32": (np.array([0, 257, 32896, 65535], np.int32), (0, 1, 128, 255)),
    "more than 16 bits": (np.array([0, 1 << 22, 1 << 23, 1 << 24], np.int32), (0, 64, 128, 255)),
    "negative": (np.array([-1000, 0, 1000, 3000], np.int32), (0, 64, 128, 255)),
    "all 32 bits": (np.array([-(1 << 31), 0, 0, (1 << 31) - 1], np.int32), (0, 128, 128, 255)),
}


@pytest.mark.parametrize("kind", GRAYS)
def test_gray_of_any_range(kind):
    values, expected = GRAYS[kind]
    for name in ("TIFF", "PNG") if values.dtype == np.uint16 else ("TIFF",):
        image = read_image(encode(Image.fromarray(values[None]), name))
        assert [image.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in expected]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ImageError, match="not numbers"):
        read_image(encode(Image.fromarray(np.array([[0, value]], np.float32)), "TIFF"))


def deep_png(values):
    """A PNG of 16 bits per channel, which Pillow does not write; values are (H, W, 3 or 4)."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def deep_tiff(values, order):
    """A TIFF of 16 bits per channel in a byte order, without compression; its pixels begin at byte 200."""
    height, width, channels = values.shape
    tags = {
        256: width,
        257: height,
        258: 180,
        259: 1,
        262: 2,
        273: 200,
        277: channels,
        278: height,
        279: values.size * 2,
    }
    count = {258: channels}
    head = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags))
    for tag, value in tags.items():
        is_short = tag in (259, 262, 277)
        head += struct.pack(f"{order}HHI", tag, 3 if is_short or tag == 258 else 4, count.get(tag, 1))
        head += struct.pack(f"{order}HH", value, 0) if is_short else struct.pack(f"{order}I", value)
    bits = struct.pack(f"{order}{channels}H", *[16] * channels)
    return head.ljust(180, b"\0") + bits.ljust(20, b"\0") + values.astype(f"{order}u2").tobytes()


@pytest.mark.parametrize("write", [deep_png, partial(deep_tiff, order="<"), partial(deep_tiff, order=">")])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_colours_of_few_bits_in_sixteen(write, bits):
    full = 2**bits - 1
    values = np.array([[[0, full // 2, full], [full // 4, 0, 1]]], np.uint16)
    expected = np.round(values * (255 / full))
    assert np.abs(np.asarray(read_image(write(values))) - expected).max() <= 1


def test_alpha_of_sixteen_bits():
    values = np.array([[[4095, 0, 2048, 65535], [0, 0, 0, 0]]], np.uint16)
    image = read_image(deep_png(values))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 128), (255, 255, 255)]


@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "YCbCr"])
def test_other_modes(mode):
    white = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    kind = "JPEG" if mode in ("CMYK", "L") else "TIFF"
    image = read_image(encode(white, kind))
    assert image.mode == "RGB"
    assert close(image.getpixel((4, 4)), (255, 255, 255), 3)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for kind in ("GIF", "WEBP", "PNG"):
        payload = encode(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert close(read_image(payload).getpixel((1, 1)), (255, 0, 0))


def bomb():
    """A PNG header that promises 100000 x 100000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "empty"),
        (b"I am a caption, not an image", "known format"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 50, "known format|damaged"),
        (encode(corner_image().resize((400, 200)), "JPEG")[:2000], "truncated"),
        (encode(corner_image(), "PNG")[:-30], "truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "known format"),
        (bomb(), "bomb|limit"),
    ],
    ids=["empty", "text", "header-only", "truncated-jpeg", "truncated-png", "postscript", "bomb"],
)
def test_what_cannot_be_read_is_named(payload, reason):
    with pytest.raises(ImageError, match=rf"0000/holiday\.jpg: .*({reason})"):
        read_image(payload, name="0000/holiday.jpg")


def test_formats_beyond_jpeg_and_png():
    for kind in ("WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"):
        assert close(read_image(encode(corner_image(), kind)).getpixel((30, 15)), (0, 0, 255), 12)
    frames = [corner_image(), corner_image().rotate(180)]
    phone = encode(frames[0], "MPO", save_all=True, append_images=frames[1:], quality=95)
    assert close(read_image(phone).getpixel((2, 2)), (254, 0, 0), 12)


def test_size_limit_is_checked_before_decoding():
    payload = encode(Image.new("RGB", (50, 50)), "PNG")
    assert read_image(payload, max_pixels=2500).size == (50, 50)
    with pytest.raises(ImageError, match="50x50"):
        read_image(payload[:60], max_pixels=2499)  # the pixels are not even there
    with pytest.raises(ImageError, match="limit"):
        read_image(np.zeros((50, 50, 3), np.uint8), max_pixels=2499)


RGBA = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
RGB, GRAY, ALPHA = RGBA[..., :3], RGBA[..., 0], RGBA[..., 3]
SHOWN = np.asarray(read_image(Image.fromarray(RGBA)))  # over white


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (GRAY, GRAY), (GRAY[..., None], GRAY), (GRAY[None], GRAY), (torch.from_numpy(GRAY), GRAY),
        (RGBA, SHOWN), (RGBA.transpose(2, 0, 1), SHOWN), (torch.from_numpy(RGBA / 255).movedim(2, 0), SHOWN),
        (RGBA[..., [0, 3]], np.asarray(read_image(Image.fromarray(RGBA[..., [0, 0, 0, 3]])))),
        (RGB.transpose(2, 0, 1), RGB), (torch.from_numpy(RGB), RGB), (torch.from_numpy(RGB).movedim(2, 0), RGB),
        (RGB / 255, RGB), ((RGB / 255).astype(np.float16), RGB), ((RGB / 255).astype(np.float32)[::-1], RGB[::-1]),
        (torch.from_numpy(RGB / 255).float().movedim(2, 0).requires_grad_(), RGB),
        (torch.from_numpy(RGB // 255).bfloat16(), RGB // 255 * 255),
        (RGB / 255 * 1.0001, RGB), (RGB.astype(np.uint16) * 257, RGB), (GRAY > 99, (GRAY > 99) * 255),
        (RGB[:3], RGB[:3]), (RGB[:, :1], RGB[:, :1]),
    ],
)  # fmt: skip
def test_arrays_and_tensors(array, expected):
    expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=2)
    assert np.array_equal(np.asarray(read_image(array)), expected)


def test_encoded_images_in_any_holder(tmp_path, random_image):
    path = tmp_path / "a.png"
    random_image.save(path)
    payload = path.read_bytes()
    written = io.BytesIO()
    random_image.save(written, "PNG")  # its position is at the end
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(path, "a.png")
        holders = [
            written, io.BytesIO(payload), bytearray(payload), memoryview(payload), np.frombuffer(payload, np.uint8),
            torch.frombuffer(bytearray(payload), dtype=torch.uint8), np.str_(path), PurePath(path), path.open("rb"),
            *(entry for entry in os.scandir(tmp_path) if entry.name == "a.png"), path.open("rb", buffering=0),
        ]  # fmt: skip
        holders.append(mmap.mmap(holders[-1].fileno(), 0, access=mmap.ACCESS_READ))
    with zipfile.ZipFile(tmp_path / "a.zip") as archive, archive.open("a.png") as member:
        for holder in [*holders, *holders, member]:
            assert np.array_equal(np.asarray(read_image(holder)), np.asarray(random_image))


@pytest.mark.parametrize(
    "given",
    [
        None, 3, 2.5, {"bytes": b""}, [RGB], ("a.jpg",), object(), Image, io.StringIO("text"), np.float64(0.5),
        RGB.astype(np.int64), RGB.astype(np.float32), RGB / -255, RGB / 255 * np.nan, RGB[None], GRAY[0] / 255,
        RGB[:, :, :0], np.zeros((5, 5, 5), np.uint8), np.zeros((3, 4, 4), np.uint8), torch.zeros(3, 4, 3),
        np.array(["a.jpg", "b.jpg"]), torch.zeros(4, 4).to_sparse(), torch.zeros(4, 4, device="meta"),
    ],
    ids=lambda given: type(given).__name__,
)  # fmt: skip
def test_what_is_no_image_or_may_be_several_is_refused(given):
    with pytest.raises(ConfigError, match=r"(?s)^x (is|cannot) .*(give .*PIL\.Image|floats must be from 0 to 1)"):
        read_image(given, name="x")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    for file in ((tmp_path / "a.png").open("rb"), (tmp_path / "a.png").open("ab")):
        with pytest.raises(ImageError, match=r"a\.png: (the file is empty|cannot be read)"):
            read_image(file)
        file.close()
        with pytest.raises(ImageError, match=r"a\.png: cannot be read: .*closed"):
            read_image(file)
    with pytest.raises(ImageError, match="empty"):
        read_image(np.zeros((0, 4, 3), np.uint8))


def test_paths_that_are_no_files(tmp_path):
    (tmp_path / "x.jpg").mkdir()
    for path in (tmp_path / "x.jpg", tmp_path / "gone.jpg"):
        with pytest.raises(ImageError, match=path.name):
            read_image(path)


def test_the_callers_image_stays_as_it_is(tmp_path):
    image = Image.new("RGBA", (4, 4), (1, 2, 3, 4))
    image.getexif()[0x0112] = 6
    read_image(image)
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (1, 2, 3, 4)
    pages = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
    with Image.open(tmp_path / "a.tiff") as opened:
        for page, colour in enumerate(((255, 0, 0), (0, 255, 0))):
            opened.seek(page)
            assert read_image(opened).getpixel((0, 0)) == colour


def drawing(size):
    """Shapes with hard edges, which suffer most from a coarse scale."""
    rng, image = np.random.default_rng(0), Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for _ in range(300):
        x, y, side = rng.integers(0, size[0]), rng.integers(0, size[1]), rng.integers(2, size[0] // 10)
        draw.rectangle((x, y, x + side, y + side // 2), outline=tuple(rng.integers(0, 256, 3).tolist()), width=3)
        draw.ellipse((x, y, x + side // 2, y + side), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


@pytest.mark.parametrize(
    ("size", "scaled_for", "decoded"),
    [
        ((2400, 1700), 384, (1200, 850)),
        ((1600, 1200), 384, (800, 600)),  # near the smallest that is taken
        ((1600, 1200), 32, (800, 600)),  # never below 576
        ((1151, 1600), 384, (1151, 1600)),
        ((1600, 1200), 480, (1600, 1200)),  # a half has less than 1.5 * 480 pixels in height
    ],
)
def test_a_large_jpeg_is_decoded_to_a_fraction_within_its_tolerance(size, scaled_for, decoded):
    payload = encode(drawing(size), "JPEG", quality=88)
    scaled = read_image(payload, scaled_for=scaled_for)
    assert scaled.size == decoded
    whole, found = (
        np.asarray(image.resize((scaled_for, scaled_for), Image.Resampling.BICUBIC)).astype(int)
        for image in (read_image(payload), scaled)
    )
    assert np.abs(found - whole).mean() < 1.5
    assert np.array_equal(found, whole) == (decoded == size)


def test_only_jpeg_files_are_scaled_and_only_when_asked():
    image = drawing((1600, 1200))
    for given in (image, np.asarray(image), encode(image, "WEBP")):
        assert read_image(given, scaled_for=384).size == (1600, 1200)
    exif = Image.Exif()
    exif[0x0112] = 6
    payload = encode(image, "JPEG", exif=exif.tobytes())
    assert read_image(payload, scaled_for=384).size == (600, 800)
    assert read_image(payload).size == (1200, 1600)
    opened = Image.open(io.BytesIO(payload))
    assert read_image(opened, scaled_for=384).size == (1200, 1600)  # the caller's own image
    gray = encode(image.convert("L"), "JPEG")
    assert (read_image(gray, scaled_for=384).mode, read_image(gray, scaled_for=384).size) == ("RGB", (800, 600))
    with pytest.raises(ImageError, match="damaged"):
        read_image(payload[:-5000], scaled_for=384)
    with pytest.raises(ImageError, match="more than the limit"):
        read_image(payload, scaled_for=384, max_pixels=1_000_000)
