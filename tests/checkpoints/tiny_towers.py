"""Tiny random vision models of every kind that BLIP-2 may freeze, as transformers saves them.

Images of 32 pixels in patches of 8: 16 patches.
"""

from pathlib import Path
from typing import Any

import torch
import transformers

SIZE, PATCH, DEPTH, WIDTH = 32, 8, 3, 32
SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": PATCH,
}
DINO: dict[str, Any] = {name: value for name, value in SHAPE.items() if name != "intermediate_size"}
NAFLEX: dict[str, Any] = {name: value for name, value in SHAPE.items() if name != "image_size"}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QFORMER: dict[str, Any] = {**TEXT, "hidden_size": 16, "encoder_hidden_size": WIDTH, "vocab_size": 40}
OPT: dict[str, Any] = {
    "model_type": "opt",
    "vocab_size": 40,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def make(kind: str) -> Any:
    """A model of transformers with random weights far from their start, in eval mode."""
    t = transformers
    makers = {
        "clip": lambda: t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=SHAPE, projection_dim=16)),
        "clip_gelu": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**SHAPE, hidden_act="gelu")),
        "clip_tanh": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**SHAPE, hidden_act="gelu_new")),
        "blip2": lambda: t.Blip2ForConditionalGeneration(
            t.Blip2Config(vision_config=SHAPE, qformer_config=QFORMER, text_config=OPT)
        ),
        "siglip": lambda: t.SiglipModel(t.SiglipConfig(text_config=TEXT, vision_config=SHAPE)),
        "siglip2": lambda: t.Siglip2Model(
            t.Siglip2Config(text_config=TEXT, vision_config={**NAFLEX, "num_patches": (SIZE // PATCH) ** 2})
        ),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**DINO, mlp_ratio=2)),
        "dinov2_registers": lambda: t.Dinov2WithRegistersModel(
            t.Dinov2WithRegistersConfig(**DINO, mlp_ratio=2, num_register_tokens=3)
        ),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**SHAPE)),
        "convnext": lambda: t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[4, 4], depths=[1, 1], num_stages=2)),
        "bert": lambda: t.BertModel(t.BertConfig(**TEXT)),
    }
    torch.manual_seed(7)
    model = makers[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter == 1))
    return model.eval()


def save(kind: str, folder: Path, *, processor: bool = True) -> Any:
    """Write the model and, unless told otherwise, how it wants its pixels. Returns the model."""
    model = make(kind)
    model.save_pretrained(folder)
    if processor:
        square = {"height": SIZE, "width": SIZE}
        transformers.ViTImageProcessor(
            size=square, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]
        ).save_pretrained(folder)
    return model
