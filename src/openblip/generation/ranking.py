"""Answers from a closed list: the given text that the decoder finds most likely (BLIP section 5.3, VQA).

B contexts (questions read with their images), C different candidates, M of them that a context compares, K
of those in one pass, P prompt tokens, T tokens of the longest candidate with its end token, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from openblip.errors import ConfigError
from openblip.generation.search import Generated, TextDecoder, check_prompt, to_generated


class Ranked(NamedTuple):
    """The best candidate by its position in the list, and its tokens with their log-probabilities."""

    position: int
    generated: Generated


@torch.inference_mode()
def best_candidates(
    model: TextDecoder,
    context_kv: Any,
    prompt_ids: Tensor,
    candidate_ids: Sequence[Sequence[int]],
    num_contexts: int,
    *,
    eos_id: int,
    num_candidates: int = 128,
    max_rows: int = 512,
) -> list[Ranked]:
    """The candidate of highest log-probability for each context.

    As in the released code, the `num_candidates` whose first token is the most likely are compared by the sum over all
    their tokens and the end token, which is added here. Unlike there, the sum has no label smoothing, a list shorter
    than `num_candidates` is compared whole, and where the limit falls between candidates with the same first token all
    of them are compared: the order of the list decides nothing.

    `prompt_ids` int64 (P,), shared, starts with the decoder's first token. `candidate_ids`: token lists without prompt
    and end token; of equal ones the first counts. `max_rows` bounds memory: the texts decoded at once.

    Raises:
        ConfigError: no candidates, an empty prompt, or `num_candidates` below 1.
        CheckpointError: the model's logits are not numbers.
    """
    check_prompt("ranking", prompt_ids)
    if not candidate_ids:
        raise ConfigError("ranking: no candidates were given")
    if num_candidates < 1:
        raise ConfigError(f"ranking: num_candidates is {num_candidates}; it must be at least 1")
    if num_contexts == 0:
        return []
    indices: dict[tuple[int, ...], int] = {}
    for index, ids in enumerate(candidate_ids):
        indices.setdefault((*ids, eos_id), index)
    texts = sorted(indices, key=len)  # so that the texts of a pass have about the same length
    device = prompt_ids.device
    rows = [torch.tensor(text, device=device) for text in texts]
    table = pad_sequence(rows, batch_first=True, padding_value=eos_id)  # (C, T)
    lengths = torch.tensor([len(text) for text in texts], device=device)

    chosen, counts = _likely_to_begin(
        model, context_kv, prompt_ids.expand(num_contexts, -1), table[:, 0], num_candidates
    )
    passes = []
    for part in chosen.split(max(1, max_rows // num_contexts), dim=1):  # (B, K)
        longest = int(lengths[part].max())
        logprobs = _logprobs(model, context_kv, prompt_ids, table[part, :longest])  # (B, K, T)
        padding = torch.arange(longest, device=device) >= lengths[part][..., None]
        passes.append(F.pad(logprobs.masked_fill(padding, 0.0), (0, table.shape[1] - longest)))
    token_logprobs = torch.cat(passes, dim=1)  # (B, M, T)
    spare = torch.arange(chosen.shape[1], device=device) >= counts[:, None]
    best = token_logprobs.sum(dim=-1).masked_fill(spare, -torch.inf).argmax(dim=1)  # (B,)
    return [
        Ranked(indices[texts[c]], to_generated(torch.tensor(texts[c]), logprobs, len(texts[c]), eos_id))
        for c, logprobs in zip(
            chosen.gather(1, best[:, None]).squeeze(1).tolist(),
            token_logprobs[torch.arange(num_contexts, device=device), best].cpu(),
            strict=True,
        )
    ]


def _likely_to_begin(
    model: TextDecoder, context_kv: Any, prompts: Tensor, first_tokens: Tensor, num_candidates: int
) -> tuple[Tensor, Tensor]:
    """Choose for each context the candidates whose first token is at least as likely as that of the candidate at rank
    `num_candidates`.

    Returns their rows of the table (B, M), padded with others, and how many of each context were chosen (B,).
    """
    logits = model.decode(prompts, context_kv)[:, -1].float()  # (B, V)
    begin = logits[:, first_tokens]  # (B, C)
    limit = begin.topk(min(num_candidates, len(first_tokens)), dim=1).values[:, -1:]
    likely = ~(begin < limit)  # NaN stays in, and is reported when it is scored
    counts = likely.sum(dim=1)
    order = likely.int().sort(dim=1, descending=True, stable=True).indices
    return order[:, : int(counts.max())], counts


def _logprobs(model: TextDecoder, context_kv: Any, prompt_ids: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each token of targets (B, K, T), float32."""
    flat = targets.flatten(0, 1)  # (B * K, T); padding stands last, where a causal decoder never sees it
    inputs = torch.cat([prompt_ids.expand(len(flat), -1), flat[:, :-1]], dim=1)  # (B * K, P + T - 1)
    logits = model.decode(inputs, context_kv)[:, len(prompt_ids) - 1 :].float()  # (B * K, T, V)
    logprobs = logits.gather(2, flat[..., None]).squeeze(2) - logits.logsumexp(dim=-1)
    return logprobs.view(targets.shape)
