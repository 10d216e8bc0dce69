"""A run of BLIP-2 with a feature cache is the run without one, to the last bit."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from small_training import write_scenes

from marks import slow
from openblip.checkpoints.checkpoint import BlipCheckpoint, save_native
from openblip.data.config import Augmentation, DataConfig, Preprocessing
from openblip.data.feature_cache import FeatureCache
from openblip.errors import ConfigError
from openblip.models.blip import Blip
from openblip.models.config import QFormerConfig
from openblip.recipes.initialize import describe_encoder
from openblip.recipes.run import Blip2Run, ImageEncoderSource
from openblip.tasks.config import Blip2Stage1Config
from openblip.training.config import TrainingConfig
from tiny_blip import SIZE, TINY, randomise, tiny_tokenizer
from tiny_blip2 import tiny_blip2

QFORMER = QFormerConfig(
    num_queries=2, hidden_dim=16, num_layers=2, num_heads=2, mlp_dim=16, max_positions=40, dropout=0.1
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Scenes, and a BLIP whose ViT is the image encoder."""
    root = tmp_path_factory.mktemp("inputs")
    write_scenes(root / "scenes", "captions", 12)
    words = tiny_tokenizer()
    model = Blip(replace(TINY, text=replace(TINY.text, vocab_size=words.vocab_size)))
    randomise(model, seed=0)
    save_native(root / "blip", BlipCheckpoint(model, words, Preprocessing(image_size=SIZE)))
    return root


def make_run(inputs, out, dtype="float32", **changes):
    run = Blip2Run(
        recipe="tiny",
        init=None,
        vision=ImageEncoderSource(source=str(inputs / "blip"), dtype=dtype),
        language=None,
        qformer=QFORMER,
        embed_dim=8,
        vocab_size=200,
        tokenizer=None,
        data=DataConfig(source=str(inputs / "scenes"), num_workers=0),
        task=Blip2Stage1Config(),
        training=TrainingConfig(steps=4, batch_size=5, log_every=1, checkpoint_every=2, precision="fp32"),
        out=str(out),
    )
    return replace(run, **changes)


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("itc", "itm", "itg")} for line in lines if "itc" in line]


@pytest.mark.parametrize("dtype", ["float32", *slow("bfloat16")])
def test_training_is_the_same_to_the_last_bit(inputs, tmp_path, dtype):
    cache = tmp_path / "cache"
    assert make_run(inputs, tmp_path / "plain", dtype).train()
    assert make_run(inputs, tmp_path / "cached", dtype, feature_cache=str(cache)).train()
    assert make_run(inputs, tmp_path / "again", dtype, feature_cache=str(cache)).train()
    plain = load_file(tmp_path / "plain" / "model" / "model.safetensors")
    for name in ("cached", "again"):
        weights = load_file(tmp_path / name / "model" / "model.safetensors")
        assert plain.keys() == weights.keys()
        assert [n for n in plain if not torch.equal(plain[n], weights[n])] == []
        assert losses(tmp_path / name) == losses(tmp_path / "plain")
    assert len(losses(tmp_path / "plain")) == 4
    assert FeatureCache(cache).parts[0].dtype == dtype


def test_the_cache_is_really_read(inputs, tmp_path):
    """Other features lead elsewhere."""
    cache = tmp_path / "cache"
    assert make_run(inputs, tmp_path / "first", feature_cache=str(cache)).train()
    for path in (cache / "parts").glob("*.bin"):
        path.write_bytes(bytes(path.stat().st_size))
    assert make_run(inputs, tmp_path / "second", feature_cache=str(cache)).train()
    assert losses(tmp_path / "first") != losses(tmp_path / "second")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "augmented"}, "one view of each image"),
        ({"data": "clips"}, "not for videos"),
        ({"train_vision": True}, "its features change"),
    ],
)
def test_what_changes_at_every_step_is_refused(inputs, tmp_path, changes, message):
    run = make_run(inputs, tmp_path / "run", feature_cache=str(tmp_path / "cache"))
    data = {"augmented": replace(run.data, augmentation=Augmentation()), "clips": replace(run.data, num_frames=2)}
    changes = {name: data.get(value, value) for name, value in changes.items()}
    with pytest.raises(ConfigError, match=message):
        replace(run, **changes).train()


def test_another_encoder_is_refused(inputs, tmp_path):
    cache = str(tmp_path / "cache")
    run = make_run(inputs, tmp_path / "run", feature_cache=cache)
    run.train()
    other = replace(run, out=str(tmp_path / "other"), vision=replace(run.vision, layer=-1))
    with pytest.raises(ConfigError, match=r"encoder\.num_layers was 1, is now 2"):
        other.train()


def test_a_description_tells_encoders_apart():
    """By their weights, precision, layer and pixels, and not by where they lie."""
    checkpoint = tiny_blip2(tower=True)
    described = describe_encoder(checkpoint)
    json.dumps(described)
    assert describe_encoder(tiny_blip2(tower=True)) == described
    moved = checkpoint._replace(preprocessing=Preprocessing(image_size=SIZE, mean=(0.5, 0.5, 0.5)))
    assert {n for n, v in describe_encoder(moved).items() if v != described[n]} == {"pixels.mean"}
    checkpoint.model.vision.layer = -1
    assert {n for n, v in describe_encoder(checkpoint).items() if v != described[n]} == {"encoder.layer"}
    checkpoint.model.vision.layer = -2
    with torch.no_grad():
        next(checkpoint.model.vision.parameters()).view(-1)[0] += 1e-3
    assert {n for n, v in describe_encoder(checkpoint).items() if v != described[n]} == {"weights"}
    checkpoint.model.vision.to(torch.bfloat16)
    changed = {n for n, v in describe_encoder(checkpoint).items() if v != described[n]}
    assert changed == {"weights", "dtype"}
