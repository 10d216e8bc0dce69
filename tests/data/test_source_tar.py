import gzip
import io
import json
import re
import tarfile
from collections import Counter

import pytest
from annotation_files import read_all, read_samples

from openblip.data.sample import Reject, Sample
from openblip.data.sources import open_source
from openblip.errors import SourceError
from source_items import items_of


def text(**fields):
    return json.dumps(fields).encode()


def test_webdataset_members_become_samples(tmp_path, write_tar, make_image):
    image = make_image(7)
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("000.jpg", image),
            ("000.json", text(caption="a dog", references=["a hound"])),
            ("dir/001.PNG", image),
            ("dir/001.txt", "eine Katze, süß\n".encode()),
            ("002.seg.png", b"not the image"),
            ("002.json", text(captions=["one", "two"], image_id=5)),
            ("002.webp", image),
            ("003.jpg", image),
            (".DS_Store", b"junk"),
        ],
    )
    samples = read_samples(path)
    assert [s.key for s in samples] == ["000", "dir/001", "002", "003"]
    assert [s.captions for s in samples] == [("a dog",), ("eine Katze, süß",), ("one", "two"), ()]
    assert samples[0].image == image
    assert samples[0].info["references"] == ["a hound"]
    assert samples[2].image_id == f"{path}#5"
    assert len({s.image_id for s in samples}) == 4


def test_two_images_are_one_sample(tmp_path, write_tar, make_image):
    left, right = make_image(1), make_image(2)
    members = [
        ("dir/a.right.JPG", right),
        ("dir/a.json", text(statement="Both are grey.", label=True)),
        ("dir/a.left.png", left),
        ("b.left.jpg", right),
        ("b.right.jpg", left),
        ("c.left.seg.jpg", b"of neither"),
        ("c.jpg", left),
    ]
    samples = read_samples(write_tar(tmp_path / "a.tar", members))
    images = [(s.key, s.image, s.second_image) for s in samples]
    assert images == [("dir/a", left, right), ("b", right, left), ("c", left, None)]
    assert dict(samples[0].info) == {"statement": "Both are grey.", "label": True}


@pytest.mark.parametrize("suffix", ["mp4", "webm", "mkv", "avi", "MOV", "m4v"])
def test_a_video_is_the_image_of_its_sample(tmp_path, write_tar, suffix):
    members = [(f"a.{suffix}", b"the video"), ("a.json", text(question="what?", answers=["that"]))]
    (sample,) = read_samples(write_tar(tmp_path / "a.tar", members))
    assert (sample.image, sample.second_image, sample.info["question"]) == (b"the video", None, "what?")


A, B = ("a.jpg", b"first"), ("b.jpg", b"second")


@pytest.mark.parametrize(
    ("members", "expected", "reason"),
    [
        (
            [A, ("a.txt", b"from txt"), ("a.json", text(caption="from json"))],
            [("a", b"first", None, ("from json",))],
            "",
        ),
        ([A, ("a.txt", b"from txt"), ("a.json", text(caption=None))], [("a", b"first", None, ("from txt",))], ""),
        ([("a.left.jpg", b""), ("a.mp4", b"v"), B], [], "the right one is missing"),
        ([("a.right.jpg", b""), ("a.mp4", b"v"), B], [], "the left one is missing"),
        ([("a.mp4", b"v"), A], [("a", b"first", None, ())], "stay"),
        ([("a.left.jpg", b"l"), ("a.right.jpg", b"r"), A], [("a", b"first", None, ())], "stay"),
        ([("a.left.jpg", b"l"), ("a.png", b"first")], [("a", b"first", None, ())], "stay"),
        ([("a.mp4", b"v"), ("a.right.jpg", b"r"), ("a.left.jpg", b"l")], [("a", b"l", b"r", ())], "stay"),
        ([A, B, ("b.txt", b"b"), ("a.txt", b"a")], [("a", b"first", None, ())], "must not lie apart"),
        ([A, ("a.txt", b"1"), B, ("a.jpg", b"x"), ("a.txt", b"2")], [("a", b"first", None, ("1",))], "duplicate"),
        ([("a.txt", b"x"), B], [], "no image"),
        ([A, ("a.json", b"{broken"), B], [], "broken json"),
        ([A, ("a.json", b"[1]"), B], [], "json object"),
        ([A, ("a.json", text(caption=3)), B], [], "caption"),
        ([A, ("a.json", b"\xff\xfe\x00"), B], [], "json"),
        ([A, ("a.txt", b"\xff\xff"), B], [], "UTF-8"),
    ],
)
def test_what_the_files_of_a_key_are(tmp_path, write_tar, members, expected, reason):
    samples, rejects = read_all(write_tar(tmp_path / "a.tar", members))
    assert [(s.key, s.image, s.second_image, s.captions) for s in samples if s.key == "a"] == expected
    assert [(s.key, s.image) for s in samples if s.key != "a"] == [("b", b"second")] * (B in members)
    assert [(r.shard, r.key) for r in rejects] == [("a", "a")] * bool(reason)
    assert all(reason in r.reason for r in rejects)


