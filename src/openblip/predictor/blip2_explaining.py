"""Explanations of BLIP-2: which patches its queries look at, and through them the words.

A query's map is attention * relu(d score / d attention), as in `explaining`, of a layer whose queries attend
to the image. What is written (by the language model or, with ITG, by the Q-Former) depends on all queries:
the map of a word is their sum, with the word's log-probability as score. A text that is matched reads the
queries in self-attention: the map of a word are theirs, weighted by how much the word attends to each.

Q queries, T text tokens, L tokens of a written text, W words, N image tokens, Dv their width, G patches a
side, Dl width of the language model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from openblip.data.prompts import conversation_prompt, normalize_question
from openblip.errors import UnsupportedTaskError
from openblip.models.blip2 import QueryAttention
from openblip.models.language_model import IGNORE
from openblip.predictor import prompting
from openblip.predictor.blip2_runtime import Blip2Runtime
from openblip.predictor.captioning import write_captions
from openblip.predictor.explaining import (
    check_text_length,
    logprobs_of,
    match_explanation,
    one_image,
    patch_maps,
    words_of,
)
from openblip.predictor.explanation import Explanation, join_language_pieces
from openblip.predictor.images import EncodedImages, Images
from openblip.predictor.writing import CAPTION_DECODING, LANGUAGE_ANSWER_DECODING


def explain_image(runtime: Blip2Runtime, image: Images, text: str | None, layer: int | None) -> Explanation:
    """Why a text matches an image, a question has its answer, or a caption says what it says."""
    heads = runtime.model.config.heads
    if not {"itg", "llm", *(() if text is None else ("itm",))} & set(heads):
        raise UnsupportedTaskError(
            "Explanations need an itg or llm head, or an itm head and a text; this checkpoint has "
            f"{', '.join(heads)}."
        )
    encoded = one_image(runtime, image)
    if text is not None and "itm" in heads:
        return _explain_match(runtime, encoded, text, layer)
    if "llm" in heads:
        return _explain_language(runtime, encoded, text, layer)
    return _explain_caption(runtime, encoded, text, layer)


@contextmanager
def _in_sight(
    runtime: Blip2Runtime, encoded: EncodedImages, layer: int | None
) -> Iterator[tuple[Tensor, QueryAttention]]:
    """Inside, gradients are kept; gives the image's tokens (1, N, Dv) and where attention will be seen."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        runtime.model.capture_query_attention(layer) as weights,
    ):
        yield encoded.tokens.clone(), weights  # what was made in inference mode cannot be part of a graph


def _explain_match(
    runtime: Blip2Runtime, encoded: EncodedImages, text: str, layer: int | None
) -> Explanation:
    """What is differentiated is the logit of "match"."""
    read = runtime.tokenize([text], runtime.encoder_id)
    words, places = words_of(runtime, read.ids[0, 1:-1].tolist())
    with _in_sight(runtime, encoded, layer) as (tokens, weights):
        logits = runtime.model.match_logits(read.ids, read.mask, runtime.model.image_kv(tokens))  # (1, 2)
        queries = patch_maps(logits[0, 1], weights.image[0])  # (Q, G, G)
    attention = weights.tokens[0].detach().float().mean(dim=1)[0].cpu()  # (Q + T, Q + T)
    looks = attention[len(queries) :, : len(queries)]  # (T, Q)
    maps = torch.einsum("tq,qgh->tgh", looks, queries)
    return match_explanation(text, logits, words, places, maps)


def _explain_language(
    runtime: Blip2Runtime, encoded: EncodedImages, question: str | None, layer: int | None
) -> Explanation:
    """Of the answer to a question, or without one of the caption."""
    language = runtime.model.require_language()
    with torch.inference_mode():
        if question is None:
            instruction = prompt = runtime.prompt
            ((written,),) = prompting.write_prompted(
                runtime, encoded, None, CAPTION_DECODING, num_captions=1, batch_size=None, seeds=None
            )
        else:
            instruction = normalize_question(question)
            prompt = conversation_prompt(runtime.question_prompt, (), instruction)
            (written,) = prompting.write_answers(
                runtime, encoded, [question], LANGUAGE_ANSWER_DECODING, batch_size=None
            )
    words, places = join_language_pieces(language.tokenizer, written.ids)
    with _in_sight(runtime, encoded, layer) as (tokens, weights):
        visual = runtime.visual_prompts(tokens, [instruction])  # (1, Q, Dl)
        predicted = language.predict_ids(visual, [prompt], [written.ids])
        logits = predicted.logits[:, predicted.labels[0] != IGNORE]  # (1, L, V)
        return _explain_words(weights, logits, written.text, written.ids, words, places)


def _explain_caption(
    runtime: Blip2Runtime, encoded: EncodedImages, text: str | None, layer: int | None
) -> Explanation:
    """Of a caption by the Q-Former, the given one or its own."""
    tokenizer = runtime.require_tokenizer()
    start = tokenizer.prompt(runtime.prompt).tolist()
    if text is None:
        ((written,),) = write_captions(
            runtime, encoded, None, CAPTION_DECODING, num_captions=1, batch_size=None, seeds=None
        )
        text, ids = written.text, written.ids
    else:
        ids = (*tokenizer.prompt(text).tolist()[1:], tokenizer.sep_id)
        check_text_length(len(ids), len(start), runtime.max_positions)
    words, places = words_of(runtime, [i for i in ids if i != tokenizer.sep_id])
    read = torch.tensor([[*start, *ids[:-1]]], device=runtime.device)
    with _in_sight(runtime, encoded, layer) as (tokens, weights):
        logits = runtime.model.decode(read, runtime.model.image_kv(tokens))[:, len(start) - 1 :]  # (1, L, V)
        return _explain_words(weights, logits, text, ids, words, places)


def _explain_words(
    weights: QueryAttention,
    logits: Tensor,
    text: str,
    ids: Sequence[int],
    words: Sequence[str],
    places: Sequence[Sequence[int]],
) -> Explanation:
    """logits (1, L, V) of a text that was written, L tokens with the end: a way back for every word."""
    logprobs = logprobs_of(logits.float(), torch.tensor(ids, device=logits.device))[0]  # (L,)
    maps = [
        patch_maps(logprobs[pieces].sum(), weights.image[0], retain_graph=True).sum(dim=0)
        for pieces in places
    ]
    heat = torch.stack(maps)
    return Explanation(
        text=text,
        score=float(logprobs.detach().sum()),
        words=tuple(words),
        heat=heat,
        overall=heat.mean(dim=0),
    )
