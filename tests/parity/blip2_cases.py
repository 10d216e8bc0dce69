"""Every kind of BLIP-2 that transformers has, as it computes it and as we do, on the same images and texts.

B images, Q queries, T text tokens, V vocabulary. Scores are floats of any shape; texts are ids without end.
"""

from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from parity_cases import Outputs
from tokenizers import Tokenizer as Words
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from openblip.checkpoints.checkpoint import Blip2Checkpoint
from openblip.checkpoints.huggingface import QFORMER_TOKENIZER
from openblip.models.language_model import IGNORED_LABEL
from tiny_blip import random_pixels, randomise, tiny_tokenizer
from written_texts import beam_ids

Language = Literal["opt", "llama", "t5"]
TOKENIZER = tiny_tokenizer()
SIZE, PATCH, NUM_QUERIES, MAX_TOKENS = 40, 8, 5, 7
PIXELS = random_pixels(3, size=SIZE)
TEXTS = TOKENIZER.encode(["a red dog", "two blue cars beside a tree", "a green bird"])
PROMPTS = ["a photo of", "Question: how many dogs are there? Answer:", ""]
TARGETS = ["a small dog", "two", "a bird and a big tree"]
SPARE_ROWS = 3  # of the language model's word embeddings, as the released ones have; one is the image's
DECODINGS: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1},
    "beam": {"num_beams": 3, "length_penalty": -1.0, "min_new_tokens": 2},
}
WRITERS = ("Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration")
RETRIEVER = "Blip2ForImageTextRetrieval"


@cache
def language_words(language: Language) -> Any:
    """Byte pairs; texts begin with </s> for decoders, as OPT's, and end with it for T5."""
    words = Words(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    symbols, special = pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=symbols, show_progress=False)
    words.train_from_iterator([*PROMPTS, *TARGETS], trainer)
    template = "$A </s>" if language == "t5" else "</s> $A"
    words.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", 1)])
    named = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **named)


def image_token(language: Language) -> int:
    """The first spare row, where transformers' processor puts "<image>"."""
    return len(language_words(language))


