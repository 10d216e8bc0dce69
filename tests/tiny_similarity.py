"""Tiny CLIP and SigLIP models of transformers with random weights."""

import torch
import transformers

from tiny_language_models import word_tokenizer

SIDE = 16
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SHAPE, "image_size": SIDE, "patch_size": 8}
POSITIONS = 8


def save_model(kind, folder):
    """A random model with its processor, which the function returns."""
    tokenizer = word_tokenizer("<s> $A </s>")
    tokenizer.model_max_length = POSITIONS
    text = {**SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    square = {"height": SIDE, "width": SIDE}
    torch.manual_seed(3)
    if kind == "clip":
        config = transformers.CLIPConfig(text_config={**text, "projection_dim": 8}, vision_config=VISION)
        config.projection_dim = 8
        model, processor_class = transformers.CLIPModel(config), transformers.CLIPProcessor
        images = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square)
    else:
        tokenizer.model_input_names = ["input_ids"]
        config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
        model, processor_class = transformers.SiglipModel(config), transformers.SiglipProcessor
        images = transformers.SiglipImageProcessorPil(size=square)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter == 1))
    model.save_pretrained(folder)
    processor = processor_class(image_processor=images, tokenizer=tokenizer)
    processor.save_pretrained(folder)
    return processor
