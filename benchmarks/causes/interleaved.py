"""Do examples in the prompt help a model that has been trained on several images and texts in one sequence?

BLIP-2 (section 5) says that they do not help it because its data have one text to an image, and that Flamingo's have
several of both. Made by `openblip ablate benchmarks/causes/interleaved.py --out ablate`.
"""

from dataclasses import replace

from openblip.recipes.ablation import VQA_ACCURACY, AblationTable, Plan, Variant
from openblip.recipes.systems import INTERLEAVED
from openblip.recipes.tables.blip2_examples import NUMBERS_OF_EXAMPLES
from openblip.recipes.tables.blip2_stage1 import train_stage2
from openblip.recipes.tables.systems import connector_settings
from openblip.tasks.config import Blip2Stage2Config


def variants(plan: Plan) -> dict[str, Variant]:
    blip2 = plan.stage2("opt", plan.stage1())
    flamingo, human = plan.stage2("opt", None, **connector_settings(plan, "flamingo")), plan.data.need("human")
    models = {}
    for task, seen in ((Blip2Stage2Config(), "pairs"), (INTERLEAVED, "sequences")):
        models[f"BLIP-2, {seen}"] = train_stage2(plan, replace(blip2, task=task)).model
        models[f"Flamingo-style, {seen}"] = plan.train(replace(flamingo, task=task), human)
    return {
        f"{name}, {label}": Variant(model=model, options={"vqa": {"num_examples": number}})
        for name, model in sorted(models.items())
        for number, label in NUMBERS_OF_EXAMPLES.items()
    }


TABLE = AblationTable(
    title="Examples in the prompt, after a training on sequences of images and texts",
    claim="Examples help a model that has been trained on sequences.",
    differs=(
        "Whether the language model, an OPT, has read one image and its caption at a time or sequences of up to four, "
        "and how many answered questions it reads before the question."
    ),
    variants=variants,
    measures=(VQA_ACCURACY,),
    paper_source="BLIP-2, section 5, limitation; it gives no numbers, and only the order is compared",
    better=tuple(
        (f"{name}, sequences, {label}", f"{name}, sequences, no example")
        for name in ("BLIP-2", "Flamingo-style")
        for label in ("one example", "four examples")
    ),
)
