"""BLIP-2: how many queries read the image."""

from dataclasses import replace

from openblip.recipes.ablation import (
    CIDER,
    FALSE_CAPTIONS,
    IMAGE_RECALL,
    TEXT_RECALL,
    VQA_ACCURACY,
    AblationTable,
    Plan,
    Variant,
)
from openblip.recipes.tables.blip2_stage1 import train_stage2


def variants(plan: Plan) -> dict[str, Variant]:
    qformer, rows = plan.preset.stage1.qformer, {}
    assert qformer is not None  # stage 1 makes a new one
    for count in (qformer.num_queries, qformer.num_queries // 4, 2 * qformer.num_queries):
        stage1 = plan.stage1(qformer=replace(qformer, num_queries=count))
        stage2 = train_stage2(plan, plan.stage2("opt", stage1))
        rows[f"{count} queries"] = Variant(model=stage2.model, tuned={"retrieval": stage1})
    return rows


TABLE = AblationTable(
    title="BLIP-2: the number of queries",
    claim="Few queries, 32 of 768 numbers for 257 image tokens, hold what a text says of an image.",
    differs="The number of queries, in both stages.",
    variants=variants,
    measures=(TEXT_RECALL, IMAGE_RECALL, VQA_ACCURACY, CIDER, FALSE_CAPTIONS),
    paper_source="section 3.1, which has no numbers for other choices",
    remarks="Retrieval is measured after stage 1, VQA (zero-shot) and captions after stage 2 with an OPT.",
)
