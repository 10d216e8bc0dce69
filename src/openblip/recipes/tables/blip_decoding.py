"""BLIP, Table 2: how the captioner writes, by beam search or by nucleus sampling."""

from openblip.generation.decoding import Beam
from openblip.recipes.ablation import CIDER, IMAGE_RECALL, TEXT_RECALL, AblationTable, Measure, Plan, Variant

REJECTED = Measure(
    name="synthetic texts rejected, %",
    task="capfilt",
    path=("counts", "synthetic", "rejected"),
    scale=100,
    higher_is_better=None,
)
TRUE = Measure(
    name="synthetic texts that are true, %",
    task="capfilt",
    path=("truth", "synthetic", "correct"),
    scale=100,
    higher_is_better=None,
)


def variants(plan: Plan) -> dict[str, Variant]:
    return {
        "none": plan.pretrain(),
        "beam": plan.pretrain(plan.clean(decoding=Beam())),
        "nucleus": plan.pretrain(plan.clean()),
    }


TABLE = AblationTable(
    title="BLIP, Table 2: beam search or nucleus sampling of synthetic captions",
    claim="Nucleus sampling is better, although more of its captions are noise: they are more varied.",
    differs="How the captioner of CapFilt decodes.",
    variants=variants,
    measures=(CIDER, TEXT_RECALL, IMAGE_RECALL, REJECTED, TRUE),
    paper={
        "none": {"TR@1": 78.4, "IR@1": 60.7, "CIDEr": 127.8},
        "beam": {"TR@1": 79.6, "synthetic texts rejected, %": 19},
        "nucleus": {"TR@1": 80.6, "IR@1": 63.1, "CIDEr": 129.7, "synthetic texts rejected, %": 25},
    },
    paper_source=(
        "COCO, fine-tuned, from 14M images with ViT-B (section 4.3); where beam search has no number here, only the "
        "order is compared"
    ),
    better=(("nucleus", "beam"), ("beam", "none")),
)
