"""What a LAVIS .pth file says about its BLIP-2 without saying it: names and shapes of its tensors.

P patch size, N image tokens, D width of the Q-Former, Dv of the image encoder, Dl of the language model,
V vocabulary.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from openblip.checkpoints.blip2_original_keys import (
    BERT,
    CLIP,
    EVA,
    LANGUAGES,
    QFORMER,
    QUERIES,
    WORDS,
    EncoderLayout,
    LanguageLayout,
)
from openblip.checkpoints.key_table import refuse
from openblip.checkpoints.original_config import (
    TEXT_EPS,
    grid_of,
    num_heads_of,
    num_layers_of,
    shape_of,
)
from openblip.errors import CheckpointError, ConfigError
from openblip.models.config import (
    STAGE1_HEADS,
    Blip2Config,
    LanguageConfig,
    QFormerConfig,
    TowerConfig,
    VisionConfig,
)

VISION_NORM_EPS = 1e-5


def is_qformer(theirs: Mapping[str, Tensor]) -> bool:
    """Whether the tensors of a .pth file are of a BLIP-2."""
    return any(name.startswith(f"{QFORMER}.") for name in theirs)


def encoder_layout(theirs: Mapping[str, Tensor], prefix: str = "") -> EncoderLayout:
    """The kind of image encoder below `prefix`."""
    return CLIP if any(name.startswith(f"{prefix}{CLIP.blocks}.") for name in theirs) else EVA


def language_layout(theirs: Mapping[str, Tensor], source: str) -> LanguageLayout | None:
    """The kind of language model that the tensors of a stage 2 are for, None in stage 1."""
    found = [layout for layout in LANGUAGES if f"{layout.projection}.weight" in theirs]
    if len(found) > 1:
        raise CheckpointError(f"{source} is for {' and for '.join(layout.model_type for layout in found)}.")
    return found[0] if found else None


def infer_encoder(
    theirs: Mapping[str, Tensor], layout: EncoderLayout, source: str, prefix: str = ""
) -> VisionConfig:
    """The settings of the image encoder below `prefix`, prepared, whose blocks are those that BLIP-2 uses.

    Raises CheckpointError when a tensor that would show something is missing or of a strange shape, or the
    heads cannot be told from the width.
    """
    width, _, patch_size, _ = shape_of(theirs, f"{prefix}{layout.patches}", 4, source)
    _, num_tokens, _ = shape_of(theirs, f"{prefix}{layout.positions}", 3, source)
    mlp_dim, _ = shape_of(theirs, f"{prefix}{layout.blocks}.0.{layout.mlp}", 2, source)
    return VisionConfig(
        image_size=grid_of(num_tokens, source) * patch_size,
        patch_size=patch_size,
        hidden_dim=width,
        num_layers=num_layers_of(theirs, f"{prefix}{layout.blocks}"),
        num_heads=num_heads_of(width, "images", source, layout.head_width),
        mlp_dim=mlp_dim,
        layer_norm_eps=layout.layer_norm_eps,
        activation=layout.activation,
        input_norm=layout.input_norm,
        output_norm=False,
    )


def infer_blip2(
    theirs: Mapping[str, Tensor],
    vision: VisionConfig | TowerConfig,
    language: LanguageConfig | None,
    source: str,
) -> Blip2Config:
    """The model's settings: what shapes show, and what is the same in all released models.

    Raises CheckpointError as `infer_encoder`.
    """
    reads_text = language is None or WORDS in theirs
    embed_dim = Blip2Config.embed_dim
    if language is None:
        embed_dim, _ = shape_of(theirs, "vision_proj.weight", 2, source)
    try:
        return Blip2Config(
            vision=vision,
            qformer=_infer_qformer(theirs, reads_text, source),
            language=language,
            embed_dim=embed_dim,
            heads=STAGE1_HEADS if language is None else ("llm",),
            instructed=language is not None and reads_text,
            vision_norm_eps=VISION_NORM_EPS,
        )
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _infer_qformer(theirs: Mapping[str, Tensor], reads_text: bool, source: str) -> QFormerConfig:
    _, num_queries, width = shape_of(theirs, QUERIES, 3, source)
    layers = f"{BERT}.encoder.layer"
    mlp_dim, _ = shape_of(theirs, f"{layers}.0.intermediate_query.dense.weight", 2, source)
    vocab_size, max_positions = QFormerConfig.vocab_size, QFormerConfig.max_positions
    if reads_text:
        vocab_size, _ = shape_of(theirs, WORDS, 2, source)
        max_positions, _ = shape_of(theirs, f"{BERT}.embeddings.position_embeddings.weight", 2, source)
    num_layers = num_layers_of(theirs, layers)
    return QFormerConfig(
        num_queries=num_queries,
        hidden_dim=width,
        num_layers=num_layers,
        num_heads=num_heads_of(width, "the Q-Former", source),
        mlp_dim=mlp_dim,
        cross_attention_every=_cross_attention_every(theirs, layers, num_layers, source),
        vocab_size=vocab_size,
        max_positions=max_positions,
        layer_norm_eps=TEXT_EPS,
    )


def _cross_attention_every(theirs: Mapping[str, Tensor], layers: str, num_layers: int, source: str) -> int:
    """How far apart layers with cross-attention are, from layer 0 on."""
    key = re.compile(rf"{re.escape(layers)}\.(\d+)\.crossattention\.")
    found = sorted({int(match[1]) for name in theirs if (match := key.match(name))})
    if not found:
        refuse(source, {f"{layers}.0.crossattention"}, set())
    every = found[1] - found[0] if len(found) > 1 else num_layers
    if found != list(range(0, num_layers, every)):
        raise CheckpointError(
            f"{source} has cross-attention in the layers {', '.join(map(str, found))} of {num_layers}; it "
            "must be layer 0 and every so many after it."
        )
    return every
