"""Where pre-training starts: a ViT for the image side of BLIP (section 4.1), BERT for its text side and for
the Q-Former of BLIP-2 (BLIP-2 section 3.1).

Both are read from Hugging Face checkpoints, by folder or hub name, through transformers, which fetches them
and knows every file layout. The tables below name what each of our parameters comes from; what a table and
the named exceptions do not account for is an error.

R rows of the word embeddings, D width, N image tokens.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from openblip.checkpoints.from_transformers import read_config, read_model
from openblip.checkpoints.huggingface_keys import VISION as BLIP_VISION
from openblip.checkpoints.key_table import Table, refuse, translate
from openblip.errors import CheckpointError
from openblip.nn.attention import SelfAttention
from openblip.nn.qformer import QFormer, QFormerLayer
from openblip.nn.text_transformer import TextTransformer
from openblip.nn.vit import VisionTransformer, VitBlock, interpolate_positions

VIT: Table = {  # ViTModel, DeiTModel
    "class_token": "embeddings.cls_token",
    "position_embedding": "embeddings.position_embeddings",
    "patch_embedding": "embeddings.patch_embeddings.projection",
    "blocks.{i}.attention_norm": "layers.{i}.layernorm_before",
    "blocks.{i}.attention.qkv": (
        "layers.{i}.attention.q_proj",
        "layers.{i}.attention.k_proj",
        "layers.{i}.attention.v_proj",
    ),
    "blocks.{i}.attention.out": "layers.{i}.attention.o_proj",
    "blocks.{i}.mlp_norm": "layers.{i}.layernorm_after",
    "blocks.{i}.mlp.0": "layers.{i}.mlp.fc1",
    "blocks.{i}.mlp.2": "layers.{i}.mlp.fc2",
    "norm": "layernorm",
}

BERT: Table = {  # BertForMaskedLM; ours without the mode, since every reading starts from the same BERT
    "embeddings.word.weight": "bert.embeddings.word_embeddings.weight",
    "embeddings.position.weight": "bert.embeddings.position_embeddings.weight",
    "embeddings.norm": "bert.embeddings.LayerNorm",
    "layers.{i}.self_attention.branch.qkv": (
        "bert.encoder.layer.{i}.attention.self.query",
        "bert.encoder.layer.{i}.attention.self.key",
        "bert.encoder.layer.{i}.attention.self.value",
    ),
    "layers.{i}.self_attention.branch.out": "bert.encoder.layer.{i}.attention.output.dense",
    "layers.{i}.self_attention.norm": "bert.encoder.layer.{i}.attention.output.LayerNorm",
    "layers.{i}.feed_forward.branch.0": "bert.encoder.layer.{i}.intermediate.dense",
    "layers.{i}.feed_forward.branch.2": "bert.encoder.layer.{i}.output.dense",
    "layers.{i}.feed_forward.norm": "bert.encoder.layer.{i}.output.LayerNorm",
    "lm_head.transform": "cls.predictions.transform.dense",
    "lm_head.norm": "cls.predictions.transform.LayerNorm",
    "lm_head.bias": "cls.predictions.bias",
}

_FEED_FORWARD = "layers.{i}.feed_forward."
# A Q-Former has two feed-forwards, of queries and of text, which both start as BERT's.
QFORMER: Table = {name: row for name, row in BERT.items() if not name.startswith(_FEED_FORWARD)} | {
    name.replace("feed_forward", f"{kind}_feed_forward"): row
    for name, row in BERT.items()
    if name.startswith(_FEED_FORWARD)
    for kind in ("query", "text")
}

# Older releases of transformers name a ViT's parameters in memory as its files do; newer ones as in `VIT`.
VIT_FILE_NAMES = {
    "encoder.layer.": "layers.",
    "attention.attention.query.": "attention.q_proj.",
    "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.",
    "attention.output.dense.": "attention.o_proj.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
}

# What a checkpoint may have that we have no use for.
UNUSED_VISION = (
    "pooler.",  # a layer over the class token that only classification trains; BLIP projects the token itself
    "classifier.",  # ImageNet's classes
    "cls_classifier.",
    "distillation_classifier.",
    "embeddings.distillation_token",  # DeiT's second class token; the paper's DeiT-B was trained without it
    "embeddings.mask_token",  # of masked-image training
)
UNUSED_TEXT = (
    "bert.pooler.",  # for next-sentence prediction
    "cls.seq_relationship.",  # next-sentence prediction
    "bert.embeddings.position_ids",  # 0, 1, 2, ..., in older files
    # BLIP has one kind of text and no token types. BERT adds row 0 to every token; the released code drops it
    # without folding it into the other embeddings, and so do we.
    "bert.embeddings.token_type_embeddings.",
    "cls.predictions.decoder.",  # tied to the word embeddings and to cls.predictions.bias
)
# Ours that BERT does not have: the released code starts cross-attention from random weights too.
FRESH_TEXT = (".cross_attention.", "embeddings.queries")
NUM_NEW_WORDS = 2  # [DEC] and [ENC], whose rows keep their random start


def init_vision(vision: VisionTransformer, source: str) -> None:
    """Start a ViT from a Hugging Face ViTModel, DeiTModel or BlipVisionModel, in place.

    Position embeddings are interpolated to the resolution of `vision`. The layer norms keep their own
    epsilon: 1e-6 as in the released code, where Hugging Face's ViTs say 1e-12.

    Args:
        vision: on any device, in any dtype.
        source: folder or hub name, e.g. "facebook/deit-base-patch16-224".

    Raises:
        CheckpointError: there is no such checkpoint, it cannot be fetched, it is of another kind or shape, or
            keys are missing or left over; they are listed.
    """
    config = read_config(source)
    kinds = {"vit": "ViTModel", "deit": "DeiTModel", "blip_vision_model": "BlipVisionModel"}
    if config.model_type not in kinds:
        raise CheckpointError(
            f"{source} is a {config.model_type}; the image side starts from one of {', '.join(kinds)}."
        )
    block = cast(VitBlock, vision.blocks[0])
    _check_kind(source, config, block.attention.num_heads)
    theirs = _read_weights(kinds[config.model_type], source, UNUSED_VISION)
    if config.model_type != "blip_vision_model":
        theirs = {_newest_vit_name(name): tensor for name, tensor in theirs.items()}
    ours = dict(vision.named_parameters())
    table = BLIP_VISION if config.model_type == "blip_vision_model" else VIT
    found = translate(table, theirs, set(ours), UNUSED_VISION, source)
    positions = found["position_embedding"]  # (1, N, D)
    if config.model_type == "deit":
        positions = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)  # without the distillation token's
    found["position_embedding"] = interpolate_positions(positions, _grid(vision))
    _copy(found, ours, source)


def init_text(text: TextTransformer, source: str) -> None:
    """Start a text transformer from a Hugging Face BERT, in place, whatever its readings share.

    Both readings start from BERT's self-attention, feed-forward and embeddings, the decoder's head from
    BERT's where the checkpoint has one. Cross-attention, and the rows of the words BERT does not know ([DEC]
    and [ENC], the last ones), keep their random start.

    Args:
        text: on any device, in any dtype.
        source: folder or hub name, e.g. "bert-base-uncased".

    Raises:
        CheckpointError: as in `init_vision`, or `text` has another vocabulary.
    """
    first = cast(Any, text.layers[0])
    readings = first.self_attention.variants.values()
    unused = () if text.lm_head is not None else ("cls.predictions.",)
    _start_from_bert(text, BERT, source, next(iter(readings)).branch.num_heads, unused)


def init_qformer(qformer: QFormer, source: str) -> None:
    """Start a Q-Former from a Hugging Face BERT, in place.

    Self-attention and the feed-forwards of queries and of text start as BERT's, and so do embeddings and
    ITG's head where the Q-Former has them. Queries, cross-attention and the rows of new words ([DEC]) keep
    their random start, as in the released code.

    Args:
        qformer: on any device, in any dtype.
        source: folder or hub name, e.g. "bert-base-uncased".

    Raises:
        CheckpointError: as in `init_text`.
    """
    first = cast(QFormerLayer, qformer.layers[0])
    num_heads = cast(SelfAttention, first.self_attention.branch).num_heads
    unused = [] if qformer.lm_head is not None else ["cls.predictions."]
    if qformer.embeddings.word is None:
        unused += ["bert.embeddings.word_embeddings.", "bert.embeddings.position_embeddings."]
    _start_from_bert(qformer, QFORMER, source, num_heads, tuple(unused))


def _start_from_bert(
    model: nn.Module, table: Table, source: str, num_heads: int, not_ours: tuple[str, ...]
) -> None:
    """Put a BERT's weights in their places; `not_ours`: what of it the model has no place for."""
    config = read_config(source)
    if config.model_type != "bert":
        raise CheckpointError(f"{source} is a {config.model_type}; the text side starts from a bert.")
    _check_kind(source, config, num_heads)
    theirs = _read_weights("BertForMaskedLM", source, UNUSED_TEXT)
    has_head = any(n.startswith("cls.predictions.") and not n.startswith(UNUSED_TEXT) for n in theirs)
    ours = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not any(part in name for part in FRESH_TEXT) and (has_head or not name.startswith("lm_head."))
    }
    found = translate(table, theirs, set(ours), (*UNUSED_TEXT, *not_ours), source)
    _copy(_fit_tables(found, ours, source), ours, source)


