"""The .pth files of BLIP-2's image encoders: EVA-CLIP's and CLIP's own, and those in files of BLIP-2.

N image tokens, D width.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor

from openblip.checkpoints.blip2_native import fill
from openblip.checkpoints.blip2_original_config import encoder_layout, infer_encoder, is_qformer
from openblip.checkpoints.blip2_original_keys import ENCODER, ENCODERS, EncoderLayout
from openblip.checkpoints.key_table import translate
from openblip.checkpoints.native import as_float32, check_weights
from openblip.checkpoints.original_config import num_layers_of
from openblip.checkpoints.pickled import OriginalFile
from openblip.data.transforms import Preprocessing
from openblip.errors import CheckpointError
from openblip.models.config import TowerConfig, VisionConfig
from openblip.models.vision_tower import VisionTower
from openblip.nn.vit import VisionTransformer


class ImageEncoder(NamedTuple):
    """An image encoder, its part of a `Blip2Config`, and what it expects of pixels."""

    model: VisionTransformer | VisionTower
    config: VisionConfig | TowerConfig
    preprocessing: Preprocessing


def holds_encoder(file: OriginalFile) -> bool:
    """Whether a .pth file is one of `read_encoder`."""
    return is_qformer(file.weights) or any(layout.patches in file.weights for layout in ENCODERS)


def read_encoder(file: OriginalFile) -> ImageEncoder:
    """The image encoder of a .pth file, in float32 on the CPU, in eval mode.

    file: of an encoder alone, which as a whole one gives all blocks but the last one, and not what follows it
    (BLIP-2 section 3.1); or of a BLIP-2 that holds the encoder that it was trained with.

    Raises CheckpointError when the file is of neither kind or is not whole.
    """
    path, weights, source = file.path, file.weights, str(file.path)
    if is_qformer(weights):
        theirs = {n.removeprefix(ENCODER): t for n, t in weights.items() if n.startswith(ENCODER)}
        if not theirs:
            raise CheckpointError(
                f"{path} holds no image encoder: a frozen one is left out there. Name the encoder's own file "
                "(LAVIS' eva_vit_g.pth or clip_vit_L.pth), or a folder."
            )
        layout = encoder_layout(theirs)
    else:
        layout = encoder_layout(weights)
        theirs = _without_last_block(weights, layout)
    theirs = prepare_encoder(as_float32(theirs), layout)
    config = infer_encoder(theirs, layout, source)
    with torch.device("meta"):
        model = VisionTransformer(**asdict(config))
    expected = model.state_dict()
    found = translate(layout.table, theirs, set(expected), (), source)
    check_weights(expected, found, source)
    fill(model, found)
    return ImageEncoder(model.eval(), config, Preprocessing(image_size=config.image_size))


def _without_last_block(theirs: Mapping[str, Tensor], layout: EncoderLayout) -> dict[str, Tensor]:
    """An encoder up to its second-last block; one that ends there already is left as it is."""
    depth = num_layers_of(theirs, layout.blocks)
    is_whole = depth == layout.whole_depth or any(name.startswith(layout.after) for name in theirs)
    left_out = (f"{layout.blocks}.{depth - 1}.", *layout.after) if is_whole else ()
    return {name: tensor for name, tensor in theirs.items() if not name.startswith(left_out)}


def prepare_encoder(
    theirs: Mapping[str, Tensor], layout: EncoderLayout, prefix: str = ""
) -> dict[str, Tensor]:
    """The tensors below `prefix` with what the table expects of them: batch axes, a key bias of zeros."""
    prepared = dict(theirs)
    for name, tensor in theirs.items():
        if name.startswith(prefix) and name.endswith(".attn.q_bias"):
            prepared.setdefault(name.replace(".q_bias", ".k_bias"), torch.zeros_like(tensor))
    for name, count in _batch_axes(layout, prefix):
        if name in prepared:
            prepared[name] = prepared[name][(None,) * count]
    return prepared


def without_batch_axes(
    theirs: Mapping[str, Tensor], layout: EncoderLayout, prefix: str = ""
) -> dict[str, Tensor]:
    """The tensors below `prefix` with the shapes that LAVIS keeps them in."""
    kept = dict(theirs)
    for name, count in _batch_axes(layout, prefix):
        if name in kept:
            kept[name] = kept[name][(0,) * count]
    return kept


def _batch_axes(layout: EncoderLayout, prefix: str) -> tuple[tuple[str, int], ...]:
    """Which tensors lack leading axes of length one, and how many."""
    return ((f"{prefix}{layout.class_token}", 2), (f"{prefix}{layout.positions}", 1)) if layout.flat else ()
