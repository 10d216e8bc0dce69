"""blip2-mini: both stages of BLIP-2 for emoji scenes and CPUs, around the frozen ViT of blip-mini.

Its language models are trained here too, on text alone: a tiny OPT and a tiny T5. Everything is the paper's made
smaller, with Muon beside AdamW. What to expect is in docs/results.md. Costs are those of one CPU core.
"""

from typing import Any

from openblip.data.config import DataConfig
from openblip.models.config import QFormerConfig
from openblip.recipes.blip2_run import Blip2Run, ImageEncoderSource, LanguageModelSource
from openblip.recipes.blip_mini import mini_training
from openblip.recipes.language_run import LanguageRun, LanguageShape
from openblip.tasks.config import Blip2Stage1Config, Blip2Stage2Config, LanguagePretrainingConfig

STAGE1_STEPS, STAGE2_STEPS = 600, 600
# A step of stage 1 takes 5.4 times as many operations as one of stage 2 (benchmarks/step_operations.py).
SCRATCH_STEPS = STAGE2_STEPS + round(5.4 * STAGE1_STEPS)

ENCODER = ImageEncoderSource(source="openblip-mini")
QFORMER = QFormerConfig(
    num_queries=8, hidden_dim=160, num_layers=4, num_heads=4, mlp_dim=640, max_positions=48, dropout=0.0
)


def blip2_mini_opt() -> LanguageRun:
    """Train a tiny OPT on documents of emoji scenes: captions, questions and answers, no images.

    Source: OPT; its lines end with a line break, as OPT's texts do in BLIP-2 (say so with --language.end-of-text).
    Cost: twenty minutes. Expected: docs/results.md.
    """
    return _language("blip2-mini-opt", LanguageShape(architecture="opt"))


def blip2_mini_t5() -> LanguageRun:
    """Train a tiny T5 on documents of emoji scenes, to continue a prefix: prefix language modelling.

    Source: BLIP-2 section 3.3, with T5 1.1. Cost: twenty minutes. Expected: docs/results.md.
    """
    return _language("blip2-mini-t5", LanguageShape(architecture="t5", num_layers=3))


def _language(name: str, shape: LanguageShape) -> LanguageRun:
    return LanguageRun(
        recipe=name,
        shape=shape,
        vocab_size=800,
        data=DataConfig(),
        task=LanguagePretrainingConfig(),
        training=mini_training(steps=2000),
        out=f"runs/{name}",
    )


def blip2_mini_stage1() -> Blip2Run:
    """Stage 1 of BLIP-2 at the size of a laptop: ITC + ITM + ITG, a new Q-Former on a frozen ViT.

    Source: BLIP-2 section 3.2. Cost: six minutes. Expected: docs/results.md.
    """
    return Blip2Run(
        recipe="blip2-mini-stage1",
        vision=ENCODER,
        qformer=QFORMER,
        embed_dim=128,
        vocab_size=1000,
        data=DataConfig(),
        task=Blip2Stage1Config(),
        training=mini_training(steps=STAGE1_STEPS),
        out="runs/blip2-mini-stage1",
    )


def blip2_mini_stage2_opt() -> Blip2Run:
    """Stage 2 of BLIP-2 at the size of a laptop, from stage 1 to a tiny frozen OPT (`blip2-mini-opt`).

    Source: BLIP-2 section 3.3. Cost: three minutes. Expected: docs/results.md.
    """
    return _stage2("blip2-mini-stage2-opt", from_stage1=True, **OPT)


def blip2_mini_stage2_t5() -> Blip2Run:
    """Stage 2 of BLIP-2 at the size of a laptop, from stage 1 to a tiny frozen T5 (`blip2-mini-t5`).

    Source: BLIP-2 section 3.3. Cost: three minutes. Expected: docs/results.md.
    """
    return _stage2("blip2-mini-stage2-t5", from_stage1=True, **T5)


def blip2_mini_scratch_opt() -> Blip2Run:
    """Stage 2 without stage 1, to a tiny frozen OPT: the comparison of the paper's Figure 5.

    Source: BLIP-2 section 4.1, effect of representation learning. It takes as many operations as both stages together.
    Cost: twenty minutes. Expected: docs/results.md.
    """
    return _stage2("blip2-mini-scratch-opt", from_stage1=False, **OPT)


def blip2_mini_scratch_t5() -> Blip2Run:
    """Stage 2 without stage 1, to a tiny frozen T5: otherwise as `blip2-mini-scratch-opt`.

    Source: BLIP-2 section 4.1. Cost: twenty minutes. Expected: docs/results.md.
    """
    return _stage2("blip2-mini-scratch-t5", from_stage1=False, **T5)


OPT: dict[str, Any] = {"end_of_text": "\n", "prompt": "a photo of", "question_prompt": "Question: {} Answer:"}
# Its decoder has learned to continue a prefix, or to write a whole line after none.
T5: dict[str, Any] = {"end_of_text": None, "prompt": "", "question_prompt": "Question: {} Short answer:"}


def _stage2(name: str, *, from_stage1: bool, end_of_text: str | None, **prompts: Any) -> Blip2Run:
    """From a checkpoint of stage 1 that the user names with --init, or from a new Q-Former."""
    return Blip2Run(
        recipe=name,
        vision=None if from_stage1 else ENCODER,
        language=LanguageModelSource(end_of_text=end_of_text),
        qformer=None if from_stage1 else QFORMER,
        vocab_size=1000,
        data=DataConfig(),
        task=Blip2Stage2Config(),
        training=mini_training(steps=STAGE2_STEPS if from_stage1 else SCRATCH_STEPS),
        out=f"runs/{name}",
        **prompts,
    )
