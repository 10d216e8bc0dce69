"""What an original .pth file says about its model without saying it: the shapes of its tensors.

P patch size, N image tokens, D width, V vocabulary.
"""

import math
import re
from collections.abc import Mapping

from torch import Tensor

from openblip.checkpoints.key_table import Layout, refuse
from openblip.checkpoints.original_keys import LAYOUTS
from openblip.errors import CheckpointError, ConfigError
from openblip.models.config import BlipConfig, Sharing, TextConfig, VisionConfig

HEAD_WIDTH = 64  # of every released model: ViT-B 12 heads, ViT-L 16, BERT 12
VISION_EPS, TEXT_EPS = 1e-6, 1e-12  # vit.py, med_config.json


def find_layout(theirs: Mapping[str, Tensor], source: str) -> Layout:
    """Which kind of model the tensors are; CheckpointError when they are of none."""
    has_encoder = any(name.startswith("text_encoder.") for name in theirs)
    has_decoder = any(name.startswith("text_decoder.") for name in theirs)
    matches = any(name.startswith(("itm_head.", "vision_proj.")) for name in theirs)
    if has_encoder and any(".crossattention.self0." in name for name in theirs):
        return LAYOUTS["NLVR2"]
    if has_encoder and has_decoder:
        return LAYOUTS["pre-trained" if matches else "VQA"]
    if has_decoder:
        return LAYOUTS["captions"]
    if has_encoder and matches:
        return LAYOUTS["retrieval"]
    raise CheckpointError(
        f"{source} is no BLIP for {', '.join(LAYOUTS)}: its weights begin with "
        f"{', '.join(sorted({name.partition('.')[0] for name in theirs})[:10])}."
    )


def infer_config(theirs: Mapping[str, Tensor], layout: Layout, sharing: Sharing, source: str) -> BlipConfig:
    """The model's settings: what shapes show, and what is the same in all released models.

    Raises CheckpointError when a tensor that would show something is missing or of a strange shape, or the
    heads cannot be told from the width.
    """
    home = next(iter(layout.homes.values()))
    image_dim, _, patch_size, _ = shape_of(theirs, "visual_encoder.patch_embed.proj.weight", 4, source)
    _, num_tokens, _ = shape_of(theirs, "visual_encoder.pos_embed", 3, source)
    image_mlp_dim, _ = shape_of(theirs, "visual_encoder.blocks.0.mlp.fc1.weight", 2, source)
    vocab_size, text_dim = shape_of(theirs, f"{home}.embeddings.word_embeddings.weight", 2, source)
    max_positions, _ = shape_of(theirs, f"{home}.embeddings.position_embeddings.weight", 2, source)
    text_mlp_dim, _ = shape_of(theirs, f"{home}.encoder.layer.0.intermediate.dense.weight", 2, source)
    grid = grid_of(num_tokens, source)
    embed_dim = BlipConfig.embed_dim
    if "itc" in layout.heads:
        embed_dim, _ = shape_of(theirs, "vision_proj.weight", 2, source)
    try:
        return BlipConfig(
            vision=VisionConfig(
                image_size=grid * patch_size,
                patch_size=patch_size,
                hidden_dim=image_dim,
                num_layers=num_layers_of(theirs, "visual_encoder.blocks"),
                num_heads=num_heads_of(image_dim, "images", source),
                mlp_dim=image_mlp_dim,
                layer_norm_eps=VISION_EPS,
            ),
            text=TextConfig(
                vocab_size=vocab_size,
                hidden_dim=text_dim,
                num_layers=num_layers_of(theirs, f"{home}.encoder.layer"),
                num_heads=num_heads_of(text_dim, "texts", source),
                mlp_dim=text_mlp_dim,
                max_positions=max_positions,
                layer_norm_eps=TEXT_EPS,
                sharing=sharing,
            ),
            embed_dim=embed_dim,
            heads=layout.heads,
        )
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error


def grid_of(num_tokens: int, source: str) -> int:
    """Patches a side, of pictures with `num_tokens` positions; CheckpointError when they make no square."""
    grid = math.isqrt(max(num_tokens - 1, 0))
    if grid < 1 or grid**2 != num_tokens - 1:
        raise CheckpointError(f"{source}: positions of {num_tokens} image tokens are those of no square.")
    return grid


def shape_of(theirs: Mapping[str, Tensor], name: str, num_axes: int, source: str) -> tuple[int, ...]:
    """A tensor's shape; CheckpointError when it is missing or has another number of axes."""
    if name not in theirs:
        refuse(source, {name}, set())
    shape = tuple(theirs[name].shape)
    if len(shape) != num_axes or min(shape) < 1:
        raise CheckpointError(f"{source}: {name} is {shape}; it has {num_axes} axes in every BLIP.")
    return shape


def num_layers_of(theirs: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbers follow `prefix`."""
    number = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    return len({found[1] for name in theirs if (found := number.match(name))})


def num_heads_of(width: int, what: str, source: str, head_width: int = HEAD_WIDTH) -> int:
    """Heads of a released model; CheckpointError when they do not divide the width."""
    if width % head_width:
        raise CheckpointError(
            f"{source}: {width} wide for {what}, which heads of {head_width} do not divide. Released models "
            "have such heads; how many this one has cannot be told from its weights."
        )
    return width // head_width
