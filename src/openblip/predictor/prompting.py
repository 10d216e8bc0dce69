"""What BLIP-2's language model writes about images: captions, answers, and turns of a conversation.

B images, C candidates, R rows of text, Q queries, T text tokens, Dl width of the language model.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from openblip.data.prompts import conversation_prompt, normalize_question
from openblip.errors import ConfigError
from openblip.generation.decoding import Decoding
from openblip.generation.language import best_texts, write_texts
from openblip.predictor.batching import MAX_ROWS
from openblip.predictor.blip2_runtime import Blip2Runtime
from openblip.predictor.candidates import Candidates, split_candidates
from openblip.predictor.captioning import Prompts, prompted_batches
from openblip.predictor.conversations import Conversation, read_turns
from openblip.predictor.images import Images, listed
from openblip.predictor.scored_text import ScoredText, text_of_language
from openblip.predictor.writing import sampling_seeds


def write_prompted(
    runtime: Blip2Runtime,
    images: Images,
    prompt: Prompts,
    decoding: Decoding,
    *,
    num_captions: int,
    batch_size: int | None,
    seeds: Sequence[int] | None,
) -> list[list[ScoredText]]:
    """`num_captions` per image, each image after a prompt of its own."""
    results: list[list[ScoredText]] = []
    for encoded, prompts, own_seeds in prompted_batches(runtime, images, prompt, decoding, batch_size, seeds):
        visual = runtime.visual_prompts(encoded.tokens, prompts)
        results += _written(runtime, visual, prompts, decoding, num_captions, own_seeds)
    return results


def write_answers(
    runtime: Blip2Runtime,
    images: Images,
    questions: Sequence[str],
    decoding: Decoding,
    batch_size: int | None,
) -> list[ScoredText]:
    """One answer per question."""
    results: list[ScoredText] = []
    for prompts, names, visual in _read_questions(runtime, images, questions, batch_size):
        found = _written(runtime, visual, prompts, decoding, 1, sampling_seeds(decoding, names))
        results += [answer for (answer,) in found]
    return results


def write_replies(
    runtime: Blip2Runtime,
    images: Images,
    conversations: Sequence[Conversation],
    decoding: Decoding,
    batch_size: int | None,
) -> list[ScoredText]:
    """What goes on with each conversation, one about each image; texts are read as they are written."""
    images = listed(images)
    if len(images) != len(conversations):
        raise ConfigError(
            f"chat takes one conversation for each image: {len(images)} images and {len(conversations)} "
            "conversations were given."
        )
    read = [read_turns(conversation, place) for place, conversation in enumerate(conversations)]
    prompts = [conversation_prompt(runtime.question_prompt, *turns) for turns in read]
    results: list[ScoredText] = []
    for where, encoded in runtime.encoded_batches(images, batch_size):
        visual = runtime.visual_prompts(encoded.tokens, [question for _, question in read[where]])
        names = [f"{seed},{prompt}" for seed, prompt in zip(encoded.seeds, prompts[where], strict=True)]
        found = _written(runtime, visual, prompts[where], decoding, 1, sampling_seeds(decoding, names))
        results += [reply for (reply,) in found]
    return results


def choose_answers(
    runtime: Blip2Runtime,
    images: Images,
    questions: Sequence[str],
    candidates: Candidates,
    *,
    num_candidates: int,
    batch_size: int | None,
) -> list[ScoredText]:
    """The most likely of `candidates` for each question; of equal ones the first."""
    shared, own_lists = split_candidates(candidates, len(questions))
    language = runtime.model.require_language()
    results: list[ScoredText] = []
    for prompts, _, visual in _read_questions(runtime, images, questions, batch_size):
        start, stop = len(results), len(results) + len(prompts)
        texts = [shared] * len(prompts) if own_lists is None else own_lists[start:stop]
        ranked = best_texts(
            language, visual, prompts, texts, num_candidates=num_candidates, max_rows=MAX_ROWS
        )
        results += [
            text_of_language(best, language, choices[place])
            for (place, best), choices in zip(ranked, texts, strict=True)
        ]
    return results


def _read_questions(
    runtime: Blip2Runtime, images: Images, questions: Sequence[str], batch_size: int | None
) -> Iterator[tuple[Sequence[str], Sequence[str], Tensor]]:
    """Batches of R prompts, what sampling is seeded by for each, and their visual prompts (R, Q, Dl)."""
    for own, encoded in runtime.question_batches(images, questions, batch_size):
        read = [normalize_question(question) for question in own]  # as training and the released code
        prompts = [conversation_prompt(runtime.question_prompt, (), question) for question in read]
        seeds = encoded.seeds * (len(own) // len(encoded))
        names = [f"{seed},{question}" for seed, question in zip(seeds, own, strict=True)]
        yield prompts, names, runtime.visual_prompts(encoded.tokens, read)


def _written(
    runtime: Blip2Runtime,
    visual: Tensor,
    prompts: Sequence[str],
    decoding: Decoding,
    num_captions: int,
    seeds: Sequence[int] | None,
) -> list[list[ScoredText]]:
    language = runtime.model.require_language()
    found = write_texts(language, visual, prompts, decoding, num_captions=num_captions, seeds=seeds)
    return [[text_of_language(text, language) for text in texts] for texts in found]
