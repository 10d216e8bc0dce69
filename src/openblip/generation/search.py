"""Images in, token ids and their log-probabilities out: by greedy, nucleus or beam search, or the best of given texts.

The prompt is read once per image, then the rows fan out; an image's cross-attention keys and values are never
copied per row. A step of a search is a function of tensors of fixed shapes; images whose texts are finished leave, a
few times, when enough of them are.

B images or other contexts, A images still open, K texts or beams per image, R rows (A * K: K consecutive rows per
image), P prompt tokens, T tokens written so far, S most new tokens, N hypotheses, C different candidates, M of them
that a context compares, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from openblip.errors import CheckpointError, ConfigError
from openblip.generation.decoding import Beam, Decoding, Nucleus, check_decoding
from openblip.generation.steps import Steps, TextDecoder, recorded, select_images


class TextModel(Protocol):
    """A model that writes texts about images, as `Blip` and `Blip2` do. context_kv: the images as it reads them
    (`CrossKV`), one entry per image, not per row.
    """

    def begin_texts(
        self, context_kv: Any, prompt_ids: Tensor, num_images: int, *, samples: int, beams: int, max_new_tokens: int
    ) -> tuple[TextDecoder, Tensor]:
        """Read the prompt, int64 (P,): a decoder of `samples` * `beams` texts of each image, and the logits (B, V),
        float32, for their first token. One of samples and beams is 1.
        """

    def decode(self, ids: Tensor, context_kv: Any) -> Tensor:
        """Logits (R, T, V) for what follows each of ids (R, T)."""


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
    model: TextModel,
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
    beams = decoding.num_beams if isinstance(decoding, Beam) else 1
    samples, most = (num_captions, 1)[beams > 1], decoding.max_new_tokens
    decoder, logits = model.begin_texts(
        context_kv, prompt_ids, num_images, samples=samples, beams=beams, max_new_tokens=most
    )
    return write(decoder, logits, decoding, num_captions=num_captions, eos_id=eos_id, seeds=seeds)


@torch.inference_mode()
def write(
    decoder: TextDecoder,
    logits: Tensor,
    decoding: Decoding,
    *,
    num_captions: int = 1,
    eos_id: int,
    seeds: Sequence[int] | None = None,
) -> list[list[Generated]]:
    """Write texts with a decoder that has read the prompts of B images. logits (B, V), float32: for the first token.
    The decoder has a row for every beam of an image, or for every caption. Else as `generate`.
    """
    check_request(len(logits), decoding, num_captions, seeds)
    num_images, most, device = len(logits), decoding.max_new_tokens, logits.device
    rows_per_image = num_captions
    state: Samples | Beams
    if isinstance(decoding, Beam) and decoding.num_beams > 1:
        rows_per_image = decoding.num_beams
        state = Beams.start(num_images, rows_per_image, most, device)
    else:
        uniform = torch.zeros(num_images, num_captions, most, device=device)
        if isinstance(decoding, Nucleus):
            seeds = derive_seeds(decoding.seed, num_images) if seeds is None else seeds
            uniform.copy_(torch.from_numpy(uniforms(seeds, num_captions, most)).view_as(uniform))
        state = Samples.start(uniform)
    images, first = torch.arange(num_images, device=device), torch.zeros(1, dtype=torch.long, device=device)
    results: list[list[Generated]] = [[] for _ in range(num_images)]
    state = state.take(logits.repeat_interleave(rows_per_image, dim=0), first, decoding, eos_id)
    with recorded(Steps(decoder, state, first, decoding, eos_id)) as steps:
        for number in range(1, most):
            if number > decoding.min_new_tokens and number % (1 if device.type == "cpu" else CHECK_EVERY) == 0:
                is_open = steps.state.is_open()
                num_open = int(is_open.sum())
                if num_open == 0:
                    break
                size = _batch_size(num_open, num_images)
                if size < len(images):
                    order = is_open.int().argsort(descending=True, stable=True)
                    kept, dropped = order[:size], order[size:]
                    _collect(results, images[dropped], select_images(steps.state, dropped), num_captions, eos_id)
                    images, steps = images[kept], steps.select(kept)
            steps.advance()
        _collect(results, images, steps.state, num_captions, eos_id)
    return results


CHECK_EVERY = 4
"""Steps between two looks at which texts are finished, where a look stops the device."""


def _batch_size(num_open: int, num_images: int) -> int:
    """The smallest of a few sizes, from `num_images` down, that holds the open images. To drop images copies the keys
    and values of the others, which costs about what one step reads anyway.
    """
    sizes = [num_images, *(math.ceil(num_images * share) for share in (0.75, 0.5, 0.25, 0.125, 0.0625))]
    return min(size for size in sizes if size >= num_open)


def _collect(
    results: list[list[Generated]], images: Tensor, state: "Samples | Beams", num_captions: int, eos_id: int
) -> None:
    """Write the best texts of `images` (A,) to their positions in `results`."""
    texts = [x[:, :num_captions].tolist() for x in state.texts()]
    for image, *rows in zip(images.tolist(), *texts, strict=True):
        results[image] = [to_generated(ids[:n], values[:n], eos_id) for ids, values, n in zip(*rows, strict=True)]


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


def adjust_scores(scores: Tensor, tokens: Tensor, length: Tensor | int, decoding: Decoding, eos_id: int) -> Tensor:
    """Apply the repetition penalty, the ban on repeated n-grams and the minimum length of `decoding` to scores (R, V).

    `scores` are logits (greedy, nucleus) or log-probabilities (beam), float32; the first `length` of `tokens` (R, S),
    an int or a tensor of one, were written so far, without the prompt. The order, and what the penalty is applied to,
    are those of transformers, except that transformers also counts the tokens of the prompt as written.
    """
    penalty, size = decoding.repetition_penalty, decoding.no_repeat_ngram_size
    num_rows, vocab_size = scores.shape
    positions = torch.arange(tokens.shape[1], device=scores.device)

    def marked(ids: Tensor, where: Tensor) -> Tensor:
        """bool (R, V), True at those of ids (R, W) where it holds."""
        marks = torch.zeros(num_rows, vocab_size + 1, dtype=torch.bool, device=scores.device)  # a column for the others
        return marks.scatter_(1, torch.where(where, ids, vocab_size), True)[:, :vocab_size]

    if penalty != 1.0:
        # Dividing a negative score would make it more likely: arXiv 1909.05858 leaves the sign open.
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(marked(tokens, positions < length), penalised, scores)
    if 0 < size <= tokens.shape[1]:
        earlier = tokens.unfold(1, size, 1)  # (R, W, n)
        last = (length - size + 1 + positions[: size - 1]).clamp(min=0)  # where the last n - 1 tokens stand
        repeats = (earlier[..., :-1] == tokens.index_select(1, last)[:, None]).all(dim=2)  # (R, W)
        written = positions[size - 1 :] < length  # (W,)
        scores = scores.masked_fill(marked(earlier[..., -1], repeats & written), -torch.inf)
    if decoding.min_new_tokens > 0:
        is_end = torch.arange(vocab_size, device=scores.device) == eos_id
        scores = scores.masked_fill(is_end & (length < decoding.min_new_tokens), -torch.inf)
    return scores


# --- Row by row: greedy and nucleus


class Samples(NamedTuple):
    """K texts for each of A images that are written on their own."""

    tokens: Tensor
    """(A, K, S) int64, meaningless beyond `lengths`, as `token_logprobs` are."""
    token_logprobs: Tensor
    """(A, K, S) float32, the model's own."""
    lengths: Tensor
    """(A, K) int64: generated tokens, the end token included."""
    finished: Tensor
    """(A, K) bool."""
    last: Tensor
    """(A, K) int64, the tokens chosen last."""
    uniform: Tensor
    """(A, K, S) float32 in [0, 1): where a nucleus is sampled."""

    @classmethod
    def start(cls, uniform: Tensor) -> Self:
        """Texts without tokens."""
        (*shape, steps), device = uniform.shape, uniform.device
        return cls(
            tokens=torch.zeros((*shape, steps), dtype=torch.long, device=device),
            token_logprobs=torch.zeros((*shape, steps), device=device),
            lengths=torch.zeros(shape, dtype=torch.long, device=device),
            finished=torch.zeros(shape, dtype=torch.bool, device=device),
            last=torch.zeros(shape, dtype=torch.long, device=device),
            uniform=uniform,
        )

    @property
    def parents(self) -> None:
        """Every text goes on from itself."""

    def texts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, their log-probabilities and lengths."""
        return self.tokens, self.token_logprobs, self.lengths

    def is_open(self) -> Tensor:
        """bool (A,): the images that need more steps."""
        return ~self.finished.all(dim=1)

    def take(self, logits: Tensor, step: Tensor, decoding: Decoding, eos_id: int) -> Self:
        """Choose the next token of every text. logits (R, V), float32; step int64 (1,), counted from 0."""
        scores = adjust_scores(logits, self.tokens.flatten(0, 1), step, decoding, eos_id)
        if isinstance(decoding, Nucleus):
            uniform = self.uniform.index_select(2, step).flatten()
            chosen = sample_nucleus(scores / decoding.temperature, uniform, decoding.top_p, decoding.top_k)
        else:
            chosen = scores.argmax(dim=-1)
        logprobs = logits.gather(1, chosen[:, None]).squeeze(1) - logits.logsumexp(dim=-1)
        chosen = chosen.view(self.last.shape)
        return self._replace(
            tokens=self.tokens.index_copy(2, step, chosen[..., None]),
            token_logprobs=self.token_logprobs.index_copy(2, step, logprobs.view(*chosen.shape, 1)),
            lengths=self.lengths + ~self.finished,
            finished=self.finished | (chosen == eos_id),
            last=chosen,
        )


def derive_seeds(seed: int | None, num_images: int) -> list[int]:
    """One seed per image position, from `seed` (the first n are the same for every number of images >= n)."""
    root = np.random.SeedSequence(seed)
    return [int(child.generate_state(1, np.uint64)[0]) for child in root.spawn(num_images)]


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
    ordered = _sort_descending(logits)
    kept = ordered
    if 0 < top_k < logits.shape[1]:
        kept = ordered.masked_fill(ordered < ordered[:, top_k - 1 : top_k], -torch.inf)
    probs = kept.softmax(dim=-1)
    mass = probs.cumsum(dim=-1)
    inside = ((mass - probs < top_p) & (probs > 0)).sum(dim=-1, keepdim=True).clamp(min=1)  # (R, 1) size of the nucleus
    target = uniform[:, None] * mass.gather(1, inside - 1)
    # At most the last token of the nucleus, whatever a parallel cumsum rounds.
    position = torch.minimum((mass <= target).sum(dim=-1, keepdim=True), inside - 1)
    chosen = ordered.gather(1, position)
    equal = (logits == chosen).cumsum(dim=-1, dtype=torch.int32)
    rank = position - (ordered > chosen).sum(dim=-1, keepdim=True)  # among the equal ones
    # Where the logits are not numbers nothing is equal; `to_generated` reports them.
    return (equal <= rank).sum(dim=-1).clamp(max=logits.shape[1] - 1)


def _sort_descending(x: Tensor) -> Tensor:
    """The values (R, V) of every row. On a CPU by numpy, which sorts with vector instructions, ten times as fast."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.sort(x.numpy(), axis=-1)).flip(-1)
    return x.sort(dim=-1, descending=True).values


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


