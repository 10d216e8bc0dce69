"""BLIP, Table 1: what captioner and filter are worth, alone and together."""

from openblip.data.decision import Decision
from openblip.recipes.ablation import (
    CIDER,
    FALSE_CAPTIONS,
    IMAGE_RECALL,
    TEXT_RECALL,
    AblationTable,
    Measure,
    Plan,
    Variant,
)

NOISE = Measure(name="untrue texts, %", task="capfilt", path=("truth", "noise_after"), scale=100, higher_is_better=None)
NUM_TEXTS = Measure(name="texts", task="capfilt", path=("num_kept",), digits=0, higher_is_better=None)


def variants(plan: Plan) -> dict[str, Variant]:
    cleaned = plan.clean()
    web, everything = "source = 'web'", "itm >= 0"
    return {
        "none": plan.pretrain(),
        "filter": plan.pretrain(plan.select(cleaned, Decision(where=web))),
        "captioner": plan.pretrain(plan.select(cleaned, Decision(threshold=None, where=everything))),
        "captioner and filter": plan.pretrain(cleaned),
    }


TABLE = AblationTable(
    title="BLIP, Table 1: CapFilt",
    claim="Captioner and filter each help, and together they help most.",
    differs="The texts that BLIP is pre-trained on; images, steps and seeds are equal.",
    variants=variants,
    measures=(CIDER, FALSE_CAPTIONS, TEXT_RECALL, IMAGE_RECALL, NUM_TEXTS, NOISE),
    paper={
        "none": {"TR@1": 78.4, "IR@1": 60.7, "CIDEr": 127.8},
        "filter": {"TR@1": 79.1, "IR@1": 61.5, "CIDEr": 128.2},
        "captioner": {"TR@1": 79.7, "IR@1": 62.0, "CIDEr": 128.9},
        "captioner and filter": {"TR@1": 80.6, "IR@1": 63.1, "CIDEr": 129.7},
    },
    paper_source="COCO, fine-tuned, from 14M images with ViT-B (section 4.2)",
)
