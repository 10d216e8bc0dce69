"""Explanations by gradient-weighted cross-attention: a patch counts where a word looks at it and looking more
would raise the score (Grad-CAM, arXiv 1610.02391; on cross-attention as in ALBEF, arXiv 2107.07651).

The map of a head is attention * relu(d score / d attention); heads are averaged and the class token left out,
as LAVIS does for the matching head. Here any layer, resolution and number of heads will do, and captions and
answers are explained, too.

W words, K of them at a time, Q text tokens that look, P prompt tokens, L tokens of a written text, N image
tokens, Dv their width, G patches a side, H heads, V vocabulary.
"""

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor

from openblip.errors import ConfigError, UnsupportedTaskError
from openblip.predictor.answering import write_answers
from openblip.predictor.batching import chunks
from openblip.predictor.blip_runtime import BlipRuntime
from openblip.predictor.captioning import write_captions
from openblip.predictor.explanation import Explanation, join_pieces
from openblip.predictor.images import EncodedImages, Images
from openblip.predictor.runtime import Runtime
from openblip.predictor.writing import ANSWER_DECODING, CAPTION_DECODING

MAX_TOKENS = 1024
"""Tokens at which the decoder predicts the next in one go."""


def explain_image(runtime: BlipRuntime, image: Images, text: str | None, layer: int | None) -> Explanation:
    """Why a text matches an image, a question has its answer, or a caption says what it says."""
    heads = runtime.model.config.heads
    if not ({"lm"} if text is None else {"itm", "vqa", "lm"}) & set(heads):
        raise UnsupportedTaskError(
            f"This checkpoint has no lm head to explain a caption by; it has {', '.join(heads)}: give a text."
            if text is None
            else f"Explanations need an itm, vqa or lm head; this checkpoint has {', '.join(heads)}."
        )
    encoded = one_image(runtime, image)
    if layer is None:
        layer = _middle(runtime.model.config.text.num_layers)
    with torch.inference_mode(False), torch.enable_grad():
        tokens = encoded.tokens.clone()  # what was made in inference mode cannot be part of a graph
        if text is None:
            ((caption,),) = write_captions(
                runtime, encoded, None, CAPTION_DECODING, num_captions=1, batch_size=None, seeds=None
            )
            return _explain_caption(runtime, tokens, caption.text, caption.ids, layer)
        if "itm" in heads:
            return _explain_match(runtime, tokens, text, layer)
        if "vqa" in heads:
            return _explain_answer(runtime, tokens, encoded, text, layer)
        text_ids = runtime.tokenizer.prompt(text).tolist()[1:]
        return _explain_caption(runtime, tokens, text, (*text_ids, runtime.tokenizer.sep_id), layer)


def _explain_match(runtime: BlipRuntime, image: Tensor, text: str, layer: int) -> Explanation:
    """image: (1, N, Dv). What is differentiated is the logit of "match"."""
    tokens = runtime.tokenize([text], runtime.encoder_id)
    words, places = words_of(runtime, tokens.ids[0, 1:-1].tolist())
    with runtime.model.capture_cross_attention("encode", layer) as weights:
        image_kv = runtime.model.image_kv(image, "encode")
        logits = runtime.model.match_logits(tokens.ids, tokens.mask, image_kv)  # (1, 2)
    maps = patch_maps(logits[0, 1], weights[0])
    return match_explanation(text, logits, words, places, maps)


def _explain_answer(
    runtime: BlipRuntime, image: Tensor, encoded: EncodedImages, question: str, layer: int
) -> Explanation:
    """image: (1, N, Dv). The answer's log-probability, through what the question's words saw."""
    (answer,) = write_answers(runtime, encoded, [question], ANSWER_DECODING, batch_size=None)
    start = runtime.tokenizer.prompt("")
    ids = torch.cat([start, torch.tensor(answer.ids)]).to(runtime.device)
    tokens = runtime.tokenize_questions([question])
    words, places = words_of(runtime, tokens.ids[0, 1:-1].tolist())
    with runtime.model.capture_cross_attention("encode", layer) as weights:
        image_kv = runtime.model.image_kv(image, "encode")
        question_kv = runtime.model.question_kv(tokens.ids, tokens.mask, image_kv)
        logits = runtime.model.decode(ids[None, :-1], question_kv)
    score = logprobs_of(logits, ids[len(start) :]).sum()
    maps = patch_maps(score, weights[0])  # the first reading: a shared layer also read the question
    return Explanation(
        text=answer.text,
        score=float(score.detach()),
        words=words,
        heat=torch.stack([maps[1:-1][pieces].mean(dim=0) for pieces in places]),
        overall=maps.mean(dim=0),
    )


