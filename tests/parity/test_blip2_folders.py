"""Every class of transformers' BLIP-2, read and written: what it says stays the same.

Tiny, random, float32. Where transformers itself is wrong, a test says so and compares with what is right.
"""

import json
from pathlib import Path
from typing import Any

import blip2_cases as cases
import pytest
import torch
import transformers
from parity_cases import Outputs, assert_same, loaded_by_them
from safetensors.torch import load_file
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import openblip
from damaged_files import assert_read_in_bfloat16, assert_same_weights, edit_config
from openblip.checkpoints.loading import load_checkpoint, save_checkpoint
from openblip.data.config import Preprocessing

pytestmark = pytest.mark.slow

WRITER, INSTRUCTED = cases.WRITERS
LANGUAGES: list[cases.Language] = ["opt", "llama", "t5"]
CASES = [(name, language) for name in cases.WRITERS for language in LANGUAGES] + [(cases.RETRIEVER, None)]


QUICK = ((WRITER, "opt"), (INSTRUCTED, "t5"), (cases.RETRIEVER, None))


@pytest.mark.parametrize(
    ("class_name", "language"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_a_folder_of_theirs_there_and_back(tmp_path: Path, class_name: str, language: cases.Language | None) -> None:
    theirs = cases.their_model(class_name, language)
    cases.write_theirs(tmp_path / "theirs", theirs, language)
    checkpoint = load_checkpoint(tmp_path / "theirs")
    expected = cases.their_outputs(theirs, language)
    assert_same(cases.our_outputs(checkpoint), expected)

    save_checkpoint(checkpoint, tmp_path / "written", "huggingface")
    again = loaded_by_them(class_name, tmp_path / "written")
    assert_same(cases.their_outputs(again, language), expected)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("theirs", "written"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name

    save_checkpoint(checkpoint, tmp_path / "ours", "openblip")
    assert_same(cases.our_outputs(load_checkpoint(tmp_path / "ours")), expected)
    assert_read_in_bfloat16(tmp_path / "theirs")


def test_blip2_model_has_the_weights_of_the_writer(tmp_path: Path) -> None:
    theirs = cases.their_model("Blip2Model", "opt")
    cases.write_theirs(tmp_path, theirs, "opt")
    found = cases.our_outputs(load_checkpoint(tmp_path), texts=False)
    with torch.no_grad():
        vision = theirs.get_image_features(cases.PIXELS)
        expected = {"features": vision.last_hidden_state, "queries": theirs.get_qformer_features(cases.PIXELS)}
    assert_same(found, Outputs(expected))
    # transformers' pooled feature went through the last norm a second time: not the class token's feature.
    assert (vision.pooler_output - expected["features"][:, 0]).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("class_name", "language"), [CASES[0], CASES[3], CASES[-1]])
@pytest.mark.parametrize("architectures", [None, ["Blip2ForSomethingOfMine"], ["Blip2PreTrainedModel"]])
def test_a_class_is_told_by_its_weights(tmp_path: Path, class_name: str, language: Any, architectures: Any) -> None:
    cases.write_theirs(tmp_path, cases.their_model(class_name, language), language)
    expected = load_checkpoint(tmp_path).model
    edit_config(tmp_path, lambda config: config.update(architectures=architectures))
    model = load_checkpoint(tmp_path).model
    assert model.config == expected.config
    assert_same_weights(model, expected)


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_folder_from_before_image_tokens(tmp_path: Path, language: cases.Language) -> None:
    """Its config and words know none, and transformers runs it no more; with one it says the same."""
    theirs = cases.their_model(WRITER, language)
    expected = cases.their_outputs(theirs, language)
    theirs.config.image_token_index = None
    cases.write_theirs(tmp_path, theirs, language)
    with pytest.raises(AttributeError, match="unsqueeze"):
        cases.their_outputs(theirs, language, texts=False)
    checkpoint = load_checkpoint(tmp_path)
    assert_same(cases.our_outputs(checkpoint), expected)
    save_checkpoint(checkpoint, tmp_path / "written", "huggingface")  # with which it runs again
    assert_same(cases.their_outputs(loaded_by_them(WRITER, tmp_path / "written"), language), expected)


def test_a_folder_whose_words_have_the_image_token(tmp_path: Path) -> None:
    theirs = cases.their_model(WRITER, "opt")
    cases.write_theirs(tmp_path, theirs, "opt")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    words.add_tokens(["<image>"], special_tokens=True)
    assert words.convert_tokens_to_ids("<image>") == cases.image_token("opt")
    words.save_pretrained(tmp_path)
    assert_same(cases.our_outputs(load_checkpoint(tmp_path)), cases.their_outputs(theirs, "opt"))


def test_a_retrieval_folder_with_image_tokens(tmp_path: Path) -> None:
    """With them transformers cuts as many tokens off a text as there are queries, whatever they are.

    Of a text that its processor has prepared together with an image those are image tokens; of a text alone
    they are the text, so its score is that of what is left.
    """
    theirs = cases.their_model(cases.RETRIEVER, image_token_index=cases.TOKENIZER.vocab_size - 1)
    cases.write_theirs(tmp_path, theirs, None)
    found = cases.our_outputs(load_checkpoint(tmp_path))
    images = torch.full((3, cases.NUM_QUERIES), theirs.config.image_token_index)
    ids, mask = torch.cat([images, cases.TEXTS.ids], dim=1), cases.TEXTS.mask.long()
    whole = torch.cat([torch.ones_like(images), mask], dim=1)
    with torch.no_grad():
        itm, cut = (
            theirs(cases.PIXELS, given, attention_mask=whole, use_image_text_matching_head=True).logits_per_image
            for given in (ids, torch.cat([cases.TEXTS.ids, cases.TEXTS.ids[:, : cases.NUM_QUERIES]], dim=1))
        )
        itc = theirs(cases.PIXELS, ids, attention_mask=whole).logits_per_image
    assert_same(found, Outputs({"itc": itc, "itm": itm}))
    assert (cut - itm).abs().max() > 1e-3


@pytest.mark.parametrize("with_token", [True, False])
def test_a_retrieval_folder_is_written_with_and_without_image_tokens(
    tmp_path: Path, images: list[Any], with_token: bool
) -> None:
    """As it was, also by way of a folder of ours, so that the processor of either folder fits the other's model."""
    index = cases.TOKENIZER.vocab_size if with_token else None
    theirs = cases.their_model(cases.RETRIEVER, image_token_index=index)
    cases.write_theirs(tmp_path / "theirs", theirs, None)
    transformers.Blip2Processor(
        BlipImageProcessorPil(size={"height": cases.SIZE, "width": cases.SIZE}),
        transformers.BertTokenizer.from_pretrained(tmp_path / "theirs"),
        num_query_tokens=cases.NUM_QUERIES if with_token else None,
    ).save_pretrained(tmp_path / "theirs")
    openblip.load(tmp_path / "theirs").save(tmp_path / "ours")
    openblip.load(tmp_path / "ours").save(tmp_path / "written", format="huggingface")
    again = loaded_by_them(cases.RETRIEVER, tmp_path / "written")
    assert again.config.image_token_index == index
    texts = ["a red dog", "two blue cars beside a tree", "a green bird"]
    expected = openblip.load(tmp_path / "ours").match(images, texts)
    for model, folder in ((theirs, "theirs"), (theirs, "written"), (again, "theirs"), (again, "written")):
        processor = transformers.Blip2Processor.from_pretrained(tmp_path / folder)
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
        assert with_token == bool((inputs.input_ids == cases.TOKENIZER.vocab_size).any())
        with torch.no_grad():
            match = model(**inputs, use_image_text_matching_head=True).logits_per_image.softmax(dim=1)[:, 1]
        torch.testing.assert_close(match, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_weights_in_half_precision_in_shards_and_pickled_read_alike(tmp_path: Path) -> None:
    theirs = cases.their_model(INSTRUCTED, "t5")
    cases.write_theirs(tmp_path / "pickled", theirs, "t5")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    state = {name: tensor.half() for name, tensor in theirs.state_dict().items()}  # tied weights twice
    state["qformer.embeddings.position_ids"] = torch.arange(30)[None]  # in older files
    torch.save(state, tmp_path / "pickled" / "pytorch_model.bin")
    cases.write_theirs(tmp_path / "shards", theirs, "t5")
    (tmp_path / "shards" / "model.safetensors").unlink()
    theirs.half().save_pretrained(tmp_path / "shards", max_shard_size="80KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    pickled, shards = (load_checkpoint(tmp_path / name) for name in ("pickled", "shards"))
    assert_same(cases.our_outputs(pickled), cases.their_outputs(theirs.float(), "t5"))
    for name, tensor in pickled.model.state_dict().items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(shards.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_images_are_prepared_as_the_folder_says(tmp_path: Path, file: str) -> None:
    cases.write_theirs(tmp_path, cases.their_model(cases.RETRIEVER), None)
    assert load_checkpoint(tmp_path).preprocessing == Preprocessing(image_size=40)
    settings: dict[str, Any] = {"size": {"height": 56, "width": 56}, "image_mean": [0.1, 0.2, 0.3]}
    settings = settings if file.startswith("pre") else {"image_processor": settings, "num_query_tokens": 5}
    (tmp_path / file).write_text(json.dumps(settings))
    assert load_checkpoint(tmp_path).preprocessing == Preprocessing(image_size=56, mean=(0.1, 0.2, 0.3))


NEW_LINE = cases.language_words("llama")("\n", add_special_tokens=False).input_ids[0]


@pytest.mark.parametrize(
    ("eos", "end"), [(None, None), (1, None), ([7, 1], None), (NEW_LINE, "\n"), ([NEW_LINE, 7], "\n")]
)
def test_what_ends_a_text(tmp_path: Path, eos: Any, end: str | None) -> None:
    """text_config says it, as to transformers' `generate`; None is the tokenizer's own end."""
    cases.write_theirs(tmp_path, cases.their_model(WRITER, "llama"), "llama")
    edit_config(tmp_path, lambda config: config["text_config"].update(eos_token_id=eos))
    checkpoint = load_checkpoint(tmp_path)
    language = checkpoint.model.config.language
    assert language.end_of_text == end
    assert checkpoint.model.require_language().end_id == (1 if end is None else NEW_LINE)


@pytest.mark.parametrize(
    ("class_name", "language", "prompt"),
    [(WRITER, "opt", "Answer:"), (WRITER, "t5", "Short answer:"), (INSTRUCTED, "llama", "Short answer:")],
)
def test_questions_are_put_as_in_the_papers(tmp_path: Path, class_name: str, language: Any, prompt: str) -> None:
    cases.write_theirs(tmp_path, cases.their_model(class_name, language), language)
    checkpoint = load_checkpoint(tmp_path)
    assert (checkpoint.prompt, checkpoint.question_prompt) == ("", f"Question: {{}} {prompt}")
