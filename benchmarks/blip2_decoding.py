"""BLIP-2 with a small language model writes captions faster than transformers, with the same weights and precision.

Peer: transformers' Blip2ForConditionalGeneration.generate with sdpa, its default, in the same precision on both sides;
our "auto" is compared with its float32, which users get by default.
Method: 8 prepared images at 224 pixels, a prompt of 11 tokens, exactly 20 new tokens on both sides (min = max), random
weights: an image encoder of ViT-B/16's shape, the Q-Former of the paper, OPT-125M or Flan-T5-base. A call goes from
pixels to tokens. The sides take turns. Greedy tokens of both sides are compared, too. "Language model alone" begins
with the visual prompts. Ranking has no peer in transformers: there it is our own model that reads the prompt again
before each of 32 candidates, as BLIP-2's released code does.
"The floor" is what the language model would take if all of its matrix products ran at the speed of a large one, and
every step read its weights at the speed of a memory copy.

    python -m benchmarks.blip2_decoding opt greedy
    python -m benchmarks.blip2_decoding t5 greedy
    python -m benchmarks.blip2_decoding opt beam
    python -m benchmarks.blip2_decoding opt nucleus
    python -m benchmarks.blip2_decoding opt ranking
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

import openblip
from benchmarks.blip_base import pixels, written_once
from benchmarks.harness import Report, alternate, copy_ceiling, matmul_ceiling, parser
from openblip.generation.language import best_texts, write_texts
from openblip.predictor import Blip2Predictor

NUM_IMAGES, NUM_TOKENS, NUM_QUERIES, PROMPT = 8, 20, 32, "a photo of"
LENGTH = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS}
OURS: dict[str, dict[str, Any]] = {
    "greedy": {"decoding": openblip.Greedy(**LENGTH)},
    "beam": {"decoding": openblip.Beam(num_beams=5, **LENGTH)},
    "nucleus": {"decoding": openblip.Nucleus(top_p=0.9, seed=0, **LENGTH), "num_captions": 5},
}
THEIRS: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1, "do_sample": False},
    "beam": {"num_beams": 5, "do_sample": False},
    "nucleus": {"num_beams": 1, "do_sample": True, "top_p": 0.9, "top_k": 0, "num_return_sequences": 5},
}
NAMES = {"greedy": "greedy", "beam": "beam 5", "nucleus": "five nucleus captions an image", "ranking": "ranking"}
CANDIDATES = [
    " ".join(["dog", "cat", "tree", "bus"][number // 4**place % 4] for place in range(3)) for number in range(32)
]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("language", choices=["opt", "t5"])
    options.add_argument("strategy", choices=list(NAMES))
    options.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    run(options.parse_args())


@torch.inference_mode()
def run(options: argparse.Namespace) -> None:
    language, strategy, device = options.language, options.strategy, options.device
    title = f"{language} {NAMES[strategy]}"
    report = Report(f"blip2-{language}-{strategy}", __doc__, options)
    whole: dict[str, Callable[[], Any]] = {}
    alone: dict[str, Callable[[], Any]] = {}
    for dtype in options.dtypes:
        ours = openblip.load(folder(language), device=device, dtype=dtype)
        assert isinstance(ours, Blip2Predictor)
        prepared, normalised = pixels(ours, NUM_IMAGES)
        visual = ours._visual_prompts(ours.encode(prepared).tokens, [PROMPT] * NUM_IMAGES)
        if strategy == "ranking":
            alone |= ranking_sides(ours, visual, dtype)
            continue
        theirs = transformers_blip2(language, getattr(torch, dtype)).to(device)
        inputs = normalised.to(device, getattr(torch, dtype))
        whole[f"transformers {dtype}"] = their_call(ours, theirs, inputs, strategy)
        whole[f"openblip {dtype}"] = our_call(ours, prepared, strategy)
        alone[f"transformers {dtype}"] = their_language_call(ours, theirs, visual, strategy)
        alone[f"openblip {dtype}"] = our_language_call(ours, visual, strategy)
        if strategy == "greedy":
            own, peer = whole[f"openblip {dtype}"](), whole[f"transformers {dtype}"]()
            report.facts[f"tokens equal to transformers', {dtype}"] = equal_tokens(own, peer)
    target = 2.0 if strategy == "greedy" and device == "cpu" else None
    for name, sides in ((title, whole), (f"{title}, language model alone", alone)):
        if not sides:
            continue
        seconds = alternate(sides, options.repeats)
        report.timings(f"{name}: {NUM_IMAGES} images", seconds)
        for dtype in options.dtypes:
            peer = seconds[f"transformers {dtype}" if strategy != "ranking" else f"prompt read again {dtype}"]
            report.ratio(
                f"{name}, {dtype}", peer, seconds[f"openblip {dtype}"], target=target if sides is whole else None
            )
        if sides is whole and {"float32", "bfloat16"} <= set(options.dtypes):
            times = seconds["transformers float32"], seconds["openblip bfloat16"]
            report.ratio(f"{name}, auto beside transformers' float32", *times)
        if sides is alone and strategy == "greedy":
            for dtype in options.dtypes:
                floor = floor_seconds(ours, visual, getattr(torch, dtype), device)
                report.add(f"{name}, {dtype}: share of the floor", floor / median(seconds[f"openblip {dtype}"]))
                slower = median(seconds[f"transformers {dtype}"])
                report.add(f"{name}, {dtype}: the floor beside transformers", slower / floor)
    report.save()


def our_call(model: Blip2Predictor, prepared: Tensor, strategy: str) -> Callable[[], Any]:
    return lambda: model.caption(prepared, prompt=PROMPT, return_scores=True, **OURS[strategy])


def their_call(ours: Blip2Predictor, model: Any, inputs: Tensor, strategy: str) -> Callable[[], Any]:
    """As their processor has it: image tokens, then the prompt."""
    prompt = torch.tensor(ours.model.require_language().tokenizer(PROMPT).input_ids)
    ids = torch.cat([torch.full((NUM_QUERIES,), model.config.image_token_index), prompt]).to(inputs.device)
    ids = ids.repeat(len(inputs), 1)
    settings = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **LENGTH, **THEIRS[strategy]}
    return lambda: model.generate(pixel_values=inputs, **settings)


def our_language_call(model: Blip2Predictor, visual: Tensor, strategy: str) -> Callable[[], Any]:
    language = model.model.require_language()
    return lambda: write_texts(language, visual, [PROMPT] * len(visual), **OURS[strategy])


def their_language_call(ours: Blip2Predictor, model: Any, visual: Tensor, strategy: str) -> Callable[[], Any]:
    inputs = ours.model.require_language().generation_inputs(visual, [PROMPT] * len(visual))
    return lambda: model.language_model.generate(**inputs, **LENGTH, **THEIRS[strategy])


def ranking_sides(model: Blip2Predictor, visual: Tensor, dtype: str) -> dict[str, Callable[[], Any]]:
    language, prompts = model.model.require_language(), [PROMPT] * len(visual)

    def read_again() -> Tensor:
        ids = [[*language.text_ids(PROMPT, text), language.end_id] for text in CANDIDATES]
        repeated = visual.repeat_interleave(len(ids), dim=0)
        predicted = language.predict_ids(repeated, [PROMPT] * len(repeated), ids * len(visual))
        logprobs = predicted.logits.float().log_softmax(dim=-1).gather(2, predicted.labels.clamp(min=0)[..., None])
        sums = logprobs.squeeze(2).masked_fill(predicted.labels < 0, 0.0).sum(dim=1)
        return sums.view(len(visual), -1).argmax(dim=1)

    def shared() -> Tensor:
        best = best_texts(language, visual, prompts, [CANDIDATES] * len(visual))
        return torch.tensor([ranked.position for ranked in best])

    if dtype == "float32":
        assert torch.equal(read_again(), shared())
    return {f"prompt read again {dtype}": read_again, f"openblip {dtype}": shared}


def equal_tokens(ours: Sequence[Any], theirs: Tensor) -> float:
    """The share of the tokens that both sides have in the same place."""
    pairs = zip(ours, theirs[:, -NUM_TOKENS:].tolist(), strict=True)
    same = [a == b for text, other in pairs for a, b in zip(text.ids[:NUM_TOKENS], other, strict=True)]
    return sum(same) / len(same)


def floor_seconds(ours: Blip2Predictor, visual: Tensor, dtype: torch.dtype, device: str) -> float:
    """Of greedy decoding by the language model: the prompt at the speed of a matmul, then the weights for each step."""
    model = ours.model.require_language().model
    prompt_tokens = ours.model.require_language().generation_inputs(visual, [PROMPT] * len(visual))["inputs_embeds"]
    num_tokens = prompt_tokens.shape[0] * prompt_tokens.shape[1]
    linear = {name: part for name, part in model.named_modules() if hasattr(part, "bias") and hasattr(part, "weight")}
    sizes = {
        name: part.weight.numel() for name, part in linear.items() if type(part).__name__ in ("Linear", "PackedLinear")
    }
    head = sizes["lm_head"]
    encoder = sum(size for name, size in sizes.items() if name.startswith("encoder."))
    cross_kv = sum(size for name, size in sizes.items() if name.endswith(("EncDecAttention.k", "EncDecAttention.v")))
    decoder = sum(sizes.values()) - encoder - cross_kv - head
    prompt_weights = encoder + cross_kv if encoder else decoder
    prompt = 2 * num_tokens * prompt_weights / matmul_ceiling(dtype, device)
    steps = NUM_TOKENS - (0 if encoder else 1)
    return prompt + (steps * decoder + NUM_TOKENS * head) * dtype.itemsize / copy_ceiling(device)


# The models, in transformers' format.


def folder(language: str) -> Path:
    return written_once(f"blip2-{language}", lambda path: write_blip2(language, path))


def transformers_blip2(language: str, dtype: torch.dtype) -> Any:
    from transformers import Blip2ForConditionalGeneration

    return Blip2ForConditionalGeneration.from_pretrained(folder(language), dtype=dtype).eval()


def write_blip2(language: str, path: Path) -> None:
    import transformers

    words, ends = tokenizer(language), {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    text: Any
    if language == "opt":  # facebook/opt-125m
        text = transformers.OPTConfig(max_position_embeddings=2048, **ends)
    else:  # google/flan-t5-base
        text = transformers.T5Config(
            d_model=768, d_ff=2048, num_layers=12, num_heads=12, feed_forward_proj="gated-gelu",
            tie_word_embeddings=False, decoder_start_token_id=0, **ends,
        )  # fmt: skip
    config = transformers.Blip2Config(
        vision_config={
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "image_size": 224, "patch_size": 16,
        },
        qformer_config={"encoder_hidden_size": 768, "use_qformer_text_input": False},
        text_config=text.to_dict(), num_query_tokens=NUM_QUERIES, image_token_index=len(words),
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Blip2ForConditionalGeneration(config).save_pretrained(path)
    words.save_pretrained(path)


def tokenizer(language: str) -> Any:
    """Byte pairs; texts begin with </s> for OPT and end with it for T5."""
    import transformers

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        [PROMPT], trainers.BpeTrainer(special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    )
    template = "$A </s>" if language == "t5" else "</s> $A"
    words.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", 1)])
    named = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **named)


if __name__ == "__main__":
    main()
