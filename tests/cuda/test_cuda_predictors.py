"""Every call of a predictor gives on a GPU what it gives on the CPU: to rounding in float32, and in lower precision as
close to float32 as the CPU comes in the same precision.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any

import pytest
import torch
from tiny_predictor import IMAGES, TEXTS, blip2_predictor, make_predictor
from torch import Tensor, nn

from openblip.generation.decoding import Beam, Greedy, Nucleus
from openblip.models.language_model import IGNORED_LABEL
from openblip.nn.linear import FeedForward
from openblip.predictor import BasePredictor, Blip2Predictor, ScoredText

QUESTIONS = ["how many cats are there?", "what is it?", "is the dog red?", "two cars?", "why?"]
DIALOGS = [[("is it red?", "yes"), question] for question in QUESTIONS]
CANDIDATES = ["two", "a red dog", "blue cars", "a small green bird", "yes", "no"]
DECODINGS = {
    "greedy": Greedy(max_new_tokens=8),
    "beam": Beam(num_beams=3, max_new_tokens=8),
    "nucleus": Nucleus(top_p=0.9, max_new_tokens=8, seed=5),
    "penalties": Beam(num_beams=2, max_new_tokens=8, min_new_tokens=3, repetition_penalty=1.3, no_repeat_ngram_size=2),
}

# What is asked of each model. Calls that write come first, then those that give numbers.
Call = Callable[[Any], Any]
CAPTIONS: dict[str, Call] = {
    f"caption-{name}": lambda p, decoding=decoding: p.caption(IMAGES, decoding=decoding, return_scores=True)
    for name, decoding in DECODINGS.items()
}
SEVERAL: dict[str, Call] = {
    f"captions-{name}": lambda p, decoding=DECODINGS[name]: list(
        chain(*p.caption(IMAGES, decoding=decoding, num_captions=2, return_scores=True))
    )
    for name in ("beam", "nucleus")
}
ANSWERS: dict[str, Call] = {
    "answer": lambda p: p.answer(IMAGES, QUESTIONS, return_scores=True),
    "answer-sampled": lambda p: p.answer(IMAGES, QUESTIONS, decoding=DECODINGS["nucleus"], return_scores=True),
}
RANKED: dict[str, Call] = {
    "answer-ranked": lambda p: p.answer(IMAGES, QUESTIONS, CANDIDATES, num_candidates=3, return_scores=True),
    "answer-own-lists": lambda p: p.answer(
        IMAGES, QUESTIONS, [CANDIDATES[: 2 + row] for row in range(5)], return_scores=True
    ),
}
PAIRS: dict[str, Call] = {
    "match": lambda p: p.match(IMAGES, TEXTS),
    "match-one-image": lambda p: p.match(IMAGES[0], TEXTS),
    "match-matrix": lambda p: p.match_matrix(IMAGES, TEXTS, batch_size=2),
    "similarity": lambda p: p.similarity(IMAGES, TEXTS),
    "embed-images": lambda p: p.embed_images(IMAGES, batch_size=2),
    "embed-texts": lambda p: p.embed_texts(TEXTS),
    "score-texts": lambda p: p.score_texts(IMAGES, [TEXTS[: 1 + row] for row in range(5)]),
    "features": lambda p: p.features(IMAGES, TEXTS),
}
EXPLANATIONS: dict[str, Call] = {
    "explain-text": lambda p: p.explain(IMAGES[1], TEXTS[1]),
    "explain-caption": lambda p: p.explain(IMAGES[1]),
}
QUESTIONS_EXPLAINED: dict[str, Call] = {"explain-answer": lambda p: p.explain(IMAGES[1], QUESTIONS[0])}
CHAT: dict[str, Call] = {"chat": lambda p: p.chat(IMAGES, DIALOGS, decoding=DECODINGS["greedy"], return_scores=True)}
JUDGE: dict[str, Call] = {"judge": lambda p: p.judge(list(zip(IMAGES, IMAGES[::-1], strict=True)), TEXTS)}
DIALOG: dict[str, Call] = {"rank-answers": lambda p: p.rank_answers(IMAGES, TEXTS, DIALOGS, CANDIDATES)}

MODELS: dict[str, tuple[Callable[[], BasePredictor], dict[str, Call]]] = {
    "blip": (lambda: make_predictor("itc", "itm", "lm"), CAPTIONS | SEVERAL | PAIRS | EXPLANATIONS),
    "blip-vqa": (lambda: make_predictor("vqa"), ANSWERS | RANKED | QUESTIONS_EXPLAINED),
    "blip-nlvr": (lambda: make_predictor("nlvr"), JUDGE),
    "blip-visdial": (lambda: make_predictor("visdial"), DIALOG),
    "blip2": (blip2_predictor, CAPTIONS | SEVERAL | PAIRS | EXPLANATIONS),
    "blip2-tower": (lambda: blip2_predictor(tower=True), PAIRS),
    "blip2-opt": (
        lambda: blip2_predictor((), "opt"),
        CAPTIONS | SEVERAL | ANSWERS | RANKED | CHAT | QUESTIONS_EXPLAINED,
    ),
    "blip2-t5": (
        lambda: blip2_predictor((), "t5", instructed=True),
        CAPTIONS | SEVERAL | ANSWERS | RANKED | CHAT | QUESTIONS_EXPLAINED,
    ),
}
CASES = [(model, call) for model, (_, calls) in MODELS.items() for call in calls]
LOWER = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def predictors(device: torch.device) -> Callable[..., Any]:
    """Predictors by model, device and dtype, each made once."""
    made: dict[tuple[object, ...], BasePredictor] = {}

    def predictor(model: str, where: torch.device | str, dtype: torch.dtype = torch.float32) -> BasePredictor:
        key = (model, torch.device(where).type, dtype)
        if key not in made:
            fresh = MODELS[model][0]()
            made[key] = type(fresh)(fresh.checkpoint, where, dtype)  # type: ignore[call-arg, arg-type]
        return made[key]

    return predictor


def numbers(result: Any) -> Iterator[Tensor]:
    """All numbers of a result, in order, as tensors on the CPU."""
    if isinstance(result, Tensor):
        assert result.device.type == "cpu"
        yield result.float()
    elif isinstance(result, float):
        yield torch.tensor(result)
    elif is_dataclass(result):
        yield from numbers([getattr(result, field.name) for field in fields(result)])
    elif isinstance(result, Sequence) and not isinstance(result, str):
        for item in result:
            yield from numbers(item)


def words(result: Any) -> list[str]:
    """All texts of a result, in order."""
    if isinstance(result, str):
        return [result]
    if is_dataclass(result):
        return words([getattr(result, field.name) for field in fields(result)])
    return [text for item in result for text in words(item)] if isinstance(result, list | tuple) else []


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    assert words(found) == words(expected)
    pairs = list(zip(numbers(found), numbers(expected), strict=True))
    assert pairs
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("model", "call"), CASES)
def test_float32_is_that_of_the_cpu(
    predictors: Callable[..., Any], device: torch.device, model: str, call: str
) -> None:
    ask = MODELS[model][1][call]
    found = ask(predictors(model, device))
    assert_close(found, ask(predictors(model, "cpu")), tolerance=1e-3 if call.startswith("explain") else 1e-4)


@pytest.mark.parametrize("model", ["blip", "blip2", "blip2-opt", "blip2-t5"])
@pytest.mark.parametrize("decoding", DECODINGS)
def test_texts_do_not_depend_on_batches(
    predictors: Callable[..., Any], device: torch.device, model: str, decoding: str
) -> None:
    """Of sizes in any order, so that what is kept for one shape serves another one as well, or is not used."""
    predictor = predictors(model, device)
    images, strategy = IMAGES * 3, DECODINGS[decoding]
    whole = predictor.caption(images, decoding=strategy, return_scores=True)
    for size in (1, 4, 15, 3, 4):
        parts = predictor.caption(images, decoding=strategy, return_scores=True, batch_size=size)
        assert_close(parts, whole, tolerance=1e-4)


def error(found: Any, expected: Any) -> float:
    """The mean absolute difference of all numbers."""
    pairs = zip(numbers(found), numbers(expected), strict=True)
    return float(torch.cat([(ours - theirs).abs().flatten() for ours, theirs in pairs]).mean())


@pytest.mark.parametrize("dtype", LOWER, ids=str)
@pytest.mark.parametrize(("model", "call"), [case for case in CASES if case[1] in PAIRS | JUDGE | DIALOG])
def test_lower_precision_is_as_close_to_float32_as_on_the_cpu(
    predictors: Callable[..., Any], device: torch.device, model: str, call: str, dtype: torch.dtype
) -> None:
    ask = MODELS[model][1][call]
    exact = ask(predictors(model, "cpu"))
    ours, theirs = (error(ask(predictors(model, where, dtype)), exact) for where in (device, "cpu"))
    assert ours <= 2 * theirs + 1e-3


@pytest.mark.parametrize("dtype", LOWER, ids=str)
def test_a_feed_forward_of_one_kernel_is_as_exact_as_of_two(device: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    exact, x = FeedForward(64, 256), torch.randn(5, 33, 64)
    layer, inputs = deepcopy(exact).to(device, dtype), x.to(device, dtype)
    with torch.inference_mode():
        expected, found, in_two = exact(x), layer(inputs), nn.Sequential(*layer)(inputs)
    assert error(found.cpu(), expected) <= 1.2 * error(in_two.cpu(), expected)


def logprobs_of(predictor: Any, texts: list[ScoredText]) -> Tensor:
    """The log-probability of each image's caption by one pass of the predictor's model over all of it."""
    tokens = predictor.encode(IMAGES).tokens
    found = []
    with torch.inference_mode():
        for row, text in enumerate(texts):
            image, ids = tokens[row : row + 1], list(text.ids)
            if isinstance(predictor, Blip2Predictor) and predictor.model.language is not None:
                visual = predictor._visual_prompts(image, [predictor.prompt])
                logits, labels = predictor.model.language.predict_ids(visual, [predictor.prompt], [ids])
                logits = logits[:, labels[0] != IGNORED_LABEL][0]
            else:
                prompt = predictor.tokenizer.prompt(predictor.prompt).tolist()
                given = torch.tensor([[*prompt, *ids[:-1]]], device=predictor.device)
                logits = predictor.model.decode(given, predictor._image_kv(image, "decode"))[0, len(prompt) - 1 :]
            chosen = torch.tensor(ids, device=logits.device)
            found.append(logits.float().log_softmax(dim=-1).gather(1, chosen[:, None]).sum())
    return torch.stack(found).cpu()


@pytest.mark.parametrize("dtype", LOWER, ids=str)
@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("model", ["blip", "blip2", "blip2-opt", "blip2-t5"])
def test_texts_of_lower_precision_score_what_float32_gives_them(
    predictors: Callable[..., Any], device: torch.device, model: str, decoding: str, dtype: torch.dtype
) -> None:
    """Rounding may choose other words. What is written has about the log-probability that float32 gives it."""
    exact, differences = predictors(model, "cpu"), []
    for where in (device, "cpu"):
        predictor = predictors(model, where, dtype)
        texts = predictor.caption(IMAGES, decoding=DECODINGS[decoding], return_scores=True)
        claimed = torch.tensor([text.logprob for text in texts])
        differences.append(float((claimed - logprobs_of(exact, texts)).abs().mean()))
    assert differences[0] <= 3 * differences[1] + 0.1
