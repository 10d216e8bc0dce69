"""What a run of BLIP-2 starts from: whose weights, at which size and precision, adapters, and a feature cache.

With a cache a run is the run without one, to the last bit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import write_scenes

from marks import slow
from openblip.checkpoints.backbones import save_language_model
from openblip.checkpoints.checkpoint import Blip2Checkpoint, BlipCheckpoint, load_native, save_native
from openblip.data.config import Augmentation, DataConfig, Preprocessing
from openblip.data.feature_cache import FeatureCache
from openblip.data.sources import Mixture
from openblip.data.tokenizer import Tokenizer
from openblip.errors import CheckpointError, ConfigError
from openblip.models.blip import Blip
from openblip.models.config import LoraSettings
from openblip.nn.config import QFormerConfig
from openblip.recipes.blip2 import blip2_caption, blip2_retrieval, blip2_stage2_opt, blip2_vqa
from openblip.recipes.initialize import describe_encoder
from openblip.recipes.mini import blip2_mini_stage1, blip2_mini_stage2_opt
from openblip.recipes.run import Blip2Run, ImageEncoderSource, LanguageModelSource
from openblip.tasks.config import Blip2Stage1Config
from openblip.tasks.contrastive import Blip2Stage1
from openblip.training.config import TrainingConfig
from shared_files import read_lines
from tiny_blip import SIZE, TINY, randomise, tiny_tokenizer
from tiny_blip2 import tiny_blip2, tiny_language_model, weights_of

pytestmark = pytest.mark.slow

NO_DATA = Mixture((), ())
CACHED_QFORMER = QFormerConfig(
    num_queries=2, hidden_dim=16, num_layers=2, num_heads=2, mlp_dim=16, max_positions=40, dropout=0.1
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of both stages, whose Q-Formers differ, and of stage 2 around a Hugging Face encoder."""
    root = tmp_path_factory.mktemp("starts")
    stage1 = tiny_blip2()
    with torch.no_grad():
        for parameter in stage1.model.qformer.parameters():
            parameter += 0.1
    save_native(root / "stage1", stage1)
    save_native(root / "stage2", tiny_blip2((), "opt"))
    save_native(root / "tower", tiny_blip2((), "opt", tower=True))
    return root


def small(run: Blip2Run, **changes: Any) -> Blip2Run:
    changes = {"frozen_dtype": None, "image_size": None, **changes}
    return replace(run, data=replace(run.data, max_text_length=20), **changes)


def load(folders: Path, name: str) -> Blip2Checkpoint:
    return load_native(folders / name)


def begin(run: Blip2Run) -> Blip2Checkpoint:
    return run.initialize(NO_DATA)


def test_a_reader_of_questions_has_its_text_side_from_stage_1(folders: Path) -> None:
    run = small(blip2_vqa(), init=str(folders / "stage2"), text_branch=str(folders / "stage1"))
    found = begin(run)
    assert found.tokenizer is not None
    assert found.model.config.instructed
    stage1, stage2 = weights_of(load(folders, "stage1")), weights_of(load(folders, "stage2"))
    for name, weight in found.model.state_dict().items():
        of_stage1 = any(part in name for part in ("text_feed_forward", "embeddings.word", "qformer.embeddings.pos"))
        of_stage1 = of_stage1 and name.startswith("qformer.")
        assert torch.equal(weight, (stage1 if of_stage1 else stage2)[name]), name


def test_a_qformer_takes_another_vocabulary(folders: Path, tmp_path: Path) -> None:
    vocabulary = Tokenizer.train(["一只狗 a dog"] * 2, 300)
    vocabulary.save(tmp_path)
    changes = {"init": str(folders / "stage1"), "tokenizer": str(tmp_path)}
    for run in (blip2_retrieval(), replace(blip2_vqa(), language=language_source(folders))):
        found, stage1 = begin(small(run, **changes)), load(folders, "stage1")
        assert found.tokenizer is not None
        assert stage1.tokenizer is not None
        assert found.model.config.qformer.vocab_size == vocabulary.vocab_size - 1, "[ENC] does not exist in BLIP-2"
        before, after = stage1.tokenizer.entries, found.tokenizer.entries
        name = "qformer.embeddings.word.weight"
        for entry in ("dog", "[CLS]", "[DEC]"):
            kept = weights_of(stage1)[name][before[entry]]
            assert torch.equal(found.model.state_dict()[name][after[entry]], kept), entry
    (tmp_path / "tokenizer.json").unlink()
    with (tmp_path / "vocab.txt").open("a") as file:
        file.write("extended\n")
    with pytest.raises(ConfigError, match=r"entries stand behind .ENC."):
        begin(small(blip2_retrieval(), **changes))
    with pytest.raises(CheckpointError, match="nowhere"):
        begin(small(blip2_retrieval(), init=str(folders / "stage1"), tokenizer="nowhere/at/all"))