def _fit_tables(found: dict[str, Tensor], ours: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Word tables with our new rows put after BERT's, position tables cut to our length."""
    fitted = dict(found)
    for name, tensor in found.items():
        rows = len(ours[name])
        if name.endswith((".word.weight", "lm_head.bias")):
            if not 0 <= rows - len(tensor) <= NUM_NEW_WORDS:
                raise CheckpointError(
                    f"{source} has {len(tensor)} words, the run's tokenizer {rows}: use BERT's own."
                )
            new_rows = ours[name].detach()[len(tensor) :].to(tensor)
            fitted[name] = torch.cat([tensor, new_rows])  # (R, D) or (R,)
        elif name.endswith(".position.weight"):
            fitted[name] = tensor[:rows]  # positions are absolute: a shorter text uses the first ones
    return fitted


def _read_weights(class_name: str, source: str, unused: tuple[str, ...]) -> dict[str, Tensor]:
    """The float32 weights of `source` as `class_name` names them, without those it has made up itself.

    Raises CheckpointError when the file has keys, besides `unused`, that the class does not know.
    """
    loaded = read_model(getattr(transformers, class_name), source, dtype=torch.float32)
    prefix = f"{loaded.model.base_model_prefix}."
    refuse(source, set(), {n for n in loaded.left_over if not _is_unused(n, prefix, unused)})
    return {n: tensor for n, tensor in loaded.model.state_dict().items() if n not in loaded.missing}


def _copy(found: Mapping[str, Tensor], ours: Mapping[str, nn.Parameter], source: str) -> None:
    """Put `found` into `ours`, whose names they have; CheckpointError when shapes differ."""
    wrong = [
        f"{name} is {tuple(found[name].shape)}, the run's model has {tuple(ours[name].shape)}"
        for name in ours
        if found[name].shape != ours[name].shape
    ]
    if wrong:
        raise CheckpointError(f"{source} has another shape than the run's model: {'; '.join(wrong)}.")
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(found[name])


def _check_kind(source: str, config: Any, num_heads: int) -> None:
    """What the shapes of weights do not show."""
    if config.num_attention_heads != num_heads:
        raise CheckpointError(
            f"{source} has {config.num_attention_heads} attention heads, the run's model {num_heads}."
        )
    if config.hidden_act != "gelu":
        raise CheckpointError(f"{source} computes with {config.hidden_act}; BLIP's layers are gelu.")


def _grid(vision: VisionTransformer) -> int:
    """Patches a side."""
    return math.isqrt(vision.position_embedding.shape[1] - 1)


def _newest_vit_name(name: str) -> str:
    for old, new in VIT_FILE_NAMES.items():
        name = name.replace(old, new)
    return name


def _is_unused(name: str, prefix: str, unused: tuple[str, ...]) -> bool:
    """Whether a key of a file is among the exceptions; the bare model's file has its keys without prefix."""
    return name.startswith(unused) or f"{prefix}{name}".startswith(unused)
