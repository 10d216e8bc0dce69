"""Original .pth files: what their tensors tell, what is left out, and what is refused.

That they compute the same is in tests/parity; here is everything around it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from damaged_files import Exploit, assert_same_weights, edit_pth
from openblip.checkpoints.checkpoint import BlipCheckpoint
from openblip.checkpoints.loading import load_checkpoint, save_checkpoint
from openblip.checkpoints.original import TRAINING_ONLY, infer_blip_settings
from openblip.data.config import Preprocessing
from openblip.data.tokenizer import Tokenizer
from openblip.errors import CheckpointError, ConfigError
from openblip.models.blip import Blip
from openblip.nn.config import TextConfig, VisionConfig
from released_files import SIZE, TEMPERATURE, TOKENIZER, released_file
from tiny_blip import tiny_blip

State = dict[str, Tensor]
UNSHARED = "text_decoder.bert.encoder.layer.1.output.dense.weight"


def write(folder: Path, content: Any) -> Path:
    """A .pth file with its vocabulary beside it."""
    TOKENIZER.save(folder)
    torch.save(content, folder / "released.pth")
    return folder / "released.pth"


@pytest.fixture(scope="module")
def pretrained() -> State:
    return released_file("pre-trained")


def test_what_the_tensors_tell(tmp_path: Path, pretrained: State) -> None:
    checkpoint = load_checkpoint(write(tmp_path, {"model": pretrained}))
    config = checkpoint.model.config
    assert config.vision == VisionConfig(
        image_size=SIZE, patch_size=8, hidden_dim=192, num_layers=3, num_heads=3, mlp_dim=100,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    assert config.text == TextConfig(
        vocab_size=TOKENIZER.vocab_size, hidden_dim=128, num_layers=2, num_heads=2, mlp_dim=90,
        max_positions=30, layer_norm_eps=1e-12, sharing="all_but_sa",
    )  # fmt: skip
    assert config.embed_dim == 10
    assert checkpoint.preprocessing == Preprocessing(image_size=SIZE)  # CLIP's mean and deviation
    assert checkpoint.model.temperature.item() == pytest.approx(TEMPERATURE, rel=1e-6)
    assert (checkpoint.prompt, checkpoint.encoder_token) == ("", "[ENC]")
    assert not checkpoint.model.training


def test_a_captioner_is_prompted_as_it_was_fine_tuned(tmp_path: Path) -> None:
    assert load_checkpoint(write(tmp_path, {"model": released_file("captions")})).prompt == "a picture of "


def meta_shapes(image_dim: int, num_layers: int, image_mlp: int, num_tokens: int) -> State:
    """Of a released retrieval model, without its memory."""
    shapes = {
        "visual_encoder.patch_embed.proj.weight": (image_dim, 3, 16, 16),
        "visual_encoder.pos_embed": (1, num_tokens, image_dim),
        "text_encoder.embeddings.word_embeddings.weight": (30524, 768),
        "text_encoder.embeddings.position_embeddings.weight": (512, 768),
        "vision_proj.weight": (256, image_dim),
    }
    for i in range(num_layers):
        shapes[f"visual_encoder.blocks.{i}.mlp.fc1.weight"] = (image_mlp, image_dim)
    for i in range(12):
        shapes[f"text_encoder.encoder.layer.{i}.intermediate.dense.weight"] = (3072, 768)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("theirs", "vision"),
    [
        (meta_shapes(768, 12, 3072, 577), VisionConfig(image_size=384)),
        (
            meta_shapes(1024, 24, 4096, 197),
            VisionConfig(image_size=224, hidden_dim=1024, num_layers=24, num_heads=16, mlp_dim=4096),
        ),
    ],
    ids=["base", "large"],
)
def test_the_released_sizes(theirs: State, vision: VisionConfig) -> None:
    config, _ = infer_blip_settings(theirs, "x")
    assert config.vision == vision
    assert config.text == TextConfig()
    assert config.embed_dim == 256
    assert set(config.heads) == {"itc", "itm"}


def test_a_bare_state_dict_reads_alike(tmp_path: Path, pretrained: State) -> None:
    (tmp_path / "bare").mkdir()
    bare = load_checkpoint(write(tmp_path / "bare", pretrained)).model
    whole = load_checkpoint(write(tmp_path, {"model": pretrained, "epoch": 19})).model
    assert bare.config == whole.config
    assert_same_weights(bare, whole)


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    halves = {n: t.half() if t.is_floating_point() else t for n, t in released_file("captions").items()}
    model = load_checkpoint(write(tmp_path, {"model": halves})).model
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_training_state_is_left_out_and_nothing_else(tmp_path: Path, pretrained: State) -> None:
    training = {name for name in pretrained if name.startswith(TRAINING_ONLY)}
    assert {name.partition(".")[0] for name in training} == {
        "visual_encoder_m", "text_encoder_m", "vision_proj_m", "text_proj_m",
        "image_queue", "text_queue", "queue_ptr",
    }  # fmt: skip
    state = {name: tensor for name, tensor in pretrained.items() if name not in training}
    load_checkpoint(write(tmp_path, {"model": state}))  # they are not asked for either
    for strange in ("visual_encoder_ema.cls_token", "queue", "text_decoder_m.bert.pooler.bias"):
        with pytest.raises(CheckpointError, match=f"left over {strange}"):
            load_checkpoint(write(tmp_path, {"model": {**state, strange: torch.zeros(1)}}))


def test_sharing_is_read_off_the_tensors(tmp_path: Path, pretrained: State) -> None:
    apart = {**pretrained, UNSHARED: pretrained[UNSHARED] + 1}
    model = load_checkpoint(write(tmp_path, {"model": apart})).model
    assert model.config.text.sharing == "none"
    layer = model.text.layers[1].feed_forward  # type: ignore[union-attr]
    difference = layer["decode"].branch[2].weight - layer["encode"].branch[2].weight  # type: ignore
    torch.testing.assert_close(difference, torch.ones_like(difference))


def without(name: str) -> Callable[[State], object]:
    return lambda state: state.pop(name)


def put(name: str, value: Any) -> Callable[[State], object]:
    return lambda state: state.update({name: value})


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("captions", without("text_decoder.cls.predictions.bias"), "missing text_decoder.cls.predictions.bias"),
        ("retrieval", without("text_encoder.encoder.layer.0.attention.self.query.bias"), "missing text_enc"),
        ("captions", without("visual_encoder.pos_embed"), "missing visual_encoder.pos_embed"),
        ("captions", without("text_decoder.bert.embeddings.word_embeddings.weight"), "missing text_decoder"),
        ("captions", put("adapter.weight", torch.zeros(2)), "left over adapter.weight"),
        ("captions", put("visual_encoder.pos_embed", torch.zeros(1, 27, 192)), "27 image tokens"),
        ("captions", put("visual_encoder.pos_embed", torch.zeros(1, 1, 192)), "1 image tokens"),
        ("captions", put("visual_encoder.pos_embed", torch.zeros(26, 192)), "has 3 axes"),
        ("captions", put("visual_encoder.cls_token", torch.zeros(1, 1, 7)), r"class_token is \(1, 1, 7\)"),
        ("captions", put("visual_encoder.patch_embed.proj.weight", torch.zeros(100, 3, 8, 8)), "100 wide"),
        ("captions", put("visual_encoder.norm.bias", 3.0), "more than weights: visual_encoder.norm.bias"),
        (
            "captions",
            put("text_decoder.cls.predictions.decoder.weight", torch.zeros(TOKENIZER.vocab_size, 128)),
            "tied",
        ),
        ("retrieval", put("temp", torch.tensor(0.0)), "temp is 0.0"),
        ("retrieval", put("temp", torch.tensor(float("nan"))), "temp is nan"),
        ("retrieval", put("temp", torch.ones(2)), "temp is"),
        ("NLVR2", put("cls_head.2.bias", torch.zeros(3)), r"nlvr_head.2.bias is \(3,\)"),
        ("NLVR2", without("text_encoder.encoder.layer.1.crossattention.output.merge_layer.bias"), "missing"),
        (
            "retrieval",
            lambda state: [state.pop(n) for n in list(state) if n.startswith(("itm_head", "vision_proj."))],
            "no BLIP for .*text_encoder",  # a feature extractor, which can do nothing of ours
        ),
        ("captions", lambda state: [state.pop(n) for n in list(state) if "text" in n], "is no BLIP for"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, kind: str, damage: Callable[[State], object], message: str) -> None:
    state = released_file(kind)
    damage(state)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(write(tmp_path, {"model": state}))


@pytest.mark.parametrize("place", ["model", "optimizer", "openblip"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused(tmp_path: Path, place: str, legacy: bool) -> None:
    content = {"model": released_file("captions"), place: Exploit(tmp_path / "exploited")}
    path = tmp_path / "x.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"cannot be read as weights.*Unsupported"):
        load_checkpoint(path)
    assert not (tmp_path / "exploited").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "exploited").exists()  # the payload was real


@pytest.mark.parametrize("content", [[1, 2], {}, {"model": {}}, {1: torch.zeros(1)}, torch.zeros(3), None])
def test_what_holds_no_weights_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(CheckpointError, match=r"released\.pth holds"):
        load_checkpoint(write(tmp_path, content))


@pytest.mark.parametrize("size", [0, 1, 10, 300, -100])
def test_a_torn_file_is_named(tmp_path: Path, size: int) -> None:
    path = write(tmp_path, {"model": released_file("captions")})
    whole = path.read_bytes()
    for damaged in (whole[:size], bytes(reversed(whole))[:5000], whole[:200] + whole[500:]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"released\.pth"):
            load_checkpoint(path)


def other_tokenizer() -> Tokenizer:
    return Tokenizer.train(["a green cat", "a green cat"], vocab_size=112)


def test_whose_words_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's, else the file's own, else those beside it, else BERT's, else an error that says so."""
    path = write(tmp_path, {"model": released_file("captions")})
    assert load_checkpoint(path).tokenizer.to_json() == TOKENIZER.to_json()

    other = other_tokenizer()
    other.save(tmp_path / "other")
    assert load_checkpoint(path, tokenizer=tmp_path / "other").tokenizer.to_json() == other.to_json()

    save_checkpoint(load_checkpoint(path)._replace(tokenizer=other), tmp_path / "own.pth", "original")
    assert load_checkpoint(tmp_path / "own.pth").tokenizer.to_json() == other.to_json()
    assert load_checkpoint(tmp_path / "own.pth", tokenizer=tmp_path).tokenizer.to_json() == TOKENIZER.to_json()

    (tmp_path / "tokenizer.json").unlink()  # vocab.txt is left
    words = load_checkpoint(path).tokenizer
    assert torch.equal(words.encode(["a red dog"]).ids, TOKENIZER.encode(["a red dog"]).ids)

    (tmp_path / "vocab.txt").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"no vocabulary.*vocab\.txt of bert-base-uncased.*offline"):
        load_checkpoint(path)
    large = Tokenizer.train([f"word{a}{b}" for a in "abcdefgh" for b in "abcdefgh"] * 2, vocab_size=400)
    large.save(tmp_path / "large")
    with pytest.raises(CheckpointError, match="another model"):
        load_checkpoint(path, tokenizer=tmp_path / "large")


