"""The released code's models as plain functions over the tensors of a .pth file, slow and obvious.

Written from the released modules' behaviour, with nothing of ours. Also how its names became transformers'.

B images, R texts, N image tokens, T text tokens, D width, H heads of 64.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]

# The image side was renamed when the checkpoints were converted for transformers; texts and heads were not.
_RENAMED = [
    (r"visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision_model.encoder.layers.\1.self_attn.qkv."),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
    (r"visual_encoder\.patch_embed\.proj\.", r"vision_model.embeddings.patch_embedding."),
    (r"visual_encoder\.pos_embed", r"vision_model.embeddings.position_embedding"),
    (r"visual_encoder\.cls_token", r"vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.norm\.", r"vision_model.post_layernorm."),
]


def as_transformers(released: State) -> State:
    """The same tensors by transformers' names."""
    renamed = {}
    for name, tensor in released.items():
        for pattern, replacement in _RENAMED:
            name = re.sub(rf"^{pattern}", replacement, name)
        renamed[name] = tensor
    return renamed


def vit(state: State, pixels: Tensor) -> Tensor:
    """float (B, 3, S, S) -> (B, N, D)."""
    v = "visual_encoder."
    weight = state[f"{v}patch_embed.proj.weight"]
    patches = F.conv2d(pixels, weight, state[f"{v}patch_embed.proj.bias"], stride=weight.shape[-1])
    x = patches.flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{v}cls_token"].expand(len(x), -1, -1), x], dim=1) + state[f"{v}pos_embed"]
    i = 0
    while f"{v}blocks.{i}.norm1.weight" in state:
        block = f"{v}blocks.{i}."
        query, key, value = _linear(state, f"{block}attn.qkv", _norm(state, f"{block}norm1", x, 1e-6)).chunk(3, -1)
        x = x + _linear(state, f"{block}attn.proj", _attention(query, key, value))
        hidden = F.gelu(_linear(state, f"{block}mlp.fc1", _norm(state, f"{block}norm2", x, 1e-6)))
        x = x + _linear(state, f"{block}mlp.fc2", hidden)
        i += 1
    return _norm(state, f"{v}norm", x, 1e-6)


def bert(
    state: State,
    home: str,
    ids: Tensor,
    mask: Tensor,
    context: Tensor | tuple[Tensor, Tensor],
    context_mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """ids and mask (R, T) with each its context (R, N, Dc), or the two images of a pair -> (R, T, D)."""
    e = f"{home}.embeddings."
    positions = state[f"{e}position_embeddings.weight"][: ids.shape[1]]
    x = _norm(state, f"{e}LayerNorm", state[f"{e}word_embeddings.weight"][ids] + positions, 1e-12)
    seen = mask[:, None, None].expand(-1, 1, ids.shape[1], -1)
    if causal:
        seen = seen & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    i = 0
    while f"{home}.encoder.layer.{i}.output.dense.weight" in state:
        layer = f"{home}.encoder.layer.{i}."
        mixed = _mixed(state, f"{layer}attention.self", x, x, seen)
        x = _residual(state, f"{layer}attention.output", _linear(state, f"{layer}attention.output.dense", mixed), x)
        if isinstance(context, tuple):
            crossed = _pair(state, f"{layer}crossattention.", x, context)
        else:
            seen_context = None if context_mask is None else context_mask[:, None, None]
            crossed = _linear(
                state,
                f"{layer}crossattention.output.dense",
                _mixed(state, f"{layer}crossattention.self", x, context, seen_context),
            )
        x = _residual(state, f"{layer}crossattention.output", crossed, x)
        hidden = F.gelu(_linear(state, f"{layer}intermediate.dense", x))
        x = _residual(state, f"{layer}output", _linear(state, f"{layer}output.dense", hidden), x)
        i += 1
    return x


def words(state: State, hidden: Tensor) -> Tensor:
    """(R, T, D) -> logits (R, T, V)."""
    head = "text_decoder.cls.predictions."
    x = F.gelu(_linear(state, f"{head}transform.dense", hidden))
    x = _norm(state, f"{head}transform.LayerNorm", x, 1e-12)
    return _linear(state, f"{head}decoder", x)


def nlvr_prediction(state: State, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Pairs of images (B, 2, 3, S, S) and statements (B, T) -> (B, 2)."""
    images = vit(state, pixels[:, 0]), vit(state, pixels[:, 1])
    first = bert(state, "text_encoder", ids, mask, images)[:, 0]
    return _linear(state, "cls_head.2", _linear(state, "cls_head.0", first).relu())


def vqa_logits(
    state: State, pixels: Tensor, question: Tensor, question_mask: Tensor, answer: Tensor, answer_mask: Tensor
) -> Tensor:
    """Logits (B, A, V) of answers (B, A), as the training loss reads them."""
    states = bert(state, "text_encoder", question, question_mask, vit(state, pixels))
    decoded = bert(state, "text_decoder.bert", answer, answer_mask, states, question_mask, causal=True)
    return words(state, decoded)


def _pair(state: State, cross: str, x: Tensor, images: tuple[Tensor, Tensor]) -> Tensor:
    parts = [
        _linear(state, f"{cross}output.dense{k}", _mixed(state, f"{cross}self{k}", x, images[k], None)) for k in (0, 1)
    ]
    if f"{cross}output.merge_layer.weight" in state:
        return _linear(state, f"{cross}output.merge_layer", torch.cat(parts, dim=-1))
    return (parts[0] + parts[1]) / 2


def _mixed(state: State, name: str, x: Tensor, context: Tensor, seen: Tensor | None) -> Tensor:
    query = _linear(state, f"{name}.query", x)
    return _attention(query, _linear(state, f"{name}.key", context), _linear(state, f"{name}.value", context), seen)


def _attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
    query, key, value = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(64)
    if seen is not None:
        scores = scores.masked_fill(~seen, -10000.0)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def _residual(state: State, name: str, x: Tensor, before: Tensor) -> Tensor:
    return _norm(state, f"{name}.LayerNorm", x + before, 1e-12)


def _norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])
