"""Folders of transformers' BLIP: what class they are, what is taken from them, what is written, what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import parity_cases as cases
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers.models.blip import image_processing_pil_blip

import openblip
from damaged_files import Exploit, assert_same_weights, edit_config, edit_weights
from openblip.checkpoints.checkpoint import BlipCheckpoint
from openblip.checkpoints.loading import load_checkpoint, save_checkpoint
from openblip.data.config import Preprocessing
from openblip.errors import CheckpointError, ConfigError
from openblip.models.blip import Blip
from openblip.models.config import BlipConfig
from openblip.predictor import BlipPredictor
from tiny_blip import TINY, randomise, tiny_blip

pytestmark = pytest.mark.slow

CAPTIONER, RETRIEVER = "BlipForConditionalGeneration", "BlipForImageTextRetrieval"
QUESTIONS = "BlipForQuestionAnswering"
TEXTS = ["a red dog", "two blue cars beside a tree", "a bird"]

# ---- from images and texts to captions and scores, with the processors of both sides


def write_with_processor(folder: Path, class_name: str) -> Any:
    theirs = cases.write_theirs(folder, class_name)
    processor = image_processing_pil_blip.BlipImageProcessorPil(size={"height": cases.SIZE, "width": cases.SIZE})
    processor.save_pretrained(folder)
    return theirs


def pixels_of(folder: Path, images: list[Image.Image]) -> Tensor:
    processor = image_processing_pil_blip.BlipImageProcessorPil.from_pretrained(folder)
    pixels: Tensor = processor(images, return_tensors="pt")["pixel_values"]
    return pixels


DECODINGS = [
    (openblip.Greedy(max_new_tokens=12), {"num_beams": 1, "do_sample": False}),
    (openblip.Beam(num_beams=3, max_new_tokens=12), {"num_beams": 3, "do_sample": False}),
]


def assert_same_captions(ours: Any, theirs: Any, folder: Path, images: list[Image.Image]) -> None:
    for decoding, settings in DECODINGS:
        with torch.no_grad():
            ids = theirs.generate(pixel_values=pixels_of(folder, images), max_new_tokens=12, **settings)
        expected = [cases.TOKENIZER.decode([i for i in row.tolist() if i < cases.TOKENIZER.vocab_size]) for row in ids]
        assert len(set(expected)) > 1  # something is compared
        assert ours.caption(images, prompt="", decoding=decoding) == expected


def assert_same_scores(ours: Any, theirs: Any, folder: Path, images: list[Image.Image]) -> None:
    """P(match) of pairs from [ENC], and ITC of all with all from [CLS]."""
    tokens, pixels = cases.TOKENIZER.encode(TEXTS), pixels_of(folder, images)
    ids, mask = tokens.ids.clone(), tokens.mask.long()
    with torch.no_grad():
        similarity = theirs(ids, pixels, attention_mask=mask, use_itm_head=False)["itm_score"]
        ids[:, 0] = cases.TOKENIZER.enc_id
        match = theirs(ids, pixels, attention_mask=mask, use_itm_head=True)["itm_score"].softmax(dim=1)[:, 1]
    assert match.std() > 1e-3
    torch.testing.assert_close(ours.match(images, TEXTS), match, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.similarity(images, TEXTS), similarity, atol=1e-5, rtol=0)


SAME = [
    (CAPTIONER, ("lm",), assert_same_captions, {"caption"}),
    (RETRIEVER, ("itc", "itm"), assert_same_scores, {"match", "similarity"}),
]


@pytest.mark.parametrize(("class_name", "heads", "assert_same", "tasks"), SAME)
def test_they_and_we_say_the_same_of_images(
    tmp_path: Path, images: list[Any], class_name: str, heads: Any, assert_same: Any, tasks: set[str]
) -> None:
    theirs = write_with_processor(tmp_path / "theirs", class_name)
    predictor = openblip.load(tmp_path / "theirs")
    assert tasks <= predictor.tasks
    assert_same(predictor, theirs, tmp_path / "theirs", images)

    predictor = BlipPredictor(ours(heads)._replace(encoder_token="[ENC]"))
    predictor.save(tmp_path / "ours", format="huggingface")
    assert_same(predictor, cases.loaded_by_them(class_name, tmp_path / "ours"), tmp_path / "ours", images)
    processor = transformers.BlipProcessor.from_pretrained(tmp_path / "ours")
    assert processor.tokenizer(TEXTS[0])["input_ids"] == cases.TOKENIZER.encode(TEXTS[:1]).ids[0].tolist()


# ---- reading


@pytest.mark.slow
@pytest.mark.parametrize("class_name", cases.CLASSES)
@pytest.mark.parametrize("architectures", [None, ["BlipForSomethingOfMine"], ["BlipPreTrainedModel"]])
def test_a_class_is_told_by_its_weights(tmp_path: Path, class_name: str, architectures: list[str] | None) -> None:
    cases.write_theirs(tmp_path, class_name)
    expected = load_checkpoint(tmp_path).model
    edit_config(tmp_path, lambda config: config.update(architectures=architectures))
    model = load_checkpoint(tmp_path).model
    assert model.config == expected.config
    assert_same_weights(model, expected)


def test_a_class_that_its_weights_do_not_tell(tmp_path: Path) -> None:
    transformers.BlipVisionModel(cases.unusual_config().vision_config).save_pretrained(tmp_path)
    cases.unusual_config().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"a model of no named class.*BlipForQuestionAnswering"):
        load_checkpoint(tmp_path)


def split_bin(folder: Path, state: dict[str, Tensor]) -> dict[str, str]:
    """Write a state dict as old releases did, in two shards with an index."""
    (folder / "model.safetensors").unlink()
    shard_of = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(state)}
    for shard in set(shard_of.values()):
        torch.save({name: state[name] for name in state if shard_of[name] == shard}, folder / shard)
    write_index(folder, shard_of)
    return shard_of


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_sharded_and_pickled_weights_read_alike(tmp_path: Path) -> None:
    theirs = cases.write_theirs(tmp_path / "whole", CAPTIONER)
    expected = load_checkpoint(tmp_path / "whole").model
    cases.write_theirs(tmp_path / "shards", CAPTIONER, max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    cases.write_theirs(tmp_path / "pickled", CAPTIONER)
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")  # tied weights written twice
    cases.write_theirs(tmp_path / "pickled_shards", CAPTIONER)
    shard_of = split_bin(tmp_path / "pickled_shards", theirs.state_dict())
    for name in ("shards", "pickled", "pickled_shards"):
        assert_same_weights(load_checkpoint(tmp_path / name).model, expected)
    (tmp_path / "pickled_shards" / next(iter(shard_of.values()))).unlink()
    with pytest.raises(CheckpointError, match=r"no .*pytorch_model-00001-of-00002\.bin"):
        load_checkpoint(tmp_path / "pickled_shards")


@pytest.mark.parametrize("weight_map", [None, {}, [1], {"a": "../x.bin"}, {"a": "/x.bin"}, {"a": "sub/x.bin"}])
def test_an_index_names_files_beside_it(tmp_path: Path, weight_map: Any) -> None:
    theirs = cases.write_theirs(tmp_path / "folder", CAPTIONER)
    torch.save(theirs.state_dict(), tmp_path / "x.bin")
    split_bin(tmp_path / "folder", theirs.state_dict())
    write_index(tmp_path / "folder", weight_map)
    with pytest.raises(CheckpointError, match=r"index\.json names"):
        load_checkpoint(tmp_path / "folder")


def test_head_counts_are_those_of_the_config(tmp_path: Path) -> None:
    """A config without them means transformers' default of 8 for texts, with which it computes as well."""
    config = transformers.BlipConfig(
        vision_config=cases.unusual_config(image_dim=39).vision_config.to_dict(),
        text_config={**cases.unusual_config().text_config.to_dict(), "hidden_size": 32, "num_attention_heads": 8},
        image_text_hidden_size=10,
    )
    theirs = transformers.BlipForImageTextRetrieval(config).eval()
    randomise(theirs, seed=8)
    theirs.save_pretrained(tmp_path)
    cases.TOKENIZER.save(tmp_path)
    edit_config(tmp_path, lambda config: config["text_config"].pop("num_attention_heads", None))
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.model.config.text.num_heads == 8
    scores, expected = cases.our_outputs(checkpoint).scores["itm"], cases.their_outputs(theirs).scores["itm"]
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_the_temperature_of_blip_model(tmp_path: Path) -> None:
    theirs = cases.write_theirs(tmp_path, "BlipModel")
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.encoder_token == "[CLS]"  # what trained it read no [ENC]
    assert checkpoint.model.config.embed_dim == 14
    assert checkpoint.model.temperature.item() == pytest.approx(math.exp(-theirs.logit_scale.item()))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"size": {"height": 64, "width": 64}, "image_mean": [0, 0.5, 1]}, (64, (0.0, 0.5, 1.0))),
        ({"size": 64}, (64, Preprocessing().mean)),
        ({}, (40, Preprocessing().mean)),
        ({"size": {"height": 64, "width": 32}}, None),
        ({"size": {"shortest_edge": 64}}, None),
        ({"size": {"height": 50, "width": 50}}, None),  # no multiple of the patches of 8
        ({"resample": 2}, None),
        ({"do_normalize": False}, None),
        ({"image_mean": [0.5]}, None),
        ({"image_std": "wide"}, None),
        ({"rescale_factor": "x"}, None),
    ],
)
def test_preprocessing_is_theirs_or_refused(tmp_path: Path, settings: dict[str, Any], expected: Any) -> None:
    cases.write_theirs(tmp_path, CAPTIONER)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    if expected is None:
        with pytest.raises(CheckpointError, match=r"prepares images unlike|no multiple"):
            load_checkpoint(tmp_path)
    else:
        preprocessing = load_checkpoint(tmp_path).preprocessing
        assert (preprocessing.image_size, preprocessing.mean) == expected


