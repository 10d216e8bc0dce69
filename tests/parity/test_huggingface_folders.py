"""Folders of transformers' BLIP, read and written: tiny, random, float32, unusual sizes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.blip import image_processing_pil_blip

import openblip
from openblip.checkpoints.checkpoint import BlipCheckpoint
from openblip.data.transforms import Preprocessing
from openblip.errors import CheckpointError
from openblip.models.blip import Blip
from openblip.models.config import BlipConfig, TextConfig, VisionConfig
from openblip.predictor import BlipPredictor
from tiny_blip import randomise, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SIZE = 40  # an odd grid of 5
CAPTIONER, RETRIEVER = transformers.BlipForConditionalGeneration, transformers.BlipForImageTextRetrieval
TEXTS = ["a red dog", "two blue cars beside a tree", "a bird"]


def their_config() -> transformers.BlipConfig:
    """Three heads, text narrower than vision, more rows than words."""
    return transformers.BlipConfig(
        vision_config={
            "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 3,
            "image_size": SIZE, "patch_size": 8, "layer_norm_eps": 1e-3,
        },
        text_config={
            "vocab_size": TOKENIZER.vocab_size + 3, "hidden_size": 24, "encoder_hidden_size": 36,
            "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 3,
            "max_position_embeddings": 30, "layer_norm_eps": 1e-2, "pad_token_id": TOKENIZER.pad_id,
            "bos_token_id": TOKENIZER.dec_id, "sep_token_id": TOKENIZER.sep_id,
            "eos_token_id": TOKENIZER.sep_id,
        },
        image_text_hidden_size=10,
    )  # fmt: skip


def write(folder: Path, kind: Any, **settings: Any) -> Any:
    """A random model of theirs, saved as a folder with tokenizer and preprocessing."""
    theirs = kind(their_config()).eval()
    randomise(theirs, seed=4)
    theirs.save_pretrained(folder, **settings)
    TOKENIZER.save(folder)
    processor = image_processing_pil_blip.BlipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    processor.save_pretrained(folder)
    return theirs


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (50 + 9 * i, 64, 3), dtype=np.uint8)) for i in range(3)]


def pixels_of(folder: Path, pictures: list[Image.Image]) -> Tensor:
    processor = image_processing_pil_blip.BlipImageProcessorPil.from_pretrained(folder)
    pixels: Tensor = processor(pictures, return_tensors="pt")["pixel_values"]
    return pixels


def captions_of(theirs: Any, pixels: Tensor, **settings: Any) -> list[str]:
    with torch.no_grad():
        ids = theirs.generate(pixel_values=pixels, max_new_tokens=12, **settings)
    return [TOKENIZER.decode([i for i in row.tolist() if i < TOKENIZER.vocab_size]) for row in ids]


DECODINGS = [
    (openblip.Greedy(max_new_tokens=12), {"num_beams": 1, "do_sample": False}),
    (openblip.Beam(num_beams=3, max_new_tokens=12), {"num_beams": 3, "do_sample": False}),
]


@pytest.mark.parametrize(("decoding", "settings"), DECODINGS, ids=["greedy", "beam"])
def test_captions_of_their_folder(
    tmp_path: Path, pictures: list[Image.Image], decoding: Any, settings: dict[str, Any]
) -> None:
    theirs = write(tmp_path, CAPTIONER)
    ours = openblip.load(tmp_path)
    assert ours.tasks == {"caption"}
    expected = captions_of(theirs, pixels_of(tmp_path, pictures), **settings)
    assert len(set(expected)) > 1  # something is compared
    assert ours.caption(pictures, decoding=decoding) == expected


def scores(theirs: Any, pixels: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """P(match) of pairs from `first`, and ITC of all with all from [CLS]."""
    tokens = TOKENIZER.encode(TEXTS)
    ids, mask = tokens.ids.clone(), tokens.mask.long()
    with torch.no_grad():
        similarity = theirs(ids, pixels, attention_mask=mask, use_itm_head=False)["itm_score"]
        ids[:, 0] = first
        match = theirs(ids, pixels, attention_mask=mask, use_itm_head=True)["itm_score"]
    return match.softmax(dim=1)[:, 1], similarity


def test_scores_of_their_folder(tmp_path: Path, pictures: list[Image.Image]) -> None:
    theirs = write(tmp_path, RETRIEVER)
    ours = openblip.load(tmp_path)
    assert {"match", "similarity"} <= ours.tasks
    match, similarity = scores(theirs, pixels_of(tmp_path, pictures), TOKENIZER.enc_id)
    assert match.std() > 1e-3
    torch.testing.assert_close(ours.match(pictures, TEXTS), match, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.similarity(pictures, TEXTS), similarity, atol=1e-5, rtol=0)


def test_sharded_and_pickled_weights_read_alike(tmp_path: Path, pictures: list[Image.Image]) -> None:
    theirs = write(tmp_path / "whole", CAPTIONER)
    write(tmp_path / "shards", CAPTIONER, max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    write(tmp_path / "pickled", CAPTIONER)
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")  # tied weights written twice
    whole, *others = (openblip.load(tmp_path / name).model for name in ("whole", "shards", "pickled"))
    for other in others:
        for name, tensor in whole.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name


def ours(heads: tuple[Any, ...]) -> BlipPredictor:
    config = BlipConfig(
        vision=VisionConfig(
            image_size=SIZE, patch_size=8, hidden_dim=36, num_layers=2, num_heads=3, mlp_dim=52,
            layer_norm_eps=1e-3,
        ),
        text=TextConfig(
            vocab_size=TOKENIZER.vocab_size, hidden_dim=24, num_layers=2, num_heads=3, mlp_dim=44,
            max_positions=30, dropout=0.0, layer_norm_eps=1e-2,
        ),
        embed_dim=10,
        heads=heads,
    )  # fmt: skip
    model = Blip(config)
    randomise(model, seed=6)
    return BlipPredictor(
        BlipCheckpoint(model, TOKENIZER, Preprocessing(image_size=SIZE, mean=(0.4, 0.5, 0.6)), "a red")
    )


def loaded_by_them(kind: Any, folder: Path) -> Any:
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def test_they_read_our_captioner(tmp_path: Path, pictures: list[Image.Image]) -> None:
    captioner = ours(("lm",))
    captioner.save(tmp_path, format="huggingface")
    theirs = loaded_by_them(CAPTIONER, tmp_path)
    for decoding, settings in DECODINGS:
        expected = captioner.caption(pictures, prompt="", decoding=decoding)
        assert captions_of(theirs, pixels_of(tmp_path, pictures), **settings) == expected
    processor = transformers.BlipProcessor.from_pretrained(tmp_path)
    assert processor.tokenizer(TEXTS[0])["input_ids"] == TOKENIZER.encode(TEXTS[:1]).ids[0].tolist()


def test_they_read_our_retrieval_model(tmp_path: Path, pictures: list[Image.Image]) -> None:
    retriever = ours(("itc", "itm"))
    retriever.save(tmp_path, format="huggingface")
    match, similarity = scores(
        loaded_by_them(RETRIEVER, tmp_path), pixels_of(tmp_path, pictures), TOKENIZER.enc_id
    )
    torch.testing.assert_close(match, retriever.match(pictures, TEXTS), atol=1e-5, rtol=0)
    torch.testing.assert_close(similarity, retriever.similarity(pictures, TEXTS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("heads", [("lm",), ("itc", "itm")])
def test_nothing_is_lost_on_the_way_there_and_back(tmp_path: Path, heads: tuple[Any, ...]) -> None:
    before = ours(heads)
    before.save(tmp_path, format="huggingface")
    after = openblip.load(tmp_path)
    assert after.model.config == before.model.config
    assert after.preprocessing == before.preprocessing
    assert after.prompt == before.prompt == "a red"
    for name, tensor in before.model.state_dict().items():
        torch.testing.assert_close(after.model.state_dict()[name], tensor, msg=name)


def test_a_model_that_they_have_no_class_for_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="heads itc, itm, lm"):
        ours(("itc", "itm", "lm")).save(tmp_path / "out", format="huggingface")
    assert not (tmp_path / "out").exists()


def change_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


WORDS = "text_decoder.bert.embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change_weights(f, lambda w: w.pop(WORDS)), f"missing {WORDS}"),
        (lambda f: change_weights(f, lambda w: w.update(extra=torch.zeros(1))), "left over extra"),
        (
            lambda f: change_weights(
                f, lambda w: w.update({"text_decoder.cls.predictions.decoder.weight": w[WORDS] + 1})
            ),
            "differs from",
        ),
        (
            lambda f: change_config(f, lambda c: c.update(architectures=["BlipForImageTextRetrieval"])),
            "missing itm_head.bias; .*left over text_decoder",
        ),
        (lambda f: change_config(f, lambda c: c.update(model_type="llama")), "llama"),
        (lambda f: change_config(f, lambda c: c["text_config"].update(bos_token_id=7)), r"\[DEC\] is 7"),
        (lambda f: change_config(f, lambda c: c["vision_config"].update(hidden_act="relu")), "gelu"),
        (
            lambda f: change_config(f, lambda c: c["text_config"].update(vocab_size=20)),
            "vocab|entries|is \\(",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"torn"), "cannot be read"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    write(tmp_path, CAPTIONER)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        openblip.load(tmp_path)


class Exploit:
    """Unpickled carelessly, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_malicious_pickle_is_refused(tmp_path: Path) -> None:
    write(tmp_path, CAPTIONER)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"x": Exploit(tmp_path / "exploited")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        openblip.load(tmp_path)
    assert not (tmp_path / "exploited").exists()


def test_without_a_tokenizer_berts_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, CAPTIONER)
    for name in ("tokenizer.json", "vocab.txt"):
        (tmp_path / name).unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="bert-base-uncased"):
        openblip.load(tmp_path)