def test_what_cannot_start_says_what_to_do(folders: Path) -> None:
    stage1, stage2 = str(folders / "stage1"), str(folders / "stage2")
    for run, message in (
        (small(blip2_vqa(), init=stage2), "stage2 has dropped .* --text-branch, or add --task.no-instructed"),
        (small(blip2_vqa(), init=stage2, text_branch=stage2), "stage2 reads no text: name one of stage 1"),
        (small(blip2_retrieval(), init=stage2), "reads no text, and blip2-retrieval trains it on texts"),
        (small(blip2_caption(), init=stage1), "needs a language model: name it with --language.source"),
        (small(blip2_caption(), init="openblip-mini"), "is no checkpoint of BLIP-2"),
    ):
        with pytest.raises(ConfigError, match=message):
            begin(run)


def language_source(folders: Path) -> LanguageModelSource:
    return LanguageModelSource(source=str(folders / "stage2" / "language_model"), end_of_text="a")


def test_stage_2_needs_no_text_and_its_projection_is_new(folders: Path) -> None:
    run = small(blip2_stage2_opt(), init=str(folders / "stage1"), language=language_source(folders))
    found = begin(run)
    assert found.tokenizer is None
    stage1 = weights_of(load(folders, "stage1"))
    for name, weight in found.model.state_dict().items():
        if name.startswith(("qformer.", "vision", "vision_norm")):
            assert torch.equal(weight, stage1[name]), name
    assert not any(p.requires_grad for part in (found.model.vision, found.model.language) for p in part.parameters())
    assert found.model.require_language().end_id != found.model.require_language().tokenizer.eos_token_id


