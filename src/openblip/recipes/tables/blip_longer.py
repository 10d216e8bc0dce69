"""BLIP, Tables 12 and 13: longer training in place of CapFilt, and going on with the old model after it."""

from dataclasses import replace
from typing import Any

from openblip.recipes.ablation import CIDER, IMAGE_RECALL, TEXT_RECALL, AblationTable, Plan, Variant

_LONGER = 1.4  # about as much as CapFilt's texts are more than the web's, by which an epoch is longer


def variants(plan: Plan) -> dict[str, Variant]:
    training, cleaned = plan.preset.pretrain.training, plan.clean()
    raw, bootstrapped = plan.pretrain(), plan.pretrain(cleaned)
    go_on: dict[str, Any] = {"model": None, "vision_init": None, "text_init": None}
    return {
        "raw": raw,
        "raw, longer": plan.pretrain(training=replace(training, steps=round(_LONGER * training.steps))),
        "bootstrapped, a new model": bootstrapped,
        "bootstrapped, from the raw one": plan.pretrain(cleaned, init=raw.model, **go_on),
        "bootstrapped, from a bootstrapped one": plan.pretrain(cleaned, init=bootstrapped.model, **go_on),
    }


TABLE = AblationTable(
    title="BLIP, Tables 12 and 13: longer training, and going on with the old model",
    claim=(
        "CapFilt's gain does not come from its longer epochs, and to go on with the model that was trained on raw "
        "pairs is no better than a new one."
    ),
    differs="How long, on which texts and from which weights BLIP is trained.",
    variants=variants,
    measures=(CIDER, TEXT_RECALL, IMAGE_RECALL),
    paper_source="section 4.4 and its tables; only their order is compared",
    better=(
        ("bootstrapped, a new model", "raw"),
        ("bootstrapped, a new model", "raw, longer"),
        ("bootstrapped, a new model", "bootstrapped, from the raw one"),
    ),
    remarks=(
        "A model that goes on has had twice the steps of a new one; the last row has as many, all of them on "
        "bootstrapped texts."
    ),
)
