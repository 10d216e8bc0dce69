"""Folders of transformers whose tokenizer got more words; their word embeddings were resized, padded, or left alone."""

import copy
import json
from pathlib import Path
from typing import Any

import blip2_cases as blip2
import parity_cases as cases
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import openblip
from openblip.checkpoints.checkpoint import BlipCheckpoint
from openblip.checkpoints.loading import load_checkpoint, save_checkpoint
from openblip.data.config import Preprocessing
from openblip.data.tokenizer import Tokenizer
from openblip.models.blip import Blip
from openblip.models.config import BlipConfig
from tiny_blip import SIZE, TINY

pytestmark = pytest.mark.slow

CAPTIONER, RETRIEVER = "BlipForConditionalGeneration", "BlipForImageTextRetrieval"
WORDS = ["zebrafish", "quokka", "axolotl"]
TEXTS = ["a red zebrafish", "two blue cars beside a quokka", "an axolotl"]
NUM_WORDS = cases.TOKENIZER.num_words  # [DEC] and [ENC] stand behind them, and not in transformers' tokenizer
RESIZES = {"not": None, "to its length": {}, "padded": {"pad_to_multiple_of": 8}, "to more": {"pad_to_multiple_of": 64}}


def write(folder: Path, class_name: str, num_added: int, resize: dict[str, int] | None) -> tuple[Any, Any]:
    """A model and its tokenizer, which knows neither [DEC] nor [ENC], as those of the hub."""
    entries = sorted(cases.TOKENIZER.entries.items(), key=lambda entry: entry[1])[:NUM_WORDS]
    tokenizer = transformers.BertTokenizer(vocab=dict(entries))
    tokenizer.add_tokens(WORDS[:num_added])
    theirs = cases.their_model(class_name)
    if resize is not None:
        torch.manual_seed(0)
        theirs.resize_token_embeddings(len(tokenizer), mean_resizing=False, **resize)
    if class_name == CAPTIONER:  # the added words are written, and no row without a word is
        head = theirs.text_decoder.cls.predictions
        with torch.no_grad():
            head.bias[NUM_WORDS : NUM_WORDS + num_added] += 7
            head.bias[len(tokenizer) :] = -100
    theirs.save_pretrained(folder)
    processor = transformers.BlipProcessor(
        BlipImageProcessorPil(size={"height": cases.SIZE, "width": cases.SIZE}), tokenizer
    )
    processor.save_pretrained(folder)
    return theirs.eval(), processor


def assert_they_say_the_same(model: Any, theirs: Any, processor: Any, images: list[Image.Image]) -> None:
    texts = processor(images=images, text=TEXTS, padding=True, return_tensors="pt")
    texts.pop("token_type_ids", None)
    with torch.no_grad():
        if type(theirs).__name__ == CAPTIONER:
            pixels = {"pixel_values": texts.pixel_values}
            for decoding, settings in (
                (openblip.Greedy(max_new_tokens=12), {"num_beams": 1}),
                (openblip.Beam(num_beams=3, max_new_tokens=12), {"num_beams": 3}),
            ):
                ids = theirs.generate(**pixels, max_new_tokens=12, do_sample=False, **settings)
                rows = [[i for i in row[1:] if i < len(processor.tokenizer)] for row in ids.tolist()]
                expected = [model.tokenizer.decode(row) for row in rows]
                assert model.caption(images, prompt="", decoding=decoding) == expected
        elif type(theirs).__name__ == RETRIEVER:
            match = theirs(**texts, use_itm_head=True).itm_score.softmax(dim=1)[:, 1]
            torch.testing.assert_close(model.match(images, TEXTS), match, atol=1e-5, rtol=0)
            similarity = theirs(**texts, use_itm_head=False).itm_score
            torch.testing.assert_close(model.similarity(images, TEXTS), similarity, atol=1e-5, rtol=0)


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("num_added", [1, 3])
@pytest.mark.parametrize("class_name", [CAPTIONER, RETRIEVER])
def test_added_words_are_kept(tmp_path: Path, images: list[Any], class_name: str, num_added: int, resize: str) -> None:
    """And [DEC] and [ENC], whose rows they take in transformers."""
    theirs, processor = write(tmp_path / "theirs", class_name, num_added, RESIZES[resize])
    token = {"encoder_token": "[CLS]"}  # from which transformers reads
    ours = openblip.load(tmp_path / "theirs", **token)  # type: ignore[arg-type]
    assert_they_say_the_same(ours, theirs, processor, images)
    ids = processor.tokenizer(TEXTS[0]).input_ids
    assert NUM_WORDS in ids
    assert ours.tokenizer.encode(TEXTS[:1]).ids[0].tolist() == ids
    if class_name == CAPTIONER:
        assert any(word in caption for word in WORDS for caption in ours.caption(images, prompt=""))

    ours.save(tmp_path / "written", format="huggingface")
    again = cases.loaded_by_them(class_name, tmp_path / "written")
    processor = transformers.BlipProcessor.from_pretrained(tmp_path / "written")
    assert processor.tokenizer(TEXTS[0]).input_ids == ids
    assert_they_say_the_same(ours, again, processor, images)
    assert_they_say_the_same(openblip.load(tmp_path / "written", **token), again, processor, images)  # type: ignore[arg-type]


