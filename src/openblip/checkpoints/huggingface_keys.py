"""Where transformers keeps what our BLIP keeps: settings (configuration_blip) and weights (modeling_blip)."""

from collections.abc import Mapping

from openblip.checkpoints.key_table import Homes, Layout, Table, within

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


# The decoder's matrix is the word embeddings, its bias cls.predictions.bias: files may have them twice.
TIED = "text_decoder.cls.predictions.decoder."


def position_ids(homes: Homes) -> tuple[str, ...]:
    """The buffers 0, 1, 2, ... that older files hold."""
    return tuple(f"{home}.embeddings.position_ids" for home in homes.values())


_VISION: Table = within(VISION, "vision.", "vision_model.")
_TEXT: Table = within(TEXT, "text.", "{text}.")
_LM_HEAD: Table = within(LM_HEAD, "text.", "text_decoder.")
ENCODER, DECODER = "text_encoder", "text_decoder.bert"

LAYOUTS: Mapping[str, Layout] = {
    "BlipForConditionalGeneration": Layout(
        heads=("lm",),
        table={**_VISION, **_TEXT, **_LM_HEAD},
        homes={"decode": DECODER},
        derived=(TIED, *position_ids({"decode": DECODER})),
    ),
    "BlipForImageTextRetrieval": Layout(
        heads=("itc", "itm"),
        table={**_VISION, **_TEXT, **{head: head for head in ("vision_proj", "text_proj", "itm_head")}},
        homes={"encode": ENCODER},
        derived=position_ids({"encode": ENCODER}),
    ),
    "BlipForQuestionAnswering": Layout(
        heads=("vqa",),
        table={**_VISION, **_TEXT, **_LM_HEAD},
        homes={"encode": ENCODER, "decode": DECODER},
        derived=(TIED, *position_ids({"encode": ENCODER, "decode": DECODER})),
    ),
    "BlipModel": Layout(
        heads=("itc",),
        pooled=True,
        table={
            **_VISION,
            **_TEXT,
            "log_temperature": "logit_scale",  # its negative, see `huggingface.py`
            "text_pooler": "text_model.pooler.dense",
            "vision_proj": "visual_projection",
            "text_proj": "text_projection",
        },
        homes={"encode": "text_model"},
        derived=position_ids({"encode": "text_model"}),
    ),
}
