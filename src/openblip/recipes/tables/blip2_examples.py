"""BLIP-2: answered questions about other images in the prompt, the limitation that the paper states."""

from openblip.recipes.ablation import VQA_ACCURACY, AblationTable, Measure, Plan, Variant
from openblip.recipes.tables.blip2_stage1 import LANGUAGE_NAMES, train_stage2

NUMBERS_OF_EXAMPLES = {0: "no example", 1: "one example", 4: "four examples"}
ANSWER_CALIBRATION = Measure(
    name="calibration error of answers, %",
    task="vqa",
    path=("calibration", "ece"),
    data="questions",
    scale=100,
    higher_is_better=False,
)


def variants(plan: Plan) -> dict[str, Variant]:
    stage1, rows = plan.stage1(), {}
    for kind, name in LANGUAGE_NAMES.items():
        model = train_stage2(plan, plan.stage2(kind, stage1)).model
        for number, label in NUMBERS_OF_EXAMPLES.items():
            rows[f"{name}, {label}"] = Variant(model=model, options={"vqa": {"num_examples": number}})
    return rows


TABLE = AblationTable(
    title="BLIP-2: examples in the prompt",
    claim="Examples in the prompt do not help: stage 2 has seen one image with one text at a time.",
    differs="How many answered questions, each after its image, the language model reads before the question.",
    variants=variants,
    measures=(VQA_ACCURACY, ANSWER_CALIBRATION),
    paper_source="section 5, limitation; it gives no numbers",
    remarks=(
        "The examples are the same before every question, and are not scored, so that a row has as many questions "
        "fewer. All rows of a kind are one training."
    ),
)