def text_config(language: Language, spare_rows: int = SPARE_ROWS) -> Any:
    """Decoders end a text with a new line, as OPT does in BLIP-2, T5 with its own end."""
    words = language_words(language)
    size = len(words) + spare_rows
    new_line = words("\n", add_special_tokens=False).input_ids[0]
    decoder = {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": new_line}
    match language:
        case "opt":
            return transformers.OPTConfig(
                vocab_size=size, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=64, **decoder,
            )  # fmt: skip
        case "llama":
            return transformers.LlamaConfig(
                vocab_size=size, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False, **decoder,
            )  # fmt: skip
        case "t5":
            return transformers.T5Config(
                vocab_size=size, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dense_act_fn="gelu",
                feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
                pad_token_id=0, eos_token_id=1, bos_token_id=1,
            )  # fmt: skip


def their_model(class_name: str, language: Language | None = None, seed: int = 4, **settings: Any) -> Any:
    """A random model of one of transformers' classes: an odd grid, three heads, epsilons of its own."""
    instructed = class_name.startswith("InstructBlip")
    reads_text = {} if instructed else {"use_qformer_text_input": class_name == RETRIEVER}
    config = (transformers.InstructBlipConfig if instructed else transformers.Blip2Config)(
        vision_config={
            "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 3,
            "image_size": SIZE, "patch_size": PATCH, "layer_norm_eps": 1e-3,
        },
        qformer_config={
            "vocab_size": TOKENIZER.vocab_size - 1,  # [ENC] is BLIP's alone
            "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 5, "num_attention_heads": 3,
            "max_position_embeddings": 30, "layer_norm_eps": 1e-2, "cross_attention_frequency": 3,
            **reads_text,
        },
        text_config=None if language is None else text_config(language).to_dict(),
        num_query_tokens=NUM_QUERIES,
        image_token_index=None if language is None else image_token(language),
        **({} if instructed else {"image_text_hidden_size": 10}),
    )  # fmt: skip
    config.update(settings)
    if language is None:
        config.text_config = text_config("opt")
    theirs = getattr(transformers, class_name)(config).eval()
    randomise(theirs, seed, scale=0.3)
    if language == "t5":  # whose released models do not tie their head
        head = torch.randn(theirs.language_model.lm_head.weight.shape, generator=torch.Generator().manual_seed(seed))
        theirs.language_model.lm_head.weight = torch.nn.Parameter(head)
        theirs.language_model.all_tied_weights_keys.pop("lm_head.weight")
        theirs.all_tied_weights_keys.pop("language_model.lm_head.weight")
    if language is not None:
        with torch.no_grad():  # so that some texts end
            theirs.language_model.get_output_embeddings().weight[end_id(language)] *= 3
    return theirs


def write_theirs(folder: Path, theirs: Any, language: Language | None) -> None:
    """A folder with their weights and the words of all who read text."""
    theirs.save_pretrained(folder)
    if language is None:
        TOKENIZER.save(folder)
        return
    language_words(language).save_pretrained(folder)
    if theirs.config.model_type == "instructblip":
        TOKENIZER.save(folder / QFORMER_TOKENIZER)


@torch.no_grad()
def our_outputs(checkpoint: Blip2Checkpoint, texts: bool = True) -> Outputs:
    """All that the model's heads can say."""
    model, out = checkpoint.model, Outputs()
    features = model.encode_image(PIXELS)
    norm = model.vision_norm
    out.scores["features"] = F.layer_norm(features, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    image_kv = model.image_kv(features)
    queries = model.encode_queries(image_kv).queries
    if model.config.instructed:
        queries = model.encode_multimodal(TEXTS.ids, TEXTS.mask, image_kv)
    out.scores["queries"] = queries
    if "itc" in model.config.heads:
        cosines = model.embed_image(queries) @ model.embed_text(TEXTS.ids, TEXTS.mask).T  # (B, Q, R)
        out.scores["itc"] = cosines.amax(dim=1)
        out.scores["itm"] = model.match_logits(TEXTS.ids, TEXTS.mask, image_kv)
    if "llm" in model.config.heads:
        language, visual = model.require_language(), model.visual_prompts(queries)
        predicted = language.predict(visual, PROMPTS, TARGETS, max_text_tokens=40)
        out.scores["llm"] = predicted.logits[predicted.labels != IGNORED_LABEL]
        for name, settings in DECODINGS.items() if texts else ():
            out.texts[name] = beam_ids(language, visual, PROMPTS, MAX_TOKENS, **settings)
    return out


@torch.no_grad()
def their_outputs(theirs: Any, language: Language | None = None, texts: bool = True) -> Outputs:
    """What transformers says of the same; its pooled features are normalised twice, so not those."""
    out = Outputs({"features": theirs.vision_model(PIXELS).last_hidden_state})
    mask = TEXTS.mask.long()
    if language is None:
        itc = theirs(PIXELS, TEXTS.ids, attention_mask=mask, use_image_text_matching_head=False)
        itm = theirs(PIXELS, TEXTS.ids, attention_mask=mask, use_image_text_matching_head=True)
        out.scores |= {"itc": itc.logits_per_image, "itm": itm.logits_per_image}
        return out
    inputs = {"pixel_values": PIXELS}
    if theirs.config.model_type == "instructblip":
        inputs |= {"qformer_input_ids": TEXTS.ids, "qformer_attention_mask": mask}
    logits, queries = _their_logits(theirs, language, inputs)
    out.scores |= {"llm": logits, "queries": queries[:, :NUM_QUERIES]}
    ids, attention = their_prompts(language)
    for name, settings in DECODINGS.items() if texts else ():
        written = theirs.generate(
            **inputs, input_ids=ids, attention_mask=attention, max_new_tokens=MAX_TOKENS, do_sample=False,
            **settings,
        )  # fmt: skip
        first = 1 if language == "t5" else ids.shape[1]  # a decoder's output repeats the prompt
        out.texts[name] = [until(row, end_id(language)) for row in written[:, first:].tolist()]
    return out


def end_id(language: Language) -> int:
    """What a text ends with."""
    return int(text_config(language).eos_token_id)


def their_prompts(language: Language) -> tuple[Tensor, Tensor]:
    """As their processor makes them, a decoder's padded at the left: image tokens, padding, prompt."""
    words = language_words(language)
    side = "right" if language == "t5" else "left"
    encoded = words(PROMPTS, padding=True, padding_side=side, return_tensors="pt")
    images = torch.full((len(PROMPTS), NUM_QUERIES), image_token(language))
    ids = torch.cat([images, encoded.input_ids], dim=1)
    return ids, torch.cat([torch.ones_like(images), encoded.attention_mask], dim=1)


def _their_logits(theirs: Any, language: Language, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (L, V) of all tokens of all targets with their ends, and states of the Q-Former."""
    words, end = language_words(language), end_id(language)
    if language == "t5":
        ids, attention = their_prompts(language)
        encoded = words(TARGETS, padding=True, return_tensors="pt")
        labels = encoded.input_ids.masked_fill(encoded.attention_mask == 0, IGNORED_LABEL)
        output = theirs(**inputs, input_ids=ids, attention_mask=attention, labels=labels)
        return output.logits[labels != IGNORED_LABEL], output.qformer_outputs.last_hidden_state
    rows = []
    for prompt, target in zip(PROMPTS, TARGETS, strict=True):
        whole = words(f"{prompt} {target}" if prompt else target).input_ids
        rows.append((len(words(prompt).input_ids), [*whole, end]))
    length = max(len(row) for _, row in rows)
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for _, row in rows])
    attention = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for _, row in rows])
    images = torch.full((len(rows), NUM_QUERIES), image_token(language))
    whole = torch.cat([torch.ones_like(images), attention], dim=1)
    output = theirs(**inputs, input_ids=torch.cat([images, ids], dim=1), attention_mask=whole)
    before = NUM_QUERIES - 1  # logits stand one place before what they predict
    found = [output.logits[i, before + start : before + len(row)] for i, (start, row) in enumerate(rows)]
    return torch.cat(found), output.qformer_outputs.last_hidden_state


def until(row: list[int], end: int) -> list[int]:
    """A row without its end and what comes behind it."""
    return row[: row.index(end)] if end in row else row