def test_words_without_an_embedding(tmp_path: Path, images: list[Any]) -> None:
    """In transformers they are an index error, here the mean of all words, with a warning."""
    theirs, processor = write(tmp_path, RETRIEVER, 3, None)
    processor.tokenizer.add_tokens([f"word{i}" for i in range(9)])
    processor.save_pretrained(tmp_path)
    rows = theirs.config.text_config.vocab_size
    lacking = len(processor.tokenizer) - rows
    with pytest.warns(
        UserWarning, match=rf"{lacking} words of its tokenizer \(word{9 - lacking}, .* mean of the others"
    ):
        model = openblip.load(tmp_path, encoder_token="[CLS]")
    assert_they_say_the_same(model, theirs, processor, images)
    assert model.match(images[0], "a red word8").isfinite()


def test_answers_of_a_model_whose_questions_alone_were_resized(tmp_path: Path, images: list[Any]) -> None:
    """As transformers does it, which cannot read what it has written."""
    write(tmp_path, "BlipForQuestionAnswering", 3, RESIZES["to more"])
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.BlipForQuestionAnswering.from_pretrained(tmp_path)
    model = openblip.load(tmp_path)
    assert isinstance(model.answer(images[0], "is it a quokka?"), str)


@pytest.mark.parametrize("resize", [None, {}, {"pad_to_multiple_of": 64}])
def test_added_words_of_a_blip2_for_retrieval(tmp_path: Path, images: list[Any], resize: Any) -> None:
    """The Q-Former's; transformers does not write their number into config.json, so it takes the settings from here."""
    theirs = blip2.their_model(blip2.RETRIEVER)
    _, processor = write(tmp_path, CAPTIONER, 1 if resize is None else 2, None)  # there is one spare row
    if resize is not None:
        theirs.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False, **resize)
    theirs.save_pretrained(tmp_path)
    texts = processor(images=images, text=TEXTS, padding=True, return_tensors="pt")
    assert NUM_WORDS in texts.input_ids

    def scores(model: Any) -> torch.Tensor:
        model.config.image_token_index = None
        with torch.no_grad():
            score: torch.Tensor = model(
                texts.pixel_values, texts.input_ids, attention_mask=texts.attention_mask,
                use_image_text_matching_head=True,
            ).logits_per_image.softmax(dim=1)[:, 1]  # fmt: skip
        return score

    model = openblip.load(tmp_path)
    torch.testing.assert_close(model.match(images, TEXTS), scores(theirs), atol=1e-5, rtol=0)
    model.save(tmp_path / "written", format="huggingface")
    again = cases.loaded_by_them(blip2.RETRIEVER, tmp_path / "written")
    torch.testing.assert_close(scores(again), scores(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_added_words_of_a_language_model(tmp_path: Path, language: Any) -> None:
    theirs = blip2.their_model(blip2.WRITERS[0], language)
    tokenizer = copy.deepcopy(blip2.language_words(language))
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.add_tokens([*WORDS, "<loc_1>"])
    theirs.resize_token_embeddings(len(tokenizer), mean_resizing=False, pad_to_multiple_of=64)
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    expected = blip2.their_outputs(theirs, language)
    for name in ("theirs", "written"):
        checkpoint = load_checkpoint(tmp_path / name)
        cases.assert_same(blip2.our_outputs(checkpoint), expected)
        words = checkpoint.model.require_language().tokenizer
        assert words("quokka <loc_1>").input_ids == tokenizer("quokka <loc_1>").input_ids
        save_checkpoint(checkpoint, tmp_path / "written", "huggingface")
    again = cases.loaded_by_them(blip2.WRITERS[0], tmp_path / "written")
    cases.assert_same(blip2.their_outputs(again, language), expected)


def test_words_of_a_slow_tokenizer(tmp_path: Path) -> None:
    """It keeps them beside vocab.txt; a special one that someone added is a word."""
    _, processor = write(tmp_path, RETRIEVER, 2, RESIZES["padded"])
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<loc_1>"]})
    processor.save_pretrained(tmp_path)
    expected = processor.tokenizer("a quokka <loc_1>").input_ids
    assert openblip.load(tmp_path).tokenizer.encode(["a quokka <loc_1>"]).ids[0].tolist() == expected
    (tmp_path / "tokenizer.json").unlink()
    words = sorted(cases.TOKENIZER.entries, key=cases.TOKENIZER.entries.__getitem__)[:NUM_WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    added = {"<loc_1>": NUM_WORDS + 2, "quokka": NUM_WORDS + 1, "zebrafish": NUM_WORDS}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    assert openblip.load(tmp_path).tokenizer.encode(["a quokka <loc_1>"]).ids[0].tolist() == expected


@pytest.mark.parametrize("is_cased", [True, False])
def test_rules_of_a_tokenizer_are_written(tmp_path: Path, is_cased: bool) -> None:
    """Those of a cased one, and ours for languages in which accents matter."""
    texts = ["A red Dog", "a caf\u00e9, a cafe\u0301", "\u4e00\u53ea\u72d7", "\u304c \u304b"]
    tokenizer = Tokenizer.train(texts * 3, vocab_size=300)
    if is_cased:
        words = dict(sorted(cases.TOKENIZER.entries.items(), key=lambda entry: entry[1]))
        names = ["A", "Dog", "red", "a"]
        vocabulary = {name: index for index, name in enumerate([*list(words)[:5], *names])}
        transformers.BertTokenizer(vocab=vocabulary, do_lower_case=False).save_pretrained(tmp_path)
        tokenizer = Tokenizer.load(tmp_path)
        assert tokenizer.pieces(tokenizer.encode(["A red Dog"]).ids[0].tolist()) == [
            "[CLS]",
            "A",
            "red",
            "Dog",
            "[SEP]",
        ]
    settings = {**TINY.to_dict()["text"], "vocab_size": tokenizer.vocab_size}
    model = Blip(BlipConfig.from_dict({**TINY.to_dict(), "text": settings, "heads": ("lm",)}))
    checkpoint = BlipCheckpoint(model.eval(), tokenizer, Preprocessing(image_size=SIZE))
    save_checkpoint(checkpoint, tmp_path / "written", "huggingface")
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "written").tokenizer
    again = load_checkpoint(tmp_path / "written").tokenizer
    for text in texts:
        ids = tokenizer.encode([text]).ids[0].tolist()
        assert theirs(text).input_ids == ids
        assert again is not None
        assert again.encode([text]).ids[0].tolist() == ids
