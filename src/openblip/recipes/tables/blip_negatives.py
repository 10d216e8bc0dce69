"""BLIP: hard negatives of ITM against random ones."""

from dataclasses import replace

from openblip.recipes.ablation import CIDER, IMAGE_RECALL, TEXT_RECALL, AblationTable, Plan, Variant


def variants(plan: Plan) -> dict[str, Variant]:
    return {"hard": plan.pretrain(), "random": plan.pretrain(task=replace(plan.preset.objectives, negatives="random"))}


TABLE = AblationTable(
    title="BLIP: hard negatives of ITM against random ones",
    claim="Negatives that ITC finds similar are more informative.",
    differs="Which wrong pairs ITM sees.",
    variants=variants,
    measures=(TEXT_RECALL, IMAGE_RECALL, CIDER),
    paper_source="section 3.2, which takes the strategy of ALBEF without a number",
    better=(("hard", "random"),),
)
