"""Where transformers keeps what our BLIP-2 keeps: settings (configuration_blip_2) and weights
(modeling_blip_2, modeling_instructblip). The language model's weights keep their names, see
`blip2_huggingface_language.py`.
"""

from collections.abc import Mapping
from typing import NamedTuple

from openblip.checkpoints.huggingface_keys import TEXT_SETTINGS, VISION
from openblip.checkpoints.key_table import Table, within
from openblip.models.config import Blip2Head

QFORMER_SETTINGS = {  # QFormerConfig, Blip2QFormerConfig
    **TEXT_SETTINGS,
    "cross_attention_every": "cross_attention_frequency",
}


class Blip2Layout(NamedTuple):
    """How a class of transformers keeps a model of ours, its language model apart."""

    heads: tuple[Blip2Head, ...]
    table: Table
    derived: tuple[str, ...]
    """Beginnings of the names whose tensors say nothing new."""
    instructed: bool = False


def qformer_layers(attention: str, reads_text: bool) -> Table:
    """The Q-Former's layers, which formats name as BERT's; `attention` is what they call its inner part."""
    ours, own, cross = "layers.{i}", "layer.{i}.attention", "layer.{i}.crossattention"
    own_inner, cross_inner = f"{own}.{attention}", f"{cross}.{attention}"
    table: dict[str, str | tuple[str, ...]] = {
        f"{ours}.self_attention.branch.qkv": (
            f"{own_inner}.query",
            f"{own_inner}.key",
            f"{own_inner}.value",
        ),
        f"{ours}.self_attention.branch.out": f"{own}.output.dense",
        f"{ours}.self_attention.norm": f"{own}.output.LayerNorm",
        f"{ours}.cross_attention.branch.query": f"{cross_inner}.query",
        f"{ours}.cross_attention.branch.key_value": (
            f"{cross_inner}.key",
            f"{cross_inner}.value",
        ),
        f"{ours}.cross_attention.branch.out": f"{cross}.output.dense",
        f"{ours}.cross_attention.norm": f"{cross}.output.LayerNorm",
    }
    for kind, ending in (("query", "_query"), ("text", "")) if reads_text else (("query", "_query"),):
        table |= {
            f"{ours}.{kind}_feed_forward.branch.0": f"layer.{{i}}.intermediate{ending}.dense",
            f"{ours}.{kind}_feed_forward.branch.2": f"layer.{{i}}.output{ending}.dense",
            f"{ours}.{kind}_feed_forward.norm": f"layer.{{i}}.output{ending}.LayerNorm",
        }
    return table


_IMAGE: Table = {
    **within({name: row for name, row in VISION.items() if name != "norm"}, "vision.", "vision_model."),
    "vision_norm": "vision_model.post_layernorm",
    "qformer.embeddings.queries": "query_tokens",
}
_QUERIES: Table = within(qformer_layers("attention", reads_text=False), "qformer.", "qformer.encoder.")
_TEXTS: Table = within(qformer_layers("attention", reads_text=True), "qformer.", "qformer.encoder.")
_PROJECTION: Table = {"language_proj": "language_projection"}


def _embeddings(words: str, norm: str) -> Table:
    return {
        "qformer.embeddings.word": f"{words}.word_embeddings",
        "qformer.embeddings.position": f"{words}.position_embeddings",
        "qformer.embeddings.norm": norm,
    }


_WRITER = Blip2Layout(
    heads=("llm",),
    table={**_IMAGE, **_QUERIES, **_PROJECTION, "qformer.embeddings.norm": "qformer.layernorm"},
    derived=("qformer.embeddings.position_ids",),  # 0, 1, 2, ..., of a text branch that is not there
)
LAYOUTS: Mapping[str, Blip2Layout] = {
    "Blip2ForConditionalGeneration": _WRITER,
    "Blip2Model": _WRITER,  # the same weights under another class
    "Blip2ForImageTextRetrieval": Blip2Layout(
        heads=("itc", "itm"),
        table={
            **_IMAGE,
            **_TEXTS,
            **_embeddings("embeddings", "qformer.layernorm"),
            "vision_proj": "vision_projection",
            "text_proj": "text_projection",
            "itm_head": "itm_head",
        },
        derived=("embeddings.position_ids",),
    ),
    "InstructBlipForConditionalGeneration": Blip2Layout(
        heads=("llm",),
        instructed=True,
        table={
            **_IMAGE,
            **_TEXTS,
            **_PROJECTION,
            **_embeddings("qformer.embeddings", "qformer.embeddings.layernorm"),
        },
        derived=("qformer.embeddings.position_ids",),
    ),
}
