"""Image-text-to-text models of transformers with random weights, of families that differ in how they read an image."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from tiny_language_models import END, PAD, START, word_tokenizer

SIDE, PATCH = 16, 8
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SHAPE, "image_size": SIDE, "patch_size": PATCH}
LANGUAGE = {**SHAPE, "num_key_value_heads": 2, "max_position_embeddings": 128}
LANGUAGE |= {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
SQUARE = {"height": SIDE, "width": SIDE}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}IMAGE{% else %} {{ item['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} Answer: {% endif %}"
)
MARKS = ["<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
MARKS += ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
FAMILIES = ("llava", "qwen2_vl", "paligemma", "git", "idefics3")


def save_captioner(family: str, folder: Path, *, seed: int = 5) -> str:
    """Write a random model with its processor, whose captions vary."""
    t: Any = transformers
    tokenizer = word_tokenizer("<s> $A </s>" if family == "git" else "$A")
    tokenizer.add_tokens(MARKS, special_tokens=True)
    mark = tokenizer.convert_tokens_to_ids
    vocabulary = {"vocab_size": len(tokenizer)}
    torch.manual_seed(seed)
    if family == "llava":
        vision = t.CLIPVisionConfig(**VISION)
        config = t.LlavaConfig(
            vision_config=vision, text_config=t.LlamaConfig(**LANGUAGE, **vocabulary), image_token_id=mark("<image>")
        )
        model = t.LlavaForConditionalGeneration(config)
        images = t.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE)
        processor = t.LlavaProcessor(
            images,
            tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=CHAT_TEMPLATE.replace("IMAGE", "<image>"),
        )
    elif family == "qwen2_vl":
        text = t.Qwen2VLTextConfig(
            **LANGUAGE, **vocabulary, rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1]}
        )
        vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": PATCH}
        marks = {f"{kind}_token_id": mark(f"<|{kind}_pad|>") for kind in ("image", "video")}
        marks |= {f"vision_{end}_token_id": mark(f"<|vision_{end}|>") for end in ("start", "end")}
        config = t.Qwen2VLConfig(text_config=text.to_dict(), vision_config=vision, **marks)
        model = t.Qwen2VLForConditionalGeneration(config)
        images = t.Qwen2VLImageProcessorPil(patch_size=PATCH, min_pixels=SIDE**2, max_pixels=(4 * SIDE) ** 2)
        images.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        marks = "<|vision_start|><|image_pad|><|vision_end|>"
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("IMAGE", marks))
        processor = None
    elif family == "paligemma":
        text = t.GemmaConfig(**LANGUAGE, **vocabulary, head_dim=8)
        config = t.PaliGemmaConfig(
            vision_config=t.SiglipVisionConfig(**VISION),
            text_config=text,
            image_token_id=mark("<image>"),
            projection_dim=16,
        )
        model = t.PaliGemmaForConditionalGeneration(config)
        images = t.SiglipImageProcessorPil(size=SQUARE)
        images.image_seq_length = (SIDE // PATCH) ** 2
        processor = t.PaliGemmaProcessor(images, tokenizer)
    elif family == "git":
        tokenizer.cls_token, tokenizer.sep_token = "<s>", "</s>"
        config = t.GitConfig(
            vision_config=VISION, **SHAPE, **vocabulary, max_position_embeddings=64, bos_token_id=START
        )
        config.eos_token_id, config.pad_token_id = END, PAD
        model = t.GitForCausalLM(config)
        processor = t.GitProcessor(t.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE), tokenizer)
    elif family == "idefics3":
        vision = {**VISION, "image_size": 2 * SIDE}
        text = t.LlamaConfig(**LANGUAGE, **vocabulary)
        config = t.Idefics3Config(
            vision_config=vision, text_config=text, image_token_id=mark("<image>"), scale_factor=2, pad_token_id=PAD
        )
        model = t.Idefics3ForConditionalGeneration(config)
        images = t.Idefics3ImageProcessorPil(
            do_image_splitting=False, size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": 2 * SIDE}
        )
        processor = t.Idefics3Processor(
            images, tokenizer, image_seq_len=4, chat_template=CHAT_TEMPLATE.replace("IMAGE", "<image>")
        )
    else:
        raise ValueError(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4 + (parameter == 1))
    model.generation_config.eos_token_id = END
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [mark(each) for each in MARKS]  # as nobody writes an image
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return str(folder)


def draw(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """An image of random blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)