NAMES = {  # members, and the (key, captions) of samples, keys of rejects and endings not used that should come of them
    "img.v1.jpg img.v1.txt img.v2.jpg img.v2.txt": ("img.v1:img.v1 img.v2:img.v2", "", ""),
    "img.v1.jpg img.v2.jpg img.v2.txt": ("img.v1: img.v2:img.v2", "", ""),
    "img.jpg img.txt img.v1.jpg img.v1.txt": ("img:img img.v1:img.v1", "", ""),
    "img.v1.txt img.v1.jpg img.v3.txt img.v2.png": ("img.v1:img.v1 img.v2:", "img.v3", ""),
    "s0.input.jpg s0.outputs.txt s1.input.jpg s1.outputs.txt": ("s0:s0.outputs s1:s1.outputs", "", ""),
    "s0.text.json s0.image.jpg s0.caption.txt": ("s0:s0.caption", "", ""),
    "s0.txt s0.image.jpg": ("s0:s0", "", ""),
    "s0.jpg s0.en.txt": ("s0:s0.en", "", ""),
    "s0.jpg s0.de.txt s0.en.txt": ("s0:", "s0.de s0.en", ""),
    "s0.jpg s0.en.txt s0.txt": ("s0:s0", "", ".en.txt"),
    "s0.canny.jpg s0.depth.png s0.jpg s0.txt": ("s0:s0", "", ".canny.jpg .depth.png"),
    "s0.a.jpg s0.b.jpg s0.txt": ("s0.a: s0.b:", "s0", ""),
    "photo 12.30.jpg photo 12.30.txt": ("photo 12.30:photo 12.30", "", ""),
    "train.v1/a.jpg train.v1/a.txt": ("train.v1/a:train.v1/a", "", ""),
    "A.B.JPG A.B.TXT": ("A.B:A.B", "", ""),
    "a.gif a.caption b.tiff c.avif d.jfif e.jp2": ("a:a b: c: d: e:", "", ""),
    "a.v1.left.jpg a.v1.right.jpg a.v1.txt": ("a.v1:a.v1", "", ""),
    "a.jpg ._a.jpg __MACOSX/a.jpg a.cls b.svg b.heic README": (
        "a:",
        "",
        "hidden hidden .cls .svg .heic without|an|ending",
    ),
    "x.jpg y.v1.txt z.jpg": ("x: z:", "y.v1", ""),
}


@pytest.mark.parametrize("names", NAMES)
def test_dots_in_names(tmp_path, write_tar, names):
    members = [
        (name, text(caption="") if name.endswith("json") else name.rpartition(".")[0].encode())
        for name in re.findall(r"[^ ]+ 12.30\S+|\S+", names)
    ]
    source = open_source(str(write_tar(tmp_path / "a.tar", members)))
    everything = list(source.read("a"))
    samples = [item for _, item in everything if isinstance(item, Sample)]
    rejects = [item.key for _, item in everything if isinstance(item, Reject)]
    expected, rejected, unused = NAMES[names]
    assert " ".join(f"{s.key}:{''.join(s.captions)}" for s in samples) == expected
    assert (rejects, Counter(source.unused["a"])) == (
        rejected.split(),
        Counter(ending.replace("|", " ") for ending in unused.split()),
    )
    for start in range(len(everything) + 1):
        rest = [entry for entry in everything if entry.number >= start]
        pieces = [entry for j in range(3) for entry in source.read("a", start=start, pieces=(j, 3))]
        assert list(source.read("a", start=start)) == rest == sorted(pieces, key=lambda entry: entry.number)
    assert Counter(source.unused["a"]).total() == len(unused.split())


