"""Average pooling and an MLP as projection, which others report to be better: is it that they train the language model?

Made by `openblip ablate benchmarks/causes/connectors_lora.py --out ablate --seeds 1`.
"""

from dataclasses import replace

from openblip.models.config import LoraSettings
from openblip.recipes.ablation import CIDER, TRAINED_PARAMETERS, VQA_ACCURACY, AblationTable, Plan, Variant
from openblip.recipes.tables.systems import connector_settings


def variants(plan: Plan) -> dict[str, Variant]:
    lora, more, stage1 = LoraSettings(rank=8), LoraSettings(rank=64, alpha=64), plan.stage1()
    pooling, resampler = (connector_settings(plan, name) for name in ("pooling", "resampler"))
    runs = {
        "average pooling": plan.stage2("opt", None, lora=lora, **pooling),
        "resampler": plan.stage2("opt", None, lora=lora, **resampler),
        "Q-Former, linear": plan.stage2("opt", stage1, lora=lora),
        "Q-Former, MLP": plan.stage2("opt", stage1, lora=lora, projection="mlp"),
    }
    for label, parts in (("average pooling, more", pooling), ("resampler, more", resampler)):
        run = plan.stage2("opt", None, lora=more, **parts)
        runs[label] = replace(run, training=replace(run.training, steps=run.training.steps * 5 // 3))
    return {label: Variant(model=plan.train(run, plan.data.need("human"))) for label, run in runs.items()}


TABLE = AblationTable(
    title="Connectors and projections around a language model that is trained by LoRA",
    claim="Average pooling is better than a resampler (DeCo), and an MLP better than a linear layer (LLaVA-1.5).",
    differs="What makes visual prompts of the image.",
    variants=variants,
    measures=(CIDER, VQA_ACCURACY, TRAINED_PARAMETERS),
    paper_source="DeCo (arXiv 2405.20985) and LLaVA-1.5 (arXiv 2310.03744); only the order is compared",
    better=(
        ("average pooling", "resampler"),
        ("average pooling, more", "resampler, more"),
        ("Q-Former, MLP", "Q-Former, linear"),
    ),
    remarks="LoRA has rank 8; the rows with more have rank 64 and five thirds of the steps.",
)
