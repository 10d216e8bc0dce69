"""blip2-mini: both stages of BLIP-2 for emoji scenes and CPUs, around the frozen ViT of blip-mini."""

from typing import NamedTuple

from openblip.data.config import DataConfig
from openblip.models.config import QFormerConfig
from openblip.recipes.blip2_run import Blip2Run, ImageEncoderSource, LanguageModelSource
from openblip.tasks.config import Blip2Stage1Config, Blip2Stage2Config
from openblip.training.config import TrainingConfig

STAGE1_STEPS, STAGE2_STEPS = 600, 600
# A step of stage 1 takes 5.4 times as many operations as one of stage 2 (benchmarks/step_operations.py).
SCRATCH_STEPS = STAGE2_STEPS + round(5.4 * STAGE1_STEPS)

ENCODER = ImageEncoderSource(source="openblip-mini")
QFORMER = QFormerConfig(
    num_queries=8,
    hidden_dim=160,
    num_layers=4,
    num_heads=4,
    mlp_dim=640,
    max_positions=48,
    dropout=0.0,
)


def blip2_mini_stage1() -> Blip2Run:
    """Stage 1 of BLIP-2 at the size of a laptop: ITC + ITM + ITG, a new Q-Former on a frozen ViT.

    Source: BLIP-2 section 3.2 with everything made smaller, and Muon beside AdamW. Cost: six minutes on one
    CPU core. Expected: docs/results.md.
    """
    return Blip2Run(
        recipe="blip2-mini-stage1",
        init=None,
        vision=ENCODER,
        language=None,
        qformer=QFORMER,
        embed_dim=128,
        vocab_size=1000,
        tokenizer=None,
        data=DataConfig(source=""),
        task=Blip2Stage1Config(),
        training=mini_training(steps=STAGE1_STEPS),
        out="runs/blip2-mini-stage1",
    )


def blip2_mini_stage2_opt() -> Blip2Run:
    """Stage 2 of BLIP-2 at the size of a laptop, from stage 1 to a tiny frozen OPT (`blip2-mini-opt`).

    Source: BLIP-2 section 3.3 with everything made smaller, and Muon beside AdamW. Cost: three minutes on one
    CPU core. Expected: docs/results.md.
    """
    return _stage2("blip2-mini-stage2-opt", OPT, init="")


def blip2_mini_stage2_t5() -> Blip2Run:
    """Stage 2 of BLIP-2 at the size of a laptop, from stage 1 to a tiny frozen T5 (`blip2-mini-t5`).

    Source: BLIP-2 section 3.3 with everything made smaller, and Muon beside AdamW. Cost: three minutes on one
    CPU core. Expected: docs/results.md.
    """
    return _stage2("blip2-mini-stage2-t5", T5, init="")


def blip2_mini_scratch_opt() -> Blip2Run:
    """Stage 2 without stage 1, to a tiny frozen OPT: what the paper's Figure 5 compares with.

    Source: BLIP-2 section 4.1, effect of representation learning. As many operations as both stages take
    together. Cost: twenty minutes on one CPU core. Expected: docs/results.md.
    """
    return _stage2("blip2-mini-scratch-opt", OPT, init=None)


def blip2_mini_scratch_t5() -> Blip2Run:
    """Stage 2 without stage 1, to a tiny frozen T5: what the paper's Figure 5 compares with.

    Source: BLIP-2 section 4.1, effect of representation learning. As many operations as both stages take
    together. Cost: twenty minutes on one CPU core. Expected: docs/results.md.
    """
    return _stage2("blip2-mini-scratch-t5", T5, init=None)


class _Language(NamedTuple):
    end_of_text: str | None
    prompt: str
    question_prompt: str


OPT = _Language("\n", "a photo of", "Question: {} Answer:")
# Its decoder has learned to go on from a prefix, or to write a whole line after none.
T5 = _Language(None, "", "Question: {} Short answer:")


def _stage2(name: str, language: _Language, *, init: str | None) -> Blip2Run:
    """From the checkpoint `init`, which the user names where it is ""; or from a new Q-Former."""
    is_new = init is None
    return Blip2Run(
        recipe=name,
        init=init,
        vision=ENCODER if is_new else None,
        language=LanguageModelSource(source="", end_of_text=language.end_of_text),
        qformer=QFORMER if is_new else None,
        vocab_size=1000,
        tokenizer=None,
        data=DataConfig(source=""),
        task=Blip2Stage2Config(),
        training=mini_training(steps=SCRATCH_STEPS if is_new else STAGE2_STEPS),
        prompt=language.prompt,
        question_prompt=language.question_prompt,
        out=f"runs/{name}",
    )


def mini_training(*, steps: int) -> TrainingConfig:
    """How the mini models are trained: batches of 64, Muon beside AdamW."""
    return TrainingConfig(
        steps=steps,
        batch_size=64,
        learning_rate=1e-3,
        muon_learning_rate=4e-3,
        warmup_steps=100,
        min_learning_rate=1e-5,
        beta2=0.98,
        clip_norm=1.0,
        checkpoint_every=100,
    )
