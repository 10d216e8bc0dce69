"""The image encoders of LAVIS' BLIP-2, EVA-CLIP's and CLIP's: in .pth files of their own, and in those of
BLIP-2.

P patch size, N image tokens, D width, M width of the MLP.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from openblip.checkpoints.checkpoint import ImageEncoder
from openblip.checkpoints.original.blip import (
    TIMM_VISION_KEYS,
    PthFile,
    grid_of,
    num_heads_of,
    num_layers_of,
    shape_of,
)
from openblip.checkpoints.state_dict import Table, as_float32, assign_weights, check_weights, translate
from openblip.data.transforms import Preprocessing
from openblip.errors import CheckpointError
from openblip.models.config import VisionConfig
from openblip.nn.vit import VisionTransformer

ENCODER_PREFIX = "visual_encoder."
"""Prefix of an image encoder's names in a file of BLIP-2."""
_QFORMER_PREFIX = "Qformer."


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
    released_depth: int
    """Number of blocks of the released encoder; BLIP-2 leaves the last one out (section 3.1)."""
    after_blocks: tuple[str, ...]
    """Prefixes of the names behind the blocks, which only a whole encoder has and BLIP-2 does not use."""
    papers: Mapping[int, str]
    """Width -> the file of the paper's encoder."""


EVA_CLIP = EncoderLayout(
    table={
        **{ours: theirs for ours, theirs in TIMM_VISION_KEYS.items() if ours != "norm"},
        # The released encoder has no bias for keys: the same bias for all keys changes no attention.
        "blocks.{i}.attention.qkv.bias": "blocks.{i}.attn.q_bias+k_bias+v_bias",
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
    released_depth=40,
    after_blocks=("norm.", "fc_norm.", "head.", "mask_token"),
    papers={1408: "eva_vit_g.pth"},
)
_BLOCK = "transformer.resblocks.{i}"
OPENAI_CLIP = EncoderLayout(
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
    released_depth=24,
    after_blocks=("ln_post.", "ln_final.", "proj"),
    papers={1024: "clip_vit_L.pth"},
)
ENCODER_LAYOUTS = (EVA_CLIP, OPENAI_CLIP)


def is_blip2_file(file: PthFile) -> bool:
    """Whether a .pth file is one of a BLIP-2."""
    return any(name.startswith(_QFORMER_PREFIX) for name in file.weights)


def holds_encoder(file: PthFile) -> bool:
    """Whether a .pth file is one for `read_encoder`."""
    return is_blip2_file(file) or any(layout.patches in file.weights for layout in ENCODER_LAYOUTS)


def read_encoder(file: PthFile) -> ImageEncoder:
    """The image encoder of a .pth file, in float32 on the CPU, in eval mode.

    A file of an encoder alone gives all blocks but the last one, and not what follows it (BLIP-2 section
    3.1). A file of a BLIP-2 gives the encoder that it was trained with, if it holds one.

    Raises CheckpointError when the file is of neither kind or is not whole.
    """
    weights, source = file.weights, str(file.path)
    if is_blip2_file(file):
        state = {
            n.removeprefix(ENCODER_PREFIX): t for n, t in weights.items() if n.startswith(ENCODER_PREFIX)
        }
        if not state:
            raise CheckpointError(
                f"{source} holds no image encoder: a frozen one is left out there. Name the encoder's own "
                "file (LAVIS' eva_vit_g.pth or clip_vit_L.pth), or a folder."
            )
        layout = encoder_layout(state)
    else:
        layout = encoder_layout(weights)
        state = _without_last_block(weights, layout)
    state = add_implied_tensors(as_float32(state), layout)
    config = infer_encoder(state, layout, source)
    with torch.device("meta"):
        model = VisionTransformer(**asdict(config))
    expected = model.state_dict()
    translated = translate(layout.table, state, expected, (), source)
    check_weights(expected, translated, source)
    assign_weights(model, translated)
    return ImageEncoder(model.eval(), config, Preprocessing(image_size=config.image_size))


def encoder_layout(state: Mapping[str, Tensor], prefix: str = "") -> EncoderLayout:
    """The kind of image encoder below `prefix`."""
    is_clip = any(name.startswith(f"{prefix}{OPENAI_CLIP.blocks}.") for name in state)
    return OPENAI_CLIP if is_clip else EVA_CLIP


def infer_encoder(
    state: Mapping[str, Tensor], layout: EncoderLayout, source: str, prefix: str = ""
) -> VisionConfig:
    """The settings of the encoder below `prefix`, from shapes; `state` is that of `add_implied_tensors`.

    Raises CheckpointError when a tensor that would show something is missing or of a strange shape, or when
    the number of heads cannot be told from the width.
    """
    width, _, patch_size, _ = shape_of(state, f"{prefix}{layout.patches}", 4, source)
    _, num_tokens, _ = shape_of(state, f"{prefix}{layout.positions}", 3, source)
    mlp_dim, _ = shape_of(state, f"{prefix}{layout.blocks}.0.{layout.mlp}", 2, source)
    return VisionConfig(
        image_size=grid_of(num_tokens, source) * patch_size,
        patch_size=patch_size,
        hidden_dim=width,
        num_layers=num_layers_of(state, f"{prefix}{layout.blocks}"),
        num_heads=num_heads_of(width, "images", source, layout.head_width),
        mlp_dim=mlp_dim,
        layer_norm_eps=layout.layer_norm_eps,
        activation=layout.activation,
        input_norm=layout.input_norm,
        output_norm=False,
    )


def _without_last_block(state: Mapping[str, Tensor], layout: EncoderLayout) -> dict[str, Tensor]:
    """An encoder up to its second-last block; one that was cut there already is left as it is."""
    depth = num_layers_of(state, layout.blocks)
    is_whole = depth == layout.released_depth or any(name.startswith(layout.after_blocks) for name in state)
    left_out = (f"{layout.blocks}.{depth - 1}.", *layout.after_blocks) if is_whole else ()
    return {name: tensor for name, tensor in state.items() if not name.startswith(left_out)}


def add_implied_tensors(
    state: Mapping[str, Tensor], layout: EncoderLayout, prefix: str = ""
) -> dict[str, Tensor]:
    """The tensors below `prefix` with what the table expects of them: batch axes, and key biases of zeros."""
    complete = dict(state)
    for name, tensor in state.items():
        if name.startswith(prefix) and name.endswith(".attn.q_bias"):
            complete.setdefault(name.replace(".q_bias", ".k_bias"), torch.zeros_like(tensor))
    for name, num_axes in _missing_axes(layout, prefix):
        if name in complete:
            complete[name] = complete[name][(None,) * num_axes]
    return complete


def drop_batch_axes(
    state: Mapping[str, Tensor], layout: EncoderLayout, prefix: str = ""
) -> dict[str, Tensor]:
    """The tensors below `prefix` in the shapes in which LAVIS keeps them."""
    dropped = dict(state)
    for name, num_axes in _missing_axes(layout, prefix):
        if name in dropped:
            dropped[name] = dropped[name][(0,) * num_axes]
    return dropped


def _missing_axes(layout: EncoderLayout, prefix: str) -> tuple[tuple[str, int], ...]:
    """The tensors that LAVIS keeps without leading axes of length one, and how many."""
    return ((f"{prefix}{layout.class_token}", 2), (f"{prefix}{layout.positions}", 1)) if layout.flat else ()
