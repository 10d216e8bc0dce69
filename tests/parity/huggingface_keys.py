"""Where transformers keeps what our BLIP keeps: one table per part, ours on the left.

`{i}` is a layer, `{mode}` the reading (encode or decode). Several names on the right are concatenated along
the first axis: we project queries, keys and values of self-attention, and keys and values of cross-attention,
in one matrix.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

Table = dict[str, tuple[str, ...]]

VISION: Table = {
    "class_token": ("embeddings.class_embedding",),
    "position_embedding": ("embeddings.position_embedding",),
    "patch_embedding": ("embeddings.patch_embedding",),
    "blocks.{i}.attention_norm": ("encoder.layers.{i}.layer_norm1",),
    "blocks.{i}.attention.qkv": ("encoder.layers.{i}.self_attn.qkv",),
    "blocks.{i}.attention.out": ("encoder.layers.{i}.self_attn.projection",),
    "blocks.{i}.mlp_norm": ("encoder.layers.{i}.layer_norm2",),
    "blocks.{i}.mlp.0": ("encoder.layers.{i}.mlp.fc1",),
    "blocks.{i}.mlp.2": ("encoder.layers.{i}.mlp.fc2",),
    "norm": ("post_layernorm",),
}

_SELF = "encoder.layer.{i}.attention"
_CROSS = "encoder.layer.{i}.crossattention"
TEXT: Table = {
    "embeddings.variants.shared.word": ("embeddings.word_embeddings",),
    "embeddings.variants.shared.position": ("embeddings.position_embeddings",),
    "embeddings.variants.shared.norm": ("embeddings.LayerNorm",),
    "layers.{i}.self_attention.variants.{mode}.branch.qkv": tuple(
        f"{_SELF}.self.{part}" for part in ("query", "key", "value")
    ),
    "layers.{i}.self_attention.variants.{mode}.branch.out": (f"{_SELF}.output.dense",),
    "layers.{i}.self_attention.variants.{mode}.norm": (f"{_SELF}.output.LayerNorm",),
    "layers.{i}.cross_attention.variants.shared.branch.query": (f"{_CROSS}.self.query",),
    "layers.{i}.cross_attention.variants.shared.branch.key_value": (
        f"{_CROSS}.self.key",
        f"{_CROSS}.self.value",
    ),
    "layers.{i}.cross_attention.variants.shared.branch.out": (f"{_CROSS}.output.dense",),
    "layers.{i}.cross_attention.variants.shared.norm": (f"{_CROSS}.output.LayerNorm",),
    "layers.{i}.feed_forward.variants.shared.branch.0": ("encoder.layer.{i}.intermediate.dense",),
    "layers.{i}.feed_forward.variants.shared.branch.2": ("encoder.layer.{i}.output.dense",),
    "layers.{i}.feed_forward.variants.shared.norm": ("encoder.layer.{i}.output.LayerNorm",),
}

LM_HEAD: Table = {
    "lm_head.transform": ("cls.predictions.transform.dense",),
    "lm_head.norm": ("cls.predictions.transform.LayerNorm",),
    "lm_head.bias": ("cls.predictions.bias",),
}

# Of theirs, tied to another weight or computed: nothing to copy.
DERIVED = ("position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias")


def copy_weights(
    theirs: nn.Module, ours: nn.Module, table: Table, *, mode: str = "", prefix: str = ""
) -> None:
    """Load `theirs` into `ours`; every tensor of both must be named by the table.

    `prefix` stands before every name of theirs.
    """
    given = {name.removeprefix(prefix): tensor for name, tensor in theirs.state_dict().items()}
    left_over = {name for name in given if not name.endswith(DERIVED)}
    converted: dict[str, Tensor] = {}
    for name in ours.state_dict():
        sources = list(_sources(name, table, mode))
        converted[name] = torch.cat([given[source] for source in sources])
        left_over -= set(sources)
    assert not left_over, f"theirs, without a place in ours: {sorted(left_over)}"
    ours.load_state_dict(converted)


def _sources(name: str, table: Table, mode: str) -> Iterator[str]:
    """Names of theirs for one tensor of ours."""
    module, _, kind = name.rpartition(".")
    layer = next((part for part in name.split(".") if part.isdigit()), "")
    for pattern, theirs in table.items():
        own = pattern.format(i=layer, mode=mode)
        if name == own:
            return (yield from (their.format(i=layer) for their in theirs))
        if module == own:
            return (yield from (f"{their.format(i=layer)}.{kind}" for their in theirs))
    raise AssertionError(f"ours, without a place in the table: {name}")
