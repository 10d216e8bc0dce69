"""BLIP-2, Figure 5 with the paper's optimizer: stage 2 by AdamW alone, with and without stage 1."""

from dataclasses import replace

from openblip.recipes.ablation import CIDER, VQA_ACCURACY, AblationTable, Plan, Variant
from openblip.recipes.tables.blip2_stage1 import with_and_without_stage1
from openblip.training.config import TrainingConfig


def variants(plan: Plan) -> dict[str, Variant]:
    return with_and_without_stage1(plan, by_adamw)


def by_adamw(training: TrainingConfig) -> TrainingConfig:
    """Without Muon, more gently and for more steps; a training without it stays as it is."""
    if training.muon_learning_rate is None:
        return training
    return replace(training, muon_learning_rate=None, learning_rate=5e-4, steps=training.steps * 3 // 2)


TABLE = AblationTable(
    title="BLIP-2, Figure 5 with AdamW alone: with and without stage 1",
    claim="What stage 1 has learned is worth most where stage 2 learns slowly through a frozen language model.",
    differs="Whether stage 2 starts from stage 1 or from a new Q-Former, and the kind of language model.",
    variants=variants,
    measures=(VQA_ACCURACY, CIDER),
    paper_source="section 4.1, effect of vision-language representation learning; a figure without numbers",
    better=(("OPT, stage 1", "OPT, no stage 1"), ("T5, stage 1", "T5, no stage 1")),
    remarks=(
        "Small models, also those of stage 1 here, are trained by Muon beside AdamW, which is faster. Stage 2 without "
        "it has half the learning rate and one and a half times the steps. At the papers' size nothing is trained by "
        "Muon, and this is the table blip2-stage1. VQA is zero-shot."
    ),
)
