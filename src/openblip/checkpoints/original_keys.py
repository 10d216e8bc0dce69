"""Where the original .pth files keep what our BLIP keeps: the released code's names.

The image side has timm's names; the text has those that transformers took over.
"""

from collections.abc import Mapping

from openblip.checkpoints.huggingface_keys import DECODER, ENCODER, LM_HEAD, TEXT, TIED, position_ids
from openblip.checkpoints.key_table import Layout, Table, within

# State of a training that no model has: momentum copies and queues of features. Left out, not an error.
TRAINING_ONLY = (
    "visual_encoder_m.",
    "text_encoder_m.",
    "vision_proj_m.",
    "text_proj_m.",
    "image_queue",
    "text_queue",
    "idx_queue",  # image ids of the queues' entries, retrieval
    "queue_ptr",  # pre-training; in LAVIS retrieval too
    "ptr_queue",  # retrieval
)

VISION: Table = {  # timm's VisionTransformer
    "class_token": "cls_token",
    "position_embedding": "pos_embed",
    "patch_embedding": "patch_embed.proj",
    "blocks.{i}.attention_norm": "blocks.{i}.norm1",
    "blocks.{i}.attention.qkv": "blocks.{i}.attn.qkv",
    "blocks.{i}.attention.out": "blocks.{i}.attn.proj",
    "blocks.{i}.mlp_norm": "blocks.{i}.norm2",
    "blocks.{i}.mlp.0": "blocks.{i}.mlp.fc1",
    "blocks.{i}.mlp.2": "blocks.{i}.mlp.fc2",
    "norm": "norm",
}

_CROSS = "encoder.layer.{i}.crossattention"
PAIR: Table = {  # nlvr_encoder: cross-attention over two images
    "layers.{i}.cross_attention.branch.first.query": f"{_CROSS}.self0.query",
    "layers.{i}.cross_attention.branch.first.key_value": (f"{_CROSS}.self0.key", f"{_CROSS}.self0.value"),
    "layers.{i}.cross_attention.branch.first.out": f"{_CROSS}.output.dense0",
    "layers.{i}.cross_attention.branch.second.query": f"{_CROSS}.self1.query",
    "layers.{i}.cross_attention.branch.second.key_value": (f"{_CROSS}.self1.key", f"{_CROSS}.self1.value"),
    "layers.{i}.cross_attention.branch.second.out": f"{_CROSS}.output.dense1",
    "layers.{i}.cross_attention.branch.merge": f"{_CROSS}.output.merge_layer",  # from the middle layer on
}

_BODY: Table = {**within(VISION, "vision.", "visual_encoder."), **within(TEXT, "text.", "{text}.")}
_LM_HEAD: Table = within(LM_HEAD, "text.", "text_decoder.")
_MATCHING: Table = {
    "log_temperature": "temp",  # its logarithm, see `original.py`
    **{head: head for head in ("vision_proj", "text_proj", "itm_head")},
}
_ENCODER = {"encode": ENCODER}
_DECODER = {"decode": DECODER}
_BOTH = {**_ENCODER, **_DECODER}

LAYOUTS: Mapping[str, Layout] = {
    "pre-trained": Layout(  # BLIP_Pretrain
        heads=("itc", "itm", "lm"),
        table={**_BODY, **_LM_HEAD, **_MATCHING},
        homes=_BOTH,
        derived=(TIED, *position_ids(_BOTH)),
    ),
    "captions": Layout(  # BLIP_Decoder
        heads=("lm",),
        table={**_BODY, **_LM_HEAD},
        homes=_DECODER,
        derived=(TIED, *position_ids(_DECODER)),
    ),
    "retrieval": Layout(  # BLIP_Retrieval, BLIP_ITM
        heads=("itc", "itm"),
        table={**_BODY, **_MATCHING},
        homes=_ENCODER,
        derived=position_ids(_ENCODER),
    ),
    "VQA": Layout(  # BLIP_VQA
        heads=("vqa",),
        table={**_BODY, **_LM_HEAD},
        homes=_BOTH,
        derived=(TIED, *position_ids(_BOTH)),
    ),
    "NLVR2": Layout(  # BLIP_NLVR
        heads=("nlvr",),
        table={**_BODY, **within(PAIR, "text.", "{text}."), "nlvr_head.{i}": "cls_head.{i}"},
        homes=_ENCODER,
        derived=position_ids(_ENCODER),
    ),
}
