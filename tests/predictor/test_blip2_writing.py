"""What BLIP-2 writes: captions, answers and replies, in any batch, from the paper's prompts.

R rows, Q queries, Dl width of the language model.
"""

from typing import Any

import pytest
import torch
from tiny_predictor import IMAGES, blip2_predictor, check_batches, make_predictor
from torch import Tensor

from marks import slow
from openblip.errors import ConfigError
from openblip.generation.decoding import Beam, Decoding, Greedy, Nucleus
from openblip.generation.language import write_texts
from openblip.generation.search import generate
from openblip.predictor import Blip2Predictor

QUESTIONS = ["what is it?", "how many cats are there?", "why?", "how big", "is it a green tree?"]
PROMPTS = ["a photo of", "", "Question: what is it? Answer:", "a small red dog beside", "two"]
DECODINGS: dict[str, Decoding] = {
    "greedy": Greedy(max_new_tokens=6),
    "beam": Beam(num_beams=3, max_new_tokens=6, min_new_tokens=2, repetition_penalty=1.5),
    "nucleus": Nucleus(top_p=0.95, max_new_tokens=6, seed=5),
}
KINDS: dict[str, dict[str, Any]] = {
    "itg": {},
    "opt": {"heads": (), "language": "opt"},
    "t5": {"language": "t5", "tower": True},
    "instructed": {"heads": (), "language": "opt", "instructed": True},
}


@pytest.fixture(scope="module", params=KINDS)
def any_kind(request: pytest.FixtureRequest) -> Blip2Predictor:
    return blip2_predictor(**KINDS[request.param])


@pytest.fixture(scope="module", params=["opt", "t5", "instructed"])
def answerer(request: pytest.FixtureRequest) -> Blip2Predictor:
    return blip2_predictor(**KINDS[request.param])


def visual_prompts(predictor: Blip2Predictor, place: int, instruction: str) -> Tensor:
    """(1, Q, Dl) of an image, by the model alone."""
    pixels = torch.from_numpy(predictor.preprocessing(IMAGES[place]))[None]
    model = predictor.model
    with torch.no_grad():
        image_kv = model.image_kv(model.encode_image(predictor.preprocessing.normalize(pixels)))
        queries = model.encode_queries(image_kv).queries
        if model.config.instructed:
            assert predictor.tokenizer is not None
            read = predictor.tokenizer.encode([instruction])
            queries = model.encode_multimodal(read.ids, read.mask, image_kv)
        return model.visual_prompts(queries)


def written(predictor: Blip2Predictor, place: int, prompt: str, instruction: str, decoding: Decoding) -> str:
    """After one prompt, by the model alone."""
    language = predictor.model.require_language()
    ((text,),) = write_texts(language, visual_prompts(predictor, place, instruction), [prompt], decoding)
    return language.decode(text.ids)


@pytest.mark.parametrize("name", ["beam", *slow("greedy", "nucleus")])
def test_captions_do_not_depend_on_batches_order_or_prompts_of_others(any_kind: Blip2Predictor, name: str) -> None:
    def captions(images: Any, prompts: list[str], batch_size: int | None) -> list[Any]:
        found: list[Any] = any_kind.caption(images, prompts, DECODINGS[name], batch_size=batch_size, return_scores=True)
        return found

    assert len({caption.text for caption in check_batches(captions, IMAGES, PROMPTS, sizes=(1, 2, 3))}) > 2


def test_a_caption_goes_on_from_the_prompt_of_the_checkpoint(answerer: Blip2Predictor) -> None:
    for prompt, given in (("a photo of", None), ("", ""), ("two cars", "two cars")):
        found = answerer.caption(IMAGES[1], given, Greedy(max_new_tokens=5))
        assert found == written(answerer, 1, prompt, prompt, Greedy(max_new_tokens=5))


def test_the_queries_caption_by_themselves_without_a_language_model() -> None:
    predictor = blip2_predictor()
    found = predictor.caption(IMAGES[:2], "a red", Greedy(max_new_tokens=5), return_scores=True)
    assert predictor.tokenizer is not None
    with torch.inference_mode():
        expected = generate(
            predictor.model,
            predictor.model.image_kv(predictor.encode(IMAGES[:2]).tokens),
            predictor.tokenizer.prompt("a red"),
            2,
            Greedy(max_new_tokens=5),
            eos_id=predictor.tokenizer.sep_id,
        )
    assert [caption.ids[:5] for caption in found] == [(*own[0].ids,) for own in expected]


