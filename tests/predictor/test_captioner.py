"""Captions by image-text-to-text models of transformers, tiny and random, against their own `generate`."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from openblip import Beam, Greedy, Nucleus
from openblip.errors import CheckpointError, ConfigError, ImageError
from openblip.predictor import BlipPredictor, TransformersCaptioner, load_captioner
from openblip.predictor.captioner import CHAT_PROMPT
from tiny_captioners import FAMILIES, draw, save_captioner
from tiny_language_models import END, word_tokenizer

PROMPT = "how many dogs are there"
SIZES = [(40, 32), (64, 32), (40, 32)]  # the second gives another shape where a model follows the image's
IMAGES = [draw(seed, size) for seed, size in enumerate(SIZES)]


@dataclass
class Loaded:
    folder: Path
    captioner: Any


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp(request.param)
    save_captioner(request.param, folder)
    return Loaded(folder, load_captioner(folder, prompt=PROMPT))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("llava")
    save_captioner("llava", folder)
    return Loaded(folder, load_captioner(folder))


def ids_of_transformers(captioner: Any, image: Any, **settings: Any) -> list[int]:
    """What the model writes about one image by its own `generate`, without the end token."""
    inputs = captioner.read_image(image)
    output = captioner.model.generate(**inputs, do_sample=False, max_new_tokens=7, pad_token_id=0, **settings)
    row = output[0, inputs["input_ids"].shape[1] :].tolist()
    return row[: row.index(END)] if END in row else row


def written_ids(texts: list[Any]) -> list[list[int]]:
    return [[i for i in text.ids if i != END] for text in texts]


def test_texts_are_those_of_transformers(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = loaded.captioner
    greedy = captioner.caption(IMAGES, decoding=Greedy(max_new_tokens=7), return_scores=True)
    assert written_ids(greedy) == [ids_of_transformers(captioner, image) for image in IMAGES]
    assert len({text.text for text in greedy}) > 1
    monkeypatch.setattr(captioner.model.generation_config, "suppress_tokens", None)
    beams = captioner.caption(IMAGES, decoding=Beam(num_beams=3, max_new_tokens=7), return_scores=True)
    settings = {"num_beams": 3, "length_penalty": 1.0, "early_stopping": False}
    assert written_ids(beams) == [ids_of_transformers(captioner, image, **settings) for image in IMAGES]


def test_sampled_texts_depend_on_the_seed_of_their_image_alone(loaded: Loaded) -> None:
    captioner, seeds = loaded.captioner, [3, 4, 5]
    settings = {"decoding": Nucleus(max_new_tokens=6), "num_captions": 3, "return_scores": True}
    together = captioner.caption(IMAGES, seeds=seeds, **settings)
    alone = [captioner.caption([image], seeds=[seed], **settings)[0] for image, seed in zip(IMAGES, seeds, strict=True)]
    assert [[text.ids for text in texts] for texts in together] == [[text.ids for text in texts] for texts in alone]
    backwards = captioner.caption(IMAGES[::-1], seeds=seeds[::-1], batch_size=2, **settings)[::-1]
    for texts, same in zip(together, backwards, strict=True):
        assert [text.ids for text in texts] == [text.ids for text in same]
        assert [text.logprob for text in texts] == pytest.approx([text.logprob for text in same], abs=1e-5)
    assert len({text.ids for texts in together for text in texts}) > 3


def test_the_logprob_is_that_of_the_text_read_at_once(loaded: Loaded) -> None:
    captioner = loaded.captioner
    (text,) = captioner.caption(IMAGES[:1], decoding=Nucleus(max_new_tokens=6), seeds=[1], return_scores=True)
    inputs = dict(captioner.read_image(IMAGES[0]))
    new, shape = torch.tensor([text.ids]), inputs["input_ids"].shape
    of_new = {"input_ids": new, "mm_token_type_ids": torch.zeros_like(new)}
    for name in [name for name in inputs if inputs[name].shape == shape]:
        inputs[name] = torch.cat([inputs[name], of_new.get(name, torch.ones_like(new))], dim=1)
    with torch.no_grad():
        logits = captioner.model(**inputs).logits[:, -len(text.ids) - 1 : -1]
    logits[..., captioner.model.generation_config.suppress_tokens] = -torch.inf
    logprobs = logits.log_softmax(dim=-1).gather(2, new[..., None]).flatten()
    assert text.token_logprobs == pytest.approx(logprobs.tolist(), abs=1e-4)
    assert text.logprob == pytest.approx(sum(text.token_logprobs))


def test_given_texts_have_the_log_probability_that_written_ones_had(loaded: Loaded) -> None:
    """Whatever the other texts and images are."""
    captioner = loaded.captioner
    settings = {"decoding": Nucleus(max_new_tokens=30), "num_captions": 4, "return_scores": True}
    written = captioner.caption(IMAGES, seeds=[7, 8, 9], **settings)
    texts: list[list[str]] = []
    expected: list[list[tuple[float, int]]] = []
    for of_image in written:
        known = [text for text in of_image if text.ids[-1] == END and "<" not in "".join(text.tokens[:-1])]
        texts.append([text.text for text in known])
        expected.append([(pytest.approx(text.logprob, abs=1e-4), len(text.ids)) for text in known])
    assert sum(map(len, texts)) > 0
    assert captioner.score_captions(IMAGES, texts, batch_size=2) == expected
    with pytest.warns(UserWarning, match="1 text was longer than"):
        ((long,),) = captioner.score_captions(IMAGES[0], ["a dog " * 400])
    assert 50 < long.num_tokens <= 256


def test_an_image_is_encoded_once_for_all_its_captions(llava: Loaded) -> None:
    encoded = []
    tower = llava.captioner.model.get_submodule("model.vision_tower")
    hook = tower.register_forward_hook(lambda module, inputs, output: encoded.append(len(output[0])))
    llava.captioner.caption(IMAGES, decoding=Nucleus(max_new_tokens=4, seed=0), num_captions=5)
    hook.remove()
    assert encoded == [len(IMAGES)]


def test_the_prompt_is_the_chat_template_s_question(llava: Loaded) -> None:
    assert llava.captioner.prompt == CHAT_PROMPT
    asked = load_captioner(llava.folder, prompt=PROMPT)
    inputs = asked.read_image(IMAGES[0])["input_ids"][0].tolist()
    assert f"{PROMPT} Answer :" in asked.tokenizer.decode(inputs)
    assert asked.caption(IMAGES[0], prompt=PROMPT) == asked.caption([IMAGES[0]])[0]
    with pytest.raises(ConfigError, match="was loaded with the prompt"):
        asked.caption(IMAGES, prompt="another")
    assert asked.fingerprint() != llava.captioner.fingerprint()


def test_every_end_token_ends_a_text(llava: Loaded) -> None:
    """As in models with an end of the text and an end of the turn; their probabilities add up."""
    captioner = load_captioner(llava.folder)
    ends = [END, captioner.tokenizer.convert_tokens_to_ids("tree"), captioner.tokenizer.convert_tokens_to_ids("big")]
    captioner.end_ids = ends
    texts = captioner.caption(IMAGES, decoding=Nucleus(max_new_tokens=8, seed=0), num_captions=8, return_scores=True)
    written = [text for of_image in texts for text in of_image]
    assert not any({"tree", "big"} & set(text.tokens) for text in written)
    assert any(text.tokens[-1] == "</s>" for text in written)


def test_what_cannot_be_captioned_is_named(llava: Loaded, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="image 1"):
        llava.captioner.caption([IMAGES[0], b"no image"])
    with pytest.raises(ConfigError, match="int8"):
        load_captioner(llava.folder, dtype="int8")
    with pytest.raises(ConfigError, match="Greedy writes one"):
        llava.captioner.caption(IMAGES, decoding=Greedy(), num_captions=2)
    with pytest.raises(ConfigError, match="has room for"):
        llava.captioner.caption(IMAGES, decoding=Greedy(max_new_tokens=1000))
    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=9)).save_pretrained(
        tmp_path
    )
    word_tokenizer("$A").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not describe a BLIP or BLIP-2"):
        load_captioner(tmp_path)


def test_weights_that_cannot_read_an_image_are_refused_when_they_are_loaded(llava: Loaded, tmp_path: Path) -> None:
    """The processor makes more tokens of an image than the model gives."""
    for path in llava.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "processor_config.json"
    config.write_text(config.read_text().replace('"patch_size": 8', '"patch_size": 4'))
    with pytest.raises(CheckpointError, match="is a llava, which writes no caption"):
        load_captioner(tmp_path)


def test_a_blip_stays_a_blip() -> None:
    assert isinstance(load_captioner("openblip-mini-captioner"), BlipPredictor)


def test_images_are_prepared_alike_in_another_process(loaded: Loaded) -> None:
    there = pickle.loads(pickle.dumps(loaded.captioner.preprocessing))
    ours, theirs = loaded.captioner.preprocessing(IMAGES[0]), there(IMAGES[0])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_types(loaded: Loaded) -> None:
    assert isinstance(loaded.captioner, TransformersCaptioner)
    assert loaded.captioner.precision == "float32"
    assert loaded.captioner.num_parameters > 1000


def test_a_captioner_in_fewer_bits(llava: Loaded) -> None:
    pytest.importorskip("bitsandbytes")
    quantized: Any = load_captioner(llava.folder, device="cpu", quantization="8bit")
    assert "Linear8bitLt" in {type(module).__name__ for module in quantized.model.modules()}
    assert len(quantized.caption(IMAGES, decoding=Greedy(max_new_tokens=3))) == len(IMAGES)
    exact, near = (
        captioner.score_captions(IMAGES[:1], [["two dogs"]])[0][0].logprob for captioner in (llava.captioner, quantized)
    )
    assert near == pytest.approx(exact, rel=0.05)
    assert near != exact
    again = load_captioner(llava.folder, device="cpu", quantization="8bit")
    assert quantized.fingerprint() == again.fingerprint() != llava.captioner.fingerprint()