@pytest.mark.parametrize("plain", [[], [("laion.jpg", b"whole"), ("laion.txt", b"of all")]])
def test_a_shard_whose_names_share_what_is_before_the_dot(tmp_path, write_tar, plain):
    members = [m for i in range(100) for m in ((f"laion.{i:04d}.jpg", b"%d" % i), (f"laion.{i:04d}.txt", b"t%d" % i))]
    source = open_source(str(write_tar(tmp_path / "a.tar", [*plain, *members])))
    everything = list(source.read("a"))
    assert [(s.key, s.captions) for _, s in everything][-100:] == [(f"laion.{i:04d}", (f"t{i}",)) for i in range(100)]
    assert len(everything) == 100 + bool(plain)
    pieces = [entry for j in range(7) for entry in source.read("a", start=30, pieces=(j, 7))]
    assert sorted(pieces, key=lambda entry: entry.number) == everything[30:]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<!DOCTYPE html><html>404" * 50, "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"PK\x03\x04" + b"x" * 1000, "zip"),
        (b"PAR1" + b"x" * 1000, "parquet"),
    ],
)
@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_a_file_that_is_something_else_says_what(tmp_path, content, reason, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=reason if name[2:] != reason else "readable"):
        read_all(tmp_path / name)


def test_a_video_is_whole_only_with_what_the_first_one_has(tmp_path, write_tar):
    members = [("a.mp4", b"1"), ("a.json", b"{}"), ("b.mp4", b"2"), ("b.json", b"{}")]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: 6 * 512])
    samples, rejects = read_all(tmp_path / "cut.tar")
    assert ([s.key for s in samples], [r.key for r in rejects]) == (["a"], [""])


def three_samples(write_tar, make_image, path):
    members = [m for i in range(3) for m in ((f"{i}.jpg", make_image(i)), (f"{i}.txt", b"text %d" % i))]
    return write_tar(path, members).read_bytes()


@pytest.mark.parametrize("cut", ["header", "image", "text missing"])
def test_a_shard_that_ends_early_gives_its_whole_samples(tmp_path, write_tar, make_image, cut):
    whole = three_samples(write_tar, make_image, tmp_path / "whole.tar")
    with tarfile.open(tmp_path / "whole.tar") as tar:
        members = tar.getmembers()
    image, caption = members[4], members[5]
    ends = {"header": image.offset + 100, "image": image.offset_data + 50, "text missing": caption.offset}
    (tmp_path / "cut.tar").write_bytes(whole[: ends[cut]])
    samples, rejects = read_all(tmp_path / "cut.tar")
    assert [s.key for s in samples] == ["0", "1"]
    assert [(r.shard, r.key) for r in rejects] == [("cut", "")]
    assert "ends early" in rejects[0].reason


@pytest.mark.parametrize("size", [*range(600, 6000, 300), 20_000])
def test_a_damaged_shard_in_pieces(tmp_path, write_tar, make_image, size):
    whole = three_samples(write_tar, make_image, tmp_path / "whole.tar")
    (tmp_path / "cut.tar").write_bytes(whole[:size])
    source = open_source(str(tmp_path / "cut.tar"))

    def read(**arguments):
        try:
            return list(source.read("cut", **arguments))
        except SourceError as error:
            return [(0, str(error))]

    everything = read()
    for start in range(5):
        pieces = [item for j in range(2) for item in read(start=start, pieces=(j, 2))]
        if isinstance(everything[0][1], str):
            assert pieces == [*everything, *everything]
        else:
            assert sorted(pieces, key=lambda p: p.number) == [p for p in everything if p.number >= start]


def test_a_damaged_header_in_the_middle_is_not_silent(tmp_path, write_tar, make_image):
    whole = bytearray(three_samples(write_tar, make_image, tmp_path / "whole.tar"))
    with tarfile.open(tmp_path / "whole.tar") as tar:
        offset = tar.getmembers()[2].offset
    whole[offset + 10 : offset + 20] = b"\xff" * 10
    (tmp_path / "bad.tar").write_bytes(whole)
    samples, rejects = read_all(tmp_path / "bad.tar")
    assert [s.key for s in samples] == ["0"]
    assert "checksum" in rejects[-1].reason