WORDS = "text_decoder.bert.embeddings.word_embeddings.weight"
TIED = "text_decoder.cls.predictions.decoder.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit_weights(f, lambda w: w.pop(WORDS)), f"missing {WORDS}"),
        (lambda f: edit_weights(f, lambda w: w.update(extra=torch.zeros(1))), "left over extra"),
        (lambda f: edit_weights(f, lambda w: w.update({TIED: w[WORDS] + 1})), "differs from"),
        (
            lambda f: edit_config(f, lambda c: c.update(architectures=[RETRIEVER])),
            "missing itm_head.bias; .*left over text_decoder",
        ),
        (lambda f: edit_config(f, lambda c: c.update(model_type="llama")), "llama"),
        (lambda f: edit_config(f, lambda c: c["text_config"].update(bos_token_id=7)), r"\[DEC\] and \[SEP\] are \(7, "),
        (lambda f: edit_config(f, lambda c: c["vision_config"].update(hidden_act="relu")), "gelu"),
        (lambda f: edit_config(f, lambda c: c["text_config"].update(vocab_size=20)), "vocab|entries|is \\("),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"torn"), "cannot be read"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    cases.write_theirs(tmp_path, CAPTIONER)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["vision_config"].update(image_size=[40, 40]), r"image_size \[40, 40\]"),
        (lambda config: config["vision_config"].update(patch_size=0), "patch_size 0"),
        (lambda config: config["text_config"].update(num_attention_heads=5), "into 5 heads"),
        (lambda config: config["text_config"].update(hidden_size="wide"), "hidden_size"),
        (lambda config: config.update(text_config=3), "text_config"),
        (lambda config: config.update(openblip=[1]), "openblip entry is damaged"),
        (lambda config: config.update(openblip={"encoder_token": "[DEC]"}), r"not with \[DEC\]"),
        (lambda config: config.update(openblip={"log_temperature": "hot"}), "openblip entry is damaged"),
        (lambda config: config.update(openblip={"sharing": "some"}), "sharing some"),
        (lambda config: config.update(openblip={"sharing": "all_but_sa"}), "share weights that differ"),
    ],
)
def test_impossible_settings_are_named(tmp_path: Path, change: Any, message: str) -> None:
    cases.write_theirs(tmp_path, QUESTIONS)
    edit_config(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


def test_a_malicious_pickle_is_refused(tmp_path: Path) -> None:
    cases.write_theirs(tmp_path, CAPTIONER)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"x": Exploit(tmp_path / "exploited")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "exploited").exists()


