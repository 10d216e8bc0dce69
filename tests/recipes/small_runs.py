"""Trainings of seconds: tiny models that learn a few emoji scenes, or boxes of four colors on two sides, by heart."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from openblip.checkpoints.checkpoint import BlipCheckpoint, save_native
from openblip.data.config import Preprocessing
from openblip.data.sample import Sample, Source
from openblip.data.sources import open_source
from openblip.data.tokenizer import Tokenizer
from openblip.emoji_scenes.scene import Kind
from openblip.emoji_scenes.writer import write_emoji_scenes
from openblip.models.blip import Blip
from openblip.models.config import BlipConfig
from openblip.nn.config import QFormerConfig, TextConfig, VisionConfig
from openblip.recipes import mini
from openblip.recipes.run import Blip2Run, ImageEncoderSource, LanguageModelSource, LanguageRun, LanguageShape
from openblip.tasks.config import Blip2Stage1Config
from shared_files import as_json, read_lines, write_tar

SIZE = 32
COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (20, 160, 20), "grey": (120, 120, 120)}
SIDES = {"left": 0, "right": SIZE // 2}
COLOR_QUESTION, SIDE_QUESTION = "what color is it?", "on which side?"


def write_scenes(folder: Path, kind: Kind, count: int) -> Source:
    write_emoji_scenes(folder, split="human", num_samples=count, kind=kind, seed=1, num_workers=1, progress=False)
    return open_source(str(folder))


def write_samples(folder: Path, samples: Iterable[Sample], suffix: str = "jpg") -> Source:
    """The same samples under new names in one shard, for what a test changed of them."""
    folder.mkdir(parents=True)
    members = []
    for number, sample in enumerate(samples):
        files = {"json": as_json(**sample.info, captions=list(sample.captions)), suffix: sample.image}
        if sample.second_image is not None:
            files |= {f"left.{suffix}": files.pop(suffix), f"right.{suffix}": sample.second_image}
        members += [(f"{number:04d}.{name}", content) for name, content in files.items()]
    write_tar(folder / "0000.tar", members)
    return open_source(str(folder))


def usable(source: Source) -> list[Sample]:
    items = (item for shard in source.shards() for _, item in source.read(shard))
    return [item for item in items if isinstance(item, Sample)]


def write_boxes(root: Path) -> None:
    """pairs.jsonl and texts.jsonl with their images, and the checkpoint encoder/ with a random ViT.

    Every image has a caption, a question with answers, and a conversation. The texts say twice what there is: who has
    learned them goes on from what stands before, be it a caption or what takes its place.
    """
    pairs, texts = [], []
    for color, rgb in COLORS.items():
        for side, left in SIDES.items():
            image = Image.new("RGB", (SIZE, SIZE), (255, 255, 255))
            image.paste(rgb, (left, 4, left + SIZE // 2, SIZE - 4))
            image.save(root / f"{color}-{side}.png")
            row = {"image": f"{color}-{side}.png", "caption": f"a {color} box on the {side}"}
            turns = [{"question": COLOR_QUESTION, "answer": color}, {"question": SIDE_QUESTION, "answer": side}]
            pairs.append({**row, "question": COLOR_QUESTION, "answers": [color] * 3, "turns": turns})
            caption = row["caption"]
            asked = [f"Question: {turn['question']} Answer: {turn['answer']}" for turn in turns]
            said = (caption, f"a photo of {caption}", *asked, f"{asked[0]}. {asked[1]}")
            texts += [{"image": row["image"], "text": f"{caption}\n{line}"} for line in said]
    for name, rows in (("pairs", pairs), ("texts", texts)):
        (root / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    untrained(root / "encoder", open_source(str(root / "pairs.jsonl")))


def texts_in(value: Any) -> list[str]:
    """All texts in a sample's json, whatever they are."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [text for part in parts for text in texts_in(part)]


