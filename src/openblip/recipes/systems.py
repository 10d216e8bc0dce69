"""The systems that BLIP is compared with, in their essential mechanism: at the size of BLIP-base and of a laptop.

Each differs from `blip-base` or `blip-mini` in its losses and in what it trains; data, model, schedule and command are
those of that recipe, so that a comparison is one of ideas and not of sizes. The papers' own models are larger, or saw
other data, so their scores are not expected here.
"""

from dataclasses import replace

from openblip.recipes.blip import blip_base
from openblip.recipes.mini import blip_mini
from openblip.recipes.run import BlipRun
from openblip.tasks import config as tasks

CLIP = tasks.PretrainingConfig(objectives=("itc",), contrastive=tasks.InBatchConfig())


def clip_base() -> BlipRun:
    """Pre-train a dual encoder by ITC among the pairs of a batch, at the size of BLIP-base.

    Source: CLIP (arXiv 2103.00020), section 2.3: a symmetric loss with a learned temperature; the joint batch there is
    32,768. Cost: less than half of blip-base. Expected: no score of the paper.
    """
    return blip_base().derive("clip-base", task=CLIP)


def clip_mini() -> BlipRun:
    """`clip-base` at the size of a laptop.

    Source: CLIP, section 2.3. Cost: ten minutes with AMX. Expected: docs/results.md.
    """
    return blip_mini().derive("clip-mini", task=CLIP)


def lit_base() -> BlipRun:
    """Pre-train a text encoder by ITC to a frozen image encoder, at the size of BLIP-base.

    Source: LiT (arXiv 2111.07991), section 3: a locked image tower from classification, an unlocked text tower from
    random weights. Cost: a third of blip-base. Expected: no score of the paper.
    """
    return clip_base().derive(
        "lit-base", vision_init="google/vit-base-patch16-224-in21k", text_init=None, train_vision=False
    )


def lit_mini() -> BlipRun:
    """`lit-base` at the size of a laptop, on the image encoder of openblip-mini.

    Source: LiT, section 3. Cost: five minutes with AMX. Expected: docs/results.md.
    """
    return clip_mini().derive("lit-mini", vision_init="openblip-mini", train_vision=False)


def albef_base() -> BlipRun:
    """Pre-train by ITC, ITM and masked words, with momentum distillation of ITC and of the words, at BLIP-base's size.

    Source: ALBEF (arXiv 2107.07651), sections 3.2 and 3.3. Its text encoder has cross-attention in its upper half only;
    here it is BLIP's. Cost: as blip-base. Expected: no score of the paper.
    """
    return blip_base().derive("albef-base", task=_albef(blip_base()))


def albef_mini() -> BlipRun:
    """`albef-base` at the size of a laptop.

    Source: ALBEF, sections 3.2 and 3.3. Cost: half an hour with AMX. Expected: docs/results.md.
    """
    return blip_mini().derive("albef-mini", task=_albef(blip_mini()))


def _albef(blip: BlipRun) -> tasks.PretrainingConfig:
    assert isinstance(blip.task, tasks.PretrainingConfig)
    return replace(blip.task, objectives=("itc", "itm", "mlm"))


def simvlm_base() -> BlipRun:
    """Pre-train by prefix language modelling alone, at the size of BLIP-base.

    Source: SimVLM (arXiv 2108.10904), section 3.1. Its encoder has one stack for image and text; here the text's
    beginning attends to the image, and the decoder to both. Cost: half of blip-base. Expected: no score of the paper.
    """
    return blip_base().derive("simvlm-base", task=tasks.PrefixConfig())


def simvlm_mini() -> BlipRun:
    """`simvlm-base` at the size of a laptop.

    Source: SimVLM, section 3.1. Cost: ten minutes with AMX. Expected: docs/results.md.
    """
    return blip_mini().derive("simvlm-mini", task=tasks.PrefixConfig())
