"""OpenBLIP's folders: they come back as they were, whole or not at all, and damage is named; folders by other names."""

import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

import openblip
from damaged_files import Exploit, assert_same_weights, edit_config, edit_weights, truncate
from marks import slow
from openblip.checkpoints.backbones import save_language_model
from openblip.checkpoints.checkpoint import Blip2Checkpoint, BlipCheckpoint, Checkpoint
from openblip.checkpoints.loading import is_hub_name, load_checkpoint, load_image_encoder, save_checkpoint
from openblip.data.config import Preprocessing
from openblip.data.tokenizer import Tokenizer
from openblip.errors import CheckpointError
from openblip.models.blip import Blip
from openblip.models.config import BlipConfig, Head
from openblip.models.language_model import wrap_language_model
from openblip.nn.config import Sharing
from tiny_blip import SIZE, TINY, random_pixels, tiny_tokenizer
from tiny_blip2 import tiny_blip2, tiny_language_model
from written_texts import beam_ids

TOKENIZER = tiny_tokenizer()


def blip(heads: tuple[Head, ...] = ("itc", "itm", "lm"), sharing: Sharing = "all_but_sa") -> BlipCheckpoint:
    text = {**TINY.to_dict()["text"], "vocab_size": TOKENIZER.vocab_size, "sharing": sharing}
    config = BlipConfig.from_dict({**TINY.to_dict(), "text": text, "heads": heads})
    torch.manual_seed(0)
    preprocessing = Preprocessing(image_size=SIZE, mean=(0.1, 0.2, 0.3))
    return BlipCheckpoint(Blip(config), TOKENIZER, preprocessing, "a picture of ")