def test_what_follows_the_end_mark_is_not_silent(tmp_path, write_tar):
    first = write_tar(tmp_path / "a.tar", [("a.jpg", b"x")]).read_bytes()
    second = write_tar(tmp_path / "b.tar", [("b.jpg", b"x" * 2_000_000)]).read_bytes()
    (tmp_path / "joined.tar").write_bytes(first + second)
    samples, rejects = read_all(tmp_path / "joined.tar")
    assert [s.key for s in samples] == ["a"]
    assert "bytes follow" in rejects[0].reason


@pytest.mark.parametrize("content", [b"", b"this is no archive" * 100, b"\0" * 20])
def test_a_shard_of_which_nothing_can_be_read(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(SourceError, match=r"a\.tar: nothing of this shard can be read"):
        read_all(tmp_path / "a.tar")


def test_a_compressed_tar_is_a_clear_error(tmp_path):
    for name in ("a.tar", "a.tar.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"x" * 1000))
        with pytest.raises(SourceError, match="compressed"):
            read_all(tmp_path / name)


def test_odd_member_names_are_only_keys(tmp_path, make_image):
    names = ["/etc/a.jpg", "../../b.jpg", "ünï/ç.jpg", "x" * 300 + "/d.jpg", "\udcff.jpg"]
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(make_image())
            tar.addfile(info, io.BytesIO(make_image()))
    samples = read_samples(tmp_path / "a.tar")
    assert [s.key for s in samples][:4] == ["/etc/a", "../../b", "ünï/ç", "x" * 300 + "/d"]
    assert all(s.key.encode() for s in samples)  # no lone surrogate: keys go into parquet and json
    assert all(s.image == make_image() for s in samples)


@pytest.mark.parametrize("archive", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_of_every_tar_format(tmp_path, make_image, archive):
    name = "d" * 90 + "/" + "f" * 90 + ".jpg"
    with tarfile.open(tmp_path / "a.tar", "w", format=archive) as tar:
        info = tarfile.TarInfo(name)
        info.size = len(make_image())
        tar.addfile(info, io.BytesIO(make_image()))
    samples, _ = read_all(tmp_path / "a.tar")
    assert [s.key for s in samples] == [name[:-4]]


def test_links_are_rejects(tmp_path, make_image):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"link{kind[0]}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        folder = tarfile.TarInfo("x.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    samples, rejects = read_all(tmp_path / "a.tar")
    assert not samples
    assert len(rejects) == 3


def test_braces_globs_and_folders_name_the_same_shards(tmp_path, write_shards, monkeypatch):
    write_shards(tmp_path, [1, 1, 1])
    monkeypatch.chdir(tmp_path)
    for spec, shards in ((".", ["0000", "0001", "0002"]), ("0000.tar", ["0000"]), ("./0000.tar", ["0000"])):
        assert list(open_source(spec).shards()) == shards
    expected = ["0000", "0001", "0002"]
    for spec in ("{0000..0002}.tar", "*.tar", "{0000,0001,0002}.tar", "000[012].tar", ""):
        assert list(open_source(str(tmp_path / spec)).shards()) == expected


def test_shards_with_the_same_stem_get_names_of_their_own(tmp_path, write_shards):
    write_shards(tmp_path / "a", [1])
    write_shards(tmp_path / "b", [1, 1])
    source = open_source(str(tmp_path / "*" / "*.tar"))
    assert list(source.shards()) == ["a-0000", "b-0000", "0001"]
    assert len({s.shard for s in items_of(source)}) == 3


def test_shards_from_a_url(tmp_path, write_shards):
    fsspec = pytest.importorskip("fsspec")
    write_shards(tmp_path, [2, 1])
    memory = fsspec.filesystem("memory")
    for path in tmp_path.glob("*.tar"):
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    for spec in ("memory://bucket/{0000..0001}.tar", "memory://bucket/*.tar", "memory://bucket"):
        samples, rejects = read_all(spec)
        assert [s.key for s in samples] == ["00000", "00001", "00002"]
        assert not rejects
    with pytest.raises(SourceError, match="no such file"):
        open_source("memory://bucket/none.tar")


@pytest.mark.parametrize("spec", ["missing.tar", "none-*.tar", "{0..3}.tar", "nowhere"])
def test_a_missing_source_is_named(tmp_path, spec):
    with pytest.raises(SourceError, match="no"):
        open_source(str(tmp_path / spec))


def test_an_unknown_format_lists_the_known_ones(tmp_path):
    (tmp_path / "a.docx").write_bytes(b"x")
    with pytest.raises(SourceError, match="parquet"):
        open_source(str(tmp_path / "a.docx"))
