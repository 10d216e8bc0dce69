"""The systems that BLIP is compared with in reviews, on the same data, at the same size."""

from dataclasses import replace

from openblip.recipes.ablation import (
    CIDER,
    IMAGE_RECALL,
    PARAMETERS,
    TEXT_RECALL,
    TRAINED_PARAMETERS,
    TRAINING_OPERATIONS,
    AblationTable,
    Plan,
    Variant,
)
from openblip.recipes.systems import CLIP
from openblip.recipes.tables.blip2_stage1 import train_stage2
from openblip.tasks.config import PrefixConfig


def variants(plan: Plan) -> dict[str, Variant]:
    objectives, human = plan.preset.objectives, plan.data.need("human")
    albef = replace(objectives, objectives=("itc", "itm", "mlm"))
    return {
        "BLIP": plan.pretrain(source=human),
        "CLIP": plan.pretrain(source=human, task=CLIP),
        "LiT": plan.pretrain(source=human, task=CLIP, train_vision=False),
        "ALBEF": plan.pretrain(source=human, task=albef),
        "SimVLM": plan.pretrain(source=human, task=PrefixConfig()),
        "BLIP-2, stage 1": Variant(model=plan.stage1()),
        "BLIP-2 with OPT": train_stage2(plan, plan.stage2("opt", plan.stage1())),
        "BLIP-2 with T5": train_stage2(plan, plan.stage2("t5", plan.stage1())),
    }


TABLE = AblationTable(
    title="Systems: understanding, generation, and what they cost",
    claim="A dual encoder matches and does not write, a decoder writes and matches poorly, and BLIP does both.",
    differs="The objectives, what is trained, and the parts that each system adds; all are trained on clean pairs.",
    variants=variants,
    measures=(TEXT_RECALL, IMAGE_RECALL, CIDER, PARAMETERS, TRAINED_PARAMETERS, TRAINING_OPERATIONS),
    remarks=(
        "Systems that do not match texts are ranked by the log-probability of the text. TFLOP are of the row's own "
        "training, without those that it starts from."
    ),
)
