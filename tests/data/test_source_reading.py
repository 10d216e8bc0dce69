"""What every source answers: numbers, resumption, pieces, skipping, reading without images; and parts of a source."""

import json
import pickle
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from annotation_files import read_all, read_samples, write, write_lines

from openblip.data.captions import CaptionRow, write_captions
from openblip.data.sample import MissingFile, Reject, Sample, is_transient
from openblip.data.sources import open_source
from openblip.data.sources.opening import JoinedSource
from openblip.errors import SourceError
from source_items import items_of

NUM_SAMPLES = 23


@pytest.fixture
def image_folder(tmp_path, make_image):
    """Images in files of their own; number 5 is missing."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(NUM_SAMPLES):
        if number != 5:
            (folder / f"{number}.jpg").write_bytes(make_image(number))
    return folder


@pytest.fixture
def open_format(tmp_path, image_folder, make_image, write_tar):
    """Opens a source of `NUM_SAMPLES` samples with something wrong here and there, by format."""

    def tar():
        members = []
        for n in range(NUM_SAMPLES):
            key = 3 if n == 20 else n  # a repeated key
            members.append((f"{key:03d}.jpg", make_image(n)))
            members.append((f"{key:03d}.json", b"{" if n == 7 else json.dumps({"caption": f"text {n}"}).encode()))
        members.insert(8, ("003.txt", b"more"))
        return open_source(str(write_tar(tmp_path / "t.tar", members)))

    def parquet():
        columns = {
            "image": [None if n == 7 else make_image(n) for n in range(NUM_SAMPLES)],
            "caption": [f"text {n}" for n in range(NUM_SAMPLES)],
            "key": [f"{3 if n == 20 else n:03d}" for n in range(NUM_SAMPLES)],
        }
        pq.write_table(pa.table(columns), tmp_path / "p.parquet", row_group_size=5)
        return open_source(str(tmp_path / "p.parquet"))

    def table():
        numbers = range(NUM_SAMPLES)
        rows = [{"image": f"{n}.jpg", "caption": f"text {n}", "key": str(3 if n == 20 else n)} for n in numbers]
        rows[7] = "{broken"
        return open_source(str(write_lines(tmp_path / "j.jsonl", rows)), images=str(image_folder))

    def csv():
        rows = [f'{n}.jpg,"text\n{n}"' for n in range(NUM_SAMPLES)]
        rows[7] = "too,many,values"
        return open_source(str(write_lines(tmp_path / "c.csv", ["image,caption", *rows])), images=str(image_folder))

    def repeats():
        """Rows of one image that follow each other are one sample."""
        rows = [f"{n // 2 if n < 12 else n % 7},{n // 2}.jpg,text {n}" for n in range(NUM_SAMPLES + 5)]
        rows[7] = "too,many,values,here"
        lines = ["id,image,caption", *rows]
        return open_source(str(write_lines(tmp_path / "r.csv", lines)), images=str(image_folder))

    def arrow():
        columns = {"image": [f"{n}.jpg" for n in range(NUM_SAMPLES)], "id": [n % 20 for n in range(NUM_SAMPLES)]}
        columns["image"][7] = None
        table = pa.table({**columns, "caption": [f"text {n}" for n in range(NUM_SAMPLES)]})
        with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table, 5)
        return open_source(str(tmp_path / "a.arrow"), images=str(image_folder))

    def annotations():
        images = [{"id": 3 if n == 20 else n, "file_name": f"{n}.jpg"} for n in range(NUM_SAMPLES)]
        captions = [{"image_id": n, "caption": f"text {n}"} for n in range(NUM_SAMPLES)]
        path = write(tmp_path / "coco.json", {"images": images, "annotations": captions})
        return open_source(str(path), images=str(image_folder))

    def folder():
        (image_folder / "7.json").write_text("{broken")
        (image_folder / "8.png").write_bytes(make_image(8))
        return open_source(str(image_folder))

    def capfilt():
        source = tar()
        scores = {"shard": "t", "source": "synthetic", "itm": 0.9, "itc": 0.3}
        texts = [(n, i) for n in range(0, NUM_SAMPLES, 3) for i in range(2)]
        rows = [CaptionRow(key=f"{n:03d}", index=i, caption=f"kept {n} {i}", **scores) for n, i in texts]
        write_captions(tmp_path / "run" / "captions" / "t.parquet", rows)
        (tmp_path / "run" / "captions" / "t.report.json").write_text("{}")
        write(tmp_path / "run" / "manifest.json", {"source": source.name, "threshold": 0.5})
        return open_source(f"capfilt:{tmp_path / 'run'}")

    def part():
        return open_source(f"{tar().name}[:70%]")

    def joined():
        return JoinedSource("joined", (tar(),))

    return locals().__getitem__


FORMATS = ["tar", "parquet", "arrow", "table", "csv", "repeats", "annotations", "folder", "capfilt", "part", "joined"]


@pytest.fixture(params=FORMATS)
def source(request, open_format):
    return open_format(request.param)()


def read(source, **arguments):
    (shard,) = source.shards()
    return list(source.read(shard, **arguments))


def present(read):
    """Without the rejects of kept texts whose samples are gone, which only a complete reading gives."""
    return [located for located in read if "any more" not in getattr(located.item, "reason", "")]


def test_numbers_do_not_decrease_and_rejects_are_in_place(source):
    everything = read(source)
    numbers = [number for number, _ in everything]
    assert numbers == sorted(numbers)
    assert max(numbers) < NUM_SAMPLES
    assert {type(item) for _, item in everything} >= {Sample, Reject}
    assert read(source) == everything


def test_reading_resumes_at_every_number(source):
    everything = read(source)
    for start in range(NUM_SAMPLES + 1):
        assert present(read(source, start=start)) == [r for r in present(everything) if r.number >= start]


@pytest.mark.parametrize("num_pieces", [2, 3, 7, 40])
def test_pieces_are_the_shard_once(source, num_pieces):
    everything = present(read(source))
    pieces = [read(source, pieces=(j, num_pieces)) for j in range(num_pieces)]
    together = sorted((located for piece in pieces for located in piece), key=lambda located: located.number)
    assert together == everything
    start = NUM_SAMPLES // 2
    for j, piece in enumerate(pieces):
        assert read(source, pieces=(j, num_pieces), start=start) == [p for p in piece if p.number >= start]


def test_skipped_samples_are_passed_over(source):
    samples = [item for _, item in read(source) if isinstance(item, Sample)]
    skipped = {sample.key for sample in samples[::2]}
    told = []

    def skip(sample):
        told.append(sample)
        return sample.key in skipped

    rest = [item for _, item in read(source, skip=skip) if isinstance(item, Sample)]
    assert rest == samples[1::2]
    assert all(not sample.image for sample in told)
    assert {sample.captions for sample in told} >= {sample.captions for sample in samples}


def test_without_images(source):
    samples = {s.key: s for _, s in read(source) if isinstance(s, Sample)}
    texts = {s.key: s for _, s in read(source, images=False) if isinstance(s, Sample)}
    assert texts.keys() >= samples.keys()
    for key, sample in samples.items():
        assert texts[key] == replace(sample, image=b"", second_image=None)


def test_a_source_is_read_alike_in_another_process(source):
    assert read(pickle.loads(pickle.dumps(source))) == read(source)


def test_counts_that_are_known(source, tmp_path):
    (shard,) = source.shards()
    count = source.num_samples(shard)
    if type(source).__name__ == "TarSource":
        assert count is None
        (tmp_path / "t_stats.json").write_text('{"successes": 23}')
        assert source.num_samples(shard) == 23
        (tmp_path / "t_stats.json").write_text("{broken")
        assert source.num_samples(shard) is None
    else:
        assert count in (None, NUM_SAMPLES, NUM_SAMPLES - 1, 16, NUM_SAMPLES + 5)


def test_a_missing_file_is_named(open_format, image_folder):
    _, rejects = [read_all(open_format("table")().name, image_folder)][0]
    assert [r.path for r in rejects if isinstance(r, MissingFile)] == [str(image_folder / "5.jpg")]


def test_an_error_of_the_machine_is_raised(open_format, monkeypatch):
    source = open_format("table")()

    def fail(path):
        raise TimeoutError("no answer")

    monkeypatch.setattr("openblip.data.sources.storage.read_bytes", fail)
    with pytest.raises(TimeoutError) as raised:
        read(source)
    assert is_transient(raised.value)
    assert len(read(source, images=False)) == NUM_SAMPLES


@pytest.mark.parametrize("format_name", ["tar", "parquet", "table", "csv"])
def test_a_shard_that_is_gone(open_format, format_name, tmp_path):
    source = open_format(format_name)()
    for path in tmp_path.iterdir():
        if path.is_file():
            path.unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        items_of(source)


def keys(spec):
    return [(s.shard, s.key) for s in read_all(spec)[0]]


def test_parts_that_meet_are_the_whole_once(tmp_path, write_shards):
    folder = write_shards(tmp_path, [70, 50, 10])
    whole, first, rest = keys(folder), keys(f"{folder}[:60%]"), keys(f"{folder}[60%:]")
    assert sorted(first + rest) == whole
    assert 60 <= len(first) <= 96  # about 60 percent of 130
    assert keys(f"{folder}[0%:100%]") == whole
    assert keys(f"{folder}[:30%]") + keys(f"{folder}[30%:60%]") != []
    assert sorted(keys(f"{folder}[:30%]") + keys(f"{folder}[30%:60%]")) == first


def test_no_image_is_on_both_sides_of_a_split(tmp_path, write_images, images):
    write_images(*(f"{number}.jpg" for number in range(30)))
    rows = write_lines(tmp_path / "t.jsonl", [{"image": f"{n % 30}.jpg", "caption": f"text {n}"} for n in range(90)])

    def names(part):
        return [sample.info["image"] for sample in read_samples(f"{rows}{part}", images)]

    first, rest = names("[:50%]"), names("[50%:]")
    assert len(first) + len(rest) == 90
    assert not {*first} & {*rest}
    assert all(first.count(name) == 3 for name in first)


def test_a_copy_elsewhere_is_split_in_the_same_way(tmp_path, write_shards):
    one, other = (write_shards(tmp_path / "one", [50, 50]), write_shards(tmp_path / "other" / "folder", [50, 50]))
    assert keys(f"{one}[:40%]") == keys(f"{other}[:40%]")
    assert keys(f"{other}/*.tar[:40%]") == keys(f"{other}[:40%]")
    assert keys(f"{other}/0001.tar[:40%]") == [key for key in keys(f"{other}[:40%]") if key[0] == "0001"]


def test_other_images_are_not_read(tmp_path, write_shards):
    folder = write_shards(tmp_path, [20])
    part = open_source(f"{folder}[:50%]")
    wanted = {sample.key for sample in items_of(part, images=False)}
    corrupt = {f"{n:05d}": b"" for n in range(20) if f"{n:05d}" not in wanted}
    assert corrupt
    assert all(sample.image for sample in read_samples(f"{write_shards(tmp_path, [20], corrupt=corrupt)}[:50%]"))


@pytest.mark.parametrize("part", ["[60%:60%]", "[90%:10%]", "[:101%]", "[:0%]"])
def test_an_empty_part_is_refused(part, tmp_path, write_shards):
    with pytest.raises(SourceError, match="percentage"):
        open_source(f"{write_shards(tmp_path, [3])}{part}")


def test_a_part_without_a_sample_is_found_at_once(tmp_path, write_shards):
    folder = write_shards(tmp_path, [1])
    parts = [f"[{n}%:{n + 1}%]" for n in range(100)]

    reasons = []
    for part in parts:
        try:
            open_source(f"{folder}{part}")
        except SourceError as error:
            reasons.append(str(error))
    assert len([reason for reason in reasons if "no sample falls into this part" in reason]) == 99
