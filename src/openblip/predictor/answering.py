"""Answers to questions about images, written freely or chosen from a list (BLIP section 5.3).

R questions, T question tokens.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from openblip.errors import ConfigError
from openblip.generation.decoding import Decoding
from openblip.generation.generate import generate
from openblip.generation.ranking import best_candidates
from openblip.models.blip import CrossKV
from openblip.predictor.batching import MAX_ROWS, as_list, checked_batch_size, chunks
from openblip.predictor.images import EncodedImages, Images, is_single
from openblip.predictor.runtime import Runtime
from openblip.predictor.scored_text import ScoredText, scored_text
from openblip.predictor.writing import check_length, sampling_seeds

Candidates = Sequence[str] | Sequence[Sequence[str]]


@torch.inference_mode()
def write_answers(
    runtime: Runtime, images: Images, questions: Sequence[str], decoding: Decoding, batch_size: int | None
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
    runtime: Runtime,
    images: Images,
    questions: Sequence[str],
    candidates: Candidates,
    *,
    num_candidates: int,
    batch_size: int | None,
) -> list[ScoredText]:
    """The most likely of `candidates` for each question; a list of lists holds each question's own."""
    shared, own_lists = _split(candidates, len(questions))
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
    runtime: Runtime, images: Images, questions: Sequence[str], batch_size: int | None
) -> Iterator[tuple[Sequence[str], Sequence[int], CrossKV]]:
    """Batches of questions with their images' seeds and what an answer is written from.

    Many questions about one image read one encoding of it.
    """
    if len(questions) > 1 and (is_single(images) or (isinstance(images, EncodedImages) and len(images) == 1)):
        encoded = runtime.encode(images)
        image_kv = runtime.model.image_kv(encoded.tokens, "encode")
        for own in chunks(questions, checked_batch_size(batch_size)):
            yield own, encoded.seeds * len(own), _question_kv(runtime, own, image_kv)
        return
    for own, encoded in runtime.paired_batches(images, questions, "answer", batch_size):
        image_kv = runtime.model.image_kv(encoded.tokens, "encode")
        yield own, encoded.seeds, _question_kv(runtime, own, image_kv)


def _question_kv(runtime: Runtime, questions: Sequence[str], image_kv: CrossKV) -> CrossKV:
    tokens = runtime.tokenize_questions(questions)
    return runtime.model.question_kv(tokens.ids, tokens.mask, image_kv)


def _answer_start(runtime: Runtime) -> Tensor:
    """[DEC] alone: a captioner's prompt is no part of an answer."""
    return runtime.tokenizer.prompt("").to(runtime.device)


def _answer_ids(runtime: Runtime, text: str) -> list[int]:
    """The tokens of a candidate; ConfigError for one that the model cannot read whole."""
    words: list[int] = runtime.tokenizer.prompt(text).tolist()[1:]
    longest = runtime.model.config.text.max_positions - 1  # [DEC] stands before it
    if len(words) > longest:
        raise ConfigError(
            f'The candidate "{text[:60]}..." has {len(words)} tokens; the model reads at most {longest}.'
        )
    return words


def _split(
    candidates: Candidates, num_questions: int
) -> tuple[Sequence[str], Sequence[Sequence[str]] | None]:
    """Candidates for all questions, or those of each; ConfigError for none or the wrong number of lists."""
    given: list[str | Sequence[str]] = as_list(candidates)
    if not given:
        raise ConfigError("answer: the list of candidates is empty; leave it out to have answers written.")
    texts = [each for each in given if isinstance(each, str)]
    if len(texts) == len(given):
        return texts, None
    lists = [list(each) for each in given if not isinstance(each, str)]
    if texts or len(lists) != num_questions or not all(lists):
        raise ConfigError(
            f"answer: candidates are texts for all {num_questions} questions, or one list that is not empty "
            "for each of them."
        )
    return [], lists
