"""Images in, token ids and their log-probabilities out: by greedy, nucleus or beam search, or the best of given texts.

The prompt is read once per image, then the rows fan out; an image's cross-attention keys and values are never
copied per row.

B images or other contexts, A images still open, K texts or beams per image, R rows (B * K: K consecutive rows per
image), P prompt tokens, T tokens written so far, S most new tokens, N hypotheses, C different candidates, M of them
that a context compares, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from openblip.errors import CheckpointError, ConfigError
from openblip.generation.decoding import Beam, Decoding, Nucleus, check_decoding


class TextDecoder(Protocol):
    """A causal text decoder that attends to images, as `Blip` and `Blip2` are. context_kv: the images as the decoder
    reads them (`CrossKV`): one entry per image, not per row.
    """

    def new_cache(self, max_length: int) -> Any:
        """An empty `SelfAttentionCache` for rows of at most `max_length` tokens."""

    def decode(self, ids: Tensor, context_kv: Any, cache: Any = None) -> Tensor:
        """Logits (R, T, V) for what follows each of ids (R, T); with a cache, ids are only the new tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """One generated text."""

    ids: list[int]
    """The tokens without prompt and end token."""
    token_logprobs: tuple[float, ...]
    """Natural log-probability of every generated token under the model's own distribution (temperature 1, no nucleus,
    no penalty, no minimum length), in order; one longer than `ids` when the end token was generated, which counts."""

    @property
    def logprob(self) -> float:
        return sum(self.token_logprobs)


def to_generated(ids: Sequence[int], logprobs: Sequence[float], eos_id: int) -> Generated:
    """A text with its end token, if it has one. Raises CheckpointError for a log-probability that is not a number."""
    if any(map(math.isnan, logprobs)):
        raise CheckpointError(
            "The model gave probabilities that are not numbers while writing; "
            "its weights are damaged, or the dtype is too narrow: try float32"
        )
    has_end = bool(ids) and ids[-1] == eos_id
    return Generated(ids=list(ids[:-1] if has_end else ids), token_logprobs=tuple(logprobs))


@torch.inference_mode()
def generate(
    model: TextDecoder,
    context_kv: Any,
    prompt_ids: Tensor,
    num_images: int,
    decoding: Decoding,
    *,
    num_captions: int = 1,
    eos_id: int,
    seeds: Sequence[int] | None = None,
) -> list[list[Generated]]:
    """Write `num_captions` texts for each of `num_images` images.

    `context_kv` holds the images once; beams and samples share it. `prompt_ids` int64 (P,), on the model's device,
    starts with the decoder's first token ([DEC]) and is the same for all images. A text ends with `eos_id` or after
    `decoding.max_new_tokens` tokens.

    Several captions are the best beams (`Beam`, best first) or independent samples (`Nucleus`). A `Nucleus` token
    depends only on the logits and on (seed of the image, number of the caption, step): not on the other images, their
    order or their number. `seeds` gives the B seeds (any integers, taken modulo 2**64); without, they come from
    `decoding.seed` and the image's position, or from fresh entropy when that is None too. No global random state is
    read or changed.

    Raises ConfigError for `num_captions` that the strategy cannot give, a prompt that is empty or not one-dimensional,
    or a number of seeds other than `num_images`; CheckpointError when the model's logits are not numbers.
    """
    check_prompt("generate", prompt_ids)
    check_request(num_images, decoding, num_captions, seeds)
    if num_images == 0:
        return []
    cache = model.new_cache(len(prompt_ids) + decoding.max_new_tokens)
    logits = model.decode(prompt_ids.expand(num_images, -1), context_kv, cache)[:, -1].float()  # (B, V)
    rows_per_image = decoding.num_beams if isinstance(decoding, Beam) else num_captions
    if rows_per_image > 1:
        cache.reorder(torch.arange(num_images, device=logits.device).repeat_interleave(rows_per_image))
        logits = logits.repeat_interleave(rows_per_image, dim=0)  # (B * K, V)
    if isinstance(decoding, Beam) and decoding.num_beams > 1:
        return _beam_search(model, context_kv, cache, logits, decoding, num_captions, eos_id)
    choose: ChooseToken = _choose_most_likely
    if isinstance(decoding, Nucleus):
        choose = nucleus_chooser(decoding, seeds, num_images, num_captions, logits.device)
    return _decode_rows(model, context_kv, cache, logits, decoding, choose, num_captions, eos_id)


