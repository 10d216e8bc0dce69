"""Which class a folder of transformers is, how its weights lie there, and what its settings say."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parity_cases import (
    CLASSES,
    TOKENIZER,
    our_outputs,
    their_model,
    their_outputs,
    unusual_config,
)
from torch import Tensor

from openblip.checkpoints.checkpoint import BlipCheckpoint
from openblip.checkpoints.loading import load_checkpoint, save_checkpoint
from openblip.data.transforms import Preprocessing
from openblip.errors import CheckpointError, ConfigError
from openblip.models.blip import Blip
from openblip.models.config import BlipConfig
from tiny_blip import TINY, randomise, tiny_blip

CAPTIONER, QUESTIONS = "BlipForConditionalGeneration", "BlipForQuestionAnswering"


def write_theirs(folder: Path, class_name: str) -> Any:
    theirs = their_model(class_name)
    theirs.save_pretrained(folder)
    TOKENIZER.save(folder)
    return theirs


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def assert_same_weights(found: Blip, expected: Blip) -> None:
    assert found.config == expected.config
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("architectures", [None, ["BlipForSomethingOfMine"], ["BlipPreTrainedModel"]])
def test_a_class_is_told_by_its_weights(
    tmp_path: Path, class_name: str, architectures: list[str] | None
) -> None:
    write_theirs(tmp_path, class_name)
    expected = load_checkpoint(tmp_path).model
    change_config(tmp_path, lambda config: config.update(architectures=architectures))
    assert_same_weights(load_checkpoint(tmp_path).model, expected)


def test_a_class_that_its_weights_do_not_tell(tmp_path: Path) -> None:
    vision = transformers.BlipVisionModel(unusual_config().vision_config)
    vision.save_pretrained(tmp_path)
    unusual_config().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"a model of no named class.*BlipForQuestionAnswering"):
        load_checkpoint(tmp_path)


def split_bin(folder: Path, state: dict[str, Tensor]) -> dict[str, str]:
    """Writes a state dict as old releases did, in two shards with an index."""
    (folder / "model.safetensors").unlink()
    places = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(state)}
    for shard in set(places.values()):
        torch.save({name: state[name] for name in state if places[name] == shard}, folder / shard)
    write_index(folder, places)
    return places


def write_index(folder: Path, places: Any) -> None:
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))


def test_sharded_pickles(tmp_path: Path) -> None:
    theirs = write_theirs(tmp_path, CAPTIONER)
    expected = load_checkpoint(tmp_path).model
    places = split_bin(tmp_path, theirs.state_dict())
    assert_same_weights(load_checkpoint(tmp_path).model, expected)
    (tmp_path / next(iter(places.values()))).unlink()
    with pytest.raises(CheckpointError, match=r"no .*pytorch_model-00001-of-00002\.bin"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("places", [None, {}, [1], {"a": "../x.bin"}, {"a": "/x.bin"}, {"a": "sub/x.bin"}])
def test_an_index_names_files_beside_it(tmp_path: Path, places: Any) -> None:
    theirs = write_theirs(tmp_path / "folder", CAPTIONER)
    torch.save(theirs.state_dict(), tmp_path / "x.bin")
    split_bin(tmp_path / "folder", theirs.state_dict())
    write_index(tmp_path / "folder", places)
    with pytest.raises(CheckpointError, match=r"index\.json names"):
        load_checkpoint(tmp_path / "folder")


def test_head_counts_are_those_of_the_config(tmp_path: Path) -> None:
    """A config without them means transformers' default of 8 for texts, with which it computes as well."""
    config = transformers.BlipConfig(
        vision_config=unusual_config(image_dim=39).vision_config.to_dict(),
        text_config={**unusual_config().text_config.to_dict(), "hidden_size": 32, "num_attention_heads": 8},
        image_text_hidden_size=10,
    )
    theirs = transformers.BlipForImageTextRetrieval(config).eval()
    randomise(theirs, seed=8)
    theirs.save_pretrained(tmp_path)
    TOKENIZER.save(tmp_path)
    change_config(tmp_path, lambda config: config["text_config"].pop("num_attention_heads", None))
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.model.config.text.num_heads == 8
    found, expected = our_outputs(checkpoint).scores["itm"], their_outputs(theirs).scores["itm"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


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
        (lambda config: config.update(openblip={"sharing": "all_but_sa"}), "share what differs"),
    ],
)
def test_impossible_settings_are_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    write_theirs(tmp_path, QUESTIONS)
    change_config(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


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
    write_theirs(tmp_path, CAPTIONER)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    if expected is None:
        with pytest.raises(CheckpointError, match=r"prepares images unlike|no multiple"):
            load_checkpoint(tmp_path)
    else:
        found = load_checkpoint(tmp_path).preprocessing
        assert (found.image_size, found.mean) == expected


def test_questions_need_one_width(tmp_path: Path) -> None:
    theirs = transformers.BlipForQuestionAnswering(unusual_config(text_dim=24))
    theirs.save_pretrained(tmp_path / "theirs")
    TOKENIZER.save(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=r"questions of width 24.*of width 36"):
        load_checkpoint(tmp_path / "theirs")
    model = tiny_blip(("vqa",), "none")  # texts of 32, images of 24
    with pytest.raises(CheckpointError, match="32 and 24"):
        save_checkpoint(BlipCheckpoint(model, TOKENIZER, Preprocessing()), tmp_path / "ours", "huggingface")
    assert not (tmp_path / "ours").exists()


def ours(heads: tuple[Any, ...], sharing: str = "none", pooled: bool = False) -> BlipCheckpoint:
    text = {
        **TINY.to_dict()["text"], "hidden_dim": 24, "vocab_size": TOKENIZER.vocab_size, "sharing": sharing
    }  # fmt: skip
    vision = {**TINY.to_dict()["vision"], "image_size": 40, "drop_path": 0.1}
    model = Blip(
        BlipConfig.from_dict(
            {"text": text, "vision": vision, "embed_dim": 12, "heads": heads, "pooled": pooled}
        )
    ).eval()
    randomise(model, seed=2)
    return BlipCheckpoint(
        model, TOKENIZER, Preprocessing(image_size=40, mean=(0.1, 0.2, 0.3)), "a red", "[CLS]"
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
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(after.model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("before", "class_name"),
    [(ours(("vqa",), "all_but_sa"), QUESTIONS), (ours(("itc",), pooled=True), "BlipModel")],
)
def test_they_compute_the_same_with_ours(tmp_path: Path, before: BlipCheckpoint, class_name: str) -> None:
    save_checkpoint(before, tmp_path, "huggingface")
    theirs, report = getattr(transformers, class_name).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    found, expected = their_outputs(theirs.eval()), our_outputs(before)
    for name, scores in expected.scores.items():
        assert scores.std() > 1e-2
        torch.testing.assert_close(found.scores[name], scores, atol=1e-5, rtol=0)
    assert found.texts == expected.texts


def test_the_temperature_of_blip_model(tmp_path: Path) -> None:
    theirs = write_theirs(tmp_path, "BlipModel")
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.encoder_token == "[CLS]"  # what trained it read no [ENC]
    assert checkpoint.model.config.embed_dim == 14
    assert checkpoint.model.temperature.item() == pytest.approx(math.exp(-theirs.logit_scale.item()))


def test_what_transformers_has_no_class_for(tmp_path: Path) -> None:
    for heads, pooled in (
        (("nlvr",), False), (("itm", "visdial"), False), (("itc",), False), (("itc", "itm"), True),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match="No model of transformers has the heads"):
            save_checkpoint(ours(heads, pooled=pooled), tmp_path / "out", "huggingface")
    with pytest.raises(ConfigError, match="choose one of openblip, huggingface, original"):
        save_checkpoint(ours(("lm",)), tmp_path / "out", "onnx")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
