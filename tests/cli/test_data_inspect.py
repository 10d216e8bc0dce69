"""`openblip data inspect`: what is counted, shown and refused."""

import io
import itertools
import json

import pytest
from PIL import Image

from shared_files import as_json, write_tar


def png(size):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shard(tmp_path):
    members = {
        "a.png": png((20, 10)),
        "a.json": as_json(captions=["a dog", "one two three"]),
        "b.png": b"broken",
        "b.txt": b"a cat",
        "c.txt": b"no picture",
    }
    return write_tar(tmp_path / "shard.tar", members.items())


def test_json(run, shard):
    [facts] = run("data", "inspect", shard, "--as-json").lines
    assert (facts["shards"], facts["samples"], facts["samples read"], facts["rejects"]) == (1, 2, 2, 2)
    assert facts["captions per image"] == {"2": 1}
    assert facts["words per caption"] == {"least": 2, "median": 2.5, "most": 3}
    assert facts["image sizes"] == ["20x10"]
    assert facts["reasons"] == {
        "not an image in a known format": 1,
        "no image or video with this key, only a text; it must be named as its image is": 1,
    }


def test_tables_name_examples_and_rejects(run, shard):
    shown = run("data", "inspect", shard).out
    for text in ("shard/a  a dog | one two three", "20x10", "Rejects (2)", "shard/b", "shard/c"):
        assert text in shown


@pytest.mark.parametrize("arguments", [["nowhere.tar"], ["{shard}", "--samples", "-1"], ["{shard}@1,{shard}"]])
def test_bad_input_is_one_line_and_exit_code_2(refusal, shard, arguments):
    refusal("data", "inspect", *(word.format(shard=shard) for word in arguments))


