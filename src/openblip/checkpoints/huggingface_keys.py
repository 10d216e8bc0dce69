"""Where transformers keeps what our BLIP keeps: settings (configuration_blip) and weights (modeling_blip)."""

from openblip.checkpoints.key_table import Table

VISION_SETTINGS = {  # VisionConfig, BlipVisionConfig
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "layer_norm_eps": "layer_norm_eps",
}
TEXT_SETTINGS = {  # TextConfig, BlipTextConfig
    "vocab_size": "vocab_size",
    "hidden_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "dropout": "hidden_dropout_prob",
    "layer_norm_eps": "layer_norm_eps",
}

VISION: Table = {  # BlipVisionModel
    "class_token": "embeddings.class_embedding",
    "position_embedding": "embeddings.position_embedding",
    "patch_embedding": "embeddings.patch_embedding",
    "blocks.{i}.attention_norm": "encoder.layers.{i}.layer_norm1",
    "blocks.{i}.attention.qkv": "encoder.layers.{i}.self_attn.qkv",
    "blocks.{i}.attention.out": "encoder.layers.{i}.self_attn.projection",
    "blocks.{i}.mlp_norm": "encoder.layers.{i}.layer_norm2",
    "blocks.{i}.mlp.0": "encoder.layers.{i}.mlp.fc1",
    "blocks.{i}.mlp.2": "encoder.layers.{i}.mlp.fc2",
    "norm": "post_layernorm",
}

_SELF = "encoder.layer.{i}.attention"
_CROSS = "encoder.layer.{i}.crossattention"
TEXT: Table = {  # BlipTextModel
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "layers.{i}.self_attention.branch.qkv": (
        f"{_SELF}.self.query",
        f"{_SELF}.self.key",
        f"{_SELF}.self.value",
    ),
    "layers.{i}.self_attention.branch.out": f"{_SELF}.output.dense",
    "layers.{i}.self_attention.norm": f"{_SELF}.output.LayerNorm",
    "layers.{i}.cross_attention.branch.query": f"{_CROSS}.self.query",
    "layers.{i}.cross_attention.branch.key_value": (f"{_CROSS}.self.key", f"{_CROSS}.self.value"),
    "layers.{i}.cross_attention.branch.out": f"{_CROSS}.output.dense",
    "layers.{i}.cross_attention.norm": f"{_CROSS}.output.LayerNorm",
    "layers.{i}.feed_forward.branch.0": "encoder.layer.{i}.intermediate.dense",
    "layers.{i}.feed_forward.branch.2": "encoder.layer.{i}.output.dense",
    "layers.{i}.feed_forward.norm": "encoder.layer.{i}.output.LayerNorm",
}

LM_HEAD: Table = {  # BlipTextLMPredictionHead
    "lm_head.transform": "cls.predictions.transform.dense",
    "lm_head.norm": "cls.predictions.transform.LayerNorm",
    "lm_head.bias": "cls.predictions.bias",
}


def _within(table: Table, ours: str, theirs: str) -> Table:
    """The table of a part, below `ours` and `theirs`."""
    rows = {name: (row,) if isinstance(row, str) else row for name, row in table.items()}
    return {f"{ours}{name}": tuple(f"{theirs}{part}" for part in row) for name, row in rows.items()}


CAPTIONER: Table = {  # BlipForConditionalGeneration
    **_within(VISION, "vision.", "vision_model."),
    **_within(TEXT, "text.", "text_decoder.bert."),
    **_within(LM_HEAD, "text.", "text_decoder."),
}
RETRIEVER: Table = {  # BlipForImageTextRetrieval
    **_within(VISION, "vision.", "vision_model."),
    **_within(TEXT, "text.", "text_encoder."),
    **{head: head for head in ("vision_proj", "text_proj", "itm_head")},
}
