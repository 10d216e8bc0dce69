"""Every kind of sample: its pixels; in the loader exactly resumable, whoever reads; moved whole to a device."""

import json
from dataclasses import fields

import numpy as np
import pytest
import torch
from clip_files import GREY_STEP, clip
from memory_source import load, names, take
from PIL import Image

from marks import slow
from openblip.data.batch import ImageTextProcessor, image_pixels, pixel_reader
from openblip.data.config import Augmentation
from openblip.data.images import read_image
from openblip.data.sample import Sample
from openblip.data.tokenizer import Tokens
from openblip.errors import VideoError
from openblip.tasks.language_model import PromptedBatch, TextProcessor
from openblip.tasks.nlvr import StatementBatch, StatementProcessor
from openblip.tasks.question_answering import QuestionBatch, QuestionProcessor
from openblip.tasks.visdial import DialogBatch, DialogProcessor

PROCESSORS = {
    "questions": QuestionProcessor(),
    "statements": StatementProcessor(),
    "dialogs": DialogProcessor(num_negatives=3, max_text_length=30),
    "clips": ImageTextProcessor(read_pixels=pixel_reader(3)),
    "clip-questions": QuestionProcessor(read_pixels=pixel_reader(2)),
    "texts": TextProcessor(),
}


def write_kind(folder, write_tar, make_image, kind):
    """Two shards of six samples of a kind; the second of each cannot be used."""
    for shard in range(2):
        members = []
        for number in range(6):
            key, bad = f"{shard}{number}", number == 1
            members += images_of(kind, key, make_image, 20 * (6 * shard + number), bad)
            members.append((f"{key}.json", json.dumps(info_of(kind, number, bad)).encode()))
        write_tar(folder / f"{shard}.tar", members)
    return folder


def images_of(kind, key, make_image, level, bad):
    if kind == "statements":
        return [(f"{key}.left.jpg", make_image(level)), (f"{key}.right.jpg", make_image(level + 9))]
    if kind.startswith("clip"):
        return [(f"{key}.mp4", b"no clip" if bad else clip(4 + level % 3, size=(16, 16)))]
    return [(f"{key}.jpg", make_image(level))]


def info_of(kind, number, bad):
    if kind == "statements":
        return {"statement": f"text {number} left", "label": "yes" if bad else number % 2 == 0}
    if kind == "dialogs":
        options = [f"sample {i}" for i in range(8)]
        turns = [
            {"question": f"text {i}", "answer": "sample 1", "options": options, "answer_index": 99 if bad else 1}
            for i in range(3)
        ]
        return {"caption": "sample text", "dialog": turns}
    if kind == "texts":
        return {} if bad else {"text": f"text {number}\nsample text"}
    if kind == "clips":
        return {"captions": [f"sample {i}" for i in range(3)]}
    answers = [f"sample {i % 3}" for i in range(number + 1)]
    return {"question": f"text {number}", "answers": 7 if bad and kind == "questions" else answers}


def content(batch):
    """Every field of a batch of any kind, tensors as lists."""
    found = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tokens):
            value = (value.ids.tolist(), value.mask.tolist())
        found[field.name] = value.tolist() if isinstance(value, torch.Tensor) else value
    return found


@pytest.mark.parametrize("kind", ["questions", *slow(*(kind for kind in PROCESSORS if kind != "questions"))])
def test_any_task_is_exactly_resumable_with_any_number_of_workers(tmp_path, write_tar, make_image, kind):
    folder = write_kind(tmp_path, write_tar, make_image, kind)
    options = {"processor": PROCESSORS[kind], "augmentation": Augmentation(), "batch_size": 16}
    whole = take(load(folder, **options), 8)
    rejects = [reject for loaded in whole for reject in loaded.rejects]
    assert {reject.key for reject in rejects} == {"01", "11"}
    assert all(reject.reason for reject in rejects)
    assert {key for loaded in whole for key in loaded.batch.keys} == {
        f"{shard}{number}" for shard in range(2) for number in (0, 2, 3, 4, 5)
    }
    cursor = json.loads(json.dumps(whole[1].cursor))
    resumed = take(load(folder, cursor=cursor, num_workers=2, **options), 6)
    assert [content(loaded.batch) for loaded in resumed] == [content(loaded.batch) for loaded in whole[2:]]
    assert [loaded.rejects for loaded in resumed] == [loaded.rejects for loaded in whole[2:]]


