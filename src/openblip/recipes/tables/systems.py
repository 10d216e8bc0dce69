"""The systems that BLIP is compared with in reviews, on the same data, at the same size."""

from dataclasses import replace
from typing import Any

from openblip.recipes import RECIPES
from openblip.recipes.ablation import (
    CIDER,
    FALSE_CAPTIONS,
    FEWER_PAIRS,
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
    return {label: replace(each, options=FEWER_PAIRS, curve=()) for label, each in _trained(plan).items()}


def _trained(plan: Plan) -> dict[str, Variant]:
    objectives, human = plan.preset.objectives, plan.data.need("human")
    albef = replace(objectives, objectives=("itc", "itm", "mlm"))
    return {
        "BLIP": plan.pretrain(fine_tunes=False, source=human),
        "CLIP": plan.pretrain(fine_tunes=False, source=human, task=CLIP),
        "LiT": plan.pretrain(fine_tunes=False, source=human, task=CLIP, train_vision=False),
        "ALBEF": plan.pretrain(fine_tunes=False, source=human, task=albef),
        "SimVLM": plan.pretrain(fine_tunes=False, source=human, task=PrefixConfig()),
        "BLIP-2, stage 1": Variant(model=plan.stage1()),
        "BLIP-2 with OPT": train_stage2(plan, plan.stage2("opt", plan.stage1())),
        "BLIP-2 with T5": train_stage2(plan, plan.stage2("t5", plan.stage1())),
        **{label: _with_connector(plan, system) for label, system in CONNECTED.items()},
    }


CONNECTED = {
    "Frozen": "frozen",
    "average pooling": "pooling",
    "a layer over each patch": "patch-mlp",
    "resampler": "resampler",
    "Flamingo-style": "flamingo",
}
"""The recipes, without the size, that say what stands in place of the Q-Former, without stage 1."""
PARTS = ("qformer", "tokenizer", "text_init", "connector", "gated", "train_vision", "task")
"""The fields of a run by which they say it."""


def connector_settings(plan: Plan, system: str) -> dict[str, Any]:
    """The fields of a run of stage 2 by which a system has its own part in place of the Q-Former."""
    recipe = RECIPES[f"{system}-{plan.preset.name}"]()
    return {name: getattr(recipe, name) for name in PARTS}


def _with_connector(plan: Plan, system: str) -> Variant:
    connected = plan.stage2("opt", None, **connector_settings(plan, system))
    return Variant(model=plan.train(connected, plan.data.need("human")))


TABLE = AblationTable(
    title="Systems: understanding, generation, and what they cost",
    claim="A dual encoder matches and does not write, a decoder writes and matches poorly, and BLIP does both.",
    differs="The objectives, what is trained, and the parts that each system adds; all are trained on clean pairs.",
    variants=variants,
    measures=(TEXT_RECALL, IMAGE_RECALL, CIDER, FALSE_CAPTIONS, PARAMETERS, TRAINED_PARAMETERS, TRAINING_OPERATIONS),
    paper_source=(
        "none compares all of them; DeCo (arXiv 2405.20985) reports that average pooling is better than a resampler, "
        "and only this order is compared"
    ),
    better=(("average pooling", "resampler"),),
    remarks=(
        "Steps are those of pre-training, stage 1 or stage 2 in the other tables. All rank the texts of 200 images, by "
        "their log-probability where a system does not match. TFLOP are of the row's own training, without those that "
        "it starts from: BLIP-2 starts from its stage 1, and what takes the place of the Q-Former from random weights."
    ),
)
