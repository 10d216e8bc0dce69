"""The systems that BLIP and BLIP-2 are compared with, in their essential mechanism: at full size and that of a laptop.

Each differs from `blip-base`, `blip-mini`, `blip2-stage2-opt` or `blip2-mini-scratch-opt` in its losses, in what stands
between image and text and in what it trains; data, model, schedule and command are those of that recipe, so that a
comparison is one of ideas and not of sizes. The papers' own models are larger, or saw other data, so their scores are
not expected here. Those with a language model take it from `--language.source`, as stage 2 of BLIP-2.
"""

from dataclasses import replace

from openblip.nn.config import (
    ConnectorConfig,
    GatedConfig,
    PatchMlpConfig,
    PoolingConfig,
    ResamplerConfig,
    SoftPromptConfig,
)
from openblip.recipes.blip import blip_base
from openblip.recipes.blip2 import blip2_stage1, blip2_stage2_opt
from openblip.recipes.mini import blip2_mini_scratch_opt, blip_mini
from openblip.recipes.run import Blip2Run, BlipRun
from openblip.tasks import config as tasks

CLIP = tasks.PretrainingConfig(objectives=("itc",), contrastive=tasks.InBatchConfig())
INTERLEAVED = tasks.Blip2Stage2Config(images_per_sequence=4)


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

    Source: SimVLM (arXiv 2108.10904), section 3.2. Its encoder has one stack for image and text; here the text's
    beginning attends to the image, and the decoder to both. Cost: half of blip-base. Expected: no score of the paper.
    """
    return blip_base().derive("simvlm-base", task=tasks.PrefixConfig())


def simvlm_mini() -> BlipRun:
    """`simvlm-base` at the size of a laptop.

    Source: SimVLM, section 3.2. Cost: ten minutes with AMX. Expected: docs/results.md.
    """
    return blip_mini().derive("simvlm-mini", task=tasks.PrefixConfig())


def frozen_base() -> Blip2Run:
    """Train a ViT-g into a frozen OPT-2.7B as two soft prompts, without stage 1.

    Source: Frozen (arXiv 2106.13884), section 3.1: the image encoder and a linear map of its mean token to two prompts
    are trained by the captions that the language model writes. Its encoder starts from random weights, here from those
    of the other systems. Cost: more than blip2-stage2-opt. Expected: no score of the paper.
    """
    return replace(_around_opt("frozen-base", SoftPromptConfig(hidden_dim=2560)), train_vision=True)


def pooling_base() -> Blip2Run:
    """Average pooling in place of the Q-Former: sixteen by sixteen patches become eight by eight.

    Source: DeCo (arXiv 2405.20985), section 3. Cost: as blip2-stage2-opt. Expected: no score of the paper.
    """
    return _around_opt("pooling-base", PoolingConfig(side=8))


def patch_mlp_base() -> Blip2Run:
    """Every patch as a prompt of OPT-2.7B, through a layer and its projection, in place of the Q-Former.

    Source: LLaVA 1.5 (arXiv 2310.03744), section 3. Cost: several times blip2-stage2-opt, since the language model
    reads 257 prompts in place of 32. Expected: no score of the paper.
    """
    return _around_opt("patch-mlp-base", PatchMlpConfig(hidden_dim=2560))


def resampler_base() -> Blip2Run:
    """Learned queries that attend to the image and read no text, in place of the Q-Former.

    Source: Flamingo (arXiv 2204.14198), section 3.1.1. Cost: as blip2-stage2-opt. Expected: no score of the paper.
    """
    return _around_opt("resampler-base", ResamplerConfig())


def flamingo_base() -> Blip2Run:
    """Train gated cross-attention before every fourth layer of a frozen OPT-2.7B, as in Flamingo-9B, and a resampler.

    Source: Flamingo (arXiv 2204.14198), section 3. Its interleaved images and texts are those of web pages; here they
    are pairs of the data, one to four in a sequence. Cost: twice blip2-stage2-opt. Expected: no score of the paper.
    """
    return resampler_base().derive("flamingo-base", gated=GatedConfig(num_heads=32, mlp_dim=10240), task=INTERLEAVED)


def _around_opt(name: str, connector: ConnectorConfig) -> Blip2Run:
    encoder = blip2_stage1().vision
    return blip2_stage2_opt().derive(name, vision=encoder, frozen_dtype=None, connector=connector)


def frozen_mini() -> Blip2Run:
    """Train an image encoder into a frozen language model as a few soft prompts, without stage 1.

    Source: Frozen (arXiv 2106.13884), section 3.1: the image encoder and a linear map of its mean token to two prompts
    are trained by the captions that the language model writes. Its encoder starts from random weights, here from
    openblip-mini's, as those of the other systems. Cost: twenty minutes. Expected: docs/results.md.
    """
    return replace(_with_connector("frozen-mini", SoftPromptConfig(hidden_dim=128)), train_vision=True)


def pooling_mini() -> Blip2Run:
    """Average pooling in place of the Q-Former: a grid of four by four patches is projected to the language model.

    Source: DeCo (arXiv 2405.20985), section 3, which finds that plain pooling wins. Cost: five minutes. Expected:
    docs/results.md.
    """
    return _with_connector("pooling-mini", PoolingConfig(side=4))


def patch_mlp_mini() -> Blip2Run:
    """Every patch as a prompt of the language model, through a layer and its projection, in place of the Q-Former.

    Source: LLaVA 1.5 (arXiv 2310.03744), section 3. Cost: ten minutes. Expected: docs/results.md.
    """
    return _with_connector("patch-mlp-mini", PatchMlpConfig(hidden_dim=128))


def resampler_mini() -> Blip2Run:
    """Learned queries that attend to the image and read no text, in place of the Q-Former.

    Source: Flamingo (arXiv 2204.14198), section 3.1.1. Cost: ten minutes. Expected: docs/results.md.
    """
    shape = ResamplerConfig(num_queries=8, hidden_dim=160, num_layers=4, num_heads=4, mlp_dim=640)
    return _with_connector("resampler-mini", shape)


def flamingo_mini() -> Blip2Run:
    """Train gated cross-attention layers within a frozen language model, and a resampler between it and the images.

    Source: Flamingo (arXiv 2204.14198), section 3. Its interleaved images and texts are those of web pages; here they
    are pairs of the data, one to four in a sequence. Cost: ten minutes. Expected: docs/results.md.
    """
    gated = GatedConfig(num_layers=2, num_heads=4, mlp_dim=512)
    return resampler_mini().derive("flamingo-mini", gated=gated, task=INTERLEAVED)


def _with_connector(name: str, connector: ConnectorConfig) -> Blip2Run:
    return blip2_mini_scratch_opt().derive(name, qformer=None, connector=connector)
