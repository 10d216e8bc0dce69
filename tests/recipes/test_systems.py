"""The systems that BLIP is compared with: each trains, is read back, and does through the predictor what it can."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import COLORS, SIZE, assert_fallen, language_run, small, train, write_boxes

import openblip
from openblip.data.sources import open_source
from openblip.errors import CheckpointError, ConfigError, UnsupportedTaskError
from openblip.evaluation.retrieval import evaluate_retrieval
from openblip.models.blip2 import Blip2
from openblip.models.config import Blip2Config, BlipConfig, LanguageConfig
from openblip.nn.config import GatedConfig, ResamplerConfig, TextConfig, VisionConfig
from openblip.recipes import systems
from openblip.recipes.ablation import AblationData, Plan, TrainingJob
from openblip.recipes.presets import base_preset
from openblip.recipes.run import Blip2Run, BlipRun, with_settings
from openblip.recipes.tables.systems import variants
from openblip.tasks.config import ContrastiveConfig, PretrainingConfig

VISION = VisionConfig(image_size=SIZE, patch_size=8, hidden_dim=64, num_layers=2, num_heads=4, mlp_dim=128)
TEXT = TextConfig(hidden_dim=48, num_layers=2, num_heads=4, mlp_dim=96, max_positions=40, dropout=0.0)
CALLS = {
    "clip-mini": {"similarity", "embed_images", "embed_texts"},
    "lit-mini": {"similarity", "embed_images", "embed_texts"},
    "albef-mini": {"similarity", "embed_images", "embed_texts", "match", "match_matrix"},
    "simvlm-mini": {"caption"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("boxes")
    write_boxes(folder)
    return folder


def system(name: str, root: Path, out: Path, steps: int, **changes: Any) -> BlipRun:
    run = getattr(systems, name.replace("-", "_"))()
    if isinstance(run.task, PretrainingConfig) and isinstance(run.task.contrastive, ContrastiveConfig):
        run = replace(run, task=replace(run.task, contrastive=ContrastiveConfig(queue_size=0, momentum=0.9)))
    vision = {} if run.train_vision else {"vision_init": str(root / "encoder")}
    shape = BlipConfig(vision=VISION, text=TEXT, embed_dim=16)
    settings: dict[str, Any] = {"model": shape, "vocab_size": 300, **vision, **changes}
    return small(run, root / "pairs.jsonl", out, steps=steps, **settings)


@pytest.fixture(scope="module")
def language(root: Path) -> Path:
    run = language_run(root, "opt", steps=2)
    train(run)
    return Path(run.out) / "model"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["frozen-mini", "pooling-mini", "patch-mlp-mini", "resampler-mini", "flamingo-mini"])
def test_a_connector_takes_the_place_of_a_qformer(name: str, root: Path, language: Path, tmp_path: Path) -> None:
    recipe: Blip2Run = getattr(systems, name.replace("-", "_"))()
    assert recipe.vision is not None
    assert recipe.language is not None
    parts: dict[str, Any] = {
        "vision": replace(recipe.vision, source=str(root / "encoder"), layer=-1),
        "language": replace(recipe.language, source=str(language)),
    }
    if name == "resampler-mini":
        parts["connector"] = ResamplerConfig(num_queries=3, hidden_dim=24, num_layers=2, num_heads=2, mlp_dim=32)
        parts["projection"] = "mlp"
    if recipe.gated is not None:
        parts["gated"] = GatedConfig(num_layers=2, num_heads=2, mlp_dim=24)
    run: Blip2Run = small(recipe, root / "pairs.jsonl", tmp_path / "run", steps=2, **parts)
    train(run)
    model = openblip.load(run.out, device="cpu")
    assert model.tasks == {"caption", "answer", "chat"}
    assert not [name for name in model.model.state_dict() if name.startswith("qformer.")]
    encoder = openblip.load(root / "encoder", device="cpu").model.vision.state_dict()
    moved = {n for n, weight in model.model.vision.state_dict().items() if not torch.equal(weight, encoder[n])}
    assert bool(moved) == (name == "frozen-mini")
    model.save(tmp_path / "saved")
    again = openblip.load(tmp_path / "saved", device="cpu")
    assert again.fingerprint() == model.fingerprint()
    assert again.model.config == model.model.config
    texts = ["a red box on the left", "a blue box"]
    assert again.score_captions(images(root), texts) == model.score_captions(images(root), texts)
    assert again.caption(images(root)) == model.caption(images(root))
    assert model.features(images(root)).queries.shape[0] == 8
    assert len(model.answer(images(root), "what color is it?")) == 8
    with pytest.raises(CheckpointError, match="save as openblip"):
        model.save(tmp_path / "other", format="huggingface")
    with pytest.raises(UnsupportedTaskError, match="no attention that could be shown"):
        model.explain(images(root)[0])
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert with_settings(recipe, saved) == run


def test_systems_have_the_size_of_the_models_around_them() -> None:
    run = systems.flamingo_base()
    assert run.connector == ResamplerConfig()
    config = Blip2Config(
        vision=VisionConfig(), heads=("llm",), connector=run.connector, gated=run.gated,
        language=LanguageConfig(name="facebook/opt-2.7b", hidden_dim=2560, end_of_text="\n"),
    )  # fmt: skip
    with torch.device("meta"):
        layers = Blip2(config).gating.layers
    assert len(layers) == 8  # of OPT's 32
    assert sum(p.numel() for p in layers.parameters()) == pytest.approx(8 * 12 * 2560**2, rel=0.001)
    plan = Plan(root=Path("/out"), preset=base_preset(), data=AblationData(source="web", human="human"), seed=0)
    rows = variants(plan)
    for label, hidden_dim in (("Frozen", 2560), ("a layer over each patch", 2560), ("resampler", 1024)):
        job = plan.jobs[Path(rows[label].model).parts[-2]]
        assert isinstance(job, TrainingJob)
        assert isinstance(job.run, Blip2Run)
        assert job.run.connector is not None
        assert asdict(job.run.connector)["hidden_dim"] == hidden_dim


def images(root: Path) -> list[str]:
    return [str(root / f"{color}-{side}.png") for color in COLORS for side in ("left", "right")]


@pytest.mark.parametrize("name", CALLS)
def test_a_system_is_read_back_as_it_was_trained(name: str, root: Path, tmp_path: Path) -> None:
    run = system(name, root, tmp_path / "run", steps=2)
    train(run)
    model = openblip.load(run.out, device="cpu")
    assert model.tasks == CALLS[name]
    model.save(tmp_path / "saved")
    again = openblip.load(tmp_path / "saved", device="cpu")
    assert again.fingerprint() == model.fingerprint()
    texts = ["a red box on the left", "a blue box"]
    for call in ("similarity", "match_matrix"):
        if call in model.tasks:
            assert torch.equal(getattr(again, call)(images(root), texts), getattr(model, call)(images(root), texts))
    if "caption" in model.tasks:
        assert again.caption(images(root)) == model.caption(images(root))
        assert again.score_captions(images(root), texts) == model.score_captions(images(root), texts)


@pytest.mark.slow
def test_a_decoder_of_prefixes_learns_to_caption_and_to_rank(root: Path, tmp_path: Path) -> None:
    simvlm = system("simvlm-mini", root, tmp_path / "simvlm", steps=80)
    assert_fallen(train(simvlm), 0.4)
    model = openblip.load(simvlm.out, device="cpu")
    expected = [f"a {color} box on the {side}" for color in COLORS for side in ("left", "right")]
    written = model.caption(images(root), return_scores=True)
    assert sum(each.text == caption for each, caption in zip(written, expected, strict=True)) >= 4  # by chance 1
    given = model.score_captions(images(root), [[each.text] for each in written])
    assert [score.logprob for (score,) in given] == pytest.approx([each.logprob for each in written], abs=1e-3)
    assert evaluate_retrieval(model, open_source(str(root / "pairs.jsonl")))["lm"]["ir_r1"] > 0.4


def test_a_locked_image_encoder_stays_as_it_was(root: Path, tmp_path: Path) -> None:
    """Also in bfloat16, in which the rest of the model is trained."""
    run = system("lit-mini", root, tmp_path / "run", steps=2)
    run = replace(run, training=replace(run.training, dtype="bfloat16"))
    train(run)
    trained, encoder = (openblip.load(folder, device="cpu").model for folder in (run.out, root / "encoder"))
    for name, weight in encoder.vision.state_dict().items():
        assert torch.equal(trained.vision.state_dict()[name], weight), name
    state = next((tmp_path / "run" / "checkpoints").glob("step_*"))
    names = torch.load(state / "task.pt", weights_only=True)
    assert not [name for name in names if name.startswith("model.vision.")]
    with pytest.raises(ConfigError, match="must come from --vision-init or --init"):
        replace(run, vision_init=None).check()
