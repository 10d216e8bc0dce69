"""BLIP, Table 3: what the text encoder and the text decoder share."""

from dataclasses import replace
from typing import get_args

from openblip.nn.config import Sharing
from openblip.recipes.ablation import CIDER, IMAGE_RECALL, PARAMETERS, TEXT_RECALL, AblationTable, Plan, Variant

_LABELS: dict[Sharing, str] = {
    "all_but_sa": "all but self-attention",
    "all": "all",
    "all_but_ca": "all but cross-attention",
    "none": "none",
}


def variants(plan: Plan) -> dict[str, Variant]:
    model = plan.preset.pretrain.model
    assert model is not None  # pre-trainings start from random weights
    assert set(_LABELS) == set(get_args(Sharing))
    return {
        label: plan.pretrain(model=replace(model, text=replace(model.text, sharing=sharing)))
        for sharing, label in _LABELS.items()
    }


TABLE = AblationTable(
    title="BLIP, Table 3: what encoder and decoder share",
    claim="Sharing everything but the self-attention layers is best, with fewer parameters than sharing nothing.",
    differs="The layers of the text transformer that its two modes have in common; all train on the raw pairs.",
    variants=variants,
    measures=(CIDER, TEXT_RECALL, IMAGE_RECALL, PARAMETERS),
    paper={
        "all": {"TR@1": 77.3, "IR@1": 59.5, "CIDEr": 125.9, "parameters, M": 224},
        "all but cross-attention": {"TR@1": 77.5, "IR@1": 59.9, "CIDEr": 126.1, "parameters, M": 252},
        "all but self-attention": {"TR@1": 78.4, "IR@1": 60.7, "CIDEr": 127.8, "parameters, M": 252},
        "none": {"TR@1": 78.3, "IR@1": 60.5, "CIDEr": 127.4, "parameters, M": 361},
    },
    paper_source="COCO, fine-tuned, from 14M images with ViT-B (section 4.4)",
)
