"""The predictor's promises: one in, one out, and nothing depends on batches, order or padding."""

import contextlib
import io
import itertools
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_predictor import (
    IMAGES,
    PROMPT,
    TEXTS,
    TOKENIZER,
    assert_same,
    blip2_predictor,
    check_batches,
    image_tokens,
    make_predictor,
    random_image,
    tokens_from_enc,
)

import openblip
from openblip.errors import CheckpointError, ConfigError, ImageError, UnsupportedTaskError
from openblip.generation.decoding import Beam, Greedy, Nucleus
from openblip.models.blip import Blip
from openblip.nn.attention import SelfAttention
from openblip.predictor import BasePredictor, BlipPredictor, EncodedImages, ScoredText, find_dtype, values
from tiny_blip import SIZE, TINY

DECODINGS = {
    "greedy": Greedy(max_new_tokens=6),
    "beam": Beam(num_beams=3, max_new_tokens=6),
    "nucleus": Nucleus(top_p=0.95, max_new_tokens=6, seed=5),
}


@pytest.fixture(scope="module", params=["blip", "blip2", "blip2 tower"])
def any_predictor(request: pytest.FixtureRequest) -> BasePredictor:
    kind: str = request.param
    return make_predictor("itc", "itm", "lm") if kind == "blip" else blip2_predictor(tower="tower" in kind)


@pytest.mark.parametrize("name", DECODINGS)
def test_captions_do_not_depend_on_batches_or_order(predictor: BlipPredictor, name: str) -> None:
    def captions(images: Any, batch_size: int | None) -> list[ScoredText]:
        return predictor.caption(images, decoding=DECODINGS[name], batch_size=batch_size, return_scores=True)

    assert len({caption.text for caption in check_batches(captions, IMAGES)}) > 1


@pytest.mark.parametrize("call", ["match", "similarity", "match_matrix"])
def test_scores_do_not_depend_on_batches_order_or_padding(any_predictor: BasePredictor, call: str) -> None:
    def scores(images: Any, texts: list[str], batch_size: int | None) -> torch.Tensor:
        found: torch.Tensor = getattr(any_predictor, call)(images, texts, batch_size=batch_size)
        return found if call == "match" else found[:, [texts.index(text) for text in TEXTS]]

    expected = check_batches(scores, IMAGES, TEXTS)
    assert expected.dtype == torch.float32
    assert expected.shape == ((5,) if call == "match" else (5, 5))
    assert expected.std() > 1e-3


def test_the_matrix_holds_the_pairs(predictor: BlipPredictor) -> None:
    matrix = predictor.match_matrix(IMAGES[:3], TEXTS)
    assert matrix.shape == (3, 5)
    assert ((matrix > 0) & (matrix < 1)).all()
    for i in range(3):
        assert_same(matrix[i], predictor.match([IMAGES[i]] * 5, TEXTS))


