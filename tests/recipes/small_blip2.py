"""Trainings of BLIP-2 in seconds: boxes of four colors on two sides, that a tiny Q-Former learns by heart.

One table serves all tasks: every image has a caption, a question with answers, and a conversation.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from PIL import Image
from small_training import SIZE, untrained

from openblip.data.sources import open_source
from openblip.models.config import QFormerConfig
from openblip.recipes.mini import (
    blip2_mini_opt,
    blip2_mini_stage1,
    blip2_mini_stage2_opt,
    blip2_mini_stage2_t5,
    blip2_mini_t5,
)
from openblip.recipes.run import Blip2Run, ImageEncoderSource, LanguageModelSource, LanguageRun, LanguageShape
from openblip.tasks.config import Blip2Stage1Config

replace = dataclasses.replace
COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (20, 160, 20), "grey": (120, 120, 120)}
SIDES = {"left": 0, "right": SIZE // 2}
COLOR_QUESTION, SIDE_QUESTION = "what color is it?", "on which side?"
QFORMER = QFormerConfig(
    num_queries=4, hidden_dim=48, num_layers=2, num_heads=4, mlp_dim=96, max_positions=40, dropout=0.0
)


def write_world(root: Path) -> None:
    """pairs.jsonl and texts.jsonl with their images, and the checkpoint encoder/ with a random ViT.

    The texts say twice what there is: who has learned them goes on from what stands before, be it a caption
    or what takes its place.
    """
    pairs, texts = [], []
    for color, rgb in COLORS.items():
        for side, left in SIDES.items():
            name = f"{color}-{side}.png"
            image = Image.new("RGB", (SIZE, SIZE), (255, 255, 255))
            image.paste(rgb, (left, 4, left + SIZE // 2, SIZE - 4))
            image.save(root / name)
            caption = f"a {color} box on the {side}"
            turns = [{"question": COLOR_QUESTION, "answer": color}, {"question": SIDE_QUESTION, "answer": side}]
            pairs.append(
                {"image": name, "caption": caption, "question": COLOR_QUESTION, "answers": [color] * 3, "turns": turns}
            )
            asked = [f"Question: {turn['question']} Answer: {turn['answer']}" for turn in turns]
            several = f"{asked[0]}. {asked[1]}"
            said = (caption, f"a photo of {caption}", *asked, several)
            texts += [{"image": name, "text": f"{caption}\n{line}"} for line in said]
    for name, rows in (("pairs", pairs), ("texts", texts)):
        (root / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    untrained(root / "encoder", open_source(str(root / "pairs.jsonl")))


def small(run: Any, root: Path, source: str, steps: int, **changes: Any) -> Any:
    """A recipe of any kind at the size of a test, its folder named by the recipe."""
    training = replace(
        run.training,
        steps=steps,
        batch_size=8,
        accumulation=1,
        learning_rate=5e-3,
        muon_learning_rate=2e-2,
        warmup_steps=5,
        weight_decay=0.0,
        precision="fp32",
        log_every=1,
        checkpoint_every=steps,
        num_threads=1,
        activation_checkpointing=False,
    )
    data = replace(run.data, source=str(root / source), num_workers=0, augmentation=None)
    fields = {"data": data, "training": training, "out": str(root / run.recipe), **changes}
    return replace(run, **fields)


def language_run(root: Path, kind: str, steps: int = 120) -> LanguageRun:
    run = blip2_mini_opt() if kind == "opt" else blip2_mini_t5()
    shape = LanguageShape(architecture=kind, hidden_dim=48, num_layers=2, num_heads=4, mlp_dim=96)  # type: ignore[arg-type]
    small_run: LanguageRun = small(run, root, "texts.jsonl", steps, shape=shape, vocab_size=330)
    return small_run


def stage1_run(root: Path, steps: int = 80) -> Blip2Run:
    run: Blip2Run = small(
        replace(blip2_mini_stage1(), task=Blip2Stage1Config(label_smoothing=0.0)),
        root,
        "pairs.jsonl",
        steps,
        vision=ImageEncoderSource(source=str(root / "encoder"), layer=-1),
        qformer=QFORMER,
        embed_dim=32,
        vocab_size=300,
    )
    # Of the seeds 0 to 4 two end with a model that leaves out the first words, whatever the order of samples.
    return replace(run, training=replace(run.training, seed=1))


def stage2_run(root: Path, kind: str, steps: int = 60) -> Blip2Run:
    """From the checkpoints that the two runs above have written."""
    run = blip2_mini_stage2_opt() if kind == "opt" else blip2_mini_stage2_t5()
    end = "\n" if kind == "opt" else None
    language = LanguageModelSource(source=str(root / f"blip2-mini-{kind}" / "model"), end_of_text=end)
    stage1 = str(root / "blip2-mini-stage1" / "model")
    small_run: Blip2Run = small(run, root, "pairs.jsonl", steps, init=stage1, language=language)
    return small_run


def fine_tuning_run(recipe: Blip2Run, root: Path, start: str, steps: int, **changes: Any) -> Blip2Run:
    """A recipe of the paper's size, from the model of another run, in float32."""
    image_size = None if recipe.image_size is None else SIZE + 8
    init = str(root / start / "model")
    run: Blip2Run = small(
        replace(recipe, data=replace(recipe.data, max_text_length=20)),
        root,
        "pairs.jsonl",
        steps,
        init=init,
        image_size=image_size,
        frozen_dtype=None,
        **changes,
    )
    training = replace(run.training, learning_rate=1.5e-3, muon_learning_rate=None)
    return replace(run, training=training)
