"""BLIP's three objectives, alone and together: what each is worth for understanding and for generation."""

from dataclasses import replace

from openblip.recipes.ablation import (
    CIDER,
    FALSE_CAPTIONS,
    FEWER_PAIRS,
    IMAGE_RECALL,
    TEXT_RECALL,
    AblationTable,
    Plan,
    Variant,
)
from openblip.tasks.config import Objective, PretrainingConfig

_SETS: tuple[tuple[Objective, ...], ...] = (
    ("itc", "itm", "lm"),
    ("itc",),
    ("itm",),
    ("lm",),
    ("itc", "itm"),
    ("itc", "lm"),
    ("itm", "lm"),
)


def variants(plan: Plan) -> dict[str, Variant]:
    return {label: replace(each, options=FEWER_PAIRS) for label, each in _trained(plan).items()}


def _trained(plan: Plan) -> dict[str, Variant]:
    return {
        " + ".join(map(str.upper, objectives)): plan.pretrain(
            fine_tunes=False, task=with_objectives(plan.preset.objectives, objectives)
        )
        for objectives in _SETS
    }


def with_objectives(task: PretrainingConfig, objectives: tuple[Objective, ...]) -> PretrainingConfig:
    """The task with other losses; without ITC no negatives are hard, since it is ITC that finds them similar."""
    negatives = task.negatives if "itc" in objectives else "random"
    return replace(task, objectives=objectives, negatives=negatives)


TABLE = AblationTable(
    title="BLIP: the three objectives, alone and together",
    claim="One model that learns all three understands and writes.",
    differs="The losses that are added up; steps and pairs are equal, so fewer losses are less work.",
    variants=variants,
    measures=(CIDER, FALSE_CAPTIONS, TEXT_RECALL, IMAGE_RECALL),
    paper_source="section 3.2, which names the objectives and has no such table",
    remarks=(
        "Models are measured as they are pre-trained, since not all have the heads of a fine-tuning. Texts are ranked "
        "by ITC and re-ranked by ITM where the model has both, by the one that it has otherwise, and by their "
        "log-probability where it only writes; among 200 images, since the last two compare all pairs, so that recall "
        "is higher than in the other tables."
    ),
)