def test_texts_of_a_matrix_are_read_with_others_of_their_length(
    predictor: BlipPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [text for _ in range(128) for text in ("a dog", "a small green bird below a big red tree")]
    expected = predictor.match_matrix(IMAGES[:2], texts)
    read: list[tuple[int, ...]] = []
    logits = predictor.model.match_logits
    monkeypatch.setattr(
        predictor.model, "match_logits", lambda ids, mask, kv: (read.append(tuple(ids.shape)), logits(ids, mask, kv))[1]
    )
    assert_same(predictor.match_matrix(IMAGES[:2], texts), expected)
    assert {rows for rows, _ in read} == {256}
    assert len({length for _, length in read}) == len(read) == 2


def test_a_match_is_the_softmax_of_the_logits_after_enc(predictor: BlipPredictor) -> None:
    tokens = tokens_from_enc("a dog")
    with torch.no_grad():
        kv = predictor.model.image_kv(image_tokens(predictor, IMAGES[0]), "encode")
        logits = predictor.model.match_logits(tokens.ids, tokens.mask, kv)
    torch.testing.assert_close(predictor.match(IMAGES[0], "a dog"), logits.softmax(dim=1)[:, 1])


def test_similarity_is_the_product_of_unit_embeddings(predictor: BlipPredictor) -> None:
    images, texts = predictor.embed_images(IMAGES), predictor.embed_texts(TEXTS)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(predictor.similarity(IMAGES, TEXTS), images @ texts.T)


def test_one_in_one_out(predictor: BlipPredictor, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    IMAGES[0].save(path)
    encoded = io.BytesIO()
    IMAGES[0].save(encoded, "PNG")
    pixels, payload = np.asarray(IMAGES[0]), encoded.getvalue()
    tensor = torch.tensor(pixels).movedim(2, 0)
    forms = [path, str(path), IMAGES[0], payload, pixels, encoded, bytearray(payload), memoryview(payload), tensor]
    forms += [path.open("rb"), pixels / 255, tensor / 255, pixels.transpose(2, 0, 1)]
    captions = [predictor.caption(form, decoding=DECODINGS["greedy"]) for form in forms]
    assert isinstance(captions[0], str)
    assert len(set(captions)) == 1
    assert predictor.caption(forms, decoding=DECODINGS["greedy"]) == captions
    several: list[Any] = [
        (IMAGES[0],),
        iter(forms),
        pixels[None],
        tensor[None],
        tensor[None] / 255,
        np.array([str(path)]),
    ]
    for images in several:
        assert set(predictor.caption(images, decoding=DECODINGS["greedy"])) == {captions[0]}
    assert predictor.embed_images(path).shape == (1, 12)
    assert predictor.embed_texts("a dog").shape == (1, 12)
    assert predictor.similarity(IMAGES[0], "a dog").shape == (1, 1)


@pytest.mark.parametrize(
    "decoding", [Beam(num_beams=4, max_new_tokens=6), DECODINGS["nucleus"]], ids=["beam", "nucleus"]
)
def test_several_captions_are_lists_of_as_many(predictor: BlipPredictor, decoding: Any) -> None:
    several = predictor.caption(IMAGES[:2], decoding=decoding, num_captions=3, return_scores=True)
    assert [len(captions) for captions in several] == [3, 3]
    assert len({caption.text for caption in several[0]}) > 1
    first = predictor.caption(IMAGES[:2], decoding=decoding, num_captions=3)
    assert first == [[caption.text for caption in captions] for captions in several]
    assert predictor.caption(IMAGES[0], decoding=decoding, num_captions=3) == first[0]


def test_nucleus_follows_its_seeds(predictor: BlipPredictor) -> None:
    def captions(seed: int | None = None, seeds: list[int] | None = None) -> list[str]:
        return predictor.caption(IMAGES, decoding=Nucleus(seed=seed, max_new_tokens=8), seeds=seeds)

    assert captions(seed=1) == captions(seed=1) != captions(seed=2)
    assert captions() != captions()
    assert captions(seeds=[1, 2, 3, 4, 5]) == captions(seed=9, seeds=[1, 2, 3, 4, 5])
    again = predictor.caption(IMAGES[2:], decoding=Nucleus(max_new_tokens=8), seeds=[3, 4, 5], batch_size=1)
    assert again == captions(seeds=[1, 2, 3, 4, 5])[2:]


def test_the_prompt_is_read_but_not_returned(predictor: BlipPredictor) -> None:
    """A caption after a prompt is what the model says after those words, and nothing else."""
    found = predictor.caption(IMAGES[0], prompt="a red dog", decoding=Greedy(max_new_tokens=5))
    ids = TOKENIZER.prompt("a red dog").tolist()
    written: list[int] = []
    with torch.no_grad():
        kv = predictor.model.image_kv(image_tokens(predictor, IMAGES[0]), "decode")
        while len(written) < 5 and TOKENIZER.sep_id not in written:
            logits = predictor.model.decode(torch.tensor([ids + written]), kv)[0, -1]
            written.append(int(logits.argmax()))
    assert found == TOKENIZER.decode([token for token in written if token != TOKENIZER.sep_id])
    assert not found.startswith("a red dog")
    own, given, none = (predictor.caption(IMAGES, prompt, DECODINGS["greedy"]) for prompt in (None, PROMPT, ""))
    assert own == given != none


def test_encoded_images_give_the_same_results(any_predictor: BasePredictor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Callable[[Any], Any]] = {
        "greedy": lambda images: any_predictor.caption(images, decoding=DECODINGS["greedy"], batch_size=2),
        "nucleus": lambda images: any_predictor.caption(images, decoding=DECODINGS["nucleus"]),
        "match": lambda images: any_predictor.match(images, TEXTS, batch_size=2),
        "matrix": lambda images: any_predictor.match_matrix(images, TEXTS),
        "similarity": lambda images: any_predictor.similarity(images, TEXTS),
    }
    expected = {name: call(IMAGES) for name, call in calls.items()}
    prepared = any_predictor.prepare(IMAGES)
    assert prepared.shape == (5, 3, SIZE, SIZE)
    assert prepared.dtype == torch.uint8
    for name, call in calls.items():
        assert_same(call(prepared), expected[name])
    encoded = any_predictor.encode(IMAGES, batch_size=2)
    assert len(encoded) == 5
    monkeypatch.setattr(any_predictor.model, "encode_image", lambda _: pytest.fail("encoded again"))
    for name, call in calls.items():
        assert_same(call(encoded), expected[name])


def test_nothing_in_nothing_out(predictor: BlipPredictor) -> None:
    assert predictor.caption([]) == []
    assert predictor.prepare([]).shape == (0, 3, SIZE, SIZE)
    assert predictor.match([], []).shape == (0,)
    assert predictor.match_matrix([], TEXTS).shape == (0, 5)
    assert predictor.match_matrix(IMAGES, []).shape == (5, 0)
    assert predictor.similarity([], TEXTS).shape == (0, 5)
    assert predictor.similarity(IMAGES, []).shape == (5, 0)
    assert predictor.embed_images([]).shape == predictor.embed_texts([]).shape == (0, 12)
    assert predictor.caption(predictor.encode([])) == []


PAIRED: list[tuple[Callable[[], BasePredictor], Callable[[Any, Any, Any], Any]]] = [
    (lambda: make_predictor("itm"), lambda p, images, texts: p.match(images, texts, batch_size=2)),
    (lambda: make_predictor("itm"), lambda p, images, texts: p.features(images, texts, batch_size=2).multimodal),
    (lambda: make_predictor("itm"), lambda p, images, texts: p.explain(images, texts)),
    (lambda: make_predictor("vqa"), lambda p, images, texts: p.answer(images, texts, decoding=DECODINGS["beam"])),
    (lambda: make_predictor("lm"), lambda p, images, texts: p.caption(images, texts, decoding=DECODINGS["nucleus"])),
    (blip2_predictor, lambda p, images, texts: p.match(images, texts, batch_size=2)),
    (blip2_predictor, lambda p, images, texts: p.features(images, texts, batch_size=2).multimodal),
    (lambda: blip2_predictor((), "opt"), lambda p, images, texts: p.answer(images, texts, decoding=DECODINGS["beam"])),
    (lambda: blip2_predictor((), "t5"), lambda p, images, texts: p.caption(images, texts, decoding=DECODINGS["beam"])),
]


@pytest.mark.parametrize(("make", "call"), PAIRED)
def test_one_text_goes_with_all_images_and_one_image_with_all_texts(
    make: Callable[[], BasePredictor], call: Callable[[Any, Any, Any], Any]
) -> None:
    predictor = make()

    def check(found: Any, expected: Any) -> None:
        assert len(found) == len(expected)
        for own, other in zip(found, expected, strict=True):
            assert_same(getattr(own, "heat", own), getattr(other, "heat", other))

    each_text = call(predictor, [IMAGES[0]] * 5, TEXTS)
    each_image = call(predictor, IMAGES, [TEXTS[1]] * 5)
    for image in (IMAGES[0], predictor.encode(IMAGES[0]), predictor.encode([IMAGES[0]])):
        check(call(predictor, image, TEXTS), each_text)
        check(call(predictor, image, iter(TEXTS)), each_text)
    for images in (IMAGES, iter(IMAGES), predictor.encode(IMAGES), predictor.prepare(IMAGES)):
        check(call(predictor, images, TEXTS[1]), each_image)
    assert len(call(predictor, [], TEXTS[1])) == 0
    with pytest.raises(ConfigError, match="equally many images and"):
        call(predictor, IMAGES[:1], TEXTS)
    with pytest.raises(ConfigError, match="equally many images and"):
        call(predictor, IMAGES, TEXTS[:1])


def test_one_image_is_not_copied_for_all_of_its_texts(
    predictor: BlipPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    judge, encode_pair, expand = make_predictor("nlvr"), Blip.encode_pair, EncodedImages.select
    monkeypatch.setattr(Blip, "encode_pair", lambda model, x: (sizes.append(len(x)), encode_pair(model, x))[1])
    monkeypatch.setattr(EncodedImages, "select", lambda images, i: (sizes.append(len(i)), expand(images, i))[1])
    judge.judge((IMAGES[0], IMAGES[1]), TEXTS * 4)
    assert set(sizes) == {1}
    predictor.caption(IMAGES[0], TEXTS, decoding=SHORT, batch_size=2)
    assert max(sizes) == 2


def test_what_goes_with_all_in_other_calls() -> None:
    both, judge = make_predictor("itc", "itm"), make_predictor("nlvr")
    for images in (IMAGES[0], IMAGES[:3]):
        num_images = len(images) if isinstance(images, list) else 1
        assert both.score_texts(images, TEXTS) == both.score_texts(images, [TEXTS] * num_images)
    pair = (IMAGES[0], IMAGES[1])
    assert_same(judge.judge([pair, pair[::-1]], "a dog"), judge.judge([pair, pair[::-1]], ["a dog"] * 2))
    assert_same(judge.judge(pair, TEXTS), judge.judge([pair] * 5, TEXTS))
    chat, dialogs = blip2_predictor((), "opt"), make_predictor("visdial")
    assert chat.chat(IMAGES[:2], "why?", decoding=SHORT) == chat.chat(IMAGES[:2], ["why?"] * 2, decoding=SHORT)
    arguments = IMAGES[:2], TEXTS[:2], [["why?"]] * 2
    assert_same(dialogs.rank_answers(*arguments, TEXTS)[1], dialogs.rank_answers(*arguments, [TEXTS] * 2)[1])


SEARCH, MATCH = {"similarity", "embed_images", "embed_texts"}, {"match", "match_matrix"}
SHORT = Greedy(max_new_tokens=4)
CALLS: dict[str, Callable[[BasePredictor], object]] = {
    "caption": lambda p: p.caption(IMAGES, decoding=SHORT),
    "match": lambda p: p.match(IMAGES, TEXTS),
    "match_matrix": lambda p: p.match_matrix(IMAGES, TEXTS),
    "similarity": lambda p: p.similarity(IMAGES, TEXTS),
    "embed_images": lambda p: p.embed_images(IMAGES),
    "embed_texts": lambda p: p.embed_texts(TEXTS),
    "answer": lambda p: p.answer(IMAGES, TEXTS, decoding=SHORT),
    "chat": lambda p: p.chat(IMAGES[0], "why?", decoding=SHORT),
    "judge": lambda p: p.judge([(IMAGES[0], IMAGES[1])], ["a dog"]),
    "rank_answers": lambda p: p.rank_answers(IMAGES[0], "a dog", ["what is it?"], ["a dog", "a cat"]),
}


@pytest.mark.parametrize(
    ("limited", "tasks"),
    [
        (lambda: make_predictor("lm"), {"caption"}),
        (lambda: make_predictor("itm"), MATCH),
        (lambda: make_predictor("itc"), SEARCH),
        (lambda: make_predictor("itc", "itm", "lm"), {"caption"} | MATCH | SEARCH),
        (lambda: make_predictor("vqa"), {"answer"}),
        (lambda: make_predictor("nlvr"), {"judge"}),
        (lambda: make_predictor("visdial"), {"rank_answers"}),
        (lambda: blip2_predictor(("itc", "itm", "itg")), {"caption"} | MATCH | SEARCH),
        (lambda: blip2_predictor(("itc",)), SEARCH),
        (lambda: blip2_predictor(("itm",)), MATCH),
        (lambda: blip2_predictor((), "opt"), {"caption", "answer", "chat"}),
        (lambda: blip2_predictor(("itc", "itm"), "t5"), {"caption", "answer", "chat"} | MATCH | SEARCH),
    ],
)
def test_a_call_without_weights_names_what_works(limited: Callable[[], BasePredictor], tasks: set[str]) -> None:
    predictor = limited()
    assert predictor.tasks == frozenset(tasks)
    for name, call in CALLS.items():
        if name in tasks:
            call(predictor)
        else:
            with pytest.raises(UnsupportedTaskError, match=f"to {name}; it can do {', '.join(sorted(tasks))}"):
                call(predictor)


def test_an_unreadable_image_is_named(any_predictor: BasePredictor, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        any_predictor.caption([IMAGES[0], broken])
    for batch_size in (None, 2):
        with pytest.raises(ImageError, match="image 3"):
            any_predictor.embed_images([*IMAGES[:3], b"no image"], batch_size)
    with pytest.raises(ImageError, match=r"absent\.png"):
        any_predictor.match(tmp_path / "absent.png", "a dog")


def test_longer_captions_than_the_model_has_positions_are_refused(predictor: BlipPredictor) -> None:
    prompt_length = len(TOKENIZER.prompt(PROMPT))
    longest = TINY.text.max_positions - prompt_length + 1
    for strategy in (Greedy, Beam):
        settings = strategy(max_new_tokens=longest, min_new_tokens=longest - 1)
        predictor.caption(IMAGES[0], decoding=settings)
    with pytest.raises(ConfigError, match=f"ask for {longest} or fewer"):
        predictor.caption(IMAGES[0], decoding=Greedy(max_new_tokens=longest + 1))


def test_texts_are_read_up_to_the_positions_and_what_is_lost_is_said_once(predictor: BlipPredictor) -> None:
    """However many words they have; whoever reads several batches hears of all of them at once."""
    words = ["a dog beside"] * 12  # 36 tokens
    assert predictor.match(IMAGES[0], " ".join(words)) != predictor.match(IMAGES[0], " ".join(words[:-1]))
    long = [f"{'a dog beside ' * 100}{end}" for end in ("one", "two", "one")]
    calls: list[Callable[..., Any]] = [
        lambda: predictor.match(IMAGES[:3], long, batch_size=1),
        lambda: predictor.match_matrix(IMAGES[:3], long, batch_size=1),
        lambda: predictor.similarity(IMAGES[0], long, batch_size=1),
        lambda: predictor.score_texts(IMAGES[:2], [long, long[:1]], batch_size=1),
    ]
    for call in calls:
        with pytest.warns(UserWarning, match="^2 texts were longer than 40 tokens and cut$") as warned:
            call()
        assert [Path(warning.filename).name for warning in warned] == ["test_predictor.py"]
    for call in (lambda: predictor.match(IMAGES[0], "一只狗"), lambda: predictor.caption(IMAGES[0], "一只狗")):
        with pytest.warns(UserWarning, match="100% of the tokens of the texts are unknown to the model's vocabulary"):
            call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor.match(IMAGES[0], "a dog")


def test_a_saved_predictor_loads_and_says_the_same(predictor: BlipPredictor, tmp_path: Path) -> None:
    predictor.save(tmp_path / "model")
    loaded = openblip.load(tmp_path / "model", device="cpu")
    assert loaded.tasks == predictor.tasks
    assert loaded.caption(IMAGES, decoding=DECODINGS["beam"]) == predictor.caption(IMAGES, decoding=DECODINGS["beam"])
    torch.testing.assert_close(loaded.match(IMAGES, TEXTS), predictor.match(IMAGES, TEXTS))
    saved, again = tmp_path / "model", tmp_path / "again"
    loaded.save(again)
    assert (saved / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert loaded.fingerprint() == predictor.fingerprint()
    assert loaded.num_parameters == predictor.num_parameters
    loaded.prompt = "two"
    loaded.save(tmp_path / "changed")
    assert openblip.load(tmp_path / "changed", device="cpu").prompt == loaded.settings["prompt"] == "two"


def test_predicting_leaves_global_random_state_alone(predictor: BlipPredictor) -> None:
    before = torch.get_rng_state()
    predictor.caption(IMAGES, decoding=Nucleus(max_new_tokens=4))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_predictor_around_a_live_model_follows_its_weights(predictor: BlipPredictor) -> None:
    """Unless it is told a device or dtype, it neither moves nor casts the model."""
    model = make_predictor("lm").model.double()
    around = BlipPredictor(predictor.checkpoint._replace(model=model))
    assert around.dtype == torch.float64
    before = around.caption(IMAGES[0], decoding=DECODINGS["greedy"], return_scores=True).logprob
    with torch.no_grad():
        model.text.lm_head.bias.add_(torch.arange(len(model.text.lm_head.bias)))  # type: ignore[union-attr]
    assert around.caption(IMAGES[0], decoding=DECODINGS["greedy"], return_scores=True).logprob != before


def test_the_fingerprint_of_a_model_is_that_of_every_version() -> None:
    """CapFilt's manifests hold it: a run of an earlier version goes on only if it is the same."""
    predictor = openblip.load("openblip-mini-filter", device="cpu")
    assert predictor.fingerprint() == "d9af128f461e883fc06d605dcc9373413e1763501c6226575e52f6914bbafc96"
    assert predictor.num_parameters == sum(p.numel() for p in predictor.model.parameters())
    half = openblip.load("openblip-mini-filter", device="cpu", dtype="bfloat16")
    assert half.fingerprint() != predictor.fingerprint()


def test_few_calls_lie_between_a_caption_and_its_attention(
    predictor: BlipPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(openblip.__file__).parent
    forward, depths = SelfAttention.forward, []

    def counting(*arguments: Any, **options: Any) -> torch.Tensor:
        frames = [frame for frame in traceback.extract_stack() if package in Path(frame.filename).parents]
        depths.append(len(frames) + 1)  # and the function that this one stands in for
        return forward(*arguments, **options)

    monkeypatch.setattr(SelfAttention, "forward", counting)
    predictor.caption(IMAGES[0])
    assert max(depths) <= 12


@pytest.fixture(scope="module")
def ending_predictor() -> BlipPredictor:
    """Its captions end."""
    predictor = make_predictor("lm")
    assert predictor.model.text.lm_head is not None
    with torch.no_grad():
        predictor.model.text.lm_head.bias[TOKENIZER.sep_id] += 8.0
    return predictor


def test_every_token_comes_with_its_own_log_probability(ending_predictor: BlipPredictor) -> None:
    found: list[ScoredText] = ending_predictor.caption(IMAGES, decoding=Greedy(max_new_tokens=20), return_scores=True)
    assert all(caption.tokens[-1] == "[SEP]" for caption in found)
    for image, caption in zip(IMAGES, found, strict=True):
        assert len(caption.tokens) == len(caption.token_logprobs)
        assert caption.logprob == pytest.approx(sum(caption.token_logprobs))
        with torch.no_grad():
            kv = ending_predictor.model.image_kv(image_tokens(ending_predictor, image), "decode")
            prompt = TOKENIZER.prompt(ending_predictor.prompt)
            logits = ending_predictor.model.decode(prompt[None], kv)[0, -1]
        logprob, first = logits.log_softmax(dim=0).max(dim=0)
        assert caption.tokens[0] == TOKENIZER.pieces([int(first)])[0]
        assert caption.token_logprobs[0] == pytest.approx(float(logprob), abs=1e-4)


def test_tokens_are_those_of_the_text_and_its_end(ending_predictor: BlipPredictor) -> None:
    settings = Greedy(max_new_tokens=2, min_new_tokens=2)
    found: ScoredText = ending_predictor.caption(IMAGES[0], decoding=settings, return_scores=True)
    assert len(found.tokens) == 2
    assert "[SEP]" not in found.tokens
    for caption in ending_predictor.caption(IMAGES, return_scores=True):
        joined = " ".join(token for token in caption.tokens if token != "[SEP]").replace(" ##", "")
        assert joined.replace(" ", "") == caption.text.replace(" ", "")


def test_the_first_token_can_be_chosen_and_is_kept(predictor: BlipPredictor, tmp_path: Path) -> None:
    predictor.save(tmp_path / "enc")
    plain = openblip.load(tmp_path / "enc", device="cpu", encoder_token="[CLS]")
    tokens = TOKENIZER.encode(["a dog"])  # from [CLS]
    with torch.no_grad():
        kv = predictor.model.image_kv(image_tokens(predictor, IMAGES[0]), "encode")
        logits = predictor.model.match_logits(tokens.ids, tokens.mask, kv)
    torch.testing.assert_close(plain.match(IMAGES[0], "a dog"), logits.softmax(dim=1)[:, 1])
    assert not torch.allclose(plain.match(IMAGES, TEXTS), predictor.match(IMAGES, TEXTS), atol=1e-3)
    torch.testing.assert_close(plain.match_matrix(IMAGES, TEXTS).diagonal(), plain.match(IMAGES, TEXTS))

    plain.save(tmp_path / "cls")
    again = openblip.load(tmp_path / "cls", device="cpu")
    assert again.encoder_token == "[CLS]"
    assert torch.equal(again.match(IMAGES, TEXTS), plain.match(IMAGES, TEXTS))
    back = openblip.load(tmp_path / "cls", device="cpu", encoder_token="[ENC]")
    torch.testing.assert_close(back.match(IMAGES, TEXTS), predictor.match(IMAGES, TEXTS))
    texts_alone = plain.embed_texts(TEXTS), predictor.embed_texts(TEXTS)
    torch.testing.assert_close(*texts_alone, msg="texts alone begin with [CLS] always")
    with pytest.raises(CheckpointError, match=r"\[ENC\] or \[CLS\], not with \[DEC\]"):
        openblip.load(tmp_path / "cls", device="cpu", encoder_token="[DEC]")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32_results(predictor: BlipPredictor, tmp_path: Path, dtype: torch.dtype) -> None:
    predictor.save(tmp_path)
    half = openblip.load(tmp_path, device="cpu", dtype=dtype)
    for call in ("match", "match_matrix", "similarity"):
        found, exact = getattr(half, call)(IMAGES, TEXTS), getattr(predictor, call)(IMAGES, TEXTS)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact, atol=0.15, rtol=0)
    assert half.embed_images(IMAGES).dtype == half.embed_texts(TEXTS).dtype == torch.float32
    assert len(half.caption(IMAGES)) == 5


def test_the_precision_is_chosen_by_name(predictor: BlipPredictor, tmp_path: Path) -> None:
    predictor.save(tmp_path)
    for name in ("float32", "bfloat16", "float16"):
        assert openblip.load(tmp_path, device="cpu", dtype=name).dtype == getattr(torch, name)
    assert openblip.load(tmp_path, device="cpu", dtype="auto").dtype == torch.float32
    for wrong in ("int4", "half", torch.int8, torch.float8_e4m3fn, 16):
        with pytest.raises(ConfigError, match="float32, bfloat16, float16, int8 and auto"):
            openblip.load(tmp_path, device="cpu", dtype=wrong)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="nowhere"):
        openblip.load(tmp_path / "nowhere")


def test_int8_says_the_same_up_to_its_rounding(predictor: BlipPredictor, tmp_path: Path) -> None:
    predictor.save(tmp_path)
    rounded = openblip.load(tmp_path, device="cpu", dtype="int8")
    assert (predictor.precision, rounded.precision) == ("float32", "int8")
    for call in ("match", "match_matrix", "similarity"):
        torch.testing.assert_close(
            getattr(rounded, call)(IMAGES, TEXTS), getattr(predictor, call)(IMAGES, TEXTS), atol=0.15, rtol=0
        )
    assert len(rounded.caption(IMAGES)) == 5
    assert rounded.explain(IMAGES[0], TEXTS[0]).words
    with pytest.raises(ConfigError, match="rounded to 8 bits"):
        rounded.save(tmp_path / "rounded")
    with pytest.raises(ConfigError, match="on cuda choose auto"):
        find_dtype("int8", torch.device("cuda"), 0)


def test_auto_takes_bfloat16_for_large_models_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, large = torch.device("cpu"), 50_000_001
    for amx, avx512 in itertools.product((True, False), repeat=2):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512)
        assert find_dtype("auto", cpu, large) == (torch.bfloat16 if amx or avx512 else torch.float32)
        assert find_dtype("auto", cpu, large - 1) == find_dtype("auto", torch.device("mps"), large) == torch.float32
        assert find_dtype(None, cpu, large) == torch.float32
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, supported=supported: supported)
        expected = torch.bfloat16 if supported else torch.float32
        assert find_dtype("auto", torch.device("cuda:1"), 1) == expected


def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("gpu", "cuda:99", "mps:7", "meta", "", 99, torch.device("cuda:99"), 0.5):
        with pytest.raises(ConfigError, match="torch cannot compute there on this machine; choose cpu"):
            openblip.load("openblip-mini", device=device)  # type: ignore[arg-type]
    # What is taken without being asked for: a GPU where there is one, Apple's too.
    assert openblip.load("openblip-mini").device.type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: pytest.fail(f"{device} was chosen"))
    with pytest.raises(pytest.fail.Exception, match="mps was chosen"):
        openblip.load("openblip-mini")


def test_the_next_images_are_read_while_the_model_works(
    predictor: BlipPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, encode, read_before = set[int](), predictor._encode, list[int]()
    all_read = threading.Event()

    class Counted(io.BytesIO):
        def __init__(self, number: int, payload: bytes) -> None:
            super().__init__(payload)
            self.number = number

        def read(self, size: int | None = -1, /) -> bytes:
            read.add(self.number)
            if len(read) == 6:
                all_read.set()
            return super().read(size)

    def slow_encode(pixels: torch.Tensor) -> EncodedImages:
        assert all_read.wait(60)
        read_before.append(len(pixels))
        return encode(pixels)

    files = []
    for number in range(6):
        payload = io.BytesIO()
        random_image(number).save(payload, "PNG")
        files.append(Counted(number, payload.getvalue()))
    expected = predictor.embed_images([random_image(number) for number in range(6)])
    monkeypatch.setattr(predictor, "_encode", slow_encode)
    assert_same(predictor.embed_images(files, batch_size=2), expected)
    assert read_before == [2, 2, 2]


def test_images_that_cannot_be_read_are_named_in_order_and_leave_no_thread(predictor: BlipPredictor) -> None:
    images = [*IMAGES, b"broken", *IMAGES, b"broken too"]
    for call in (predictor.prepare, lambda given: predictor.caption(given, batch_size=2)):
        with pytest.raises(ImageError, match=r"^image 5: "):
            call(images)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("openblip-read")]
    with pytest.raises(ImageError, match=r"^image 9: "):
        predictor.prepare([b"broken"], first=9)


def test_images_are_hashed_only_for_seeds_that_come_from_them(
    predictor: BlipPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[object] = []
    monkeypatch.setattr(values, "hash_int", lambda data: hashed.append(data) or len(hashed))
    encoded = predictor.encode(IMAGES)
    for decoding in (Greedy(max_new_tokens=2), Nucleus(max_new_tokens=2)):
        predictor.caption(encoded, decoding=decoding)
    predictor.caption(IMAGES, decoding=Nucleus(max_new_tokens=2, seed=1), seeds=range(5))
    assert not hashed
    predictor.caption(encoded, decoding=Nucleus(max_new_tokens=2, seed=1))
    assert len(hashed) == 10  # the images, and with them the seed


def test_large_jpegs_are_scaled_on_request(
    predictor: BlipPredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), np.uint8)).save(tmp_path / "a.jpg")
    exact = predictor.prepare(tmp_path / "a.jpg")
    monkeypatch.setattr(predictor, "scales_jpegs", True)
    scaled = predictor.prepare(tmp_path / "a.jpg")
    assert not torch.equal(exact, scaled)
    assert (exact.int() - scaled.int()).abs().float().mean() < 3  # of pure noise


def test_two_models_encode_alike_when_their_encoders_are_equal() -> None:
    captioner, judge = make_predictor("lm"), make_predictor("itc", "itm")
    judge.model.vision.load_state_dict(captioner.model.vision.state_dict())
    assert captioner.encodes_alike(captioner)
    assert captioner.encodes_alike(judge)
    with torch.no_grad():
        judge.model.vision.class_token += 1
    assert not captioner.encodes_alike(judge)
    other = make_predictor("lm")
    other.preprocessing = replace(other.preprocessing, mean=(0.5, 0.5, 0.5))
    assert not captioner.encodes_alike(other)
    assert not blip2_predictor().encodes_alike(captioner)
