"""Scores for given texts instead of generated ones: answers from a closed list (BLIP section 5.3, VQA).

B images, C candidates, K candidates of one pass, P prompt tokens, T tokens of the longest candidate with its
end token, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from openblip.errors import ConfigError
from openblip.generation.interface import DecoderContext, TextDecoder


@torch.inference_mode()
def rank_candidates(
    model: TextDecoder,
    context_kv: DecoderContext,
    prompt_ids: Tensor,
    candidate_ids: Sequence[Sequence[int]],
    num_images: int,
    *,
    eos_id: int,
    candidates_per_pass: int = 32,
) -> Tensor:
    """Log-probability of every candidate for every image: float32 (B, C), the higher the better.

    A candidate's score is the sum over its tokens and the end token, which is added here; it is not divided
    by the length. `prompt_ids` int64 (P,), shared, starts with the decoder's first token. `candidate_ids`: C
    token lists without prompt and end token. `candidates_per_pass` bounds memory: B * candidates_per_pass
    rows at once.

    Raises:
        ConfigError: no candidate, or an empty prompt.
    """
    if not candidate_ids:
        raise ConfigError("rank_candidates: no candidates were given")
    if prompt_ids.dim() != 1 or len(prompt_ids) == 0:
        raise ConfigError(
            f"rank_candidates: prompt_ids has the shape {tuple(prompt_ids.shape)}; "
            "give one row with at least the first token"
        )
    scores = []
    for start in range(0, len(candidate_ids), candidates_per_pass):
        texts = [[*ids, eos_id] for ids in candidate_ids[start : start + candidates_per_pass]]
        scores.append(_score(model, context_kv, prompt_ids, texts, num_images, pad_id=eos_id))
    return torch.cat(scores, dim=1)


def _score(
    model: TextDecoder,
    context_kv: DecoderContext,
    prompt_ids: Tensor,
    texts: list[list[int]],
    num_images: int,
    pad_id: int,
) -> Tensor:
    """(B, K) for K texts with their end tokens. Padding stands last, where a causal decoder never sees it."""
    longest = max(len(text) for text in texts)
    targets = torch.tensor([text + [pad_id] * (longest - len(text)) for text in texts])  # (K, T)
    real = torch.arange(longest) < torch.tensor([[len(text)] for text in texts])
    targets, real = targets.to(prompt_ids.device), real.to(prompt_ids.device)

    inputs = torch.cat([prompt_ids.expand(len(texts), -1), targets[:, :-1]], dim=1)  # (K, P + T - 1)
    logits = model.decode(inputs.repeat(num_images, 1), context_kv)  # (B * K, P + T - 1, V)
    logprobs = logits[:, len(prompt_ids) - 1 :].float().log_softmax(dim=-1)  # (B * K, T, V)
    chosen = logprobs.gather(2, targets.repeat(num_images, 1)[..., None]).view(
        num_images, len(texts), longest
    )
    return chosen.masked_fill(~real, 0.0).sum(dim=-1)
