"""Instruction data in every form that a source may hold it."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from annotation_files import describe, read_all, write

from openblip.data.inspect import inspect_source
from openblip.data.sources import open_source
from openblip.data.texts import Turn, turns_of

TURNS = [Turn("What is it?", "A dog."), Turn("What color?", "Brown.")]
MESSAGES = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A dog."},
    {"from": "human", "value": "What color?"},
    {"from": "gpt", "value": "Brown."},
]
LISTED = [turn._asdict() for turn in TURNS]


def llava(*rows):
    return [{"id": number, "image": image, "conversations": said} for number, image, said in rows]


def test_llavas_list_has_several_conversations_about_one_image(tmp_path, write_images, images):
    write_images("train/1.jpg", "train/2.jpg")
    rows = llava(("1", "train/1.jpg", MESSAGES), ("1", "train/1.jpg", MESSAGES[:2]), ("2", "train/2.jpg", MESSAGES))
    path = write(tmp_path / "llava_instruct_150k.json", rows)
    samples, rejects = read_all(path, images)
    assert not rejects
    assert [turns_of(sample.info) for sample in samples] == [TURNS, TURNS[:1], TURNS]
    assert samples[0].image_id == samples[1].image_id != samples[2].image_id
    assert len({sample.key for sample in samples}) == 3
    assert describe(path, images)["format"] == "list of instructions about images"


def test_a_text_without_image_is_a_reject(tmp_path, write_images, images):
    write_images("1.jpg")
    text_alone = {"id": "x", "conversations": MESSAGES}
    path = write(tmp_path / "mix.json", [*llava(("1", "1.jpg", MESSAGES)), text_alone])
    samples, rejects = read_all(path, images)
    assert len(samples) == 1
    assert "no image" in rejects[0].reason


@pytest.mark.parametrize(
    ("fields", "turns"),
    [
        ({"conversations": MESSAGES}, TURNS),
        ({"turns": LISTED}, TURNS),
        ({"instruction": "What is it?", "answer": "A dog."}, TURNS[:1]),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_tables(tmp_path, write_images, images, fields, turns, suffix):
    write_images("1.jpg")
    path = tmp_path / f"table.{suffix}"
    row = {"image": "1.jpg", **fields}
    if suffix == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    elif suffix == "csv":
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(row)
            writer.writerow([v if isinstance(v, str) else json.dumps(v) for v in row.values()])
    else:
        content = (images / "1.jpg").read_bytes()
        pq.write_table(pa.Table.from_pylist([row | {"image": content}]), path)
    samples, rejects = read_all(path, None if suffix == "parquet" else images)
    assert not rejects
    assert turns_of(samples[0].info) == turns


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conversations": "[{"}, "conversations is broken json"),
        ({"conversations": [{"from": "human"}]}, "each with a value"),
        ({"turns": [{"answer": "yes"}]}, "each with a question"),
        ({"instruction": 7, "answer": "yes"}, "instruction must be a text"),
    ],
)
def test_what_is_broken_is_a_reject(tmp_path, write_images, images, fields, message):
    write_images("1.jpg")
    path = tmp_path / "table.jsonl"
    path.write_text(json.dumps({"image": "1.jpg", **fields}) + "\n")
    samples, rejects = read_all(path, images)
    assert not samples
    assert message in rejects[0].reason


def test_inspection_counts_instructions(tmp_path, write_images, images):
    write_images("1.jpg")
    path = write(tmp_path / "llava.json", llava(("1", "1.jpg", MESSAGES), ("1", "1.jpg", MESSAGES[:2])))
    facts = inspect_source(open_source(str(path), images=str(images))).facts()
    assert (facts["samples with instructions"], facts["instructions"]) == (2, 3)