def test_a_trained_encoder_is_float32_at_its_new_size(folders: Path) -> None:
    run = small(blip2_caption(), init=str(folders / "stage2"), image_size=2 * SIZE, frozen_dtype="bfloat16")
    found = begin(run)
    assert found.preprocessing.image_size == found.model.config.vision.image_size == 2 * SIZE  # type: ignore[union-attr]
    assert {p.dtype for p in found.model.vision.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in found.model.vision.parameters())
    assert next(found.model.require_language().parameters()).dtype == torch.bfloat16
    assert found.model.encode_image(torch.randn(1, 3, 2 * SIZE, 2 * SIZE)).shape[1] == (2 * SIZE // 8) ** 2 + 1
    frozen = begin(replace(run, train_vision=False, frozen_dtype="float16"))
    assert {p.dtype for p in frozen.model.vision.parameters()} == {torch.float16}
    assert {p.dtype for p in frozen.model.qformer.parameters()} == {torch.float32}


def test_of_a_hugging_face_encoder_only_what_is_read_is_trained(folders: Path) -> None:
    found = begin(small(blip2_caption(), init=str(folders / "tower")))
    names = {name for name, p in found.model.vision.named_parameters() if p.requires_grad}
    assert any(".layers.0." in name for name in names)
    assert not any(".layers.1." in name or "post_layernorm" in name for name in names)
    assert any("embeddings" in name for name in names)


def test_the_trained_model_keeps_its_prompts_and_budget(folders: Path) -> None:
    run = small(blip2_caption(), init=str(folders / "stage2"), max_text_tokens=50)
    found = begin(run)
    assert found.model.config.language is not None
    assert found.model.config.language.max_text_tokens == 50
    run = replace(run, task=replace(run.task, prompt="this is"))
    run.save(begin(run), folders / "written")
    assert load(folders, "written").prompt == "this is"


def test_texts_that_are_longer_than_the_qformers_positions(folders: Path) -> None:
    checkpoint = load(folders, "stage1")
    data = DataConfig(max_text_length=41)
    with pytest.raises(ConfigError, match="up to 41 tokens: the Q-Former has 40 positions"):
        Blip2Stage1.build(Blip2Stage1Config(), data, checkpoint.model, checkpoint.tokenizer, checkpoint.preprocessing)


@pytest.mark.slow
def test_a_run_trains_and_saves_adapters(tmp_path):
    stage1: Blip2Checkpoint = tiny_blip2()
    save_native(tmp_path / "stage1", stage1)
    language = tiny_language_model("opt")
    save_language_model(tmp_path / "opt", language)
    write_scenes(tmp_path / "scenes", "captions", 6)
    source = LanguageModelSource(source=str(tmp_path / "opt"))
    run = replace(
        blip2_mini_stage2_opt(),
        init=str(tmp_path / "stage1"),
        language=source,
        lora=LoraSettings(rank=2, dropout=0.1),
        data=DataConfig(source=str(tmp_path / "scenes"), num_workers=0),
        training=TrainingConfig(steps=2, batch_size=2, dtype="float32"),
        out=str(tmp_path / "run"),
    )
    assert run.train()
    trained = load_native(tmp_path / "run" / "model").model.language.model
    adapters = {name: p for name, p in trained.named_parameters() if "lora_" in name}
    assert adapters
    assert all(p.abs().sum() > 0 for p in adapters.values())  # one of each pair began as zeros
    own = language.model.state_dict()
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): weight
        for name, weight in trained.state_dict().items()
        if "lora_" not in name
    }
    assert base.keys() == own.keys()
    assert all(torch.equal(base[name], own[name]) for name in own)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Scenes, and a BLIP whose ViT is the image encoder."""
    root = tmp_path_factory.mktemp("inputs")
    write_scenes(root / "scenes", "captions", 12)
    words = tiny_tokenizer()
    model = Blip(replace(TINY, text=replace(TINY.text, vocab_size=words.vocab_size)))
    randomise(model, seed=0)
    save_native(root / "blip", BlipCheckpoint(model, words, Preprocessing(image_size=SIZE)))
    return root


def make_run(inputs, out, dtype="float32", **changes):
    run = replace(
        blip2_mini_stage1(),
        vision=ImageEncoderSource(source=str(inputs / "blip"), dtype=dtype),
        qformer=CACHED_QFORMER,
        embed_dim=8,
        vocab_size=200,
        data=DataConfig(source=str(inputs / "scenes"), num_workers=0),
        training=TrainingConfig(steps=4, batch_size=5, log_every=1, checkpoint_every=2, dtype="float32"),
        out=str(out),
    )
    return replace(run, **changes)


def losses(out):
    lines = read_lines(out / "metrics.jsonl")
    return [{name: line[name] for name in ("itc", "itm", "itg")} for line in lines if "itc" in line]


@pytest.mark.parametrize("dtype", ["float32", *slow("bfloat16")])
def test_training_is_the_same_to_the_last_bit(inputs, tmp_path, dtype):
    cache = tmp_path / "cache"
    assert make_run(inputs, tmp_path / "plain", dtype).train()
    assert make_run(inputs, tmp_path / "cached", dtype, feature_cache=str(cache)).train()
    assert make_run(inputs, tmp_path / "again", dtype, feature_cache=str(cache)).train()
    plain = load_file(tmp_path / "plain" / "model" / "model.safetensors")
    for name in ("cached", "again"):
        weights = load_file(tmp_path / name / "model" / "model.safetensors")
        assert plain.keys() == weights.keys()
        assert [n for n in plain if not torch.equal(plain[n], weights[n])] == []
        assert losses(tmp_path / name) == losses(tmp_path / "plain")
    assert len(losses(tmp_path / "plain")) == 4
    assert FeatureCache(cache).parts[0].dtype == dtype


def test_the_cache_is_really_read(inputs, tmp_path):
    """Other features lead elsewhere."""
    cache = tmp_path / "cache"
    assert make_run(inputs, tmp_path / "first", feature_cache=str(cache)).train()
    for path in (cache / "parts").glob("*.bin"):
        path.write_bytes(bytes(path.stat().st_size))
    assert make_run(inputs, tmp_path / "second", feature_cache=str(cache)).train()
    assert losses(tmp_path / "first") != losses(tmp_path / "second")


def test_what_changes_at_every_step_is_refused(inputs, tmp_path):
    run = make_run(inputs, tmp_path / "run", feature_cache=str(tmp_path / "cache"))
    for number, (changes, message) in enumerate(
        (
            ({"data": replace(run.data, augmentation=Augmentation())}, "one view of each image"),
            ({"data": replace(run.data, num_frames=2)}, "not for videos"),
            ({"train_vision": True}, "its features change"),
        )
    ):
        with pytest.raises(ConfigError, match=message):
            replace(run, **changes, out=f"{run.out}-{number}").train()


def test_another_encoder_is_refused(inputs, tmp_path):
    cache = str(tmp_path / "cache")
    run = make_run(inputs, tmp_path / "run", feature_cache=cache)
    run.train()
    other = replace(run, out=str(tmp_path / "other"), vision=replace(run.vision, layer=-1))
    with pytest.raises(ConfigError, match=r"encoder\.num_layers was 1, is now 2"):
        other.train()


def test_a_description_tells_encoders_apart():
    """By their weights, precision, layer and pixels, and not by where they lie."""
    checkpoint = tiny_blip2(tower=True)
    described = describe_encoder(checkpoint)
    json.dumps(described)
    assert describe_encoder(tiny_blip2(tower=True)) == described
    moved = checkpoint._replace(preprocessing=Preprocessing(image_size=SIZE, mean=(0.5, 0.5, 0.5)))
    assert {n for n, v in describe_encoder(moved).items() if v != described[n]} == {"pixels.mean"}
    checkpoint.model.vision.layer = -1
    assert {n for n, v in describe_encoder(checkpoint).items() if v != described[n]} == {"encoder.layer"}
    checkpoint.model.vision.layer = -2
    with torch.no_grad():
        next(checkpoint.model.vision.parameters()).view(-1)[0] += 1e-3
    assert {n for n, v in describe_encoder(checkpoint).items() if v != described[n]} == {"weights"}
    checkpoint.model.vision.to(torch.bfloat16)
    changed = {n for n, v in describe_encoder(checkpoint).items() if v != described[n]}
    assert changed == {"weights", "dtype"}