@pytest.mark.slow
@pytest.mark.parametrize("heads", [("itc", "itm", "lm"), ("lm",), ("itc", "itm"), ("vqa",), ("nlvr",)])
@pytest.mark.parametrize("sharing", ["all", "all_but_ca", "all_but_sa", "none"])
def test_ours_comes_back_whole(tmp_path: Path, heads: tuple[Any, ...], sharing: Any) -> None:
    """Three heads of 8, of which no tensor tells, and everything else the format has no place for."""
    if heads == ("vqa",) and sharing in ("all", "all_but_sa"):
        sharing = "none"  # its texts are wider than its images
    before = checkpoint(heads, sharing)
    save_checkpoint(before, tmp_path / "new" / "ours.pth", "original")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ours.pth"]
    after = load_checkpoint(tmp_path / "new" / "ours.pth")
    assert after.model.config == before.model.config
    assert after[2:] == before[2:]
    assert after.tokenizer.to_json() == before.tokenizer.to_json()
    assert_same_weights(after.model, before.model, rounded=("log_temperature",))


def checkpoint(heads: tuple[Any, ...], sharing: Any = "all_but_sa", pooled: bool = False) -> BlipCheckpoint:
    model = tiny_blip(("itc",) if "vqa" in heads else heads, sharing)
    config = model.config
    text = {**config.to_dict()["text"], "vocab_size": TOKENIZER.vocab_size}
    model = Blip(type(config).from_dict({**config.to_dict(), "text": text, "heads": heads, "pooled": pooled}))
    return BlipCheckpoint(model, TOKENIZER, Preprocessing(image_size=24, mean=(0.1, 0.2, 0.3)), "a red", "[CLS]")


