"""BLIP: ITC with a momentum model and a queue, against ITC in the batch."""

from dataclasses import replace

from openblip.recipes.ablation import (
    CIDER,
    IMAGE_RECALL,
    TEXT_MAP,
    TEXT_R_PRECISION,
    TEXT_RECALL,
    AblationTable,
    Measure,
    Plan,
    Variant,
)
from openblip.tasks.config import ContrastiveConfig, InBatchConfig

ITC_TEXT_RECALL = Measure(name="TR@1 by ITC", task="retrieval", path=("itc", "tr_r1"), scale=100)
ITC_IMAGE_RECALL = Measure(name="IR@1 by ITC", task="retrieval", path=("itc", "ir_r1"), scale=100)


def variants(plan: Plan) -> dict[str, Variant]:
    task = plan.preset.objectives
    assert isinstance(task.contrastive, ContrastiveConfig)  # the papers' recipe
    hard = replace(task.contrastive, alpha=0.0)
    return {
        "momentum and queue": plan.pretrain(),
        "queue, no soft targets": plan.pretrain(task=replace(task, contrastive=hard)),
        "in the batch": plan.pretrain(task=replace(task, contrastive=InBatchConfig())),
    }


TABLE = AblationTable(
    title="BLIP: ITC with a momentum model against ITC in the batch",
    claim="A queue gives more negatives than a batch, and a momentum model's soft targets forgive noisy pairs.",
    differs="What ITC compares a pair with, and whether the momentum model says how much other pairs fit.",
    variants=variants,
    measures=(ITC_TEXT_RECALL, ITC_IMAGE_RECALL, TEXT_RECALL, IMAGE_RECALL, TEXT_MAP, TEXT_R_PRECISION, CIDER),
    paper_source="section 3.2, which takes both from ALBEF without a number",
    better=(("momentum and queue", "in the batch"),),
    remarks="mAP@R and R-Precision are measured on images of which each has five right texts.",
)
