"""BLIP-2: a linear layer between queries and language model, or two."""

from openblip.recipes.ablation import CIDER, TRAINED_PARAMETERS, VQA_ACCURACY, AblationTable, Plan, Variant
from openblip.recipes.tables.blip2_stage1 import train_stage2


def variants(plan: Plan) -> dict[str, Variant]:
    stage1 = plan.stage1()
    linear, mlp = plan.stage2("opt", stage1), plan.stage2("opt", stage1, projection="mlp")
    return {label: Variant(model=train_stage2(plan, run).model) for label, run in (("linear", linear), ("MLP", mlp))}


TABLE = AblationTable(
    title="BLIP-2: the projection to the language model",
    claim="BLIP-2 projects queries by one linear layer; LLaVA-1.5 reports that two with a GELU between are better.",
    differs="What makes visual prompts of the queries.",
    variants=variants,
    measures=(VQA_ACCURACY, CIDER, TRAINED_PARAMETERS),
    paper_source="BLIP-2 section 3.3 and LLaVA-1.5 (arXiv 2310.03744) section 3; only the order is compared",
    better=(("MLP", "linear"),),
)
