"""BLIP, Table 3, whose rows hardly differ after 350 steps: is the paper's order seen after twice as many?

Made by `openblip ablate benchmarks/causes/sharing_longer.py --out ablate --seeds 1`.
"""

from dataclasses import replace

from openblip.recipes.ablation import AblationTable, Plan, Variant
from openblip.recipes.tables import blip_sharing


def variants(plan: Plan) -> dict[str, Variant]:
    training = plan.preset.pretrain.training
    pretrain = replace(plan.preset.pretrain, training=replace(training, steps=2 * training.steps))
    longer = replace(plan, preset=replace(plan.preset, pretrain=pretrain))  # it adds to the same jobs
    return blip_sharing.variants(longer)


TABLE = AblationTable(
    title="BLIP, Table 3, with twice the steps",
    claim=blip_sharing.TABLE.claim,
    differs=blip_sharing.TABLE.differs,
    variants=variants,
    measures=blip_sharing.TABLE.measures,
    paper=blip_sharing.TABLE.paper,
    paper_source=blip_sharing.TABLE.paper_source,
)