def untrained(folder: Path, source: Source, vision_width: int = 64) -> Path:
    """A checkpoint with random weights and the heads of pre-training, that knows the words of a source."""
    tokenizer = Tokenizer.train([text for s in usable(source) for text in texts_in([*s.captions, dict(s.info)])], 600)
    shape = {"num_layers": 2, "num_heads": 4, "mlp_dim": 128}
    vision = VisionConfig(image_size=SIZE, patch_size=8, hidden_dim=vision_width, **shape)
    text = TextConfig(vocab_size=tokenizer.vocab_size, hidden_dim=64, max_positions=64, dropout=0.0, **shape)
    torch.manual_seed(0)
    model = Blip(BlipConfig(vision=vision, text=text, embed_dim=32))
    save_native(folder, BlipCheckpoint(model, tokenizer, Preprocessing(image_size=SIZE)))
    return folder


def small(run: Any, source: Any, out: Path, *, steps: int, batch_size: int = 8, **changes: Any) -> Any:
    """A recipe of any kind at the size of a test."""
    rates = {"learning_rate": 5e-3, "muon_learning_rate": 2e-2, "schedule": "cosine", "warmup_steps": 5}
    once = {"log_every": 1, "checkpoint_every": steps, "num_threads": 1, "activation_checkpointing": False}
    settings = {"steps": steps, "batch_size": batch_size, "weight_decay": 0.0, "dtype": "float32", **rates, **once}
    settings |= {name: changes.pop(name) for name in ("learning_rate", "muon_learning_rate") if name in changes}
    data = replace(run.data, source=str(source), num_workers=0, augmentation=None)
    fields = {"data": data, "training": replace(run.training, **settings), "out": str(out), **changes}
    return replace(run, **fields)


def train(run: Any) -> list[float]:
    """The losses by step."""
    assert run.train()
    return [line["loss"] for line in read_lines(Path(run.out) / "metrics.jsonl")]


def assert_fallen(losses: list[float], to: float) -> None:
    """The last losses are below this share of the first ones."""
    assert sum(losses[-3:]) < to * sum(losses[:3]), losses


def language_run(root: Path, kind: str, steps: int = 120) -> LanguageRun:
    run = mini.blip2_mini_opt() if kind == "opt" else mini.blip2_mini_t5()
    shape = LanguageShape(architecture=kind, hidden_dim=48, num_layers=2, num_heads=4, mlp_dim=96)  # type: ignore[arg-type]
    return small(run, root / "texts.jsonl", root / run.recipe, steps=steps, shape=shape, vocab_size=330)


def stage1_run(root: Path, steps: int = 80) -> Blip2Run:
    run: Blip2Run = small(
        replace(mini.blip2_mini_stage1(), task=Blip2Stage1Config(label_smoothing=0.0)),
        root / "pairs.jsonl",
        root / "blip2-mini-stage1",
        steps=steps,
        vision=ImageEncoderSource(source=str(root / "encoder"), layer=-1),
        qformer=QFormerConfig(
            num_queries=4, hidden_dim=48, num_layers=2, num_heads=4, mlp_dim=96, max_positions=40, dropout=0.0
        ),
        embed_dim=32,
        vocab_size=300,
    )
    # Of the seeds 0 to 4 two end with a model that leaves out the first words, whatever the order of samples.
    return replace(run, training=replace(run.training, seed=1))


def stage2_run(root: Path, kind: str, steps: int = 60) -> Blip2Run:
    """From the checkpoints that the two runs above have written."""
    run = mini.blip2_mini_stage2_opt() if kind == "opt" else mini.blip2_mini_stage2_t5()
    language = replace(run.language or LanguageModelSource(), source=str(root / f"blip2-mini-{kind}" / "model"))
    init = str(root / "blip2-mini-stage1" / "model")
    return small(run, root / "pairs.jsonl", root / run.recipe, steps=steps, init=init, language=language)


def fine_tuning_run(recipe: Blip2Run, root: Path, start: str, steps: int, **changes: Any) -> Blip2Run:
    """A recipe of the paper's size, from the model of another run, in float32."""
    return small(
        replace(recipe, data=replace(recipe.data, max_text_length=20)),
        root / "pairs.jsonl",
        root / recipe.recipe,
        steps=steps,
        learning_rate=1.5e-3,
        muon_learning_rate=None,
        init=str(root / start / "model"),
        image_size=None if recipe.image_size is None else SIZE + 8,
        frozen_dtype=None,
        **changes,
    )
