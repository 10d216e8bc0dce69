"""Where LAVIS keeps what our BLIP-2 keeps: names, and the frozen parts that its files leave out.

The image side is EVA-CLIP's ViT or OpenAI's CLIP's; the Q-Former has BERT's names, with a second feed-forward
for the queries.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from openblip.checkpoints.blip2_huggingface_keys import qformer_layers
from openblip.checkpoints.huggingface_keys import LM_HEAD
from openblip.checkpoints.key_table import Table, within
from openblip.checkpoints.original_keys import VISION

QFORMER, BERT = "Qformer", "Qformer.bert"
ENCODER = "visual_encoder."
QUERIES = "query_tokens"
WORDS = f"{BERT}.embeddings.word_embeddings.weight"
POSITION_IDS = f"{BERT}.embeddings.position_ids"  # a buffer, in every file
TIED = f"{QFORMER}.cls.predictions.decoder."  # the word embeddings and cls.predictions.bias once more

TRAINED: Table = {  # Blip2Qformer, and what Blip2OPT and Blip2T5 keep of it
    "vision_norm": "ln_vision",
    "qformer.embeddings.queries": QUERIES,
    "qformer.embeddings.word": f"{BERT}.embeddings.word_embeddings",
    "qformer.embeddings.position": f"{BERT}.embeddings.position_embeddings",
    "qformer.embeddings.norm": f"{BERT}.embeddings.LayerNorm",
    **within(qformer_layers("self", reads_text=True), "qformer.", f"{BERT}.encoder."),
    **within(LM_HEAD, "qformer.", f"{QFORMER}."),
    "log_temperature": "temp",  # its logarithm
    **{head: head for head in ("vision_proj", "text_proj", "itm_head")},
}


class EncoderLayout(NamedTuple):
    """How LAVIS keeps one kind of ViT, and what is the same in all of that kind."""

    table: Table
    patches: str
    """Name of the weight (D, 3, P, P)."""
    positions: str
    """Name of the tensor (1, N, D), or (N, D) where `flat`."""
    class_token: str
    blocks: str
    mlp: str
    """Name, in a block, of the weight (M, D)."""
    head_width: int
    layer_norm_eps: float
    activation: Literal["gelu", "quick_gelu"]
    input_norm: bool
    flat: bool
    """Whether class token and positions have no batch axis."""
    whole_depth: int
    """Blocks of the encoder as it was released; BLIP-2 leaves the last one out (section 3.1)."""
    after: tuple[str, ...]
    """Beginnings of the names behind the blocks, which only a whole encoder has and BLIP-2 does not use."""
    papers: Mapping[int, str]
    """Width -> the file of the paper's encoder."""


EVA = EncoderLayout(
    table={
        **{ours: theirs for ours, theirs in VISION.items() if ours != "norm"},
        # The released encoder has no bias for keys: the same bias for all keys changes no attention.
        "blocks.{i}.attention.qkv.bias": tuple(f"blocks.{{i}}.attn.{part}_bias" for part in "qkv"),
    },
    patches="patch_embed.proj.weight",
    positions="pos_embed",
    class_token="cls_token",
    blocks="blocks",
    mlp="mlp.fc1.weight",
    head_width=88,
    layer_norm_eps=1e-6,
    activation="gelu",
    input_norm=False,
    flat=False,
    whole_depth=40,
    after=("norm.", "fc_norm.", "head.", "mask_token"),
    papers={1408: "eva_vit_g.pth"},
)
_BLOCK = "transformer.resblocks.{i}"
CLIP = EncoderLayout(
    table={
        "class_token": "class_embedding",
        "position_embedding": "positional_embedding",
        "patch_embedding": "conv1",
        "input_norm": "ln_pre",
        "blocks.{i}.attention_norm": f"{_BLOCK}.ln_1",
        "blocks.{i}.attention.qkv.weight": f"{_BLOCK}.attn.in_proj_weight",
        "blocks.{i}.attention.qkv.bias": f"{_BLOCK}.attn.in_proj_bias",
        "blocks.{i}.attention.out": f"{_BLOCK}.attn.out_proj",
        "blocks.{i}.mlp_norm": f"{_BLOCK}.ln_2",
        "blocks.{i}.mlp.0": f"{_BLOCK}.mlp.c_fc",
        "blocks.{i}.mlp.2": f"{_BLOCK}.mlp.c_proj",
    },
    patches="conv1.weight",
    positions="positional_embedding",
    class_token="class_embedding",
    blocks="transformer.resblocks",
    mlp="mlp.c_fc.weight",
    head_width=64,
    layer_norm_eps=1e-5,
    activation="quick_gelu",
    input_norm=True,
    flat=True,
    whole_depth=24,
    after=("ln_post.", "ln_final.", "proj"),
    papers={1024: "clip_vit_L.pth"},
)
ENCODERS = (EVA, CLIP)


class LanguageLayout(NamedTuple):
    """How LAVIS keeps the projection to one kind of language model, and how it uses that one."""

    model_type: str
    """Of transformers."""
    projection: str
    weights: str
    """Beginning of the names of the language model's own weights."""
    instructed: tuple[bool, ...]
    """Whether its Q-Former reads instructions: what LAVIS has models for."""
    end_of_text: str | None
    changes: Mapping[str, str]
    """Settings that LAVIS gives the language model in place of its own."""
    question_prompt: str
    papers: Mapping[int, str]
    """Width -> the paper's language model."""


LANGUAGES = (
    LanguageLayout(
        "opt",
        "opt_proj",
        "opt_model.",
        (False,),
        "\n",
        {},
        "Question: {} Answer:",
        {2560: "facebook/opt-2.7b", 4096: "facebook/opt-6.7b"},
    ),
    LanguageLayout(
        "t5",
        "t5_proj",
        "t5_model.",
        (False, True),
        None,
        {"dense_act_fn": "gelu"},
        "Question: {} Short answer:",
        {2048: "google/flan-t5-xl", 4096: "google/flan-t5-xxl"},
    ),
    LanguageLayout(  # InstructBLIP's
        "llama",
        "llm_proj",
        "llm_model.",
        (False, True),
        None,
        {},
        "Question: {} Short answer:",
        {4096: "lmsys/vicuna-7b-v1.1", 5120: "lmsys/vicuna-13b-v1.1"},
    ),
)
