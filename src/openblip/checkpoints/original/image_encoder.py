"""The image encoders of LAVIS' BLIP-2, EVA-CLIP's and CLIP's: in .pth files of their own, and in those of BLIP-2.

P patch size, N image tokens, D width, M width of the MLP.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openblip.checkpoints import state_dict
from openblip.checkpoints.backbones import build_vit, empty_vit
from openblip.checkpoints.checkpoint import ImageEncoder
from openblip.checkpoints.original.blip import TIMM_VISION_KEYS, PthFile, infer_vit, layer_numbers
from openblip.checkpoints.state_dict import State, Table
from openblip.data.config import Preprocessing
from openblip.errors import CheckpointError
from openblip.models.config import VisionConfig

ENCODER_PREFIX = "visual_encoder."
"""Prefix of an image encoder's names in a file of BLIP-2."""
_QFORMER_PREFIX = "Qformer."


class EncoderLayout(NamedTuple):
    """How LAVIS keeps one kind of ViT, and what is the same in all of that kind."""

    table: Table
    settings: Mapping[str, Any]
    """Settings of its `VisionConfig` that no shape tells."""
    head_width: int
    has_batch_axes: bool
    """Whether class token and positions are (1, 1, D) and (1, N, D), not (D,) and (N, D)."""
    released_depth: int
    """Number of blocks of the released encoder; BLIP-2 leaves the last one out (section 3.1)."""
    after_blocks: tuple[str, ...]
    """Prefixes of the names behind the blocks, which only a whole encoder has and BLIP-2 does not use."""
    papers: Mapping[int, str]
    """Width -> the file of the paper's encoder."""

    @property
    def blocks(self) -> str:
        """Prefix of the blocks' names."""
        return self.table["blocks.{i}.mlp.0"].partition("{i}")[0]


EVA_CLIP = EncoderLayout(
    table={
        **{name: timm_name for name, timm_name in TIMM_VISION_KEYS.items() if name != "norm"},
        # The released encoder has no bias for keys: the same bias for all keys changes no attention.
        "blocks.{i}.attention.qkv.bias": "blocks.{i}.attn.q_bias+k_bias+v_bias",
    },
    settings={"layer_norm_eps": 1e-6, "activation": "gelu", "input_norm": False, "output_norm": False},
    head_width=88,
    has_batch_axes=True,
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
    settings={"layer_norm_eps": 1e-5, "activation": "quick_gelu", "input_norm": True, "output_norm": False},
    head_width=64,
    has_batch_axes=False,
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
    names = [f"{layout.table['patch_embedding']}.weight" for layout in ENCODER_LAYOUTS]
    return is_blip2_file(file) or any(name in file.weights for name in names)


def read_encoder(file: PthFile) -> ImageEncoder:
    """The image encoder of a .pth file.

    A file of an encoder alone gives all blocks but the last one, and not what follows it (BLIP-2 section 3.1). A file
    of a BLIP-2 gives the encoder that it was trained with, if it holds one.
    """
    if is_blip2_file(file):
        state = state_dict.below(ENCODER_PREFIX, file.weights)
        if not state:
            raise CheckpointError(
                f"{file.path} holds no image encoder: a frozen one is left out there. Name the encoder's own file "
                "(LAVIS' eva_vit_g.pth or clip_vit_L.pth), or a folder."
            )
        layout = encoder_layout(state)
    else:
        layout = encoder_layout(file.weights)
        state = _without_last_block(file.weights, layout)
    state = add_implied_tensors(state_dict.as_float32(state), layout)
    config = infer_encoder(state, layout, file.path)
    weights = state_dict.translate(layout.table, state, empty_vit(config).state_dict(), (), file.path)
    model = build_vit(config, weights, file.path)
    return ImageEncoder(model.eval(), config, Preprocessing(image_size=config.image_size))


def encoder_layout(state: State, prefix: str = "") -> EncoderLayout:
    """The kind of image encoder below `prefix`."""
    is_clip = any(name.startswith(f"{prefix}{OPENAI_CLIP.blocks}") for name in state)
    return OPENAI_CLIP if is_clip else EVA_CLIP


def infer_encoder(state: State, layout: EncoderLayout, source: object, prefix: str = "") -> VisionConfig:
    """The config of the encoder below `prefix`, from shapes; `state` is that of `add_implied_tensors`."""
    return infer_vit(state, layout.table, prefix, source, layout.settings, layout.head_width)


def _without_last_block(state: State, layout: EncoderLayout) -> dict[str, Tensor]:
    """An encoder up to its second-last block; one that was cut there already is left as it is."""
    depth = len(layer_numbers(state, layout.blocks.removesuffix(".")))
    is_whole = depth == layout.released_depth or any(name.startswith(layout.after_blocks) for name in state)
    return state_dict.without((f"{layout.blocks}{depth - 1}.", *layout.after_blocks) if is_whole else (), state)


def add_implied_tensors(state: State, layout: EncoderLayout, prefix: str = "") -> dict[str, Tensor]:
    """The tensors below `prefix` with what the table expects of them: batch axes, and key biases of zeros."""
    complete = dict(state)
    for name, tensor in state.items():
        if name.startswith(prefix) and name.endswith(".attn.q_bias"):
            complete.setdefault(name.replace(".q_bias", ".k_bias"), torch.zeros_like(tensor))
    for name, num_axes in _missing_axes(complete, layout, prefix):
        complete[name] = complete[name][(None,) * num_axes]
    return complete


def drop_batch_axes(state: State, layout: EncoderLayout, prefix: str = "") -> dict[str, Tensor]:
    """The tensors below `prefix` in the shapes in which LAVIS keeps them."""
    return {**state, **{name: state[name][(0,) * n] for name, n in _missing_axes(state, layout, prefix)}}


def _missing_axes(state: State, layout: EncoderLayout, prefix: str) -> list[tuple[str, int]]:
    """The tensors that LAVIS keeps without leading axes of length one, and how many."""
    if layout.has_batch_axes:
        return []
    axes = {f"{prefix}{layout.table['class_token']}": 2, f"{prefix}{layout.table['position_embedding']}": 1}
    return [(name, num_axes) for name, num_axes in axes.items() if name in state]
