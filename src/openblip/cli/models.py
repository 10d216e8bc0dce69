"""`openblip models`: the shipped models and the known public checkpoints."""

import json
from typing import NamedTuple

BSD, MIT, CC = "BSD-3-Clause", "MIT", "CC BY-SA 4.0"
OPT = "MIT; its OPT: non-commercial"  # the licence of the language model inside
CAPTION, ANSWER, MATCH, CHAT = "caption", "answer", "match, similarity", "caption, answer, chat"


class KnownModel(NamedTuple):
    """A checkpoint that `openblip.load` reads by this name, or from this file once it is here."""

    name: str
    can: str
    """The calls that people take it for."""
    million_parameters: int
    license: str
    good_at: str


SHIPPED = (
    KnownModel("openblip-mini", "caption, match, similarity", 3, CC, "emoji scenes only: tests and the demo"),
    KnownModel("openblip-mini-captioner", CAPTION, 3, CC, "emoji scenes only: CapFilt's captioner"),
    KnownModel("openblip-mini-filter", MATCH, 3, CC, "emoji scenes only: CapFilt's filter"),
)
ON_THE_HUB = (
    KnownModel("Salesforce/blip-image-captioning-base", CAPTION, 224, BSD, "captions of photographs, fast (COCO)"),
    KnownModel("Salesforce/blip-image-captioning-large", CAPTION, 446, BSD, "better captions of photographs (COCO)"),
    KnownModel("Salesforce/blip-itm-base-coco", MATCH, 223, BSD, "filter of CapFilt, search, re-ranking"),
    KnownModel("Salesforce/blip-itm-large-coco", MATCH, 446, BSD, "the same, better and slower"),
    KnownModel("Salesforce/blip-itm-base-flickr", MATCH, 223, BSD, "search among photographs of people (Flickr30k)"),
    KnownModel("Salesforce/blip-itm-large-flickr", MATCH, 446, BSD, "the same, better and slower"),
    KnownModel("Salesforce/blip-vqa-base", ANSWER, 385, BSD, "short answers about photographs (VQAv2)"),
    KnownModel("Salesforce/blip-vqa-capfilt-large", ANSWER, 385, BSD, "the same, pre-trained on cleaner data"),
    KnownModel("Salesforce/blip2-itm-vit-g", MATCH, 1170, MIT, "the best matching and search here, slow without a GPU"),
    KnownModel("Salesforce/blip2-itm-vit-g-coco", MATCH, 1170, MIT, "the same, fine-tuned on COCO"),
    KnownModel("Salesforce/blip2-opt-2.7b", CHAT, 3745, OPT, "captions and free prompts"),
    KnownModel("Salesforce/blip2-opt-2.7b-coco", CAPTION, 3745, OPT, "captions in COCO's style"),
    KnownModel("Salesforce/blip2-opt-6.7b", CHAT, 7750, OPT, "the same with a larger language model"),
    KnownModel("Salesforce/blip2-opt-6.7b-coco", CAPTION, 7750, OPT, "captions in COCO's style"),
    KnownModel("Salesforce/blip2-flan-t5-xl", CHAT, 3942, MIT, "questions and instructions"),
    KnownModel("Salesforce/blip2-flan-t5-xl-coco", CAPTION, 3942, MIT, "captions in COCO's style"),
    KnownModel("Salesforce/blip2-flan-t5-xxl", CHAT, 12229, MIT, "the same with a larger language model"),
    KnownModel("Salesforce/instructblip-flan-t5-xl", CHAT, 4022, MIT, "InstructBLIP: follows longer instructions"),
    KnownModel("Salesforce/instructblip-flan-t5-xxl", CHAT, 12310, MIT, "the same with a larger language model"),
    KnownModel("Salesforce/instructblip-vicuna-7b", CHAT, 7910, "Vicuna's, non-commercial", "the same, longer answers"),
)
FILES = (
    KnownModel("model_base_14M.pth", "start of trainings", 252, BSD, "pre-trained on 14M images"),
    KnownModel("model_base.pth", "start of trainings", 252, BSD, "pre-trained on 129M images"),
    KnownModel("model_base_capfilt_large.pth", "start of trainings", 252, BSD, "the same, data cleaned by BLIP-L"),
    KnownModel("model_large.pth", "start of trainings", 475, BSD, "pre-trained on 129M images, ViT-L"),
    KnownModel("model_base_nlvr.pth", "judge", 259, BSD, "statements about two photographs (NLVR2)"),
    KnownModel("blip2_pretrained.pth", MATCH, 1170, BSD, "start of trainings of BLIP-2, after stage 1"),
)
GROUPS = (
    ("Shipped with OpenBLIP", SHIPPED),
    ("On the Hugging Face hub: openblip.load(NAME) downloads them once", ON_THE_HUB),
    ("Files of the released code of BLIP and LAVIS: download one, then openblip.load(FILE)", FILES),
)


def command(*, as_json: bool = False) -> int:
    """Lists the shipped models and the known public checkpoints: what they can do, their size, licence and strength.

    Any other checkpoint in one of the formats of docs/checkpoints.md loads as well. Licences are those that the
    publishers state; read them before you use a model.

    Args:
        as_json: print JSON lines instead of tables.
    """
    if as_json:
        for model in (model for _, models in GROUPS for model in models):
            print(json.dumps(model._asdict()))
        return 0
    widths = [max(len(row[column]) for _, models in GROUPS for row in map(_row, models)) for column in range(4)]
    for title, models in GROUPS:
        print(f"\n{title}")
        for *columns, last in map(_row, models):
            padded = (f"{text:<{width}}" for text, width in zip(columns, widths, strict=True))
            print("  " + "  ".join((*padded, last)))
    return 0


def _row(model: KnownModel) -> tuple[str, ...]:
    millions = model.million_parameters
    size = f"{millions}M" if millions < 1000 else f"{millions / 1000:.1f}B"
    return model.name, model.can, size, model.license, model.good_at
