"""Row-by-row decoding: greedy and nucleus.

B images, K texts per image, R rows (B * K), A rows still worked on, S most new tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openblip.generation.decoding import Decoding, Nucleus
from openblip.generation.generated import Generated, to_generated
from openblip.generation.interface import DecoderContext, TextDecoder
from openblip.generation.prefill import prefill, worth_compacting
from openblip.generation.scores import adjust_scores

# (adjusted scores (A, V), the rows they belong to (A,), step) -> chosen tokens (A,)
ChooseToken = Callable[[Tensor, Tensor, int], Tensor]


def nucleus_chooser(decoding: Nucleus, seeds: Sequence[int], num_captions: int, device: Any) -> ChooseToken:
    """Sampling from the nucleus with one uniform number per (seed, caption, step)."""
    table = torch.from_numpy(uniforms(seeds, num_captions, decoding.max_new_tokens)).to(device)

    def choose(scores: Tensor, rows: Tensor, step: int) -> Tensor:
        return sample_nucleus(scores / decoding.temperature, table[rows, step], decoding.top_p)

    return choose


def choose_most_likely(scores: Tensor, rows: Tensor, step: int) -> Tensor:
    return scores.argmax(dim=-1)


def uniforms(seeds: Sequence[int], num_captions: int, steps: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float32 (B * num_captions, steps), a function of (seed, caption, step)
    alone.

    Philox is counter-based: the key is (seed modulo 2**64, caption), the counter is the step. 24 bits are
    kept, which float32 holds exactly, so 1.0 cannot come out of rounding.
    """
    raw = [
        np.random.Philox(key=np.array([seed % 2**64, caption], dtype=np.uint64)).random_raw(steps)
        for seed in seeds
        for caption in range(num_captions)
    ]
    return ((np.stack(raw) >> np.uint64(40)) * 2.0**-24).astype(np.float32)


def sample_nucleus(logits: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """One token per row of logits (A, V) by inverse CDF at uniform (A,) in [0, 1); int64 (A,).

    The nucleus is the smallest set of most likely tokens with probability >= top_p, at least one token
    (arXiv 1904.09751, section 3.1). Equal probabilities are ordered by token id.
    """
    sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = sorted_logits.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # mass of the more likely tokens
    inside = before < top_p
    inside[:, 0] = True
    mass = probs.masked_fill(~inside, 0.0).cumsum(dim=-1)
    position = (mass <= uniform[:, None] * mass[:, -1:]).sum(dim=-1)
    # At most the last position with mass, whatever a parallel cumsum rounds; at least 0, also when the logits
    # are not numbers, which `to_generated` reports.
    position = torch.minimum(position, (inside & (probs > 0)).sum(dim=-1) - 1).clamp(min=0)
    return order.gather(1, position[:, None]).squeeze(1)


def decode_rows(
    model: TextDecoder,
    context_kv: DecoderContext,
    prompt_ids: Tensor,
    num_images: int,
    decoding: Decoding,
    choose: ChooseToken,
    *,
    num_captions: int,
    eos_id: int,
    pad_id: int,
) -> list[list[Generated]]:
    """`num_captions` texts per image, each row decoded on its own with `choose`."""
    device, steps = prompt_ids.device, decoding.max_new_tokens
    logits, cache = prefill(model, context_kv, prompt_ids, num_images, num_captions, steps)

    num_rows = num_images * num_captions
    tokens = torch.full((num_rows, steps), pad_id, device=device)
    token_logprobs = torch.zeros((num_rows, steps), device=device)
    lengths = torch.full((num_rows,), steps, device=device)
    rows = torch.arange(num_rows, device=device)  # (A,) where the rows still worked on are kept
    finished = torch.zeros(num_rows, dtype=torch.bool, device=device)  # (A,)

    for step in range(steps):
        chosen = choose(adjust_scores(logits, tokens[rows, :step], decoding, eos_id), rows, step)
        logprob = logits.log_softmax(dim=-1).gather(1, chosen[:, None]).squeeze(1)
        tokens[rows, step] = chosen.masked_fill(finished, pad_id)
        token_logprobs[rows, step] = logprob
        ended = (chosen == eos_id) & ~finished
        lengths[rows[ended]] = step + 1
        finished = finished | ended

        open_images = (~finished.view(-1, num_captions)).any(dim=1).nonzero().squeeze(1)
        if step + 1 == steps or len(open_images) == 0:
            break
        if worth_compacting(len(open_images), len(finished) // num_captions):
            keep = torch.arange(len(rows), device=device).view(-1, num_captions)[open_images].flatten()
            context_kv = context_kv.select(open_images)
            cache.reorder(keep)
            rows, finished, chosen = rows[keep], finished[keep], chosen[keep]
        logits = model.decode(chosen[:, None], context_kv, cache)[:, -1].float()

    tokens, token_logprobs, ends = tokens.cpu(), token_logprobs.cpu(), lengths.tolist()
    texts = [to_generated(tokens[r], token_logprobs[r], ends[r], eos_id) for r in range(num_rows)]
    return [texts[i * num_captions : (i + 1) * num_captions] for i in range(num_images)]