def check_prompt(caller: str, prompt_ids: Tensor) -> None:
    """Raise ConfigError unless the prompt is one row that holds at least the decoder's first token."""
    if prompt_ids.dim() != 1 or len(prompt_ids) == 0:
        raise ConfigError(
            f"{caller}: prompt_ids has the shape {tuple(prompt_ids.shape)}; give one row with at least the first token"
        )


def check_request(num_images: int, decoding: Decoding, num_captions: int, seeds: Sequence[int] | None) -> None:
    """Raise ConfigError unless the strategy is one and gives that many texts, and there is a seed for each image."""
    check_decoding(decoding, num_captions)
    if seeds is not None and len(seeds) != num_images:
        raise ConfigError(f"generate: {len(seeds)} seeds for {num_images} images; give one per image")


def adjust_scores(scores: Tensor, generated: Tensor, decoding: Decoding, eos_id: int) -> Tensor:
    """Apply the repetition penalty, the ban on repeated n-grams and the minimum length of `decoding` to scores (R, V).

    `scores` are logits (greedy, nucleus) or log-probabilities (beam), float32; `generated` (R, T) are the
    tokens written so far, without the prompt. The order, and what the penalty is applied to, are those of
    transformers, except that transformers also counts the tokens of the prompt as written.
    """
    penalty, size = decoding.repetition_penalty, decoding.no_repeat_ngram_size
    if penalty != 1.0 and generated.shape[1] > 0:
        seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, generated, True)
        # Dividing a negative score would make it more likely: arXiv 1909.05858 leaves the sign open.
        scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    if 0 < size <= generated.shape[1]:
        earlier = generated.unfold(1, size, 1)  # (R, W, n)
        last = generated[:, generated.shape[1] - size + 1 :]  # (R, n - 1)
        repeats = (earlier[..., :-1] == last[:, None]).all(dim=2)  # (R, W)
        vocab_size = scores.shape[1]  # also where the windows point that are not repeated
        banned = torch.zeros(len(scores), vocab_size + 1, dtype=torch.bool, device=scores.device)
        banned.scatter_(1, torch.where(repeats, earlier[..., -1], vocab_size), True)
        scores = scores.masked_fill(banned[:, :vocab_size], -torch.inf)
    if generated.shape[1] < decoding.min_new_tokens:
        end = torch.arange(scores.shape[1], device=scores.device) == eos_id
        scores = scores.masked_fill(end, -torch.inf)
    return scores


def _worth_compacting(num_open: int, num_images: int) -> bool:
    """Whether dropping finished images pays: once a quarter of them is finished, which happens only a few times.
    Selecting images copies their cross-attention K and V, which costs about what one decoding step reads anyway.
    """
    return num_open <= 0.75 * num_images


# --- Row by row: greedy and nucleus


ChooseToken = Callable[[Tensor, Tensor, int], Tensor]
"""(adjusted scores (R', V), the rows they belong to (R',), step) -> chosen tokens (R',)."""


def _choose_most_likely(scores: Tensor, rows: Tensor, step: int) -> Tensor:
    return scores.argmax(dim=-1)


def derive_seeds(seed: int | None, num_images: int) -> list[int]:
    """One seed per image position, from `seed` (the first n are the same for every number of images >= n)."""
    root = np.random.SeedSequence(seed)
    return [int(child.generate_state(1, np.uint64)[0]) for child in root.spawn(num_images)]


def nucleus_chooser(
    decoding: Nucleus, seeds: Sequence[int] | None, num_images: int, num_captions: int, device: torch.device
) -> ChooseToken:
    """A function that samples from the nucleus with one uniform number per (seed, caption, step)."""
    seeds = derive_seeds(decoding.seed, num_images) if seeds is None else seeds
    table = torch.from_numpy(uniforms(seeds, num_captions, decoding.max_new_tokens)).to(device)

    def choose(scores: Tensor, rows: Tensor, step: int) -> Tensor:
        return sample_nucleus(scores / decoding.temperature, table[rows, step], decoding.top_p, decoding.top_k)

    return choose


