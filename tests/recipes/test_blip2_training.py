"""BLIP-2 from stage 1 to every fine-tuning: each learns a few images by heart within seconds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
from safetensors.torch import load_file
from small_runs import COLOR_QUESTION, SIDE_QUESTION, assert_fallen, fine_tuning_run, train

import openblip
from openblip.checkpoints.backbones import load_language_model
from openblip.data.config import Augmentation
from openblip.data.sources import open_source
from openblip.evaluation.retrieval import evaluate_retrieval
from openblip.recipes.blip2 import blip2_caption, blip2_instruct, blip2_retrieval, blip2_vqa
from openblip.training.run_folder import RunFolder
from shared_files import read_lines

pytestmark = pytest.mark.slow


def load(root: Path, name: str) -> Any:
    return openblip.load(root / name / "model", device="cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world, its language models, and the models of both stages."""
    root = tmp_path_factory.mktemp("blip2")
    small_runs.write_boxes(root)
    assert_fallen(train(small_runs.stage1_run(root)), 0.4)
    assert_fallen(train(small_runs.language_run(root, "opt")), 0.2)
    assert_fallen(train(small_runs.stage2_run(root, "opt")), 0.4)
    assert_fallen(train(small_runs.language_run(root, "t5", steps=200)), 0.2)
    assert_fallen(train(small_runs.stage2_run(root, "t5")), 0.7)
    return root


def images(root: Path) -> list[str]:
    return [str(root / row["image"]) for row in read_lines(root / "pairs.jsonl")]


def captions(root: Path) -> list[str]:
    return [row["caption"] for row in read_lines(root / "pairs.jsonl")]


def assert_colors(words: list[str], root: Path) -> None:
    """Nearly every color: by chance one of four."""
    truth = [caption.split()[1] for caption in captions(root)]
    assert sum(word == color for word, color in zip(words, truth, strict=True)) >= 6, words


def first_word(text: str) -> str:
    """The answer: so small a language model goes on with what its texts have behind it."""
    return text.split()[0].rstrip(".")


def assert_found(scores: dict[str, Any]) -> None:
    for way in ("itc", "itm"):  # by chance 1 / 8
        assert scores[way]["tr_r1"] > 0.8
        assert scores[way]["ir_r1"] > 0.8


def test_stage_1_retrieves_and_writes(root: Path) -> None:
    model = load(root, "blip2-mini-stage1")
    assert_found(evaluate_retrieval(model, open_source(str(root / "pairs.jsonl")), rerank=4))
    written = model.caption(images(root))
    assert sum(map(str.__eq__, written, captions(root))) >= 6


def test_stage_2_makes_a_language_model_see(root: Path) -> None:
    model = load(root, "blip2-mini-stage2-opt")
    assert_colors([caption.split()[1] for caption in model.caption(images(root), prompt="")], root)


def test_an_encoder_decoder_goes_on_with_what_it_sees(root: Path) -> None:
    """Of each image the true caption is likelier than the one with the other side."""
    model, true = load(root, "blip2-mini-stage2-t5"), captions(root)
    other = [text.replace("left", "RIGHT").replace("right", "left").replace("RIGHT", "right") for text in true]
    scores = model.score_captions(images(root), [*map(list, zip(true, other, strict=True))])
    assert sum(right.logprob > wrong.logprob for right, wrong in scores) >= 7  # by chance 4 of 8


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_language_models_stay_as_they_were(root: Path, kind: str) -> None:
    frozen = load_language_model(root / f"blip2-mini-{kind}" / "model").model.state_dict()
    after = load(root, f"blip2-mini-stage2-{kind}").model.language.model.state_dict()
    assert after.keys() == frozen.keys()
    assert all(torch.equal(weight, frozen[name]) for name, weight in after.items())


