import builtins
import contextlib
import io
import struct

import numpy as np
import pytest

pytest.importorskip("av")

from clip_files import clip, level, sound
from PIL import Image

import openblip
from openblip.data.images import read_frames
from openblip.errors import ConfigError, ImageError, MissingExtraError, VideoError

CONTAINERS = [("mp4", "mpeg4"), ("mp4", "libx264"), ("mov", "mpeg4"), ("mkv", "libx264"), ("webm", "libvpx-vp9")]
CONTAINERS += [("avi", "mpeg4")]
AT_FRONT = {"movflags": "faststart"}


def shown(images):
    return [round(level(image)) for image in images]


@pytest.mark.parametrize(("container", "codec"), CONTAINERS)
@pytest.mark.parametrize(("total", "num_frames"), [(20, 8), (20, 20), (1, 4), (3, 8), (7, 1)])
def test_frames_are_spread_evenly(container, codec, total, num_frames):
    frames = read_frames(clip(total, container=container, codec=codec), num_frames)
    assert shown(frames) == [i * total // num_frames for i in range(num_frames)]
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (64, 48))}


def test_a_frame_is_what_was_filmed():
    pixels = np.asarray(read_frames(clip(4), 4)[2]).astype(int)
    for at, colour in (((5, 5), (255, 0, 0)), ((42, 58), (0, 0, 255)), ((24, 32), (16, 16, 16))):
        assert np.abs(pixels[at] - colour).max() < 12


def test_paths_and_urls(tmp_path):
    (tmp_path / "a.mp4").write_bytes(clip())
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.pipe_file("/clips/a.mp4", clip())
    for place in (tmp_path / "a.mp4", str(tmp_path / "a.mp4"), "memory://clips/a.mp4"):
        assert shown(read_frames(place, 2)) == [0, 10]


def test_a_variable_rate_counts_frames_not_seconds():
    payload = clip(6, container="mkv", times=[0, 1, 2, 50, 90, 91])
    assert shown(read_frames(payload, 3)) == [0, 2, 4]


def test_a_last_frame_that_stays_long_is_no_cut():
    payload = clip(2, container="mkv", codec="libx264", times=[0, 50])
    stated = b"\x44\x89\x88"  # the length, a float of milliseconds
    longer = payload.replace(stated + struct.pack(">d", 5100), stated + struct.pack(">d", 10_000))
    assert longer != payload
    assert shown(read_frames(longer, 2)) == [0, 1]


def test_transparent_parts_are_white():
    payload = bytearray(clip(1, container="mov", codec="png", layout="rgba"))
    (opaque,) = read_frames(bytes(payload), 1)
    assert opaque.getpixel((32, 24)) == (0, 0, 0)
    clear = io.BytesIO()
    Image.new("RGBA", (64, 48)).save(clear, "PNG")
    start = payload.index(b"\x89PNG")
    payload[start : start + len(clear.getvalue())] = clear.getvalue()
    assert read_frames(bytes(payload), 1)[0].getpixel((32, 24)) == (255, 255, 255)


def test_a_title_in_another_encoding():
    payload = clip(container="mkv", codec="libx264", title="title?").replace(b"title?", b"\xfftitl\xe9")
    assert shown(read_frames(payload, 2)) == [0, 10]


def test_frames_that_an_edit_cuts_away_do_not_count():
    payload = bytearray(clip(20, codec="libx264"))
    at = payload.index(b"elst") + 16
    (start,) = struct.unpack_from(">i", payload, at)
    struct.pack_into(">i", payload, at, start + 5 * 1024)  # five frames of ten per second
    assert shown(read_frames(bytes(payload), 5)) == [5, 8, 11, 14, 17]


# Where the axes of a stored image go, as the file has it, and where its red upper left corner ends up.
TURNS = {
    "none": ((1, 0, 0, 1), "upper left"),
    "right": ((0, 1, -1, 0), "upper right"),
    "half": ((-1, 0, 0, -1), "lower right"),
    "left": ((0, -1, 1, 0), "lower left"),
    "mirrored": ((-1, 0, 0, 1), "upper right"),
    "upside down": ((1, 0, 0, -1), "lower left"),
    "transposed": ((0, 1, 1, 0), "upper left"),
    "transversed": ((0, -1, -1, 0), "lower right"),
}


@pytest.mark.parametrize("turn", TURNS)
def test_a_turned_clip_is_shown_upright(turn):
    (a, b, c, d), red = TURNS[turn]
    payload = bytearray(clip(2))
    matrix = struct.pack(">9i", *(value << 16 for value in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
    at = payload.index(b"tkhd") + 44
    payload[at : at + 36] = matrix
    (frame,) = read_frames(bytes(payload), 1)
    assert frame.size == ((64, 48) if a else (48, 64))
    right, lower = frame.width - 4, frame.height - 4
    corners = {"upper left": (3, 3), "upper right": (right, 3), "lower left": (3, lower), "lower right": (right, lower)}
    assert [name for name, at in corners.items() if frame.getpixel(at)[0] > 200] == [red]


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "empty"),
        (b"no clip at all", "known format"),
        (np.random.default_rng(0).bytes(10_000), "known format"),
        (sound(), "no video"),
        (sound("matroska"), "no video"),
        (sound(cover=Image.new("RGB", (24, 16))), "no video"),
        (clip(codec="libx264").replace(b"avc1", b"zzzz"), "cannot decode"),
        (b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n", "known format"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "known format"),
    ],
    ids=["empty", "text", "noise", "mp4-sound", "mkv-sound", "sound-cover", "codec", "playlist", "list"],
)
def test_what_is_no_clip(payload, reason):
    with pytest.raises(VideoError, match=f"^x: .*{reason}"):
        read_frames(payload, 4, name="x")


