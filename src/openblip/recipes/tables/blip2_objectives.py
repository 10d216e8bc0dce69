"""BLIP-2, Table 6: what the objectives of stage 1 are worth for retrieval."""

from dataclasses import replace

from openblip.recipes.ablation import IMAGE_RECALL, TEXT_RECALL, AblationTable, Plan, Variant
from openblip.recipes.tables.blip_queue import ITC_IMAGE_RECALL, ITC_TEXT_RECALL
from openblip.tasks.config import Blip2Stage1Config


def variants(plan: Plan) -> dict[str, Variant]:
    task = plan.preset.stage1.task
    assert isinstance(task, Blip2Stage1Config)  # it is stage 1
    return {
        "ITC + ITM": Variant(model=plan.stage1(task=replace(task, itg=False))),
        "ITC + ITM + ITG": Variant(model=plan.stage1(task=task)),
        "ITC": Variant(model=plan.stage1(task=replace(task, itm=False, itg=False))),
    }


TABLE = AblationTable(
    title="BLIP-2, Table 6: the objectives of stage 1",
    claim="ITG helps retrieval too: it makes the queries extract what the text says.",
    differs="The losses that are added up.",
    variants=variants,
    measures=(TEXT_RECALL, IMAGE_RECALL, ITC_TEXT_RECALL, ITC_IMAGE_RECALL),
    paper={"ITC + ITM": {"TR@1": 84.5, "IR@1": 67.2}, "ITC + ITM + ITG": {"TR@1": 85.4, "IR@1": 68.3}},
    paper_source="COCO, fine-tuned, ViT-g (section 4.4)",
    remarks="The row ITC is not in the paper.",
)