BLIP, STAGE2, WHOLE = "BLIP", "stage 2, OPT", "all heads"
KINDS: dict[str, Callable[[], Checkpoint]] = {
    BLIP: blip,
    "one self-attention": partial(blip, sharing="all"),
    "nothing shared": partial(blip, sharing="none"),
    "captioner": partial(blip, ("lm",)),
    "retrieval": partial(blip, ("itc", "itm"), "none"),
    "stage 1": tiny_blip2,
    "stage 1 around a tower": partial(tiny_blip2, tower=True),
    STAGE2: partial(tiny_blip2, (), "opt"),
    "stage 2, T5": partial(tiny_blip2, (), "t5"),
    WHOLE: partial(tiny_blip2, language="opt", tower=True),  # all parts that a folder can have
    "instructed": partial(tiny_blip2, (), "t5", instructed=True),
}
BOTH = pytest.mark.parametrize("kind", [BLIP, WHOLE])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be copied, not changed."""
    root = tmp_path_factory.mktemp("written")
    for kind in (BLIP, WHOLE):
        save_checkpoint(KINDS[kind](), root / kind)
    return root


@pytest.fixture
def folder(written: Path, tmp_path: Path, kind: str) -> Path:
    return Path(shutil.copytree(written / kind, tmp_path / "folder"))


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def outputs(checkpoint: Checkpoint) -> tuple[list[float], list[list[int]]]:
    """The queries of two images, and what the language model goes on with."""
    if isinstance(checkpoint, BlipCheckpoint):
        return checkpoint.model.encode_image(random_pixels(2)).flatten().tolist(), []
    model = checkpoint.model
    queries = model.encode_queries(model.image_kv(model.encode_image(random_pixels(2)))).queries
    if model.language is None:
        return queries.flatten().tolist(), []
    visual, prompts = model.visual_prompts(queries), ["a photo", "Question: why?"]
    ids = beam_ids(model.language, visual, prompts, 6)
    return queries.flatten().tolist(), ids


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path, kind: str) -> None:
    before = KINDS[kind]()
    state = {name: tensor.clone() for name, tensor in before.model.state_dict().items()}
    save_checkpoint(before, tmp_path)
    after = load_checkpoint(tmp_path)
    assert type(after) is type(before)
    assert after.model.config == before.model.config
    assert after[2:] == before[2:]
    assert_same_weights(after.model, before.model)
    for name, tensor in before.model.state_dict().items():  # saving has left the model alone
        assert torch.equal(tensor, state[name]), name
    assert not after.model.training
    assert (after.tokenizer is None) == (before.tokenizer is None)
    if before.tokenizer is not None and after.tokenizer is not None:
        assert after.tokenizer.to_json() == before.tokenizer.to_json()
    assert outputs(after) == outputs(before)


def adapted() -> Blip2Checkpoint:
    """With LoRA adapters that change what the language model says."""
    import peft

    checkpoint = KINDS[STAGE2]()
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(checkpoint.model.language.model, settings).eval()
    checkpoint.model.language = wrap_language_model(model, checkpoint.model.language.tokenizer)
    return checkpoint


@torch.no_grad()
def test_adapters_come_back_beside_the_model_that_they_adapt(tmp_path: Path) -> None:
    plain, before = KINDS[STAGE2](), adapted()
    state = {name: tensor.clone() for name, tensor in before.model.state_dict().items()}
    save_checkpoint(before, tmp_path)
    after = load_checkpoint(tmp_path)
    assert_same_weights(after.model, before.model)
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name  # saving has left it alone
    visual = torch.randn(1, 4, 16)
    models = (checkpoint.model.require_language() for checkpoint in (before, after, plain))
    logits = [language.predict(visual, ["a"], ["dog"], 8).logits for language in models]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])

    shutil.rmtree(tmp_path / "language_model" / "adapter")  # what is left is the model as it was
    assert_same_weights(load_checkpoint(tmp_path).model, plain.model)


def test_damaged_adapters_are_named(tmp_path: Path) -> None:
    save_checkpoint(adapted(), tmp_path)
    weights = tmp_path / "language_model" / "adapter" / "adapter_model.safetensors"
    edit_weights(weights, lambda w: w.pop(sorted(w)[0]))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors .*missing base_model.*lora_A"):
        load_checkpoint(tmp_path)
    truncate(weights)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors cannot be read"):
        load_checkpoint(tmp_path)


def test_where_what_is_written(written: Path, tmp_path: Path) -> None:
    words = {"tokenizer.json", "vocab.txt"}
    assert files_in(written / BLIP) == {"config.json", "model.safetensors", *words}
    folders = {"language_model", "vision_model"}
    assert files_in(written / WHOLE) == {"config.json", "model.safetensors", *folders, *words}
    names = load_file(written / WHOLE / "model.safetensors")
    assert not any(name.startswith(("language.", "vision.")) for name in names)
    save_checkpoint(KINDS[STAGE2](), tmp_path)
    assert files_in(tmp_path) == {"config.json", "model.safetensors", "language_model"}
    names = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("vision.") for name in names)  # our own ViT
    assert not any(name.startswith("language.") for name in names)


def test_every_part_keeps_its_precision_on_disk_and_is_read_as_float32(tmp_path: Path) -> None:
    small, parts = blip(), KINDS[WHOLE]()
    small.model.bfloat16()
    parts.model.require_language().to(torch.bfloat16)
    parts.model.vision.half()
    of_parts = {LANGUAGE: torch.bfloat16, TOWER: torch.float16, OWN: torch.float32}
    for before, dtypes in ((small, {OWN: torch.bfloat16}), (parts, of_parts)):
        save_checkpoint(before, tmp_path)
        for name, dtype in dtypes.items():
            assert {tensor.dtype for tensor in load_file(tmp_path / name).values()} == {dtype}, name
        assert_same_weights(load_checkpoint(tmp_path).model, before.model.float())


@BOTH
def test_a_checkpoint_can_be_saved_over_itself(folder: Path) -> None:
    loaded = load_checkpoint(folder)
    save_checkpoint(loaded, folder)
    assert_same_weights(load_checkpoint(folder).model, loaded.model)


@pytest.mark.parametrize("step", ["checkpoints.state_dict.save_file", "files.os.replace", "files.json.dumps"])
@pytest.mark.parametrize("kind", [BLIP, STAGE2])
def test_a_torn_folder_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, step: str) -> None:
    """Whenever writing was killed."""

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    checkpoint = KINDS[kind]()
    monkeypatch.setattr(f"openblip.{step}", die)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(checkpoint, tmp_path / "new")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"no checkpoint .*new"):
        load_checkpoint(tmp_path / "new")
    save_checkpoint(checkpoint, tmp_path / "new")  # what was left there does not disturb
    save_checkpoint(checkpoint, tmp_path / "fresh")
    assert files_in(tmp_path / "new") == files_in(tmp_path / "fresh")
    load_checkpoint(tmp_path / "new")


@BOTH
def test_the_caller_may_name_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    other = Tokenizer.train(["a green cat", "a green cat"], vocab_size=112)
    other.save(tmp_path / "other")
    words = load_checkpoint(folder, tokenizer=tmp_path / "other").tokenizer
    assert words.to_json() == other.to_json()


MANY_WORDS = [f"word{a}{b}" for a in "abcdefgh" for b in "abcdefgh"] * 2
BIAS, FC1 = "itm_head.bias", "layers.0.fc1.bias"
OWN, LANGUAGE, TOWER = (f"{part}model.safetensors" for part in ("", "language_model/", "vision_model/"))
Damage = Callable[[Path], object]
OF_BOTH: list[tuple[Damage, str]] = [
    (lambda f: edit_weights(f, lambda w: w.pop("itm_head.bias")), r"safetensors.*missing itm_head\.bias"),
    (lambda f: edit_weights(f, lambda w: w.update(extra=torch.zeros(1))), "left over extra"),
    (lambda f: edit_weights(f, lambda w: w.update({BIAS: torch.zeros(3)})), rf"{BIAS} is \(3,\), the model has \(2,\)"),
    (lambda f: truncate(f / OWN), r"model\.safetensors cannot be read"),
    (lambda f: (f / OWN).write_bytes(b""), r"model\.safetensors cannot be read"),
    (lambda f: (f / OWN).unlink(), r"no .*model\.safetensors"),
    (lambda f: (f / "config.json").unlink(), "no checkpoint .*folder"),
    (lambda f: truncate(f / "config.json"), r"config\.json cannot be read"),
    (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), r"config\.json cannot be read"),
    (lambda f: (f / "config.json").write_text("[1]"), r"config\.json holds list where a JSON object"),
    (lambda f: edit_config(f, lambda c: c.pop("model")), r"config\.json.*model.*another version"),
    (lambda f: edit_config(f, lambda c: c.update(model=None)), r"config\.json.*another version"),
    (lambda f: edit_config(f, lambda c: c.pop("prompt")), r"config\.json.*prompt.*another version"),
    (lambda f: edit_config(f, lambda c: c["model"]["vision"].update(depth=3)), r"config\.json.*depth"),
    (lambda f: edit_config(f, lambda c: c["model"].update(heads=["x"])), "heads"),
    (lambda f: edit_config(f, lambda c: c["preprocessing"].update(crop=1)), r"config\.json.*crop"),
    (lambda f: (f / "tokenizer.json").write_text("{"), r"tokenizer\.json"),
]
OF_BLIP: list[tuple[Damage, str]] = [
    (lambda f: edit_config(f, lambda c: c.pop("format")), "a model of no named class"),  # not ours any more
    (lambda f: edit_config(f, lambda c: c["model"]["vision"].update(num_heads=5)), r"config\.json.*5 heads"),
    (lambda f: edit_config(f, lambda c: c["preprocessing"].update(image_size=30)), "image_size 30"),
    (lambda f: [(f / name).unlink() for name in ("tokenizer.json", "vocab.txt")], "tokenizer.json"),
    (lambda f: Tokenizer.train(MANY_WORDS, vocab_size=400).save(f), r"tokenizer has \d+ entries, .*the model \d+"),
]
OF_BLIP2: list[tuple[Damage, str]] = [
    (lambda f: edit_weights(f, lambda w: w.update({"language.x": torch.zeros(3)})), r"left over language\.x"),
    (lambda f: edit_config(f, lambda c: c.pop("question_prompt")), r"config\.json.*another version"),
    (lambda f: edit_config(f, lambda c: c["model"].update(depth=3)), "unknown are depth"),
    (lambda f: edit_config(f, lambda c: c["model"]["qformer"].update(num_heads=5)), "5 heads"),
    (lambda f: edit_config(f, lambda c: c["model"]["language"].update(hidden_dim=8)), "16 wide"),
    (lambda f: edit_config(f, lambda c: c["model"]["vision"].update(layer=-9)), "no layer -9"),
    (lambda f: shutil.rmtree(f / "language_model"), "language_model"),
    (lambda f: shutil.rmtree(f / "vision_model"), "vision_model"),
    (lambda f: truncate(f / LANGUAGE), "language_model/model.safetensors cannot be read"),
    (lambda f: truncate(f / TOWER), "vision_model/model.safetensors cannot be read"),
    (lambda f: (f / "language_model" / "config.json").write_text("{"), "language_model"),
    (lambda f: [path.unlink() for path in (f / "language_model").glob("token*")], "language_model has no tokenizer"),
    (lambda f: edit_weights(f / LANGUAGE, lambda w: w.pop(f"model.decoder.{FC1}")), f"language_model.*missing .*{FC1}"),
    (
        lambda f: edit_weights(f / TOWER, lambda w: [w.pop(name) for name in list(w) if "fc1" in name]),
        r"vision_model does not have exactly .*missing .*layers\.0\.mlp\.fc1\.bias",
    ),
]


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [(BLIP, *row) for row in OF_BOTH + OF_BLIP]
    + slow(*((WHOLE, *row) for row in OF_BOTH))
    + [(WHOLE, *row) for row in OF_BLIP2],
)
def test_damage_is_named(folder: Path, kind: str, damage: Damage, message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


@BOTH
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pickle_is_refused_and_runs_no_code(folder: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(Exploit(folder / "exploited")))
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(folder)
    assert not (folder / "exploited").exists()


def test_no_source_file_loads_pickles_carelessly() -> None:
    """Every torch.load says weights_only=True, and no other unpickler is used."""
    package = Path(openblip.__file__).parent
    for path in package.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert source.count("torch.load(") == source.count("weights_only=True"), path
        assert "weights_only=False" not in source, path
        assert "pickle.load" not in source, path


@pytest.mark.parametrize("source", ["./absent/folder", "openblip-giant"])
def test_load_says_what_can_be_loaded(source: str) -> None:
    with pytest.raises(CheckpointError, match=f"There is no checkpoint {source}:"):
        openblip.load(source)


# ---- what a name stands for: the run folder of a training, which is its final model, and names on the hub


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run" / "checkpoints" / "step_00000010").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"recipe": "caption", "task": {}}))
    return tmp_path / "run"


@pytest.mark.parametrize("kind", [BLIP, STAGE2])
def test_a_finished_run_is_its_final_model(run: Path, kind: str) -> None:
    final, best = KINDS[kind](), KINDS[kind]()
    best.model.vision.position_embedding.data.zero_()
    save_checkpoint(best, run / "best")
    save_checkpoint(final, run / "model")
    loaded = load_checkpoint(run)
    assert type(loaded) is type(final)
    assert_same_weights(loaded.model, final.model)
    assert openblip.load(run).tasks == openblip.load(run / "model").tasks
    encoder = load_image_encoder(run)
    assert_same_weights(encoder.model, load_image_encoder(run / "model").model)


@pytest.mark.parametrize("load", [load_checkpoint, openblip.load, load_image_encoder])
def test_an_unfinished_run_says_what_there_is(run: Path, load: Any) -> None:
    with pytest.raises(CheckpointError, match=r"run .*has not finished.*checkpoints/.*train --resume") as caught:
        load(run)
    assert "best" not in str(caught.value)
    save_checkpoint(KINDS[BLIP](), run / "best")
    with pytest.raises(CheckpointError, match=r"has not finished.*Name .*run/best, .*checkpoints/"):
        load(run)
    with pytest.raises(CheckpointError, match=r"step_00000010 is the state .*name its run folder .*/run, or"):
        load(run / "checkpoints" / "step_00000010")


def test_the_run_of_a_language_model_is_no_model_of_images(run: Path) -> None:
    save_language_model(run / "model", tiny_language_model("opt"))
    with pytest.raises(CheckpointError, match=r"run/model/config\.json .*model_type is opt. A language model"):
        load_checkpoint(run)


# ---- names on the hub, without a network


@pytest.mark.parametrize(
    ("source", "expected"),
    [("Salesforce/blip-base", True), ("openblip-mini", False), ("/runs/x", False), ("./runs/x", False),
     ("runs/x/model", False), ("../x", False)],
)  # fmt: skip
def test_what_reads_like_a_name(source: str, expected: bool) -> None:
    assert is_hub_name(source) is expected


def test_a_model_of_the_hub_is_read_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openblip.load("openblip-mini-filter").save(tmp_path, format="huggingface")
    asked: list[Any] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, "pytorch_model*.bin" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert "match" in openblip.load("owner/filter").tasks
    assert asked == [("owner/filter", False)]  # safetensors were there
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        openblip.load("owner/filter")
    assert asked[1:] == [("owner/filter", False), ("owner/filter", True)]


def test_a_folder_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openblip.load("openblip-mini-filter").save(tmp_path / "runs" / "filter")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    assert "match" in openblip.load("runs/filter").tasks


def test_offline_the_name_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"no checkpoint owner/no-such-model: .*offline"):
        openblip.load("owner/no-such-model")