@pytest.mark.parametrize("decoding", [DECODINGS["beam"], DECODINGS["nucleus"]], ids=["beam", "nucleus"])
def test_several_captions_are_lists_of_as_many(any_kind: Blip2Predictor, decoding: Decoding) -> None:
    found = any_kind.caption(IMAGES[:2], decoding=decoding, num_captions=3, return_scores=True)
    assert [len(captions) for captions in found] == [3, 3]
    assert len({caption.ids for caption in found[0]}) == 3
    first = any_kind.caption(IMAGES[1], decoding=decoding, return_scores=True)
    assert found[1][0].ids == first.ids


def test_seeds_of_the_caller_go_before_the_images(any_kind: Blip2Predictor) -> None:
    same = [IMAGES[0]] * 3
    first, again, other = any_kind.caption(
        same, decoding=Nucleus(top_p=1.0, temperature=2.0, max_new_tokens=8), seeds=[3, 3, 4]
    )
    assert first == again != other


def test_a_score_is_that_of_the_text_in_one_reading(answerer: Blip2Predictor) -> None:
    caption = answerer.caption(IMAGES[2], decoding=DECODINGS["beam"], return_scores=True)
    language = answerer.model.require_language()
    visual = visual_prompts(answerer, 2, "a photo of")
    with torch.no_grad():
        predicted = language.predict_ids(visual, ["a photo of"], [caption.ids])
    logprobs = predicted.logits[0, -len(caption.ids) :].log_softmax(dim=-1)
    expected = logprobs.gather(1, torch.tensor(caption.ids)[:, None]).squeeze(1)
    assert caption.token_logprobs == pytest.approx(expected.tolist(), abs=1e-4)
    assert caption.logprob == pytest.approx(expected.sum().item(), abs=1e-4)
    assert len(caption.tokens) == len(caption.ids)
    ended = caption.ids[-1] == language.end_id
    assert ended or len(caption.ids) == 6


def test_questions_are_put_as_the_checkpoint_puts_them(answerer: Blip2Predictor) -> None:
    found = answerer.answer(IMAGES[:2], ["What is it?", "Why?"])
    decoding = Beam(num_beams=5, max_new_tokens=10, min_new_tokens=1, length_penalty=-1.0)
    assert answerer.answer_decoding == decoding  # tiny models may write the same by others
    short = "Short answer" if answerer.model.require_language().is_encoder_decoder else "Answer"
    for place, question in enumerate(["What is it?", "Why?"]):  # only the Q-Former reads them in lower case
        prompt = f"Question: {question} {short}:"
        assert found[place] == written(answerer, place, prompt, question.lower(), decoding)


def test_answers_do_not_depend_on_batches_or_order(answerer: Blip2Predictor) -> None:
    def answers(images: Any, questions: list[str], batch_size: int | None) -> list[str]:
        return answerer.answer(images, questions, batch_size=batch_size)

    expected = check_batches(answers, IMAGES, QUESTIONS, sizes=(2, 3))
    assert len(set(expected)) > 2
    assert answerer.answer(answerer.encode(IMAGES), QUESTIONS) == expected
    assert answerer.caption([]) == answerer.answer([], []) == answerer.chat([], []) == []


def test_several_questions_about_one_image(answerer: Blip2Predictor) -> None:
    found = answerer.answer(IMAGES[3], QUESTIONS, batch_size=2)
    assert found == answerer.answer([IMAGES[3]] * 5, QUESTIONS)
    assert answerer.answer(IMAGES[3], QUESTIONS[0]) == found[0]


