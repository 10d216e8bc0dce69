"""BLIP-2, Figure 5: stage 2 with and without stage 1, around a decoder and an encoder-decoder."""

from collections.abc import Callable
from dataclasses import replace

from openblip.recipes.ablation import CIDER, VQA_ACCURACY, AblationTable, Plan, Variant
from openblip.recipes.presets import LanguageKind
from openblip.recipes.run import Blip2Run
from openblip.training.config import TrainingConfig

LANGUAGE_NAMES: dict[LanguageKind, str] = {"opt": "OPT", "t5": "T5"}


def variants(plan: Plan) -> dict[str, Variant]:
    return with_and_without_stage1(plan, lambda training: training)


def with_and_without_stage1(plan: Plan, change: Callable[[TrainingConfig], TrainingConfig]) -> dict[str, Variant]:
    """Stage 2 around both kinds of language models, from stage 1 and from a new Q-Former; `change` is of stage 2."""
    stage1, rows = plan.stage1(), {}
    for kind, name in LANGUAGE_NAMES.items():
        for label, init in ((f"{name}, no stage 1", None), (f"{name}, stage 1", stage1)):
            run = plan.stage2(kind, init)
            rows[label] = train_stage2(plan, replace(run, training=change(run.training)))
    return rows


def train_stage2(plan: Plan, run: Blip2Run) -> Variant:
    """A stage 2 with models on its way, so that it is the same training in every table."""
    return plan.train_curve(run, plan.data.need("human"), 3, after=run.init)


TABLE = AblationTable(
    title="BLIP-2, Figure 5: with and without stage 1",
    claim="Without stage 1 both kinds of language model answer far worse, and OPT's answers get worse as it goes on.",
    differs="Whether stage 2 starts from stage 1 or from a new Q-Former, and the kind of language model.",
    variants=variants,
    measures=(VQA_ACCURACY, CIDER),
    paper_source="section 4.1, effect of vision-language representation learning; a figure without numbers",
    better=(("OPT, stage 1", "OPT, no stage 1"), ("T5, stage 1", "T5, no stage 1")),
    remarks="VQA is zero-shot: stage 2 sees captions alone.",
)