def test_captions_after_a_prompt_with_a_trained_encoder(root: Path) -> None:
    run = fine_tuning_run(blip2_caption(), root, "blip2-mini-stage2-opt", 60)
    run = replace(run, training=replace(run.training, layer_decay=0.4))
    assert_fallen(train(run), 0.9)
    model, start_model = load(root, "blip2-caption"), load(root, "blip2-mini-stage2-opt")
    assert model.preprocessing.image_size == run.image_size
    assert model.prompt == "a photo of"
    moved = {
        name: float((weight - start_model.model.state_dict()[name]).abs().mean())
        for name, weight in model.model.state_dict().items()
        if name.endswith("mlp.0.weight") and name.startswith("vision.")
    }
    last, first = (moved[f"vision.blocks.{i}.mlp.0.weight"] for i in (1, 0))
    assert first > 0
    assert last > 1.5 * first  # learning rates of 0.4 and 0.16
    written = model.caption(images(root))
    assert all(text.startswith("a ") and " box on the " in text for text in written), written
    assert_colors([text.split()[1] for text in written], root)


def test_questions_are_answered_with_the_qformer_reading_them(root: Path) -> None:
    branch = str(root / "blip2-mini-stage1" / "model")
    run = fine_tuning_run(blip2_vqa(), root, "blip2-mini-stage2-opt", 50, text_branch=branch)
    assert_fallen(train(run), 0.7)
    model = load(root, "blip2-vqa")
    assert model.model.config.instructed
    assert model.tokenizer is not None
    answers = model.answer(images(root), [COLOR_QUESTION] * 8)
    assert_colors([first_word(answer) for answer in answers], root)


def test_retrieval_with_a_trained_encoder(root: Path) -> None:
    run = fine_tuning_run(blip2_retrieval(), root, "blip2-mini-stage1", 15)
    train(run)
    model = load(root, "blip2-retrieval")
    assert model.model.config.heads == ("itc", "itm", "itg")
    assert_found(evaluate_retrieval(model, open_source(str(root / "pairs.jsonl")), rerank=4))


def test_conversations_are_followed(root: Path) -> None:
    branch = str(root / "blip2-mini-stage1" / "model")
    run = fine_tuning_run(blip2_instruct(), root, "blip2-mini-stage2-opt", 60, text_branch=branch)
    assert_fallen(train(run), 0.7)
    model = load(root, "blip2-instruct")
    assert_colors([first_word(reply) for reply in model.chat(images(root), [COLOR_QUESTION] * 8)], root)
    told = [[(COLOR_QUESTION, caption.split()[1]), SIDE_QUESTION] for caption in captions(root)]
    assert set(model.chat(images(root), told)) <= {"left", "right"}


class CutOffError(BaseException):
    """What nothing catches, as a kill."""


@pytest.mark.parametrize("stage", ["stage1", "stage2-t5"])
def test_a_run_that_is_cut_off_goes_on_exactly(
    root: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all that is random: views, dropout, negatives, cuts of texts."""
    run = small_runs.stage1_run(root) if stage == "stage1" else small_runs.stage2_run(root, "t5")
    run = replace(
        run,
        qformer=None if run.qformer is None else replace(run.qformer, dropout=0.1),
        data=replace(run.data, augmentation=Augmentation()),
        training=replace(run.training, steps=5, checkpoint_every=3),
    )
    whole = train(replace(run, out=str(tmp_path / "whole")))
    cut = replace(run, out=str(tmp_path / "cut"))
    log = RunFolder.log

    def log_and_stop(folder: RunFolder, record: dict[str, Any]) -> None:
        log(folder, record)
        if record["step"] == 4:
            raise CutOffError

    monkeypatch.setattr(RunFolder, "log", log_and_stop)
    with pytest.raises(CutOffError):
        cut.train()
    monkeypatch.undo()
    assert cut.train(resume=True)
    assert [line["loss"] for line in read_lines(tmp_path / "cut" / "metrics.jsonl")] == whole
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    saved = torch.load(tmp_path / "cut" / "checkpoints" / "step_00000003" / "task.pt", weights_only=True)
    assert not any(name.startswith(("model.vision.", "model.language.")) for name in saved)