def uniforms(seeds: Sequence[int], num_captions: int, steps: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float32 (B * num_captions, steps), from (seed, caption, step) alone. Philox is
    counter-based: the key is (seed modulo 2**64, caption), the counter is the step. 24 bits are kept, which float32
    holds exactly, so 1.0 cannot come out of rounding.
    """
    raw = [
        np.random.Philox(key=np.array([seed % 2**64, caption], dtype=np.uint64)).random_raw(steps)
        for seed in seeds
        for caption in range(num_captions)
    ]
    return ((np.stack(raw) >> np.uint64(40)) * 2.0**-24).astype(np.float32)


def sample_nucleus(logits: Tensor, uniform: Tensor, top_p: float, top_k: int = 0) -> Tensor:
    """One token per row of logits (R, V) by inverse CDF at uniform (R,) in [0, 1); int64 (R,). The nucleus is the
    smallest set of most likely tokens with probability >= top_p, at least one token (arXiv 1904.09751, section 3.1).
    With `top_k` it is taken from the k most likely tokens and those as likely as the last of them, as in transformers.
    Equal probabilities are ordered by token id.
    """
    sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)
    if 0 < top_k < logits.shape[1]:
        sorted_logits = sorted_logits.masked_fill(sorted_logits < sorted_logits[:, top_k - 1 : top_k], -torch.inf)
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


def _decode_rows(
    model: TextDecoder,
    context_kv: Any,
    cache: Any,
    logits: Tensor,
    decoding: Decoding,
    choose: ChooseToken,
    num_captions: int,
    eos_id: int,
) -> list[list[Generated]]:
    """`num_captions` texts per image, each row decoded on its own with `choose`; logits (R, V) after the prompt."""
    device, steps, num_rows = logits.device, decoding.max_new_tokens, len(logits)
    tokens = torch.zeros((num_rows, steps), dtype=torch.long, device=device)  # meaningless beyond `lengths`
    token_logprobs = torch.zeros((num_rows, steps), device=device)
    lengths = torch.full((num_rows,), steps, device=device)
    rows = torch.arange(num_rows, device=device)  # (A * K,) where the rows still open are kept
    finished = torch.zeros(num_rows, dtype=torch.bool, device=device)  # (A * K,)

    for step in range(steps):
        chosen = choose(adjust_scores(logits, tokens[rows, :step], decoding, eos_id), rows, step)
        tokens[rows, step] = chosen
        token_logprobs[rows, step] = logits.log_softmax(dim=-1).gather(1, chosen[:, None]).squeeze(1)
        ended = (chosen == eos_id) & ~finished
        lengths[rows[ended]] = step + 1
        finished = finished | ended

        open_images = (~finished.view(-1, num_captions)).any(dim=1).nonzero().squeeze(1)
        if step + 1 == steps or len(open_images) == 0:
            break
        if _worth_compacting(len(open_images), len(finished) // num_captions):
            keep = torch.arange(len(rows), device=device).view(-1, num_captions)[open_images].flatten()
            context_kv = context_kv.select(open_images)
            cache.reorder(keep)
            rows, finished, chosen = rows[keep], finished[keep], chosen[keep]
        logits = model.decode(chosen[:, None], context_kv, cache)[:, -1].float()

    finals = zip(tokens.tolist(), token_logprobs.tolist(), lengths.tolist(), strict=True)
    texts = [to_generated(ids[:length], logprobs[:length], eos_id) for ids, logprobs, length in finals]
    return [texts[start : start + num_captions] for start in range(0, num_rows, num_captions)]


# --- Beam search, with the scoring and stopping of transformers 5.23 (`early_stopping=False`)


NEVER = -1e9
"""Below every real score, and finite, so that sums with it still order."""


class Hypotheses(NamedTuple):
    """N texts for each of A images."""

    scores: Tensor
    """(A, N) float32: summed adjusted log-probabilities; divided by length ** length_penalty once finished."""
    tokens: Tensor
    """(A, N, S) int64."""
    token_logprobs: Tensor
    """(A, N, S) float32, the model's own."""
    lengths: Tensor
    """(A, N) int64: generated tokens, the end token included."""
    finished: Tensor
    """(A, N) bool."""

    @classmethod
    def empty(cls, num_images: int, num_beams: int, steps: int, device: torch.device) -> Self:
        """Hypotheses that have not begun, below every real score."""
        shape = (num_images, num_beams)
        return cls(
            scores=torch.full(shape, NEVER, device=device),
            tokens=torch.zeros((*shape, steps), dtype=torch.long, device=device),
            token_logprobs=torch.zeros((*shape, steps), device=device),
            lengths=torch.zeros(shape, dtype=torch.long, device=device),
            finished=torch.zeros(shape, dtype=torch.bool, device=device),
        )

    def gather(self, index: Tensor) -> "Hypotheses":
        """The hypotheses index (A, M) of every image, in that order."""
        return Hypotheses(*(torch.take_along_dim(t, index if t.dim() == 2 else index[..., None], dim=1) for t in self))

    def of_images(self, index: Tensor) -> "Hypotheses":
        """All hypotheses of the images that `index` selects."""
        return Hypotheses(*(t[index] for t in self))


def _beam_search(
    model: TextDecoder, context_kv: Any, cache: Any, logits: Tensor, decoding: Beam, num_captions: int, eos_id: int
) -> list[list[Generated]]:
    """The `num_captions` best texts of every image, best first; logits (R, V) after the prompt."""
    device, steps, num_beams = logits.device, decoding.max_new_tokens, decoding.num_beams
    num_images = len(logits) // num_beams
    running = Hypotheses.empty(num_images, num_beams, steps, device)
    running.scores[:, 0] = 0.0  # the beams of an image start equal: all but one wait
    finished = Hypotheses.empty(num_images, num_beams, steps, device)
    images = torch.arange(num_images, device=device)  # (A,) the images still open
    improvable = torch.ones(num_images, dtype=torch.bool, device=device)  # (A,)
    results: list[list[Generated]] = [[] for _ in range(num_images)]

    for step in range(steps):
        candidates, parents = _extend(running, logits, step, decoding, eos_id)
        ended = (candidates.tokens[..., step] == eos_id) | (step + 1 == steps)  # (A, 2K)
        finished = _keep_finished(finished, candidates, ended & improvable[:, None], decoding.length_penalty)
        running = candidates._replace(scores=candidates.scores + ended * NEVER)
        chosen = running.scores.topk(num_beams, dim=1).indices  # (A, K)
        running, parents = running.gather(chosen), parents.gather(1, chosen)

        # Whether the best running text, ended now, would still enter the K best finished ones. As in transformers, this
        # is a guess where the penalty favours long texts: a longer text could score higher yet.
        divisor = float(step + 1) ** decoding.length_penalty
        enters = running.scores[:, 0] / divisor > finished.scores.amin(dim=1)
        improvable = improvable & (~finished.finished.all(dim=1) | enters)
        still_open = improvable.nonzero().squeeze(1)
        if step + 1 == steps or len(still_open) == 0:
            break
        rows = parents + num_beams * torch.arange(len(images), device=device)[:, None]  # (A, K)
        if _worth_compacting(len(still_open), len(images)):
            _collect(results, images[~improvable], finished.of_images(~improvable), num_captions, eos_id)
            context_kv, images, rows = context_kv.select(still_open), images[still_open], rows[still_open]
            running, finished = running.of_images(still_open), finished.of_images(still_open)
            improvable = improvable[still_open]
        cache.reorder(rows.flatten())
        logits = model.decode(running.tokens[..., step].reshape(-1, 1), context_kv, cache)[:, -1].float()

    _collect(results, images, finished, num_captions, eos_id)
    return results


def _extend(running: Hypotheses, logits: Tensor, step: int, decoding: Beam, eos_id: int) -> tuple[Hypotheses, Tensor]:
    """The 2K best one-token extensions of every image's K beams, and the beam (A, 2K) each extends. 2K, because up to K
    of them may end their text and K must remain to go on with.
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


def _keep_finished(finished: Hypotheses, candidates: Hypotheses, ended: Tensor, length_penalty: float) -> Hypotheses:
    """The K best finished texts, after the `ended` (A, 2K) ones among the K best candidates have joined."""
    num_beams = finished.scores.shape[1]
    ended = ended.clone()
    ended[:, num_beams:] = False
    scores = candidates.scores / candidates.lengths.float() ** length_penalty
    new = candidates._replace(scores=scores.masked_fill(~ended, NEVER), finished=ended)
    joined = Hypotheses(*(torch.cat(pair, dim=1) for pair in zip(finished, new, strict=True)))
    return joined.gather(joined.scores.topk(num_beams, dim=1).indices)


def _collect(
    results: list[list[Generated]], images: Tensor, finished: Hypotheses, num_captions: int, eos_id: int
) -> None:
    """Write the best texts of `images` (A,) to their positions in `results`."""
    tokens, logprobs, lengths = (t[:, :num_captions].tolist() for t in finished[1:4])
    for row, image in enumerate(images.tolist()):
        texts = zip(tokens[row], logprobs[row], lengths[row], strict=True)
        results[image] = [to_generated(ids[:length], values[:length], eos_id) for ids, values, length in texts]


# --- Answers from a closed list: the given text that the decoder finds most likely (BLIP section 5.3, VQA)


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

    Raises ConfigError for no candidates, an empty prompt, or `num_candidates` below 1; CheckpointError when the model's
    logits are not numbers.
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
    device, num_prompt = prompt_ids.device, len(prompt_ids)
    rows = [torch.tensor(text, device=device) for text in texts]
    table = pad_sequence(rows, batch_first=True, padding_value=eos_id)  # (C, T)
    lengths = torch.tensor([len(text) for text in texts], device=device)

    begin = model.decode(prompt_ids.expand(num_contexts, -1), context_kv)[:, -1].float()[:, table[:, 0]]  # (B, C)
    limit = begin.topk(min(num_candidates, len(texts)), dim=1).values[:, -1:]
    likely = ~(begin < limit)  # NaN stays in, and is reported when it is scored
    counts = likely.sum(dim=1)
    order = likely.int().sort(dim=1, descending=True, stable=True).indices
    chosen = order[:, : int(counts.max())]  # (B, M) rows of the table, those beyond a context's count are spare

    passes = []
    for part in chosen.split(max(1, max_rows // num_contexts), dim=1):  # (B, K)
        longest = int(lengths[part].max())
        targets = table[part, :longest].flatten(0, 1)  # (B * K, T); a causal decoder never sees the padding at its end
        inputs = torch.cat([prompt_ids.expand(len(targets), -1), targets[:, :-1]], dim=1)  # (B * K, P + T - 1)
        logits = model.decode(inputs, context_kv)[:, num_prompt - 1 :].float()  # (B * K, T, V)
        logprobs = logits.gather(2, targets[..., None]).squeeze(2) - logits.logsumexp(dim=-1)
        padding = torch.arange(longest, device=device) >= lengths[part][..., None]
        logprobs = logprobs.view(padding.shape).masked_fill(padding, 0.0)  # (B, K, T)
        passes.append(F.pad(logprobs, (0, table.shape[1] - longest)))
    token_logprobs = torch.cat(passes, dim=1)  # (B, M, T)
    spare = torch.arange(chosen.shape[1], device=device) >= counts[:, None]
    best = token_logprobs.sum(dim=-1).masked_fill(spare, -torch.inf).argmax(dim=1)  # (B,)

    best_texts = [texts[row] for row in chosen.gather(1, best[:, None]).squeeze(1).tolist()]
    values = token_logprobs[torch.arange(num_contexts, device=device), best].tolist()
    return [
        Ranked(indices[text], to_generated(text, logprobs_of_text[: len(text)], eos_id))
        for text, logprobs_of_text in zip(best_texts, values, strict=True)
    ]