def test_without_a_tokenizer_berts_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases.write_theirs(tmp_path, CAPTIONER)
    for name in ("tokenizer.json", "vocab.txt"):
        (tmp_path / name).unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="bert-base-uncased"):
        load_checkpoint(tmp_path)


# ---- writing


def ours(heads: tuple[Any, ...], sharing: str = "none", pooled: bool = False) -> BlipCheckpoint:
    """A model with all that a folder of transformers has no place for."""
    text = {
        **TINY.to_dict()["text"], "hidden_dim": 24, "vocab_size": cases.TOKENIZER.vocab_size, "sharing": sharing,
        "layer_norm_eps": 1e-2,
    }  # fmt: skip
    vision = {**TINY.to_dict()["vision"], "image_size": cases.SIZE, "drop_path": 0.1, "layer_norm_eps": 1e-3}
    config = {"text": text, "vision": vision, "embed_dim": 12, "heads": heads, "pooled": pooled}
    model = Blip(BlipConfig.from_dict(config)).eval()
    randomise(model, seed=2)
    return BlipCheckpoint(
        model, cases.TOKENIZER, Preprocessing(image_size=cases.SIZE, mean=(0.1, 0.2, 0.3)), "a red", "[CLS]"
    )


@pytest.mark.parametrize(
    "before",
    [
        ours(("lm",), "all"),
        ours(("itm", "itc")),
        ours(("itc",), pooled=True),
        *(ours(("vqa",), sharing) for sharing in ("all", "all_but_ca", "all_but_sa", "none")),
    ],
)
def test_ours_comes_back_whole(tmp_path: Path, before: BlipCheckpoint) -> None:
    save_checkpoint(before, tmp_path, "huggingface")
    after = load_checkpoint(tmp_path)
    assert set(after.model.config.heads) == set(before.model.config.heads)
    assert after.model.config.text == before.model.config.text
    assert after.model.config.vision == before.model.config.vision
    assert after[2:] == before[2:]  # preprocessing, prompt, token
    assert_same_weights(after.model, before.model)