def test_what_its_sharing_says_must_hold(tmp_path: Path) -> None:
    save_checkpoint(checkpoint(("itc", "itm", "lm")), tmp_path / "ours.pth", "original")
    edit_pth(tmp_path / "ours.pth", lambda content: content["model"].update({UNSHARED: content["model"][UNSHARED] + 1}))
    with pytest.raises(CheckpointError, match=r"share weights that differ: text_encoder.encoder.layer.1.output"):
        load_checkpoint(tmp_path / "ours.pth")


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry.pop("model"),
        lambda entry: entry.update(model=3),
        lambda entry: entry["model"]["text"].update(num_heads=5),
        lambda entry: entry.update(encoder_token="[DEC]"),
        lambda entry: entry.update(preprocessing=None),
        lambda entry: entry.update(tokenizer="{"),
    ],
)
def test_a_damaged_entry_is_named(tmp_path: Path, damage: Callable[[dict[str, Any]], object]) -> None:
    save_checkpoint(checkpoint(("lm",)), tmp_path / "ours.pth", "original")
    edit_pth(tmp_path / "ours.pth", lambda content: damage(content["openblip"]))
    with pytest.raises(CheckpointError, match=r"ours\.pth, its openblip entry"):
        load_checkpoint(tmp_path / "ours.pth")
    edit_pth(tmp_path / "ours.pth", lambda content: content.update(openblip="x"))
    with pytest.raises(CheckpointError, match="openblip entry is damaged"):
        load_checkpoint(tmp_path / "ours.pth")


def test_what_the_released_code_has_no_model_for(tmp_path: Path) -> None:
    for heads, pooled in ((("itc",), True), (("itm",), False), (("itm", "visdial"), False)):
        with pytest.raises(CheckpointError, match="no model with the heads"):
            save_checkpoint(checkpoint(heads, pooled=pooled), tmp_path / "out.pth", "original")
    with pytest.raises(ConfigError, match=r"end with \.pth"):
        save_checkpoint(checkpoint(("lm",)), tmp_path / "out", "original")
    assert not list(tmp_path.iterdir())