def save_image(path, size=(20, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


@pytest.fixture
def inspect(run):
    """What is counted in a source."""

    def inspect(*arguments):
        [facts] = run("data", "inspect", *arguments, "--as-json").lines
        return facts

    return inspect


@pytest.fixture
def vqa(tmp_path):
    """Three questions of VQAv2, one without an answer, and the picture of two."""
    asked = [("Dog?", 1), ("Cat?", 1), ("Bird?", 2)]
    questions = [
        {"question_id": number, "question": text, "image_id": image} for number, (text, image) in enumerate(asked)
    ]
    answers = [
        {"question_id": n, "answers": [{"answer": a, "answer_confidence": "yes"} for a in said]}
        for n, said in enumerate([["yes", "yes", "no"], ["no", "no", "no"]])
    ]
    info = {"description": "This is v2.0 of the VQA dataset."}
    (tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(
        json.dumps({"info": info, "data_subtype": "val2014", "questions": questions})
    )
    (tmp_path / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"info": info, "annotations": answers}))
    save_image(tmp_path / "coco" / "val2014" / "COCO_val2014_000000000001.jpg")
    return tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"


def test_questions(inspect, vqa, tmp_path):
    facts = inspect(vqa, "--images", tmp_path / "coco", "--samples", 1)
    assert facts["format"] == "VQAv2 questions with annotations"
    assert facts["annotations"] == str(tmp_path / "v2_mscoco_val2014_annotations.json")
    assert (facts["questions"], facts["questions without an answer"]) == (3, "1 (33.3%)")
    assert (facts["answers"], facts["different answers"]) == (6, 2)
    assert facts["most frequent answers"] == {"no": 4, "yes": 2}
    assert (facts["samples"], facts["task fields counted in"], facts["samples read"]) == (3, 3, 1)
    assert "missing images" not in facts


def test_missing_images_are_counted_and_named(run, inspect, vqa, tmp_path):
    facts = inspect(vqa, "--images", tmp_path / "coco")
    assert facts["missing images"] == "1 of 3"
    assert [path.rpartition("/")[2] for path in facts["first missing"]] == ["COCO_val2014_000000000002.jpg"]
    assert facts["reasons"] == {"no such file as its image": 1}
    printed = run("data", "inspect", vqa, "--images", tmp_path / "coco").out
    shown = "".join(character for character in printed if character not in " \n│")
    assert "COCO_val2014_000000000002.jpg" in shown
    assert "Dog?yes/no" in shown


def test_a_missing_companion_is_one_line(refusal, vqa, tmp_path):
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    error = refusal("data", "inspect", vqa, "--images", tmp_path / "coco")
    assert "v2_mscoco_val2014_annotations.json" in error


def test_statements_and_domains_and_classes(run, inspect, tmp_path):
    for name in ("a", "b"):
        save_image(tmp_path / f"{name}.png", (8, 8))
    both = {"image": "a.png", "second_image": "b.png", "statement": "A dog."}
    rows = [both | {"label": True}, both | {"label": False}, both, both | {"label": "maybe"}]
    rows += [{"image": "a.png", "label": "cat"}, {"image": "b.png", "caption": "x", "domain": "in-domain"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    facts = inspect(tmp_path / "t.jsonl")
    assert facts["statements"] == {"true": 1, "false": 1, "unlabelled": 1}
    assert (facts["classes"], facts["most frequent classes"]) == (1, {"cat": 1})
    assert facts["domains"] == {"in-domain": 1}
    assert facts["pairs of images"] == 3
    assert facts["reasons"] == {"t.jsonl line 4: the label of a statement must be true or false, not 'maybe'": 1}
    assert "A dog. (no label)" in run("data", "inspect", tmp_path / "t.jsonl").out


def test_dialogs(inspect, tmp_path):
    save_image(tmp_path / "VisualDialog_val2018_000000000001.jpg")
    rounds = [{"question": 0, "answer": 0, "answer_options": [0, 1], "gt_index": 0}, {"question": 0}]
    dialogs = [{"image_id": 1, "caption": "a man", "dialog": rounds}]
    data = {"questions": ["is it"], "answers": ["yes", "no"], "dialogs": dialogs}
    path = tmp_path / "visdial_1.0_val.json"
    path.write_text(json.dumps({"data": data, "split": "val"}))
    facts = inspect(path, "--images", tmp_path)
    assert (facts["dialogs"], facts["rounds"], facts["rounds without an answer"]) == (1, 2, "1 (50.0%)")
    assert facts["candidates per round"] == {"2": 1}
    assert facts["rounds with relevance"] == 0
    assert "visdial_1.0_val_dense_annotations.json" in facts["missing"]
    dense = [{"image_id": 1, "round_id": 1, "gt_relevance": [1, 0]}]
    (tmp_path / "visdial_1.0_val_dense_annotations.json").write_text(json.dumps(dense))
    facts = inspect(path, "--images", tmp_path)
    assert facts["rounds with relevance"] == 1
    assert "missing" not in facts


def test_fields_of_other_types_are_shown_and_not_counted(run, inspect, tmp_path):
    """A tar's json goes into `info` as it is."""
    fields = {"question": "Who?", "answers": "me", "dialog": [5, {"question": 1}], "label": 7, "domain": 3}
    shard = write_tar(tmp_path / "odd.tar", [("a.png", png((4, 4))), ("a.json", as_json(**fields))])
    facts = inspect(shard)
    assert (facts["questions"], facts["questions without an answer"]) == (1, "1 (100.0%)")
    assert not {"domains", "classes"} & facts.keys()
    assert "Who? me | class 7 | 1 (no answer)" in run("data", "inspect", shard).out


def test_the_samples_read_are_spread_over_the_source(run, inspect, tmp_path):
    save_image(tmp_path / "a.png", (4, 4))
    rows = [{"image": "a.png", "caption": f"w{n}"} for n in range(100)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = run("data", "inspect", tmp_path / "t.jsonl", "--samples", "4", "--examples", "4").out.splitlines()
    shown = [int(line.rpartition("w")[2]) for line in lines if "t/0" in line]
    assert len(shown) == 4
    gaps = [later - earlier for earlier, later in itertools.pairwise(shown)]
    assert shown[0] == 0
    assert min(gaps) >= 15
    assert inspect(tmp_path / "t.jsonl", "--samples", "0")["samples read"] == 100


def test_clips(inspect, tmp_path):
    """The first frame is what is measured; a clip that cannot be decoded is a reject."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 32, 16
        for _ in range(3):
            output.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (32, 16)))))
        output.mux(stream.encode())
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:100])
    rows = [{"video": f"{name}.mp4", "question": "Who?", "answers": ["a man"]} for name in "ab"]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    facts = inspect(tmp_path / "t.jsonl")
    assert (facts["questions"], facts["clips"], facts["rejects"]) == (2, 1, 1)
    assert facts["image sizes"] == ["32x16"]


@pytest.mark.parametrize(
    "words",
    [
        "caption SOURCE --model openblip-mini",
        "match SOURCE --model openblip-mini",
        "answer SOURCE what? --model openblip-mini",
        "evaluate caption --model openblip-mini --data SOURCE",
        "capfilt SOURCE --captioner openblip-mini --filter openblip-mini --out OUT",
        "data inspect SOURCE",
        "train blip-mini --out OUT --data.source SOURCE",
    ],
)
def test_columns_are_named_in_every_command(run, tmp_path, words):
    source = tmp_path / "t.csv"
    source.write_text("photo,title\na.jpg,x\n")
    prefix = "data." if words.startswith("train") else ""
    named = words.replace("SOURCE", str(source)).replace("OUT", str(tmp_path / "out")).split()
    result = run(*named, f"--{prefix}image-column", "photo", f"--{prefix}caption-column", "nope", code=2)
    assert "no caption column (nope); found: photo, title" in result.err
    result = run(*named, f"--{prefix}image-column", "nope", code=2)
    assert "no image column (nope); found: photo, title" in result.err
