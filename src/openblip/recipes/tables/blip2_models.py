"""BLIP-2, Table 2: the trend over image encoders and language models."""

from dataclasses import replace

from openblip.recipes import blip2
from openblip.recipes.ablation import CIDER, FALSE_CLAIMS, VQA_ACCURACY, AblationTable, Plan, Variant
from openblip.recipes.presets import LanguageKind
from openblip.recipes.run import Blip2Run, ImageEncoderSource
from openblip.recipes.tables.blip2_stage1 import LANGUAGE_NAMES, train_stage2

_LARGER: dict[LanguageKind, str] = {"opt": "facebook/opt-6.7b", "t5": "google/flan-t5-xxl"}


def variants(plan: Plan) -> dict[str, Variant]:
    rows = {}
    encoders = {"smaller": plan.stage1(vision=smaller_encoder(plan)), "larger": plan.stage1()}
    for kind, name in LANGUAGE_NAMES.items():
        for encoder, size in (("smaller", "smaller"), ("larger", "smaller"), ("larger", "larger")):
            run = language_of_size(plan, plan.stage2(kind, encoders[encoder]), kind, size)
            rows[f"{encoder} ViT, {size} {name}"] = Variant(model=train_stage2(plan, run).model)
    return rows


def smaller_encoder(plan: Plan) -> ImageEncoderSource:
    """ViT-L for the ViT-g of the papers' size, and less of the layers of a small ViT."""
    vision = plan.preset.stage1.vision
    if not plan.preset.languages:
        vision = blip2.blip2_stage1_vit_l().vision
    assert vision is not None  # stage 1 names its encoder
    return replace(vision, layer=-4) if plan.preset.languages else vision


def language_of_size(plan: Plan, run: Blip2Run, kind: LanguageKind, size: str) -> Blip2Run:
    """Stage 2 around the smaller or the larger language model of a kind: of the papers' size the recipe has the smaller
    one, and of those that are trained here the larger one.
    """
    assert run.language is not None  # stage 2 has one
    trained_here = plan.preset.languages.get(kind)
    source = run.language.source
    if trained_here is None and size == "larger":
        source = _LARGER[kind]
    elif trained_here is not None and size == "smaller":
        shape = trained_here.shape
        shape = replace(shape, hidden_dim=shape.hidden_dim // 2, mlp_dim=shape.mlp_dim // 2)
        small = replace(trained_here, shape=replace(shape, num_layers=(shape.num_layers + 1) // 2))
        source = plan.train(small, plan.data.need("documents"), is_shared=True)
    return replace(run, language=replace(run.language, source=source))


TABLE = AblationTable(
    title="BLIP-2, Table 2: better image encoders and language models",
    claim="Better image encoders and better language models each make BLIP-2 better, and FlanT5 is better than OPT.",
    differs="The frozen models; the Q-Former and its training are equal.",
    variants=variants,
    measures=(VQA_ACCURACY, CIDER, *FALSE_CLAIMS),
    paper={
        "smaller ViT, smaller OPT": {"VQA accuracy": 50.1},
        "larger ViT, smaller OPT": {"VQA accuracy": 53.5},
        "larger ViT, larger OPT": {"VQA accuracy": 54.3},
        "smaller ViT, smaller T5": {"VQA accuracy": 62.6},
        "larger ViT, smaller T5": {"VQA accuracy": 63.1},
        "larger ViT, larger T5": {"VQA accuracy": 65.2},
    },
    paper_source="VQAv2 val, zero-shot: ViT-L and ViT-g; OPT 2.7B and 6.7B, FlanT5 XL and XXL (section 4.1)",
    remarks=(
        "Small language models are trained on the same documents, the smaller ones with half the width and half the "
        "layers; the smaller ViT is the lower part of the larger one."
    ),
)
