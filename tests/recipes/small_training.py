"""Trainings of seconds: a tiny model that learns a few emoji scenes by heart."""

import dataclasses
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import openblip
from openblip.checkpoints.checkpoint import BlipCheckpoint, save_native
from openblip.data.config import Preprocessing
from openblip.data.sample import Sample, Source
from openblip.data.sources import open_source
from openblip.data.tokenizer import Tokenizer
from openblip.emoji_scenes.scene import Kind
from openblip.emoji_scenes.writer import write_emoji_scenes
from openblip.models.blip import Blip
from openblip.models.config import BlipConfig, TextConfig, VisionConfig
from openblip.predictor import BlipPredictor
from openblip.recipes.run import BlipRun

replace = dataclasses.replace
SIZE = 32


def write_scenes(folder: Path, kind: Kind, count: int) -> Source:
    write_emoji_scenes(folder, split="human", num_samples=count, kind=kind, seed=1, num_workers=1, progress=False)
    return open_source(str(folder))


def write_samples(folder: Path, samples: Iterable[Sample], suffix: str = "jpg") -> Source:
    """The same samples under new names in one shard, for what a test changed of them."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "0000.tar", "w") as tar:
        for number, sample in enumerate(samples):
            info = dict(sample.info) | {"captions": list(sample.captions)}
            files = {"json": json.dumps(info).encode()}
            if sample.second_image is None:
                files[suffix] = sample.image
            else:
                files |= {f"left.{suffix}": sample.image, f"right.{suffix}": sample.second_image}
            for name, content in files.items():
                member = tarfile.TarInfo(f"{number:04d}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return open_source(str(folder))


def usable(source: Source) -> list[Sample]:
    items = (item for shard in source.shards() for _, item in source.read(shard))
    return [item for item in items if isinstance(item, Sample)]


def words(value: Any) -> list[str]:
    """All texts in a sample's json, whatever they are."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [text for part in parts for text in words(part)]


def untrained(folder: Path, source: Source, vision_width: int = 64) -> Path:
    """A checkpoint with random weights and the heads of pre-training, that knows the words of a source."""
    texts = [text for s in usable(source) for text in words([*s.captions, dict(s.info)])]
    tokenizer = Tokenizer.train(texts, 600)
    shape = {"num_layers": 2, "num_heads": 4, "mlp_dim": 128}
    vision = VisionConfig(image_size=SIZE, patch_size=8, hidden_dim=vision_width, **shape)
    text = TextConfig(vocab_size=tokenizer.vocab_size, hidden_dim=64, max_positions=64, dropout=0.0, **shape)
    torch.manual_seed(0)
    model = Blip(BlipConfig(vision=vision, text=text, embed_dim=32))
    save_native(folder, BlipCheckpoint(model, tokenizer, Preprocessing(image_size=SIZE)))
    return folder


@dataclass(frozen=True)
class Learned:
    """What came of a training: the sum of the losses by step, and the model."""

    losses: list[float]
    model: BlipPredictor


def small(run: BlipRun, source: Source, init: Path, out: Path, *, steps: int, batch_size: int) -> BlipRun:
    """A recipe at the size of a test."""
    training = replace(
        run.training,
        steps=steps,
        batch_size=batch_size,
        learning_rate=2e-3,
        muon_learning_rate=1e-2,
        schedule="cosine",
        warmup_steps=5,
        weight_decay=0.0,
        precision="fp32",
        log_every=1,
        checkpoint_every=steps,
        num_threads=1,
    )
    data = replace(run.data, source=source.name, num_workers=0, augmentation=None)
    return replace(run, init=str(init), data=data, training=training, out=str(out))


def learn(run: BlipRun) -> Learned:
    assert run.train()
    lines = (Path(run.out) / "metrics.jsonl").read_text().splitlines()
    return Learned([json.loads(line)["loss"] for line in lines], openblip.load(f"{run.out}/model", device="cpu"))