@pytest.mark.parametrize(
    ("before", "class_name"), [(ours(("vqa",), "all_but_sa"), QUESTIONS), (ours(("itc",), pooled=True), "BlipModel")]
)
def test_they_compute_the_same_with_ours(tmp_path: Path, before: BlipCheckpoint, class_name: str) -> None:
    save_checkpoint(before, tmp_path, "huggingface")
    outputs, expected = cases.their_outputs(cases.loaded_by_them(class_name, tmp_path)), cases.our_outputs(before)
    for name, scores in expected.scores.items():
        assert scores.std() > 1e-2
        torch.testing.assert_close(outputs.scores[name], scores, atol=1e-5, rtol=0)
    assert outputs.texts == expected.texts


def test_questions_need_one_width(tmp_path: Path) -> None:
    theirs = transformers.BlipForQuestionAnswering(cases.unusual_config(text_dim=24))
    theirs.save_pretrained(tmp_path / "theirs")
    cases.TOKENIZER.save(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=r"questions of width 24.*of width 36"):
        load_checkpoint(tmp_path / "theirs")
    model = tiny_blip(("vqa",), "none")  # texts of 32, images of 24
    with pytest.raises(CheckpointError, match="32 and 24"):
        save_checkpoint(BlipCheckpoint(model, cases.TOKENIZER, Preprocessing()), tmp_path / "ours", "huggingface")
    assert not (tmp_path / "ours").exists()


def test_what_transformers_has_no_class_for(tmp_path: Path) -> None:
    for heads, pooled in (
        (("itc", "itm", "lm"), False), (("nlvr",), False), (("itm", "visdial"), False), (("itc",), False),
        (("itc", "itm"), True),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=f"No model of transformers has the heads {', '.join(heads)}"):
            save_checkpoint(ours(heads, pooled=pooled), tmp_path / "out", "huggingface")
    with pytest.raises(ConfigError, match="choose one of openblip, huggingface, original"):
        save_checkpoint(ours(("lm",)), tmp_path / "out", "onnx")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
