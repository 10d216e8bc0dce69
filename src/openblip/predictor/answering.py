"""Answers to questions about images, written freely or chosen from a list (BLIP section 5.3).

R questions, T question tokens.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from openblip.errors import ConfigError
from openblip.generation.decoding import Decoding
from openblip.generation.ranking import best_candidates
from openblip.generation.search import generate
from openblip.models.blip import CrossKV
from openblip.predictor.batching import MAX_ROWS
from openblip.predictor.blip_runtime import BlipRuntime
from openblip.predictor.candidates import Candidates, split_candidates
from openblip.predictor.images import Images
from openblip.predictor.scored_text import ScoredText, scored_text
from openblip.predictor.writing import check_length, sampling_seeds


@torch.inference_mode()
def write_answers(
    runtime: BlipRuntime, images: Images, questions: Sequence[str], decoding: Decoding, batch_size: int | None
) -> list[ScoredText]:
    """One answer per question, generated from the states of the question."""
    prompt_ids = _answer_start(runtime)
    check_length(len(prompt_ids), decoding, runtime.model.config.text.max_positions)
    results = []
    for own, seeds, question_kv in _read_questions(runtime, images, questions, batch_size):
        generated = generate(
            runtime.model,
            question_kv,
            prompt_ids,
            len(own),
            decoding,
            eos_id=runtime.tokenizer.sep_id,
            pad_id=runtime.tokenizer.pad_id,
            seeds=sampling_seeds(decoding, list(zip(seeds, own, strict=True))),
        )
        results += [scored_text(answers[0], runtime.tokenizer) for answers in generated]
    return results


@torch.inference_mode()
def choose_answers(
    runtime: BlipRuntime,
    images: Images,
    questions: Sequence[str],
    candidates: Candidates,
    *,
    num_candidates: int,
    batch_size: int | None,
) -> list[ScoredText]:
    """The most likely of `candidates` for each question; a list of lists holds each question's own."""
    shared, own_lists = split_candidates(candidates, len(questions))
    known: dict[str, list[int]] = {}

    def ids(text: str) -> list[int]:
        if text not in known:
            known[text] = _answer_ids(runtime, text)
        return known[text]

    def choose(texts: Sequence[str], question_kv: CrossKV, count: int) -> list[ScoredText]:
        ranked = best_candidates(
            runtime.model,
            question_kv,
            _answer_start(runtime),
            [ids(text) for text in texts],
            count,
            eos_id=runtime.tokenizer.sep_id,
            num_candidates=num_candidates,
            max_rows=MAX_ROWS,
        )
        return [scored_text(best, runtime.tokenizer, texts[place]) for place, best in ranked]

    results: list[ScoredText] = []
    for own, _, question_kv in _read_questions(runtime, images, questions, batch_size):
        if own_lists is None:
            results += choose(shared, question_kv, len(own))
            continue
        for row in range(len(own)):
            one = question_kv.select(torch.tensor([row], device=runtime.device))
            results += choose(own_lists[len(results)], one, 1)
    return results


def _read_questions(
    runtime: BlipRuntime, images: Images, questions: Sequence[str], batch_size: int | None
) -> Iterator[tuple[Sequence[str], Sequence[int], CrossKV]]:
    """Batches of questions with their images' seeds and what an answer is written from."""
    for own, encoded in runtime.question_batches(images, questions, batch_size):
        image_kv = runtime.image_kv(encoded.tokens, "encode")
        yield own, encoded.seeds * (len(own) // len(encoded)), _question_kv(runtime, own, image_kv)


def _question_kv(runtime: BlipRuntime, questions: Sequence[str], image_kv: CrossKV) -> CrossKV:
    tokens = runtime.tokenize_questions(questions)
    return runtime.model.question_kv(tokens.ids, tokens.mask, image_kv)


def _answer_start(runtime: BlipRuntime) -> Tensor:
    """[DEC] alone: a captioner's prompt is no part of an answer."""
    return runtime.tokenizer.prompt("").to(runtime.device)


def _answer_ids(runtime: BlipRuntime, text: str) -> list[int]:
    """The tokens of a candidate; ConfigError for one that the model cannot read whole."""
    words: list[int] = runtime.tokenizer.prompt(text).tolist()[1:]
    longest = runtime.model.config.text.max_positions - 1  # [DEC] stands before it
    if len(words) > longest:
        raise ConfigError(
            f'The candidate "{text[:60]}..." has {len(words)} tokens; the model reads at most {longest}.'
        )
    return words