def _explain_caption(
    runtime: BlipRuntime, image: Tensor, text: str, text_ids: Sequence[int], layer: int
) -> Explanation:
    """image: (1, N, Dv); text_ids with the end. The log-probability of each word, through all read before it.

    Every word has a row of its own in the batch, so that one pass back gives the gradients of all.
    """
    prompt_ids = runtime.tokenizer.prompt(runtime.prompt)  # (P,)
    ids = torch.cat([prompt_ids, torch.tensor(text_ids)]).to(runtime.device)  # (P + L,)
    words, places = words_of(runtime, [i for i in text_ids if i != runtime.tokenizer.sep_id])
    check_text_length(len(text_ids), len(prompt_ids), runtime.max_positions)
    image_kv = runtime.model.image_kv(image, "decode")
    maps, score = [], 0.0
    for own in chunks(places, max(1, MAX_TOKENS // len(ids))):
        with runtime.model.capture_cross_attention("decode", layer) as weights:
            logits = runtime.model.decode(ids[None, :-1].expand(len(own), -1), image_kv)
        logprobs = logprobs_of(logits[:, len(prompt_ids) - 1 :], ids[len(prompt_ids) :])  # (K, L)
        each = torch.stack([logprobs[row, pieces].sum() for row, pieces in enumerate(own)])
        looks = patch_maps(each.sum(), weights[0])  # (K * Q, G, G)
        maps.append(looks.unflatten(0, (len(own), -1)).sum(dim=1))
        score = float(logprobs[0].detach().sum())
    heat = torch.cat(maps)
    return Explanation(text=text, score=score, words=words, heat=heat, overall=heat.mean(dim=0))


def one_image(runtime: Runtime, image: Images) -> EncodedImages:
    """The image encoded; ConfigError for several, or a clip."""
    encoded = runtime.encode(image)
    if len(encoded) != 1 or encoded.num_frames != 1:
        raise ConfigError("explain takes one image at a time, and no clip.")
    return encoded


def check_text_length(length: int, prompt_length: int, positions: int) -> None:
    """ConfigError for a caption of more tokens, its end included, than the model reads."""
    if prompt_length + length - 1 > positions:
        raise ConfigError(
            f"A text of {length} tokens with its end, after a prompt of {prompt_length}: the model reads at "
            f"most {positions}; give a shorter one."
        )


def _middle(num_layers: int) -> int:
    """Not the last one, where what the words see no longer reaches the score of a match."""
    return max(0, min(num_layers // 2, num_layers - 2))


def patch_maps(score: Tensor, weights: Tensor, retain_graph: bool = False) -> Tensor:
    """weights (1, H, Q, N), of which score is made -> (Q, G, G), float32 on the CPU."""
    (gradient,) = torch.autograd.grad(score, weights, retain_graph=retain_graph)
    cams = (weights.detach() * gradient.clamp(min=0.0)).mean(dim=1)[0]  # (Q, N)
    side = isqrt(cams.shape[1])
    if side**2 + 1 == cams.shape[1]:
        cams = cams[:, 1:]  # without the class token
    elif side**2 != cams.shape[1]:
        raise UnsupportedTaskError(
            "Explanations need an image encoder whose tokens are a square of patches, with a class token "
            f"before it or none; this one has {cams.shape[1]} tokens."
        )
    patches: Tensor = cams.unflatten(1, (side, side))
    return patches.float().cpu()


def logprobs_of(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (K, L, V) and what they should say, (L,) -> (K, L)."""
    wanted = targets.expand(len(logits), -1)[..., None]
    return logits.gather(2, wanted).squeeze(2) - logits.logsumexp(dim=-1)


def match_explanation(
    text: str, logits: Tensor, words: tuple[str, ...], places: Sequence[Sequence[int]], maps: Tensor
) -> Explanation:
    """Of a match: logits (1, 2), maps (T, G, G) of all tokens, of which `places` are each word's pieces."""
    return Explanation(
        text=text,
        score=float(logits.detach().float().softmax(dim=1)[0, 1]),
        words=words,
        heat=torch.stack([maps[1:-1][pieces].mean(dim=0) for pieces in places]),
        overall=maps.mean(dim=0),
    )


def words_of(runtime: Runtime, ids: Sequence[int]) -> tuple[tuple[str, ...], list[list[int]]]:
    """The words of a text and the places of their pieces; ConfigError when there are none."""
    words, places = join_pieces(runtime.require_tokenizer().pieces(ids))
    if not words:
        raise ConfigError("explain shows where words look: the text has none.")
    return tuple(words), places
