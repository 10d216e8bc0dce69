"""BLIP, Table 1, whose captioner is right in half of its captions: is the claim true with one that is nearly always?

Made by `openblip ablate benchmarks/causes/capfilt_shipped.py --out ablate`.
"""

from openblip.data.decision import Decision
from openblip.recipes.ablation import CIDER, IMAGE_RECALL, TEXT_RECALL, AblationTable, Plan, Variant
from openblip.recipes.tables.blip_capfilt import NOISE, NUM_TEXTS


def variants(plan: Plan) -> dict[str, Variant]:
    cleaned = plan.clean(captioner="openblip-mini-captioner", filter="openblip-mini-filter")
    return {
        "filter": plan.pretrain(plan.select(cleaned, Decision(where="source = 'web'"))),
        "captioner and filter": plan.pretrain(cleaned),
    }


TABLE = AblationTable(
    title="BLIP, Table 1, with the shipped captioner and filter",
    claim="Captioner and filter together help more than the filter alone.",
    differs="The texts that BLIP is pre-trained on, after CapFilt with models that have seen 60,000 clean pairs.",
    variants=variants,
    measures=(CIDER, TEXT_RECALL, IMAGE_RECALL, NUM_TEXTS, NOISE),
    paper_source="BLIP, Table 1 (section 4.2); only the order is compared",
    better=(("captioner and filter", "filter"),),
)
