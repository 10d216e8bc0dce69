"""An index holds what its source holds, finds what the predictor's own calls say, and outlives a kill."""

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openblip.checkpoints.checkpoint import save_native
from openblip.cli.main import main
from openblip.data.config import DecodingAhead
from openblip.data.sources import rows as rows_module
from openblip.errors import ConfigError, SourceError
from openblip.files import locate
from openblip.predictor import Blip2Predictor, BlipPredictor
from openblip.predictor.base import BasePredictor
from openblip.search import index as index_module
from openblip.search.index import ImageIndex, build_index
from shared_files import as_json, printed, write_tar
from tiny_blip import tiny_checkpoint
from tiny_blip2 import tiny_blip2

WORDS = ["a red dog", "two blue cars", "the small cat", "a big tree", "a green bird"]


@pytest.fixture(scope="module")
def blip() -> BlipPredictor:
    return BlipPredictor(tiny_checkpoint(("itc", "itm")), device="cpu")


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 20 + seed, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_folder(folder: Path, numbers: list[int]) -> Path:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        (folder / f"{number}.png").write_bytes(png(number))
        (folder / f"{number}.txt").write_text(WORDS[number % len(WORDS)])
    return folder


def build(source: Path | str, predictor: BasePredictor, out: Path) -> tuple[int, int, int, int]:
    done = build_index(str(source), predictor, out, checkpoint="tiny", reading=DecodingAhead(), batch_size=3)
    assert not done.rejects
    return done.added, done.changed, done.deleted, done.unchanged


def test_images_and_texts_are_found_as_the_predictor_scores_them(blip: BlipPredictor, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", list(range(7)))
    assert build(folder, blip, tmp_path / "index") == (7, 0, 0, 0)
    index, paths = ImageIndex(tmp_path / "index", blip), [str(folder / f"{n}.png") for n in range(7)]
    expected = blip.similarity(paths, ["a red dog"])[:, 0]
    hits = index.search("a red dog", top=7)
    assert [hit.key for hit in hits] == [str(n) for n in expected.argsort(descending=True).tolist()]
    assert [hit.similarity for hit in hits] == pytest.approx(expected.sort(descending=True).values.tolist(), abs=1e-5)

    match = blip.match_matrix(paths, ["a red dog"])[:, 0]
    reranked = index.search("a red dog", top=7, rerank=7)
    order = (expected + match).argsort(descending=True)  # as evaluation/retrieval.py ranks
    assert not torch.equal(order, match.argsort(descending=True))
    assert [hit.key for hit in reranked] == [str(n) for n in order.tolist()]
    assert [hit.match for hit in reranked] == pytest.approx(match[order].tolist(), abs=1e-5)
    partly = index.search("a red dog", top=5, rerank=2)
    assert {hit.key for hit in partly[:2]} == {hit.key for hit in hits[:2]}
    assert [(hit.key, hit.match) for hit in partly[2:]] == [(hit.key, None) for hit in hits[2:5]]

    alike = index.search(image=paths[4], top=3)
    assert (alike[0].key, alike[0].similarity) == ("4", pytest.approx(1, abs=1e-5))
    texts = index.search(image=paths[4], find="texts", top=7)
    scores = blip.similarity(paths[4], [WORDS[n % 5] for n in range(7)])[0]
    assert [hit.similarity for hit in texts] == pytest.approx(scores.sort(descending=True).values.tolist(), abs=1e-5)
    best = index.search(image=paths[4], find="texts", top=1, rerank=7)[0]
    sums = blip.similarity(paths[4], WORDS)[0] + blip.match_matrix(paths[4], WORDS)[0]
    assert best.text == WORDS[sums.argmax()]
    assert best.similarity + (best.match or 0) == pytest.approx(sums.max().item(), abs=1e-5)
    both = index.search("a red dog", paths[4], top=7)
    assert {hit.key for hit in both} == {hit.key for hit in hits}
    assert [hit.key for hit in both] != [hit.key for hit in hits]


def test_an_image_of_blip2_is_found_by_its_best_query(tmp_path: Path) -> None:
    blip2 = Blip2Predictor(tiny_blip2(("itc", "itm", "itg")), device="cpu")
    folder = write_folder(tmp_path / "images", list(range(6)))
    build(folder, blip2, tmp_path / "index")
    expected = blip2.similarity([str(folder / f"{n}.png") for n in range(6)], ["a big tree"])[:, 0]
    index = ImageIndex(tmp_path / "index", blip2)
    assert (index.num_images, len(index)) == (6, 6 * blip2.embed_images([png(0)]).shape[1])
    hits = index.search("a big tree", top=4, thumbnails=True)
    assert [hit.key for hit in hits] == [str(n) for n in expected.argsort(descending=True)[:4].tolist()]
    assert [hit.similarity for hit in hits] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-5)
    for hit in hits:
        assert hit.thumbnail is not None
        assert Image.open(io.BytesIO(hit.thumbnail)).size == (20 + int(hit.key), 24)


