"""BLIP-2, Figure 5 with AdamW alone: is stage 1 better than as many more operations of stage 2?

Made by `openblip ablate benchmarks/causes/stage1_operations.py --out ablate --seeds 1`.
"""

from dataclasses import replace

from openblip.recipes.ablation import CIDER, TRAINING_OPERATIONS, VQA_ACCURACY, AblationTable, Plan, Variant
from openblip.recipes.tables.blip2_adamw import by_adamw
from openblip.recipes.tables.blip2_stage1 import train_stage2

BOTH_STAGES = 31.47 / 9.69  # TFLOP of both stages, and of stage 2 alone


def variants(plan: Plan) -> dict[str, Variant]:
    with_stage1, alone = plan.stage2("opt", plan.stage1()), plan.stage2("opt", None)
    training = by_adamw(alone.training)
    longer = replace(training, steps=round(BOTH_STAGES * training.steps))
    return {
        "stage 1 and stage 2": train_stage2(plan, replace(with_stage1, training=training)),
        "stage 2 alone, longer": train_stage2(plan, replace(alone, training=longer)),
    }


TABLE = AblationTable(
    title="BLIP-2, Figure 5 with AdamW alone, at equal operations",
    claim="Stage 1 is worth its operations.",
    differs="Where the operations of stage 1 go.",
    variants=variants,
    measures=(VQA_ACCURACY, CIDER, TRAINING_OPERATIONS),
    paper_source="section 4.1, where steps of stage 2 are equal; it says nothing of operations",
    better=(("stage 1 and stage 2", "stage 2 alone, longer"),),
    remarks="The TFLOP of the first row are of stage 2; with stage 1 they are those of the second.",
)
