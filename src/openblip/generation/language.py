"""Decoding by a language model of transformers: visual prompts and text prompts in, token ids out.

transformers runs the search. What a strategy does to the scores is done here, so that it is the same as for
our own decoders: the repetition penalty, the ban on repeated n-grams and the minimum length look at generated
tokens only, and a sampled token depends on nothing but its scores and its seed. (transformers 5.23 does not
penalise the first generated tokens of a row, as many as there are padding tokens before the row's prompt.)

B images, K texts for each, R = B * K rows, Q visual prompts, T text tokens, Dl width of the language model,
V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openblip.errors import ConfigError
from openblip.generation import search
from openblip.generation.decoding import Beam, Decoding, Nucleus
from openblip.models.language_model import IGNORED_LABEL, LanguageModel, Predicted


@torch.inference_mode()
def write_texts(
    language: LanguageModel,
    visual: Tensor,
    prompts: Sequence[str],
    decoding: Decoding,
    *,
    num_captions: int = 1,
    seeds: Sequence[int] | None = None,
) -> list[list[search.Generated]]:
    """Write `num_captions` texts after each of B visual prompts (B, Q, Dl) and text prompts. Several captions, seeds
    and errors are as in `generate`. Log-probabilities come from one more forward pass over the generated texts.
    """
    search.check_request(len(visual), decoding, num_captions, seeds)
    if len(visual) == 0:
        return []
    from transformers import LogitsProcessorList

    uniform: Tensor | None = None
    settings: dict[str, Any] = {"num_beams": 1}
    if isinstance(decoding, Beam):
        settings = {
            "num_beams": decoding.num_beams,
            "length_penalty": decoding.length_penalty,
            "num_return_sequences": num_captions,
        }
    repeated_visual = visual.repeat_interleave(num_captions, dim=0)
    repeated_prompts = [prompt for prompt in prompts for _ in range(num_captions)]
    if isinstance(decoding, Nucleus):
        seeds = search.derive_seeds(decoding.seed, len(visual)) if seeds is None else seeds
        numbers = search.uniforms(seeds, num_captions, decoding.max_new_tokens)
        uniform = torch.from_numpy(numbers).to(visual.device)
        visual, prompts = repeated_visual, repeated_prompts
    strategy: Any = _Strategy(decoding, uniform, language.end_id, num_first=int(language.is_encoder_decoder))
    written = language.generate(
        visual,
        prompts,
        do_sample=False,
        max_new_tokens=decoding.max_new_tokens,
        logits_processor=LogitsProcessorList([strategy]),
        **settings,
    )
    rows = [ids if len(ids) == decoding.max_new_tokens else [*ids, language.end_id] for ids in written]
    texts = _read_out(language.predict_ids(repeated_visual, repeated_prompts, rows), language.end_id)
    return [texts[start : start + num_captions] for start in range(0, len(texts), num_captions)]


@torch.inference_mode()
def best_texts(
    language: LanguageModel,
    visual: Tensor,
    prompts: Sequence[str],
    candidates: Sequence[Sequence[str]],
    *,
    num_candidates: int = 128,
    max_rows: int = 512,
) -> list[search.Ranked]:
    """The candidate of highest log-probability, its end token included, after each visual prompt (R, Q, Dl).

    candidates: a list for each row; of equal candidates the first counts. They are compared as in `best_candidates`,
    with the same errors. `max_rows` bounds memory: the texts in one forward pass.
    """
    if num_candidates < 1 or not all(candidates):
        raise ConfigError(f"ranking: num_candidates is {num_candidates}, or there are no candidates")
    indices: list[dict[tuple[int, ...], int]] = []
    for prompt, texts_of_row in zip(prompts, candidates, strict=True):
        indices.append({})
        for index, text in enumerate(texts_of_row):
            indices[-1].setdefault((*language.text_ids(prompt, text), language.end_id), index)
    pairs = [
        (row, ids)
        for row, texts in enumerate(_likely_to_begin(language, visual, prompts, indices, num_candidates))
        for ids in texts
    ]
    pairs.sort(key=lambda pair: len(pair[1]))  # so that the texts of a pass have about the same length
    ranked: list[list[search.Ranked]] = [[] for _ in indices]
    for start in range(0, len(pairs), max_rows):
        rows, texts = zip(*pairs[start : start + max_rows], strict=True)
        visual_of_rows = visual[torch.tensor(rows, device=visual.device)]
        predicted = language.predict_ids(visual_of_rows, [prompts[row] for row in rows], texts)
        for row, ids, generated in zip(rows, texts, _read_out(predicted, language.end_id), strict=True):
            ranked[row].append(search.Ranked(indices[row][ids], generated))
    return [max(texts, key=lambda text: (text.generated.logprob, -text.position)) for texts in ranked]


def _likely_to_begin(
    language: LanguageModel,
    visual: Tensor,
    prompts: Sequence[str],
    texts: Sequence[Iterable[tuple[int, ...]]],
    num_candidates: int,
) -> Iterator[list[tuple[int, ...]]]:
    """Yield for each row the texts whose first token is at least as likely as that of the text at that rank."""
    lists = [list(texts_of_row) for texts_of_row in texts]
    if all(len(texts_of_row) <= num_candidates for texts_of_row in lists):
        yield from lists
        return
    predicted = language.predict_ids(visual, prompts, [[language.end_id]] * len(lists))
    begin = predicted.logits[predicted.labels != IGNORED_LABEL]  # (R, V): one token of each row is predicted
    for texts_of_row, logits in zip(lists, begin.float().cpu(), strict=True):
        firsts = logits[[ids[0] for ids in texts_of_row]]
        limit = firsts.topk(min(num_candidates, len(texts_of_row))).values[-1]
        # NaN stays in, and is reported when it is scored
        yield [ids for ids, first in zip(texts_of_row, firsts, strict=True) if not first < limit]


def _read_out(predicted: Predicted, end_id: int) -> list[search.Generated]:
    """The texts of a forward pass, with the log-probability of every token."""
    logprobs = predicted.logits.float().log_softmax(dim=-1)  # (R, T, V)
    targets = predicted.labels.clamp(min=0)
    token_logprobs = logprobs.gather(2, targets[..., None]).squeeze(2).cpu()
    texts = []
    for ids, row in zip(predicted.labels.cpu(), token_logprobs, strict=True):
        written = ids != IGNORED_LABEL
        texts.append(search.to_generated(ids[written].tolist(), row[written].tolist(), end_id))
    return texts


@dataclass
class _Strategy:
    """A logits processor of transformers that applies `decoding`; where it samples, one token is left."""

    decoding: Decoding
    uniform: Tensor | None  # (R, most new tokens)
    end_id: int
    num_first: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids (R, num_first + T), after a decoder's start token, and scores (R, V), of beams log-probabilities ->
        (R, V).
        """
        written = input_ids[:, self.num_first :]
        length, nucleus = written.shape[1], self.decoding
        scores = search.adjust_scores(scores, written, length, nucleus, self.end_id)
        if self.uniform is None or not isinstance(nucleus, Nucleus):
            return scores
        scores = scores / nucleus.temperature
        chosen = search.sample_nucleus(scores, self.uniform[:, length], nucleus.top_p, nucleus.top_k)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)
