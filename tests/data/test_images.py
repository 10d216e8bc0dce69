import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from openblip.data.images import read_image
from openblip.errors import ImageError


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


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 4, 4), "uint8"), ((4, 4, 3), "float32"), ((4, 4), "uint8"), ((0, 4, 3), "uint8")]
)
def test_wrong_arrays(shape, dtype):
    with pytest.raises(ImageError):
        read_image(np.zeros(shape, dtype))


def test_paths_that_are_no_files(tmp_path):
    (tmp_path / "x.jpg").mkdir()
    for path in (tmp_path / "x.jpg", tmp_path / "gone.jpg"):
        with pytest.raises(ImageError, match=path.name):
            read_image(path)
    with pytest.raises(ImageError, match="NoneType"):
        read_image(None)


def test_the_callers_image_stays_as_it_is():
    image = Image.new("RGBA", (4, 4), (1, 2, 3, 4))
    image.getexif()[0x0112] = 6
    read_image(image)
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (1, 2, 3, 4)