def test_examples_stand_before_every_question(answerer: Blip2Predictor) -> None:
    examples = [(IMAGES[0], "What is it?", "Two"), (IMAGES[1], "Why?", "a big green tree")]
    found = answerer.answer(IMAGES[2:4], QUESTIONS[2:4], return_scores=True, examples=examples)
    language = answerer.model.require_language()
    short = "Short answer" if language.is_encoder_decoder else "Answer"
    parts = []
    for place, (_, question, answer) in enumerate(examples):
        ids = language.tokenizer(f"Question: {question} {short}: {answer}").input_ids
        ids += [] if language.is_encoder_decoder else [language.end_id]
        words = language.model.get_input_embeddings()(torch.tensor([ids]))
        parts += [visual_prompts(answerer, place, question.lower()), words]
    for place, question in ((2, QUESTIONS[2]), (3, QUESTIONS[3])):
        visual = torch.cat([*parts, visual_prompts(answerer, place, question)], dim=1)
        ((text,),) = write_texts(language, visual, [f"Question: {question} {short}:"], answerer.answer_decoding)
        assert found[place - 2].ids[: len(text.ids)] == tuple(text.ids)
        assert found[place - 2].logprob == pytest.approx(text.logprob, abs=1e-4)
    alone = answerer.answer(IMAGES[2:4], QUESTIONS[2:4], return_scores=True)
    assert all(one.logprob != other.logprob for one, other in zip(found, alone, strict=True))
    chosen = answerer.answer(IMAGES[2], QUESTIONS[2], candidates=CANDIDATES, examples=examples)
    assert chosen in CANDIDATES
    for hostile in ([IMAGES[0]], [(IMAGES[0], "why?")], [(IMAGES[0], "why?", 2)]):
        with pytest.raises(ConfigError, match="an image, a question and its answer"):
            answerer.answer(IMAGES[2], "why?", examples=hostile)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="leave them out"):
        make_predictor("vqa").answer(IMAGES[2], "why?", examples=examples)


CANDIDATES = ["yes", "two", "a big green tree", "dog"]


def test_the_likeliest_candidate_answers(answerer: Blip2Predictor) -> None:
    found = answerer.answer(IMAGES, QUESTIONS, candidates=CANDIDATES, return_scores=True)
    language = answerer.model.require_language()
    short = "Short answer" if language.is_encoder_decoder else "Answer"
    for place, question in enumerate(QUESTIONS):
        scores = []
        for text in CANDIDATES:
            visual = visual_prompts(answerer, place, question)
            with torch.no_grad():
                predicted = language.predict(visual, [f"Question: {question} {short}:"], [text], None)
            keep = predicted.labels[0] >= 0
            logprobs = predicted.logits[0, keep].log_softmax(dim=-1)
            scores.append(logprobs.gather(1, predicted.labels[0, keep][:, None]).sum().item())
        assert found[place].text == CANDIDATES[scores.index(max(scores))]
        assert found[place].logprob == pytest.approx(max(scores), abs=1e-4)
    own = [CANDIDATES[i % 3 : i % 3 + 2] for i in range(5)]
    chosen = answerer.answer(IMAGES, QUESTIONS, candidates=own, batch_size=2)
    alone = [answerer.answer(IMAGES[i], QUESTIONS[i], candidates=own[i]) for i in range(5)]
    assert chosen == alone
    assert all(text in own[i] for i, text in enumerate(chosen))


def test_a_conversation_is_read_with_all_its_turns(answerer: Blip2Predictor) -> None:
    turns = [("Which city is this?", "singapore"), ("why?", "it has a statue."), "Where is it?"]
    decoding = Greedy(max_new_tokens=6)
    short = "Short answer" if answerer.model.require_language().is_encoder_decoder else "Answer"
    prompt = (
        f"Question: Which city is this? {short}: singapore. Question: why? {short}: it has a statue. "
        f"Question: Where is it? {short}:"
    )
    reply = answerer.chat(IMAGES[0], turns, decoding)
    assert reply == written(answerer, 0, prompt, "Where is it?", decoding)
    both = answerer.chat([IMAGES[1], IMAGES[0]], ["why?", turns], decoding, batch_size=1)
    assert both[1] == reply
    assert both[0] == answerer.chat(IMAGES[1], "why?", decoding)
    assert answerer.chat(IMAGES[0], turns, decoding, return_scores=True).text == reply


def test_the_prompt_is_not_penalised() -> None:
    """A prompt of the words that the model would write changes nothing about their penalty."""
    predictor = blip2_predictor((), "opt")
    strong = Greedy(max_new_tokens=4, repetition_penalty=1e6)
    language = predictor.model.require_language()
    prompt = "a photo of a small red dog"
    visual = visual_prompts(predictor, 0, prompt)
    with torch.no_grad():
        first = language.predict_ids(visual, [prompt], [[language.end_id]])
    likeliest = int(first.logits[0, -1].argmax())
    found = predictor.caption(IMAGES[0], prompt, strong, return_scores=True)
    assert found.ids[0] == likeliest
    assert len(set(found.ids)) == len(found.ids)
