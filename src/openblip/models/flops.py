"""How many floating-point operations BLIP and BLIP-2 take, as functions of their shapes. No torch here.

Counted are the matrix products of linear layers, convolutions and attention, each multiplication and addition as one
operation, as torch's FlopCounterMode counts them; the tests hold every function here equal to its counts. Norms,
activations and softmax are left out, as everywhere: they are about a hundredth. Attention counts as computed without
regard to masks, so causal attention is not halved.

A training step counts a trained layer three times: forward, the gradient of its input and the gradient of its weight. A
frozen layer that gradients pass through has no gradient of a weight. What activation checkpointing computes again is
not counted, and neither is the optimizer: a step counts what it must compute, and a utilisation that is divided by it
can be compared.

B batch, N image tokens, T text tokens, Q queries, S key tokens, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from openblip.errors import ConfigError
from openblip.models.config import Blip2Config, BlipConfig
from openblip.nn.config import (
    PatchMlpConfig,
    PoolingConfig,
    QFormerConfig,
    ResamplerConfig,
    SoftPromptConfig,
    TextConfig,
    VisionConfig,
)

VisionUse = Literal["trained", "frozen", "cached"]
"""How a training step gets image features: from an encoder with or without gradients, or from a feature cache."""


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _attention(queries: int, keys: int, width: int) -> int:
    """Scores and the weighted sum, all heads together."""
    return 4 * queries * keys * width


def _self_attention(tokens: int, keys: int, width: int) -> int:
    """With its four projections."""
    return 4 * _linear(tokens, width, width) + _attention(tokens, keys, width)


def _cross_attention(tokens: int, keys: int, width: int) -> int:
    """With the projections of queries and output; keys and values are there already."""
    return 2 * _linear(tokens, width, width) + _attention(tokens, keys, width)


# --- Parts of the models, forward


def num_image_tokens(config: VisionConfig, image_size: int | None = None) -> int:
    """N of an image of another size than the config's, if one is given; with the class token."""
    return ((image_size or config.image_size) // config.patch_size) ** 2 + 1


def vision_flops(config: VisionConfig, image_size: int | None = None) -> int:
    """The image encoder, for one image."""
    tokens, width = num_image_tokens(config, image_size), config.hidden_dim
    block = _self_attention(tokens, tokens, width) + 2 * _linear(tokens, width, config.mlp_dim)
    return _patch_flops(config, tokens) + config.num_layers * block


def _patch_flops(config: VisionConfig, tokens: int) -> int:
    return _linear(tokens - 1, 3 * config.patch_size**2, config.hidden_dim)


def context_kv_flops(config: TextConfig | QFormerConfig, context_tokens: int, context_dim: int) -> int:
    """The keys and values of a context, such as the tokens of an image, in all layers that attend to it."""
    every = config.cross_attention_every if isinstance(config, QFormerConfig) else 1
    return len(range(0, config.num_layers, every)) * _linear(context_tokens, context_dim, 2 * config.hidden_dim)


def text_flops(config: TextConfig, tokens: int, *, context_tokens: int = 0, past: int = 0) -> int:
    """The text transformer over one text. context_tokens: those of the image that it attends to, whose keys and values
    are there; 0 for text alone. past: tokens before it in the cache.
    """
    width = config.hidden_dim
    layer = _self_attention(tokens, past + tokens, width) + 2 * _linear(tokens, width, config.mlp_dim)
    if context_tokens:
        layer += _cross_attention(tokens, context_tokens, width)
    return config.num_layers * layer


def qformer_flops(config: QFormerConfig, *, tokens: int = 0, image_tokens: int = 0, past: int = 0) -> int:
    """The Q-Former over its queries, if it sees an image of `image_tokens`, and a text of `tokens`. past: queries and
    tokens before them in the cache.
    """
    queries, width = config.num_queries if image_tokens else 0, config.hidden_dim
    both = queries + tokens
    layer = _self_attention(both, past + both, width) + 2 * _linear(both, width, config.mlp_dim)
    num_cross = len(range(0, config.num_layers, config.cross_attention_every)) if queries else 0
    return config.num_layers * layer + num_cross * _cross_attention(queries, image_tokens, width)


def visual_tokens(config: Blip2Config, image_tokens: int) -> int:
    """The number of tokens that a language model is shown of an image: visual prompts, or what gated layers see."""
    match config.connector:
        case None:
            return config.qformer.num_queries
        case PoolingConfig(side=side):
            return side * side
        case PatchMlpConfig():
            return image_tokens
        case SoftPromptConfig(num_queries=queries) | ResamplerConfig(num_queries=queries):
            return queries


def visual_prompt_flops(config: Blip2Config, image_tokens: int, language_dim: int) -> int:
    """What the Q-Former, or a connector in its place, and the projection to a language model make of an image."""
    queries, context_dim = visual_tokens(config, image_tokens), config.vision.hidden_dim
    match config.connector:
        case None:
            width = config.qformer.hidden_dim
            total = context_kv_flops(config.qformer, image_tokens, context_dim)
            total += qformer_flops(config.qformer, image_tokens=image_tokens)
        case PoolingConfig():
            width, total = context_dim, 0
        case PatchMlpConfig(hidden_dim=width):
            total = _linear(image_tokens, context_dim, width)
        case SoftPromptConfig(hidden_dim=width):
            total = _linear(1, context_dim, queries * width)
        case ResamplerConfig(hidden_dim=width, num_layers=layers, mlp_dim=mlp_dim):
            context = image_tokens + queries
            layer = _linear(context, width, 2 * width) + _cross_attention(queries, context, width)
            layer += 2 * _linear(queries, width, mlp_dim)
            total = _linear(image_tokens, context_dim, width) + layers * layer
    total += _linear(queries, width, language_dim)
    return total if config.projection == "linear" else total + _linear(queries, language_dim, language_dim)


def gated_flops(config: Blip2Config, image_tokens: int, language_dim: int, tokens: int) -> int:
    """Gated layers of a language model over so many tokens, one of which stands for the image; 0 without them."""
    if config.gated is None:
        return 0
    visual, width = visual_tokens(config, image_tokens), language_dim
    layer = _linear(visual, width, 2 * width) + _cross_attention(tokens, visual, width)
    return config.gated.num_layers * (layer + 2 * _linear(tokens, width, config.gated.mlp_dim))


def _places(config: Blip2Config, image_tokens: int) -> int:
    """How many places an image takes in a text of the language model."""
    return visual_tokens(config, image_tokens) if config.gated is None else 1


def word_flops(config: TextConfig | QFormerConfig, tokens: int) -> int:
    """The prediction of a word at each of so many tokens."""
    return _linear(tokens, config.hidden_dim, config.hidden_dim) + _linear(tokens, config.hidden_dim, config.vocab_size)


# --- Language models of transformers


@dataclass(frozen=True, kw_only=True)
class LanguageModelShape:
    """The shape of a language model of transformers: a decoder, or an encoder-decoder with as many layers in each."""

    hidden_dim: int
    num_layers: int
    attention_dim: int
    """Number of heads times their width."""
    key_value_dim: int
    """The same of keys and values, less where queries share them."""
    mlp_dim: int
    mlp_matrices: Literal[2, 3]
    """3 with a gate."""
    vocab_size: int
    is_encoder_decoder: bool = False

    @classmethod
    def of(cls, config: Any) -> "LanguageModelShape":
        """That of a config of transformers; AttributeError for an architecture that names its parts in another way."""
        if config.is_encoder_decoder:  # T5
            width, gated = config.num_heads * config.d_kv, bool(config.is_gated_act)
            return cls(
                hidden_dim=config.d_model,
                num_layers=config.num_layers,
                attention_dim=width,
                key_value_dim=width,
                mlp_dim=config.d_ff,
                mlp_matrices=3 if gated else 2,
                vocab_size=config.vocab_size,
                is_encoder_decoder=True,
            )
        width, heads = config.hidden_size, config.num_attention_heads
        is_gated = hasattr(config, "intermediate_size")  # Llama, Qwen, Mistral, ...; OPT says ffn_dim
        return cls(
            hidden_dim=width,
            num_layers=config.num_hidden_layers,
            attention_dim=width,
            key_value_dim=width // heads * (getattr(config, "num_key_value_heads", None) or heads),
            mlp_dim=config.intermediate_size if is_gated else config.ffn_dim,
            mlp_matrices=3 if is_gated else 2,
            vocab_size=config.vocab_size,
        )


def _stack_flops(shape: LanguageModelShape, tokens: int, keys: int) -> tuple[int, int]:
    """An encoder or decoder without its cross-attention: in linear layers, and in attention over so many keys."""
    outputs = 2 * shape.attention_dim + 2 * shape.key_value_dim + shape.mlp_matrices * shape.mlp_dim
    linear = _linear(tokens, shape.hidden_dim, outputs)
    return shape.num_layers * linear, shape.num_layers * _attention(tokens, keys, shape.attention_dim)


def _cross_flops(shape: LanguageModelShape, tokens: int, prefix: int) -> tuple[int, int]:
    """Cross-attention of a decoder over a prefix whose keys and values are there: in linear layers, in attention."""
    linear = _linear(tokens, shape.hidden_dim, 2 * shape.attention_dim)
    return shape.num_layers * linear, shape.num_layers * _attention(tokens, prefix, shape.attention_dim)


def _prefix_kv_flops(shape: LanguageModelShape, prefix: int) -> int:
    return shape.num_layers * _linear(prefix, shape.hidden_dim, 2 * shape.key_value_dim)


def _language_parts(shape: LanguageModelShape, prefix: int, tokens: int) -> tuple[int, int]:
    """What `language_flops` counts: in linear layers, and in attention."""
    if not shape.is_encoder_decoder:
        linear, attention = _stack_flops(shape, prefix + tokens, prefix + tokens)
        return linear + _linear(prefix + tokens, shape.hidden_dim, shape.vocab_size), attention
    parts = (
        _stack_flops(shape, prefix, prefix),
        _stack_flops(shape, tokens, tokens),
        _cross_flops(shape, tokens, prefix),
    )
    linear, attention = (sum(part) for part in zip(*parts, strict=True))
    return linear + _prefix_kv_flops(shape, prefix) + _linear(tokens, shape.hidden_dim, shape.vocab_size), attention


def language_flops(shape: LanguageModelShape, prefix: int, tokens: int) -> int:
    """A language model over one row, forward: `prefix` visual prompts and tokens of the prompt, and `tokens` of the
    text after them, with logits at each place where it computes them. An encoder reads the prefix.
    """
    return sum(_language_parts(shape, prefix, tokens))


def language_write_flops(shape: LanguageModelShape, prefix: int, num_texts: int, tokens: int) -> int:
    """Texts of so many tokens, ends included, written one token after the other behind a prefix that is read once for
    all of them.
    """
    read, word = sum(_stack_flops(shape, prefix, prefix)), _linear(1, shape.hidden_dim, shape.vocab_size)
    if shape.is_encoder_decoder:  # the decoder begins with a token of its own
        read += _prefix_kv_flops(shape, prefix)
        across = sum(_cross_flops(shape, 1, prefix))
        return read + num_texts * sum(sum(_stack_flops(shape, 1, i + 1)) + across + word for i in range(tokens))
    steps = (sum(_stack_flops(shape, 1, prefix + i)) + word for i in range(1, tokens))  # the last token is not read
    return read + word + num_texts * sum(steps)


# --- Training steps


def frozen_language_flops(shape: LanguageModelShape, prefix: int, tokens: int) -> int:
    """`language_flops` and the gradients that pass through a frozen language model to its visual prompts.

    In the decoder of an encoder-decoder, gradients do not reach what stands below the first cross-attention; here they
    are counted as if they did, about half a layer.
    """
    linear, attention = _language_parts(shape, prefix, tokens)
    return 2 * linear + 3 * attention


def _trained_vision_flops(config: VisionConfig, image_size: int | None, use: VisionUse) -> int:
    """The image encoder in a training step, for one image."""
    if use == "cached":
        return 0
    forward = vision_flops(config, image_size)
    if use == "frozen":
        return forward
    return 3 * forward - _patch_flops(config, num_image_tokens(config, image_size))  # pixels have no gradient


def contrastive_step_flops(
    config: BlipConfig,
    batch_size: int,
    tokens: int,
    num_keys: int | None,
    *,
    vision_use: VisionUse = "trained",
    image_size: int | None = None,
) -> int:
    """One micro-batch of a pre-training by the objectives that are the config's heads: forward and backward.

    tokens: T, to which texts are padded. num_keys: the filled part of the queue; None without a momentum model. ITM
    reads three texts for each image: its own, a wrong one, and its own with a wrong image. The momentum encoders run
    forward only. One process.
    """
    vision, text, heads, size = config.vision, config.text, set(config.heads), batch_size
    image_tokens = num_image_tokens(vision, image_size)
    alone, beside = text_flops(text, tokens), text_flops(text, tokens, context_tokens=image_tokens)
    embedding = alone + _linear(1, vision.hidden_dim, config.embed_dim) + _linear(1, text.hidden_dim, config.embed_dim)
    image_kv = context_kv_flops(text, image_tokens, vision.hidden_dim)
    of_both = 0  # what the momentum model computes too
    if "itc" in heads:
        of_both += embedding
    if "mlm" in heads:
        of_both += beside + word_flops(text, tokens)
    modes = {"itm": "encode", "mlm": "encode", "lm": "decode"}
    num_kv = len({modes[head] for head in heads & modes.keys()})
    if text.sharing in ("all", "all_but_sa"):
        num_kv = min(num_kv, 1)
    of_trained = of_both + num_kv * image_kv
    if "itm" in heads:
        of_trained += 3 * (beside + _linear(1, text.hidden_dim, 2))
    if "lm" in heads:
        of_trained += text_flops(text, tokens - 1, context_tokens=image_tokens) + word_flops(text, tokens - 1)
    total = _trained_vision_flops(vision, image_size, vision_use) + 3 * of_trained
    if "itc" in heads and num_keys is None:
        total += 3 * 2 * _linear(1, config.embed_dim, size)
    elif "itc" in heads and num_keys is not None:
        # In both directions: of a query with all keys forward, backward and for the soft targets, and for ITM's
        # negatives.
        total += 2 * _linear(1, config.embed_dim, 3 * (size + num_keys) + size)
    if heads & {"itc", "mlm"} and num_keys is not None:
        total += vision_flops(vision, image_size) + of_both + (image_kv if "mlm" in heads else 0)
    return size * total


def captioning_step_flops(config: BlipConfig, batch_size: int, tokens: int, *, image_size: int | None = None) -> int:
    """One micro-batch of BLIP's captioning, forward and backward. tokens: those that the decoder reads, with [DEC] and
    the prompt.
    """
    vision, text = config.vision, config.text
    image_tokens = num_image_tokens(vision, image_size)
    decoder = context_kv_flops(text, image_tokens, vision.hidden_dim) + word_flops(text, tokens)
    decoder += text_flops(text, tokens, context_tokens=image_tokens)
    return batch_size * (_trained_vision_flops(vision, image_size, "trained") + 3 * decoder)


def stage1_step_flops(
    config: Blip2Config,
    batch_size: int,
    tokens: int,
    *,
    vision_use: VisionUse = "frozen",
    itg: bool = True,
    image_size: int | None = None,
) -> int:
    """One micro-batch of BLIP-2's stage 1 (ITC, ITM and ITG), forward and backward, in one process. tokens: T, to which
    texts are padded.
    """
    vision, qformer = vision_shape(config), config.qformer
    image_tokens, queries, width = num_image_tokens(vision, image_size), qformer.num_queries, qformer.hidden_dim
    trained = context_kv_flops(qformer, image_tokens, vision.hidden_dim)
    trained += qformer_flops(qformer, image_tokens=image_tokens) + _linear(queries, width, config.embed_dim)
    trained += qformer_flops(qformer, tokens=tokens) + _linear(1, width, config.embed_dim)
    trained += 2 * _linear(queries, config.embed_dim, batch_size)  # every query of an image with every text, both ways
    matching = qformer_flops(qformer, tokens=tokens, image_tokens=image_tokens) + _linear(queries, width, 2)
    trained += 3 * matching
    if itg:
        trained += qformer_flops(qformer, tokens=tokens - 1, past=queries) + word_flops(qformer, tokens - 1)
    return batch_size * (_trained_vision_flops(vision, image_size, vision_use) + 3 * trained)


def stage2_step_flops(
    config: Blip2Config,
    language: LanguageModelShape,
    batch_size: int,
    prompt_tokens: int,
    tokens: int,
    *,
    vision_use: VisionUse = "frozen",
    image_size: int | None = None,
) -> int:
    """One micro-batch of BLIP-2's stage 2 or its captioning, forward and backward through a frozen language model.

    prompt_tokens: of the text before the caption, the tokenizer's first token included. tokens: of the caption and its
    end.
    """
    vision = vision_shape(config)
    image_tokens = num_image_tokens(vision, image_size)
    trained = visual_prompt_flops(config, image_tokens, language.hidden_dim)
    prefix = _places(config, image_tokens) + prompt_tokens
    trained += gated_flops(config, image_tokens, language.hidden_dim, prefix + tokens)
    written = frozen_language_flops(language, prefix, tokens)
    return batch_size * (_trained_vision_flops(vision, image_size, vision_use) + 3 * trained + written)


def vision_shape(config: Blip2Config) -> VisionConfig:
    """The shape of a BLIP-2's image encoder. ConfigError for one of transformers: the config lacks its shape."""
    if not isinstance(config.vision, VisionConfig):
        raise ConfigError(f"The shape of the image encoder {config.vision.name} is not in the model's config.")
    return config.vision


# --- Inference, for one image


def image_flops(config: BlipConfig, image_size: int | None = None) -> int:
    """The image, encoded, and its keys and values for the text transformer."""
    tokens, vision = num_image_tokens(config.vision, image_size), config.vision
    return vision_flops(vision, image_size) + context_kv_flops(config.text, tokens, vision.hidden_dim)


def caption_flops(
    config: BlipConfig, num_captions: int, tokens: int, *, prompt_tokens: int = 4, image_size: int | None = None
) -> int:
    """Captions of an image by BLIP, which is encoded and read with the prompt once. tokens: those written for each
    caption, its end included. Beams count as captions. prompt_tokens: with [DEC].
    """
    text, image_tokens = config.text, num_image_tokens(config.vision, image_size)

    def step(count: int, past: int) -> int:
        return text_flops(text, count, context_tokens=image_tokens, past=past) + word_flops(text, 1)

    read = tokens - 1  # the last one is not read
    written = read * step(1, prompt_tokens + read - 1)  # the slots of later tokens are masked
    return image_flops(config, image_size) + step(prompt_tokens, read) + num_captions * written


def score_flops(config: BlipConfig, lengths: Sequence[int], *, image_size: int | None = None) -> int:
    """ITC and ITM of an image's texts by a BLIP, as CapFilt's filter computes them. lengths: tokens of each text."""
    vision, text = config.vision, config.text
    image_tokens = num_image_tokens(vision, image_size)
    total = image_flops(config, image_size) + _linear(1, vision.hidden_dim, config.embed_dim)
    for tokens in lengths:
        total += text_flops(text, tokens) + _linear(1, text.hidden_dim, config.embed_dim)
        total += text_flops(text, tokens, context_tokens=image_tokens) + _linear(1, text.hidden_dim, 2)
    return total


def blip2_caption_flops(
    config: Blip2Config,
    language: LanguageModelShape,
    num_captions: int,
    tokens: int,
    *,
    prompt_tokens: int = 0,
    image_size: int | None = None,
) -> int:
    """Captions of an image by a BLIP-2, as `caption_flops` counts them. prompt_tokens: of the prompt."""
    vision = vision_shape(config)
    image_tokens = num_image_tokens(vision, image_size)
    image = vision_flops(vision, image_size) + visual_prompt_flops(config, image_tokens, language.hidden_dim)
    prefix = _places(config, image_tokens) + prompt_tokens
    image += gated_flops(config, image_tokens, language.hidden_dim, prefix + num_captions * (tokens - 1))
    return image + language_write_flops(language, prefix, num_captions, tokens)