def test_only_what_has_changed_is_embedded(
    blip: BlipPredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = tmp_path / "shards"

    def write(name: str, numbers: list[int], text: str = "a red dog", later: int = 0) -> None:
        files = [(f"{n}.png", png(n + later)) for n in numbers] + [
            (f"{n}.json", as_json(caption=text)) for n in numbers
        ]
        write_tar(shards / name, sorted(files))

    write("0.tar", [0, 1, 2, 3])
    write("1.tar", [4, 5])
    assert build(shards, blip, tmp_path / "index") == (6, 0, 0, 0)
    embedded: list[int] = []
    embed = blip.embed_images
    monkeypatch.setattr(
        blip, "embed_images", lambda pixels, *rest: embedded.append(len(pixels)) or embed(pixels, *rest)
    )
    assert build(shards, blip, tmp_path / "index") == (0, 0, 0, 6)
    write("1.tar", [4, 5, 6])  # one more
    assert build(shards, blip, tmp_path / "index") == (1, 0, 0, 6)
    write("1.tar", [5, 6, 7], later=9)  # other images of these names, one more, one gone
    assert build(shards, blip, tmp_path / "index") == (1, 2, 1, 4)
    write("0.tar", [0, 1, 2, 3], text="a big tree")
    assert build(shards, blip, tmp_path / "index") == (0, 4, 0, 3)
    assert embedded == [1, 3, 3, 1]  # in batches of three
    (shards / "0.tar").unlink()
    assert build(shards, blip, tmp_path / "index") == (0, 0, 4, 3)
    index = ImageIndex(tmp_path / "index", blip)
    assert {hit.key for hit in index.search("a dog", top=50)} == {"5", "6", "7"}
    assert [hit.text for hit in index.search("a dog", find="texts", top=50)] == ["a red dog"] * 3
    assert len(index) == 3


def rows_of(folder: Any, table: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = (
        index_module.connect(folder).open_table(table).search().limit(999).to_arrow().to_pylist()
    )
    return sorted(rows, key=lambda row: (row["id"], row["caption"], row["vector"]))


@pytest.mark.parametrize("kind", ["blip", "blip2"])
def test_images_that_moved_to_another_shard_keep_their_vectors(
    kind: str, blip: BlipPredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = blip if kind == "blip" else Blip2Predictor(tiny_blip2(("itc", "itm", "itg")), device="cpu")
    monkeypatch.setattr(rows_module, "ROWS_PER_SHARD", 3)
    embedded: list[int] = []
    for name in ("embed_images", "embed_texts"):
        embed = getattr(model, name)
        monkeypatch.setattr(
            model, name, lambda items, *rest, embed=embed: embedded.append(len(items)) or embed(items, *rest)
        )
    folder = write_folder(tmp_path / "images", [1, 2, 3])  # one shard, named as the folder
    assert build(folder, model, tmp_path / "index") == (3, 0, 0, 0)
    embedded.clear()
    write_folder(folder, [4])  # two, with other names
    assert build(folder, model, tmp_path / "index") == (1, 0, 0, 3)
    assert embedded == [1, 1, 1]  # the first is of the width of vectors
    write_folder(folder, [0, 5, 6, 7])  # 0 goes first, so that every boundary moves
    embedded.clear()
    assert build(folder, model, tmp_path / "index") == (4, 0, 0, 4)
    assert sum(embedded) == 1 + 2 * 4
    embedded.clear()
    (folder / "1.png").rename(folder / "9.png")
    (folder / "1.txt").rename(folder / "9.txt")
    (folder / "2.png").unlink()
    assert build(folder, model, tmp_path / "index") == (0, 0, 1, 7)
    assert embedded == [1]
    build(folder, model, tmp_path / "whole")
    for table in ("images", "texts"):
        updated, whole = (rows_of(tmp_path / name, table) for name in ("index", "whole"))
        assert len(whole) == len(updated)
        for one, other in zip(updated, whole, strict=True):
            assert one.pop("vector") == pytest.approx(other.pop("vector"), abs=1e-6)
            assert one == other


def build_without_images(source: Path, predictor: BasePredictor, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it was killed after it has written the texts."""
    table = index_module._table

    def killed(*arguments: Any, **columns: Any) -> Any:
        if "thumbnail" in columns:
            raise KeyboardInterrupt
        return table(*arguments, **columns)

    with monkeypatch.context() as patch:
        patch.setattr(index_module, "_table", killed)
        with pytest.raises(KeyboardInterrupt):
            build(source, predictor, out)


def test_texts_that_a_kill_left_without_their_images_leave(
    blip: BlipPredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "images", [0, 1, 2])
    build_without_images(folder, blip, tmp_path / "index", monkeypatch)
    assert len(rows_of(tmp_path / "index", "texts")) == 3
    (folder / "0.png").unlink()  # gone, and one without its text
    (folder / "1.txt").unlink()
    assert build(folder, blip, tmp_path / "index") == (2, 0, 0, 0)
    assert [(row["key"], row["caption"]) for row in rows_of(tmp_path / "index", "texts")] == [("2", WORDS[2])]


def test_a_shard_that_was_begun_and_is_gone_leaves(
    blip: BlipPredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"web/{name}.tar", [("0.png", png(0 if name == "a" else 1)), ("0.txt", b"a dog")])
    build_without_images(tmp_path / "web", blip, tmp_path / "index", monkeypatch)
    assert [row["id"] for row in rows_of(tmp_path / "index", "texts")] == ["a/0", "b/0"]
    (tmp_path / "web/a.tar").unlink()
    assert build(tmp_path / "web", blip, tmp_path / "index") == (1, 0, 0, 0)
    assert [row["id"] for row in rows_of(tmp_path / "index", "texts")] == ["b/0"]


def test_nothing_leaves_that_could_not_be_looked_for(blip: BlipPredictor, tmp_path: Path) -> None:
    shards = [write_tar(tmp_path / f"web/{n}.tar", [(f"{i}.png", png(3 * n + i)) for i in range(3)]) for n in range(3)]
    assert build(tmp_path / "web", blip, tmp_path / "index") == (9, 0, 0, 0)
    shards[0].write_bytes(b"nothing" * 500)
    shards[1].write_bytes(shards[1].read_bytes()[:2500])
    done = build_index(str(tmp_path / "web"), blip, tmp_path / "index", checkpoint="tiny", reading=DecodingAhead())
    assert [(reject.shard, reject.key) for reject in done.rejects] == [("0", ""), ("1", "")]
    assert (done.added, done.changed, done.deleted) == (0, 0, 0)
    assert len(ImageIndex(tmp_path / "index", blip)) == 9


def test_vectors_that_are_no_numbers_are_rejects(
    blip: BlipPredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(
        tmp_path / "web/a.tar",
        [(f"{n}.{end}", data) for n in range(5) for end, data in (("png", png(n)), ("txt", b"a dog"))],
    )
    (tmp_path / "web/b.tar").write_bytes(path.read_bytes())

    def broken(name: str, number: int) -> Callable[..., torch.Tensor]:
        embed = getattr(blip, name)

        def embedded(items: Any, *rest: Any) -> torch.Tensor:
            vectors = embed(items, *rest).clone()
            if len(vectors) > 1:
                vectors[number] = float("nan")
            return vectors

        return embedded

    with monkeypatch.context() as patch:
        patch.setattr(blip, "embed_images", broken("embed_images", 1))
        patch.setattr(blip, "embed_texts", broken("embed_texts", 0))
        done = build_index(
            str(path.parent), blip, tmp_path / "index", checkpoint="tiny", reading=DecodingAhead(), batch_size=5
        )
    assert [(reject.shard, reject.key) for reject in done.rejects] == [("a", "1"), ("b", "1"), ("a", "0")]
    assert (done.added, len(ImageIndex(tmp_path / "index", blip))) == (8, 8)
    assert build(str(path.parent), blip, tmp_path / "index") == (2, 0, 0, 8)
    index = ImageIndex(tmp_path / "index", blip)
    assert len(index.search("a dog", find="texts", top=99)) == 9
    monkeypatch.setattr(blip, "embed_texts", lambda *_: torch.full((1, 12), float("nan")))
    with pytest.raises(ConfigError, match="not a number"):
        index.search("a dog")


def test_an_index_has_one_writer_and_readers_that_see_what_it_writes(
    blip: BlipPredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "SEEN_AFTER", timedelta(0))
    monkeypatch.setattr(index_module, "KEPT_VERSIONS", timedelta(milliseconds=1))
    folder, out = write_folder(tmp_path / "images", [0, 1]), tmp_path / "index"
    out.mkdir()
    (out / ".index.json.host.1.partial").write_text("{")  # of a process that was killed as it began
    with (out / "index.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is being written by another"):
            build(folder, blip, out)
    assert build(folder, blip, out) == (2, 0, 0, 0)
    index = ImageIndex(out, blip)
    assert len(index.search("a dog")) == 2
    (folder / "0.png").unlink()
    assert build(write_folder(folder, [2, 3]), blip, out) == (2, 0, 1, 1)
    hits = index.search("a dog", thumbnails=True)
    assert {hit.key for hit in hits} == {"1", "2", "3"}
    assert all(hit.thumbnail for hit in hits)
    shutil.rmtree(out / "lance")
    with pytest.raises(ConfigError, match="no whole tables; run `openblip index` again"):
        ImageIndex(out, blip)


def test_an_index_of_nothing_finds_nothing(blip: BlipPredictor, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/broken.png").write_bytes(b"no image")
    done = build_index(str(tmp_path / "images"), blip, tmp_path / "index", checkpoint="tiny", reading=DecodingAhead())
    assert [reject.key for reject in done.rejects] == ["broken"]
    for find in ("images", "texts"):
        assert (
            ImageIndex(tmp_path / "index", blip).search(
                image=png(1), find=find, thumbnails=True, rerank=find == "texts"
            )
            == []
        )


def test_changes_that_no_time_or_size_of_a_table_tells_are_seen(blip: BlipPredictor, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", [0, 1, 2, 3])
    (tmp_path / "table.jsonl").write_text("".join(f'{{"image": "images/{n}.png", "caption": "a"}}\n' for n in range(4)))
    for name, source in (("folder", folder), ("table", tmp_path / "table.jsonl")):
        assert build(source, blip, tmp_path / name) == (4, 0, 0, 0)
    for number, text in ((1, "a blue dog"), (2, "a big dog")):
        (folder / f"{number}.txt").write_text(text)
    earlier = (folder / "3.png").stat()
    (folder / "3.png").write_bytes(png(3)[:-1] + b"\0")  # as many bytes, and an old time
    os.utime(folder / "3.png", ns=(earlier.st_atime_ns, earlier.st_mtime_ns))
    assert build(folder, blip, tmp_path / "folder") == (0, 3, 0, 1)
    assert build(tmp_path / "table.jsonl", blip, tmp_path / "table") == (0, 1, 0, 3)


def test_a_shard_of_which_a_part_is_broken_is_read_again(blip: BlipPredictor, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("1.png", b"no image")])
    for unchanged in (0, 1):
        done = build_index(str(path), blip, tmp_path / "index", checkpoint="tiny", reading=DecodingAhead())
        assert ([reject.key for reject in done.rejects], done.unchanged) == (["1"], unchanged)


def test_conditions_choose_rows_and_nothing_else(blip: BlipPredictor, tmp_path: Path) -> None:
    build(write_folder(tmp_path / "images", list(range(7))), blip, tmp_path / "index")
    index = ImageIndex(tmp_path / "index", blip)
    assert {hit.key for hit in index.search("a dog", where="width > 23 AND height = 24")} == {"4", "5", "6"}
    assert {hit.key for hit in index.search("a dog", where="caption LIKE '%cars'")} == {"1", "6"}
    mistakes = ("colour = 3", "width >", "width", "caption < 3 + 'x'", "1=1; DROP TABLE images", "vector IS NULL")
    hostile = ("key IN (SELECT key FROM images)", "read_text('index.json') > ''", "lpad(caption, 1000000000, 'x') > ''")
    for condition in mistakes + hostile:
        with pytest.raises(ConfigError, match="columns: id, shard, key, caption, width, height"):
            index.search("a dog", where=condition)
    with pytest.raises(ConfigError, match="columns: id, shard, key, caption"):
        index.search("a dog", find="texts", where="width > 3")
    assert len(index) == 7


def test_sizes_are_those_of_the_file(blip: BlipPredictor, tmp_path: Path) -> None:
    """Also of a photograph that is turned, and that is scaled down as it is decoded."""
    (tmp_path / "images").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (2400, 1800)).save(tmp_path / "images/a.jpg", exif=turned)
    build(tmp_path / "images", blip, tmp_path / "index")
    assert [hit.key for hit in ImageIndex(tmp_path / "index", blip).search("a dog", where="width = 1800")] == ["a"]


def test_names_with_quotes_are_names(blip: BlipPredictor, tmp_path: Path) -> None:
    names = ["it's", 'a "b" %', "back\\slash", "'; --"]
    write_tar(tmp_path / "a'b.tar", [(f"{name}.png", png(n)) for n, name in enumerate(names)])
    assert build(tmp_path / "a'b.tar", blip, tmp_path / "index") == (4, 0, 0, 0)
    write_tar(tmp_path / "a'b.tar", [(f"{name}.png", png(n + 2)) for n, name in enumerate(names[:2])])
    assert build(tmp_path / "a'b.tar", blip, tmp_path / "index") == (0, 2, 2, 0)
    found = ImageIndex(tmp_path / "index", blip).search("a dog", top=9, rerank=9, thumbnails=True)
    assert {hit.key for hit in found} == set(names[:2])
    assert all(hit.thumbnail for hit in found)


def test_a_large_index_is_searched_approximately_and_exactly_on_request(
    blip: BlipPredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "APPROXIMATE_ABOVE", 300)

    def random_vectors(items: Any, *rest: Any) -> torch.Tensor:
        made = torch.randn(len(items), 12, generator=torch.Generator().manual_seed(len(items)))
        return torch.nn.functional.normalize(made, dim=1)

    with monkeypatch.context() as patch:
        patch.setattr(blip, "embed_images", random_vectors)
        files = [file for n in range(320) for file in ((f"{n}.png", png(n % 7)), (f"{n}.txt", b""))]
        assert build(write_tar(tmp_path / "a.tar", files), blip, tmp_path / "index") == (320, 0, 0, 0)
    index = ImageIndex(tmp_path / "index", blip)
    assert index.images.list_indices()
    monkeypatch.setattr(index_module, "FEWEST_PROBED", 1)
    monkeypatch.setattr(index_module, "REFINE_FACTOR", 1)
    for number in range(9):  # most of which are in partitions that are not probed at first
        assert [hit.key for hit in index.search("a tree", top=9, where=f"key = '{number}'")] == [str(number)]
    assert len(index.search("a tree", top=300)) == 300
    monkeypatch.setattr(index_module, "REFINE_FACTOR", 20)
    exact = index.search("a big tree", top=10, exact=True)
    found = index.search("a big tree", top=10)
    assert len({hit.key for hit in exact} & {hit.key for hit in found}) >= 9


def test_what_does_not_belong_together_is_refused(blip: BlipPredictor, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", [0, 1])
    build(folder, blip, tmp_path / "index")
    other = BlipPredictor(tiny_checkpoint(("itc", "itm", "lm")), device="cpu")
    with pytest.raises(ConfigError, match="another index: model was"):
        build(folder, other, tmp_path / "index")
    with pytest.raises(ConfigError, match="weights differ"):
        ImageIndex(tmp_path / "index", other)
    with pytest.raises(ConfigError, match="another index: source was"):
        build(write_folder(tmp_path / "others", [2]), blip, tmp_path / "index")
    with pytest.raises(ConfigError, match="not empty"):
        build(folder, blip, folder)
    with pytest.raises(ConfigError, match="no index"):
        ImageIndex(folder, blip)
    with pytest.raises(ConfigError, match="top must be at least 1"):
        ImageIndex(tmp_path / "index", blip).search("a dog", top=0)
    with pytest.raises(ConfigError, match="give a text to re-rank images"):
        ImageIndex(tmp_path / "index", blip).search(image=str(folder / "0.png"), rerank=2)
    (folder / "1.png").unlink()
    with pytest.raises(SourceError, match=r"can no longer be read.*openblip index"):
        ImageIndex(tmp_path / "index", blip).search("a dog", rerank=2)


STOPS = """
import signal
from openblip.cli.main import main
from openblip.search import index

note = index._IndexWriter._note

def note_two(writer, states):
    note(writer, states)
    if sum(map(bool, writer.shards.values())) >= 2:
        signal.pause()

index.ROWS_PER_COMMIT, index._IndexWriter._note = 24, note_two
main()
"""
"""The command, which stops with two shards or more."""


def num_finished(noted: Any) -> int:
    """Shards that are whole, by an index's shards.json."""
    if not noted.exists():
        return 0
    # of a store in one request, since the file is written anew meanwhile
    data = noted.read_bytes() if isinstance(noted, Path) else noted.fs.cat_file(noted.path)
    return sum(map(bool, json.loads(data).values()))


@pytest.mark.slow
def test_a_killed_index_is_continued(blip: BlipPredictor, bucket: Any, tmp_path: Path) -> None:
    """In a folder and in an object store; the rows are those of an index that was never killed."""
    save_native(tmp_path / "model", tiny_checkpoint(("itc", "itm")))
    for shard in range(6):
        files = [(f"{n}.png", png(n % 7)) for n in range(40)] + [
            (f"{n}.json", as_json(caption="a dog")) for n in range(40)
        ]
        write_tar(tmp_path / f"web/{shard}.tar", sorted(files))
    command = ["index", str(tmp_path / "web"), "--model", str(tmp_path / "model"), "--out"]
    whole = tmp_path / "whole"
    assert main([*command, str(whole)]) == 0
    for out in (str(tmp_path / "index"), "s3://web-data/index"):
        process = subprocess.Popen(
            [sys.executable, "-c", STOPS, *command, out], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None and num_finished(locate(out) / "shards.json") < 2:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert 2 <= num_finished(locate(out) / "shards.json") < 6
        assert main([*command, out]) == 0
        for table in ("images", "texts"):
            continued, uninterrupted = rows_of(locate(out), table), rows_of(whole, table)
            assert [row["id"] for row in continued] == [row["id"] for row in uninterrupted]
            assert len(continued) == 240
    hits = [ImageIndex(place, blip).search("a red dog", top=5, where="key < '3'") for place in (whole, out)]
    assert hits[0] == hits[1]


def test_only_places_that_can_be_written_are_begun(
    bucket: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "images", [0])
    for out, reason in (
        ("s3://no-such-bucket/index", "cannot be written into"),
        ("memory://index", "in a local folder or below one of s3://, gs://, az://"),
        (str(folder / "0.png"), "is no folder"),
    ):
        assert main(["index", str(folder), "--model", "openblip-mini-filter", "--out", out]) == 2
        assert reason in capsys.readouterr().err
    for place in ("s3://web-data/nothing", "s3://no-such-bucket/index"):
        assert main(["search", place, "a dog"]) == 2
        assert "is no index" in capsys.readouterr().err


def test_the_commands(
    blip: BlipPredictor, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "images", [0, 1, 2])
    (folder / "broken.png").write_bytes(b"no image")
    save_native(tmp_path / "model", tiny_checkpoint(("itc", "itm")))
    run: Callable[..., int] = lambda *words: main([str(word) for word in words])  # noqa: E731
    assert run("index", folder, "--model", tmp_path / "model", "--out", tmp_path / "index") == 1
    out, err = capsys.readouterr()
    assert "3 images added" in out
    assert "broken" in err
    page = tmp_path / "found.html"
    assert run("search", tmp_path / "index", "a <b>dog", "--top", 2, "--rerank", 3, "--as-json", "--html", page) == 0
    hits = printed(capsys)
    assert [hit["rank"] for hit in hits] == [1, 2]
    assert all(0 <= hit["match"] <= 1 for hit in hits)
    html = page.read_text()
    assert html.count("data:image/jpeg") == 2
    assert "a &lt;b&gt;dog" in html
    assert run("search", tmp_path / "index", "--image", folder / "1.png", "--top", 1) == 0
    assert " 1.000 " in capsys.readouterr().out
    assert run("search", tmp_path / "index") == 2
    assert "give a text" in capsys.readouterr().err
    assert run("search", folder, "a dog") == 2
    assert "openblip index" in capsys.readouterr().err