class Beams(NamedTuple):
    """A beam search over A images with K beams."""

    running: Hypotheses
    """(A, K) texts to go on with; those that would wait for others are NEVER likely."""
    finished: Hypotheses
    """(A, K) the best ended texts, best first."""
    improvable: Tensor
    """bool (A,): whether a running text could still enter the finished ones."""
    parents: Tensor
    """(A, K) int64: the beam that each beam extended last."""
    last: Tensor
    """(A, K) int64, the tokens chosen last."""

    @classmethod
    def start(cls, num_images: int, num_beams: int, steps: int, device: torch.device) -> Self:
        """Texts without tokens: the beams of an image start equal, so all but one wait."""
        shape = (num_images, num_beams, steps, device)
        running, finished = Hypotheses.empty(*shape), Hypotheses.empty(*shape)
        running.scores[:, 0] = 0.0
        improvable, nothing = torch.ones(num_images, dtype=torch.bool, device=device), torch.zeros_like(running.lengths)
        return cls(running, finished, improvable, nothing, nothing)

    def texts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of the finished texts, their log-probabilities and lengths."""
        return self.finished.tokens, self.finished.token_logprobs, self.finished.lengths

    def is_open(self) -> Tensor:
        """bool (A,): the images that need more steps."""
        return self.improvable

    def take(self, logits: Tensor, step: Tensor, decoding: Decoding, eos_id: int) -> "Beams":
        """Choose the next tokens of every image. logits (R, V), float32; step int64 (1,), counted from 0."""
        assert isinstance(decoding, Beam)
        num_beams, length = decoding.num_beams, step + 1
        candidates, parents = _extend(self.running, logits, step, decoding, eos_id)
        last = candidates.tokens.index_select(2, step).squeeze(2)  # (A, 2K)
        ended = (last == eos_id) | (length == decoding.max_new_tokens)
        counted = ended & self.improvable[:, None]
        finished = _keep_finished(self.finished, candidates, counted, decoding.length_penalty)
        running = candidates._replace(scores=candidates.scores + ended * NEVER)
        chosen = running.scores.topk(num_beams, dim=1).indices  # (A, K)
        running = running.gather(chosen)

        # Whether the best running text, ended now, would still enter the K best finished ones. As in transformers, this
        # is a guess where the penalty favours long texts: a longer text could score higher yet.
        enters = running.scores[:, 0] / length.float() ** decoding.length_penalty > finished.scores.amin(dim=1)
        improvable = self.improvable & (~finished.finished.all(dim=1) | enters)
        return Beams(running, finished, improvable, parents.gather(1, chosen), last.gather(1, chosen))


def _extend(
    running: Hypotheses, logits: Tensor, step: Tensor, decoding: Beam, eos_id: int
) -> tuple[Hypotheses, Tensor]:
    """The 2K best one-token extensions of every image's K beams, and the beam (A, 2K) each extends. 2K, because up to K
    of them may end their text and K must remain to go on with.
    """
    num_images, num_beams = running.scores.shape
    vocab_size = logits.shape[-1]
    logprobs = logits.log_softmax(dim=-1)  # (R, V)
    adjusted = adjust_scores(logprobs, running.tokens.flatten(0, 1), step, decoding, eos_id)
    totals = running.scores[..., None] + adjusted.view(num_images, num_beams, vocab_size)
    scores, flat = totals.flatten(1).topk(2 * num_beams, dim=1)  # (A, 2K)
    parents = flat // vocab_size
    candidates = running.gather(parents)
    own = logprobs.view(num_images, -1).gather(1, flat)
    candidates = candidates._replace(
        scores=scores,
        tokens=candidates.tokens.index_copy(2, step, (flat % vocab_size)[..., None]),
        token_logprobs=candidates.token_logprobs.index_copy(2, step, own[..., None]),
        lengths=(step + 1).expand(parents.shape),
    )
    return candidates, parents


def _keep_finished(finished: Hypotheses, candidates: Hypotheses, ended: Tensor, length_penalty: float) -> Hypotheses:
    """The K best finished texts, after the `ended` (A, 2K) ones among the K best candidates have joined."""
    num_beams = finished.scores.shape[1]
    ended = ended.clone()
    ended[:, num_beams:] = False
    scores = candidates.scores / candidates.lengths.float() ** length_penalty
    new = candidates._replace(scores=scores.masked_fill(~ended, NEVER), finished=ended)
    joined = Hypotheses(*(torch.cat(pair, dim=1) for pair in zip(finished, new, strict=True)))
    return joined.gather(joined.scores.topk(num_beams, dim=1).indices)


# --- Answers from a closed list: the given text that the decoder finds most likely (BLIP section 5.3, VQA)


class Ranked(NamedTuple):
    """The best candidate by its position in the list, and its tokens with their log-probabilities."""

    position: int
    generated: Generated


@torch.inference_mode()
def best_candidates(
    model: TextModel,
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