def test_an_image_with_the_name_of_a_clip(tmp_path, make_image):
    (tmp_path / "a.mp4").write_bytes(make_image())
    with pytest.raises(VideoError, match=r"a\.mp4.*not a video"):
        read_frames(tmp_path / "a.mp4", 4)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8])
@pytest.mark.parametrize(("container", "codec"), CONTAINERS)
def test_a_clip_that_is_cut_off(container, codec, share):
    whole = clip(container=container, codec=codec)
    with pytest.raises(VideoError):
        read_frames(whole[: int(share * len(whole))], 4)


@pytest.mark.parametrize("lost", [1, 200, 1500, "a whole frame"])
def test_a_clip_that_is_cut_off_behind_its_index(lost):
    """Where everything that says what the clip is stands before the frames."""
    whole = clip(options=AT_FRONT)
    assert shown(read_frames(whole, 4)) == [0, 5, 10, 15]
    if lost == "a whole frame":
        (lost,) = struct.unpack_from(">I", whole, whole.index(b"stsz") + 16 + 19 * 4)
    with pytest.raises(VideoError, match="cut off"):
        read_frames(whole[:-lost], 4)


def test_a_last_packet_that_is_cut_off():
    whole = clip(container="avi")
    with pytest.raises(VideoError, match="a packet is not whole"):
        read_frames(whole[: whole.index(b"idx1") - 10], 4)


def test_damage_in_the_middle_is_not_shown_as_an_image():
    payload = bytearray(clip())
    start = payload.index(b"mdat") + 1000
    payload[start : start + 60] = bytes(60)
    with pytest.raises(VideoError, match=r"frame \d+ cannot be decoded whole"):
        read_frames(bytes(payload), 4)


def test_random_damage_is_a_video_error_or_a_clip():
    random = np.random.default_rng(0)
    wholes = [clip(container=container, codec=codec) for container, codec in CONTAINERS]
    for trial in range(120):
        payload = bytearray(wholes[trial % len(wholes)])
        for position in random.integers(0, len(payload), 20):
            payload[position] = random.integers(0, 256)
        with contextlib.suppress(VideoError):
            assert len(read_frames(bytes(payload), 3)) == 3


def test_a_clip_without_frames():
    payload = clip(codec="libx264", options={"movflags": "frag_keyframe+empty_moov"})
    with pytest.raises(VideoError, match="no frame"):
        read_frames(payload[: payload.index(b"moof") - 4], 4)


def test_limits():
    payload = clip(20)
    assert len(read_frames(payload, 2, max_pixels=64 * 48, max_frames=20)) == 2
    with pytest.raises(VideoError, match="64x48 is more than the limit of 3071 pixels"):
        read_frames(payload, 2, max_pixels=64 * 48 - 1)
    with pytest.raises(VideoError, match="limit of 19 frames"):
        read_frames(payload, 2, max_frames=19)
    with pytest.raises(ConfigError, match="at least 1"):
        read_frames(payload, 0)


def test_a_clip_that_is_too_large_is_refused_before_it_is_decoded(monkeypatch):
    payload = clip(5, size=(1920, 1080))
    monkeypatch.setattr("openblip.data.images._Video._decode", None)
    with pytest.raises(VideoError, match="1920x1080 is more"):
        read_frames(payload, 2, max_pixels=1_000_000)
    with pytest.raises(VideoError, match="limit of 4 frames"):
        read_frames(payload, 2, max_frames=4)


def test_an_index_of_millions_of_frames_is_refused():
    payload = bytearray(clip())
    struct.pack_into(">II", payload, payload.index(b"stsz") + 8, 0, 0x7FFFFFFF)
    with pytest.raises(VideoError):
        read_frames(bytes(payload), 2)


def test_few_frames_are_kept(monkeypatch):
    """A long clip does not fill the memory: only what is asked for becomes an image."""
    converted = []
    image = Image.fromarray
    monkeypatch.setattr(Image, "fromarray", lambda values: converted.append(1) or image(values))
    read_frames(clip(200, size=(32, 32)), 3)
    assert len(converted) == 3


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(VideoError, match=r"gone\.mp4: cannot be read: No such file"):
        read_frames(tmp_path / "gone.mp4", 2)


def test_what_skips_bad_images_skips_bad_clips():
    assert issubclass(VideoError, ImageError)
    assert openblip.VideoError is VideoError


def test_without_pyav(monkeypatch):
    load = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "av":
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r'pip install "openblip\[video\]"'):
        read_frames(b"x", 2)
