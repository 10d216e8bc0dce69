"""BLIP, Table 4: a captioner and a filter of their own, or one model that is both."""

from openblip.recipes.ablation import CIDER, IMAGE_RECALL, TEXT_RECALL, AblationTable, Measure, Plan, Variant
from openblip.recipes.tables.blip_decoding import REJECTED, TRUE

# Facts, since all seeds share captioner and filter
FILTER = tuple(
    Measure(name=f"filter: {name}, %", task="capfilt", path=("truth", *path), scale=100, higher_is_better=None)
    for name, path in {
        "AP on web texts": ("web", "average_precision"),
        "AUC on web texts": ("web", "auc"),
        "AUC on synthetic texts": ("synthetic", "auc"),
    }.items()
)


def variants(plan: Plan) -> dict[str, Variant]:
    both = plan.train(plan.from_start(plan.preset.shared), plan.data.need("human"), is_shared=True)
    return {"shared": plan.pretrain(plan.clean(captioner=both, filter=both)), "decoupled": plan.pretrain(plan.clean())}


TABLE = AblationTable(
    title="BLIP, Table 4: captioner and filter, shared or apart",
    claim="Fine-tuned apart they clean better: a filter that shares the captioner's weights lets its mistakes pass.",
    differs="Whether captioner and filter are one model, fine-tuned with all three objectives, or two.",
    variants=variants,
    measures=(CIDER, TEXT_RECALL, IMAGE_RECALL, REJECTED, TRUE, *FILTER),
    paper={
        "shared": {"TR@1": 79.8, "IR@1": 62.2, "CIDEr": 129.0, "synthetic texts rejected, %": 8},
        "decoupled": {"TR@1": 80.6, "IR@1": 63.1, "CIDEr": 129.7, "synthetic texts rejected, %": 25},
    },
    paper_source="COCO, fine-tuned, from 14M images with ViT-B (section 4.4)",
    remarks="The one model is fine-tuned for fewer steps than the two together.",
)