@pytest.mark.parametrize("kind", PROCESSORS)
def test_what_a_processor_draws_depends_on_the_sample_alone(tmp_path, write_tar, make_image, kind):
    """Not on the process: sides, rounds, wrong answers and views are those of a single one."""
    folder = write_kind(tmp_path, write_tar, make_image, kind)
    options = {"processor": PROCESSORS[kind], "augmentation": Augmentation()}
    (one,) = take(load(folder, batch_size=32, **options), 1)
    ranks = [take(load(folder, batch_size=16, rank=r, world_size=2, **options), 1) for r in (0, 1)]
    for rank, batches in enumerate(ranks):
        assert names(batches) == names([one])[rank::2]
        assert torch.equal(batches[0].batch.pixels, one.batch.pixels[rank::2])


@pytest.mark.parametrize(
    ("kind", "batch_type", "shape"),
    [
        ("questions", QuestionBatch, (4, 3, 8, 8)),
        ("statements", StatementBatch, (4, 2, 3, 8, 8)),
        ("dialogs", DialogBatch, (4, 3, 8, 8)),
        ("clip-questions", QuestionBatch, (4, 2, 3, 8, 8)),
        ("texts", PromptedBatch, (4, 0)),
    ],
)
def test_batches_of_every_kind_move_whole(tmp_path, write_tar, make_image, kind, batch_type, shape):
    folder = write_kind(tmp_path, write_tar, make_image, kind)
    batch = take(load(folder, processor=PROCESSORS[kind]), 1)[0].batch
    assert type(batch) is batch_type
    assert len(batch) == 4
    assert batch.pixels.shape == shape
    moved = batch.to("meta")
    assert type(moved) is batch_type
    for field in fields(moved):
        value = getattr(moved, field.name)
        for tensor in (value.ids, value.mask) if isinstance(value, Tokens) else (value,):
            assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta", field.name
    assert moved.keys == batch.keys


def sample(image):
    return Sample("k", "shard", image, (), "source#1")


def plain(image, rng):
    return np.asarray(image.resize((8, 8), Image.Resampling.NEAREST)).transpose(2, 0, 1)


def rng():
    return np.random.default_rng(5)


def test_an_image_is_one_view(make_image):
    image = make_image(3)
    pixels = image_pixels(sample(image), plain, rng())
    assert pixels.shape == (3, 8, 8)
    assert np.array_equal(pixels, plain(read_image(image), rng()))
    assert np.array_equal(pixel_reader(None)(sample(image), plain, rng()), pixels)


def test_a_videos_frames_are_spread_evenly():
    frames = pixel_reader(4)(sample(clip(20)), plain, rng())
    assert frames.shape == (4, 3, 8, 8)
    numbers = [round(frame[:, 4, 4].mean() / GREY_STEP) for frame in frames]
    assert numbers == sorted(numbers)
    assert min(np.diff(numbers)) >= 4


def test_all_frames_of_a_video_have_the_same_view():
    """A crop that jumps about would be a movement that is not there."""
    seen = []

    def noting(image, generator):
        seen.append(generator.random(3).tolist())
        return plain(image, generator)

    pixel_reader(3)(sample(clip(6)), noting, rng())
    assert seen == [rng().random(3).tolist()] * 3


def test_a_video_that_cannot_be_decoded_is_named():
    with pytest.raises(VideoError, match="shard/k"):
        pixel_reader(2)(sample(b"no video"), plain, rng())
