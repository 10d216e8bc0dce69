"""Beam search, with the scoring and stopping of transformers 5.23 (`early_stopping=False`).

B images, A images still worked on, K beams, N hypotheses, S most new tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openblip.generation.decoding import Beam
from openblip.generation.generated import Generated, to_generated
from openblip.generation.interface import DecoderContext, TextDecoder
from openblip.generation.prefill import prefill, worth_compacting
from openblip.generation.scores import adjust_scores

# Below every real score, and finite, so that sums with it still order.
NEVER = -1e9


class Hypotheses(NamedTuple):
    """N texts for each of A images.

    scores (A, N) float32: summed adjusted log-probabilities while a text runs, divided by length **
    length_penalty once it is finished. tokens (A, N, S) int64. token_logprobs (A, N, S) float32: the model's
    own. lengths (A, N) int64: generated tokens, the end token included. finished (A, N) bool.
    """

    scores: Tensor
    tokens: Tensor
    token_logprobs: Tensor
    lengths: Tensor
    finished: Tensor

    @classmethod
    def empty(
        cls, num_images: int, num_beams: int, steps: int, pad_id: int, device: torch.device
    ) -> Hypotheses:
        shape = (num_images, num_beams)
        return cls(
            scores=torch.full(shape, NEVER, device=device),
            tokens=torch.full((*shape, steps), pad_id, device=device),
            token_logprobs=torch.zeros((*shape, steps), device=device),
            lengths=torch.zeros(shape, dtype=torch.long, device=device),
            finished=torch.zeros(shape, dtype=torch.bool, device=device),
        )

    def gather(self, index: Tensor) -> Hypotheses:
        """The hypotheses index (A, M) of every image, in that order."""
        return Hypotheses(
            *(torch.take_along_dim(t, index if t.dim() == 2 else index[..., None], dim=1) for t in self)
        )

    def of_images(self, index: Tensor) -> Hypotheses:
        """All hypotheses of the images `index`."""
        return Hypotheses(*(t[index] for t in self))

    def joined(self, other: Hypotheses) -> Hypotheses:
        """The hypotheses of both, image by image."""
        return Hypotheses(*(torch.cat(pair, dim=1) for pair in zip(self, other, strict=True)))

    def best(self, k: int) -> Hypotheses:
        """The k of highest score of every image, best first."""
        return self.gather(self.scores.topk(k, dim=1).indices)


def beam_search(
    model: TextDecoder,
    context_kv: DecoderContext,
    prompt_ids: Tensor,
    num_images: int,
    decoding: Beam,
    *,
    num_captions: int,
    eos_id: int,
    pad_id: int,
) -> list[list[Generated]]:
    """The `num_captions` best texts of every image, best first."""
    device, steps, num_beams = prompt_ids.device, decoding.max_new_tokens, decoding.num_beams
    logits, cache = prefill(model, context_kv, prompt_ids, num_images, num_beams, steps)
    running = Hypotheses.empty(num_images, num_beams, steps, pad_id, device)
    running.scores[:, 0] = 0.0  # the beams of an image start equal: all but one wait
    finished = Hypotheses.empty(num_images, num_beams, steps, pad_id, device)
    images = torch.arange(num_images, device=device)  # (A,) the images still worked on
    improvable = torch.ones(num_images, dtype=torch.bool, device=device)  # (A,)
    results: list[list[Generated]] = [[] for _ in range(num_images)]

    for step in range(steps):
        candidates, parents = _extend(running, logits, step, decoding, eos_id)
        ended = (candidates.tokens[..., step] == eos_id) | (step + 1 == steps)  # (A, 2K)
        finished = _keep_finished(finished, candidates, ended & improvable[:, None], decoding.length_penalty)
        running = candidates._replace(scores=candidates.scores + ended * NEVER)
        chosen = running.scores.topk(num_beams, dim=1).indices  # (A, K)
        running, parents = running.gather(chosen), parents.gather(1, chosen)

        improvable = improvable & _can_improve(running, finished, step + 1, decoding.length_penalty)
        still_open = improvable.nonzero().squeeze(1)
        if step + 1 == steps or len(still_open) == 0:
            break
        rows = parents + num_beams * torch.arange(len(images), device=device)[:, None]  # (A, K)
        if worth_compacting(len(still_open), len(images)):
            _collect(results, images[~improvable], finished.of_images(~improvable), num_captions, eos_id)
            context_kv, images, rows = context_kv.select(still_open), images[still_open], rows[still_open]
            running, finished = running.of_images(still_open), finished.of_images(still_open)
            improvable = improvable[still_open]
        cache.reorder(rows.flatten())
        logits = model.decode(running.tokens[..., step].reshape(-1, 1), context_kv, cache)[:, -1].float()

    _collect(results, images, finished, num_captions, eos_id)
    return results


def _extend(
    running: Hypotheses, logits: Tensor, step: int, decoding: Beam, eos_id: int
) -> tuple[Hypotheses, Tensor]:
    """The 2K best one-token extensions of every image's K beams, and the beam (A, 2K) each extends.

    2K, because up to K of them may be ends of texts and K must remain to go on with.
    """
    num_images, num_beams = running.scores.shape
    vocab_size = logits.shape[-1]
    logprobs = logits.log_softmax(dim=-1)  # (A * K, V)
    adjusted = adjust_scores(logprobs, running.tokens[..., :step].flatten(0, 1), decoding, eos_id)
    totals = running.scores[..., None] + adjusted.view(num_images, num_beams, vocab_size)
    scores, flat = totals.flatten(1).topk(2 * num_beams, dim=1)  # (A, 2K)
    parents = flat // vocab_size
    candidates = running.gather(parents)
    candidates.tokens[..., step] = flat % vocab_size
    candidates.token_logprobs[..., step] = logprobs.view(num_images, -1).gather(1, flat)
    return candidates._replace(scores=scores, lengths=torch.full_like(parents, step + 1)), parents


def _keep_finished(
    finished: Hypotheses, candidates: Hypotheses, ended: Tensor, length_penalty: float
) -> Hypotheses:
    """The K best finished texts with the `ended` (A, 2K) ones among the K best candidates taken in."""
    num_beams = finished.scores.shape[1]
    ended = ended.clone()
    ended[:, num_beams:] = False
    scores = candidates.scores / candidates.lengths.float() ** length_penalty
    new = candidates._replace(scores=scores.masked_fill(~ended, NEVER), finished=ended)
    return finished.joined(new).best(num_beams)


def _can_improve(running: Hypotheses, finished: Hypotheses, length: int, length_penalty: float) -> Tensor:
    """(A,) whether the best running text, ended now, would still enter the K best finished ones.

    A guess where the penalty favours long texts: a longer text could score higher yet (transformers'
    `early_stopping=False` makes the same guess).
    """
    divisor: float = float(length) ** length_penalty
    all_taken: Tensor = finished.finished.all(dim=1)
    return ~all_taken | (running.scores[:, 0] / divisor > finished.scores.amin(dim=1))


def _collect(
    results: list[list[Generated]], images: Tensor, finished: Hypotheses, num_captions: int, eos_id: int
) -> None:
    """Write the best texts of `images` (A,) to their places in `results`."""
    tokens, logprobs, lengths = (
        finished.tokens.cpu(),
        finished.token_logprobs.cpu(),
        finished.lengths.tolist(),
    )
    for row, image in enumerate(images.tolist()):
        results[image] = [
            to_generated(tokens[row, n], logprobs[row, n], lengths[row][n], eos_id)
            for n in range(num_captions)
        ]
