"""Decoding by a language model of transformers: visual prompts and prompts in words in, token ids out.

transformers searches; what a strategy does to the scores is done here, so that it is what it is for our own
decoders: the repetition penalty and the minimum length look at written tokens alone, and a sampled token
depends on nothing but its scores and its seed. (transformers 5.23 spares the first written tokens of a row
its penalty, as many as there is padding before the row's prompt.)

B images, K texts for each, R = B * K rows, Q visual prompts, T text tokens, Dl width of the language model,
V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from openblip.errors import ConfigError
from openblip.generation.decoding import Beam, Decoding, Nucleus
from openblip.generation.generate import check_request, derive_seeds
from openblip.generation.generated import Generated, to_generated
from openblip.generation.ranking import Ranked
from openblip.generation.sampling import ChooseToken, nucleus_chooser
from openblip.generation.scores import adjust_scores
from openblip.models.language_model import IGNORE, LanguageModel, Predicted


@torch.inference_mode()
def write_texts(
    language: LanguageModel,
    visual: Tensor,
    prompts: Sequence[str],
    decoding: Decoding,
    *,
    num_captions: int = 1,
    seeds: Sequence[int] | None = None,
) -> list[list[Generated]]:
    """Write `num_captions` texts after each of B visual prompts (B, Q, Dl) and prompts in words.

    Several captions and seeds are as in `generate`. Log-probabilities are those of one more reading of what
    was written.

    Raises:
        ConfigError: `num_captions` that the strategy cannot give, or another number of seeds than images.
        CheckpointError: the model's logits are not numbers.
    """
    check_request(len(visual), decoding, num_captions, seeds)
    if len(visual) == 0:
        return []
    choose: ChooseToken | None = None
    settings: dict[str, Any] = {"num_beams": 1}
    if isinstance(decoding, Beam):
        settings = {
            "num_beams": decoding.num_beams,
            "length_penalty": decoding.length_penalty,
            "num_return_sequences": num_captions,
        }
    own_visual, own_prompts = _repeated(visual, prompts, num_captions)
    if isinstance(decoding, Nucleus):
        seeds = derive_seeds(decoding.seed, len(visual)) if seeds is None else seeds
        choose = nucleus_chooser(decoding, seeds, num_captions, visual.device)
        visual, prompts = own_visual, own_prompts
    written = language.generate(
        visual,
        prompts,
        do_sample=False,
        max_new_tokens=decoding.max_new_tokens,
        logits_processor=_processors(decoding, choose, language),
        **settings,
    )
    rows = [ids if len(ids) == decoding.max_new_tokens else [*ids, language.end_id] for ids in written]
    texts = _read_out(language.predict_ids(own_visual, own_prompts, rows), language.end_id)
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
) -> list[Ranked]:
    """The candidate of highest log-probability, its end included, after each of R visual prompts (R, Q, Dl).

    candidates: those of each row; of equal ones the first counts. As in `best_candidates`, the
    `num_candidates` whose first token is the likeliest are compared, and all of them where the limit falls
    between some that begin alike. `max_rows` bounds memory: the texts read at once.

    Raises:
        ConfigError: a row without candidates, or `num_candidates` below 1.
        CheckpointError: the model's logits are not numbers.
    """
    if num_candidates < 1 or not all(candidates):
        raise ConfigError(f"ranking: num_candidates is {num_candidates}, or there are no candidates")
    places: list[dict[tuple[int, ...], int]] = []
    for prompt, own in zip(prompts, candidates, strict=True):
        places.append({})
        for place, text in enumerate(own):
            places[-1].setdefault((*language.text_ids(prompt, text), language.end_id), place)
    pairs = [
        (row, ids)
        for row, texts in enumerate(_likely_to_begin(language, visual, prompts, places, num_candidates))
        for ids in texts
    ]
    pairs.sort(key=lambda pair: len(pair[1]))  # so that the texts of a pass have about the same length
    best: dict[int, Ranked] = {}
    for start in range(0, len(pairs), max_rows):
        rows, texts = zip(*pairs[start : start + max_rows], strict=True)
        own_visual = visual[torch.tensor(rows, device=visual.device)]
        read = _read_out(
            language.predict_ids(own_visual, [prompts[row] for row in rows], texts), language.end_id
        )
        for row, ids, found in zip(rows, texts, read, strict=True):
            ranked = Ranked(places[row][ids], found)
            if row not in best or _rank(ranked) > _rank(best[row]):
                best[row] = ranked
    return [best[row] for row in range(len(places))]


def _rank(ranked: Ranked) -> tuple[float, int]:
    return ranked.generated.logprob, -ranked.place


def _likely_to_begin(
    language: LanguageModel,
    visual: Tensor,
    prompts: Sequence[str],
    texts: Sequence[Iterable[tuple[int, ...]]],
    num_candidates: int,
) -> Iterator[list[tuple[int, ...]]]:
    """Of each row those whose first token is at least as likely as that of the text at place
    `num_candidates`.
    """
    listed = [list(own) for own in texts]
    if all(len(own) <= num_candidates for own in listed):
        yield from listed
        return
    predicted = language.predict_ids(visual, prompts, [[language.end_id]] * len(listed))
    begin = predicted.logits[predicted.labels != IGNORE]  # (R, V): one token of each row is predicted
    for own, logits in zip(listed, begin.float().cpu(), strict=True):
        firsts = logits[[ids[0] for ids in own]]
        limit = firsts.topk(min(num_candidates, len(own))).values[-1]
        # what is no number stays in, and is reported when it is scored
        yield [ids for ids, first in zip(own, firsts, strict=True) if not first < limit]


def _read_out(predicted: Predicted, end_id: int) -> list[Generated]:
    """The texts that a language model was made to read, with the log-probability of every token."""
    logprobs = predicted.logits.float().log_softmax(dim=-1)  # (R, T, V)
    targets = predicted.labels.clamp(min=0)
    found = logprobs.gather(2, targets[..., None]).squeeze(2).cpu()
    labels = predicted.labels.cpu()
    texts = []
    for ids, own in zip(labels, found, strict=True):
        place = ids != IGNORE
        texts.append(to_generated(ids[place], own[place], int(place.sum()), end_id))
    return texts


class _Strategy:
    """A logits processor of transformers: `decoding` applied to scores; where it samples, one token stays."""

    def __init__(self, decoding: Decoding, choose: ChooseToken | None, end_id: int, num_first: int) -> None:
        self.decoding = decoding
        self.choose = choose
        self.end_id = end_id
        self.num_first = num_first

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids (R, num_first + T) and scores (R, V), of beams log-probabilities -> (R, V)."""
        written = input_ids[:, self.num_first :]
        scores = adjust_scores(scores, written, self.decoding, self.end_id)
        if self.choose is None:
            return scores
        rows = torch.arange(len(scores), device=scores.device)
        chosen = self.choose(scores, rows, written.shape[1])
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def _processors(decoding: Decoding, choose: ChooseToken | None, language: LanguageModel) -> Any:
    from transformers import LogitsProcessorList

    num_first = int(language.is_encoder_decoder)  # the decoder's start token
    return LogitsProcessorList([_Strategy(decoding, choose, language.end_id, num_first)])


def _repeated(visual: Tensor, prompts: Sequence[str], count: int) -> tuple[Tensor, list[str]]:
    """Each row `count` times in a row."""
    return visual.repeat_interleave(count, dim=0), [prompt for prompt in prompts for _ in range(count)]
