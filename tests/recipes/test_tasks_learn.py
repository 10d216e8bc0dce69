"""Every task, from its recipe to its scores, learns a few emoji scenes by heart within seconds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import assert_fallen, small, train, untrained, usable, write_samples, write_scenes

import openblip
from openblip.data.sample import Sample, Source
from openblip.evaluation.captioning import evaluate_captioning
from openblip.evaluation.classification import evaluate_classification
from openblip.evaluation.nlvr import evaluate_nlvr
from openblip.evaluation.question_answering import evaluate_question_answering
from openblip.evaluation.retrieval import evaluate_retrieval
from openblip.evaluation.visdial import evaluate_visdial
from openblip.metrics import captioning
from openblip.recipes import mini
from openblip.recipes.run import BlipRun
from openblip.tasks.config import ContrastiveConfig, RetrievalConfig, VisdialConfig

pytestmark = pytest.mark.slow


def trained(
    run: BlipRun, source: Source, folder: Path, *, steps: int, batch_size: int, fallen_to: float, width: int = 64
) -> Any:
    """The model, whose losses have fallen to a share of the first ones."""
    init, rates = str(untrained(folder / "init", source, width)), {"learning_rate": 2e-3, "muon_learning_rate": 1e-2}
    run = small(run, source.name, folder / "run", steps=steps, batch_size=batch_size, init=init, **rates)
    assert_fallen(train(run), fallen_to)
    return openblip.load(f"{run.out}/model", device="cpu")


def without_queue(run: BlipRun) -> BlipRun:
    """A queue of a few pairs, each many times over, would only be in the way."""
    contrastive = ContrastiveConfig(queue_size=0, momentum=0.9, alpha=0.0)
    return replace(run, task=RetrievalConfig(contrastive=contrastive))


def asked_for_backgrounds(source: Source) -> list[Sample]:
    """One question for all images: only these tell its answer."""
    backgrounds = [sample for sample in usable(source) if sample.info["question_kind"] == "background"]
    return [replace(s, info={**s.info, "question": "what color is it?"}) for s in backgrounds]


def test_captioning_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(captioning, "java_runs", lambda: False)
    source = write_scenes(tmp_path / "scenes", "captions", 12)
    model = trained(mini.blip_mini_captioner(), source, tmp_path, steps=80, batch_size=12, fallen_to=0.3)
    scores = evaluate_captioning(model, source)
    assert scores["cider"] > 150
    assert scores["bleu_4"] > 0.5


def test_retrieval_learns_and_classifies(tmp_path: Path) -> None:
    source = write_scenes(tmp_path / "scenes", "classes", 16)
    model = trained(without_queue(mini.blip_mini_filter()), source, tmp_path, steps=60, batch_size=16, fallen_to=0.5)
    scores = evaluate_retrieval(model, source, rerank=4)
    for way in ("itc", "itm"):  # by chance 1 / 16
        assert scores[way]["tr_r1"] > 0.7
        assert scores[way]["ir_r1"] > 0.7
    classified = evaluate_classification(model, source, templates=["there is a {}", "a big {}"])
    assert classified["top1"] > 4 / classified["num_classes"]


def test_questions_learn_from_images_of_another_width(tmp_path: Path) -> None:
    same = asked_for_backgrounds(write_scenes(tmp_path / "scenes", "questions", 110))
    source = write_samples(tmp_path / "backgrounds", same)
    assert len(same) >= 8
    model = trained(mini.blip_mini_vqa(), source, tmp_path, steps=100, batch_size=len(same), width=48, fallen_to=0.3)
    answers = [sample.info["answers"][0] for sample in same]
    chance = max(answers.count(answer) for answer in answers) / len(answers)
    assert chance < 0.4
    written = evaluate_question_answering(model, source)
    ranked = evaluate_question_answering(model, source, candidates=sorted(set(answers)))
    assert written["vqa_accuracy"] > 0.85
    assert ranked["vqa_accuracy"] > 0.85


def test_statements_learn_from_both_images(tmp_path: Path) -> None:
    """One statement for all pairs, and every image in a true and in a false one: it takes both to tell."""
    stated = usable(write_scenes(tmp_path / "scenes", "statements", 8))
    pairs = []
    for place, one in enumerate(stated):
        for other in (one, stated[place - 1]):
            info = {**one.info, "statement": "the images belong together", "label": one is other}
            pairs.append(replace(one, second_image=other.second_image, info=info))
    source = write_samples(tmp_path / "pairs", pairs)
    model = trained(mini.blip_mini_nlvr(), source, tmp_path, steps=150, batch_size=16, fallen_to=0.3)
    assert evaluate_nlvr(model, source)["accuracy"] > 0.9


def test_dialogs_learn(tmp_path: Path) -> None:
    source = write_scenes(tmp_path / "scenes", "dialogs", 5)
    run = replace(mini.blip_mini_visdial(), task=VisdialConfig(num_negatives=7))
    model = trained(run, source, tmp_path, steps=60, batch_size=15, fallen_to=0.5)
    scores = evaluate_visdial(model, source)
    assert scores["num_rounds"] >= 20
    assert scores["mrr"] > 0.3  # by chance 0.05
    assert scores["mean_rank"] < 12  # by chance 50


def test_clips_are_retrieved(tmp_path: Path) -> None:
    source = write_scenes(tmp_path / "scenes", "clips", 8)
    run = without_queue(mini.blip_mini_video_retrieval())
    model = trained(run, source, tmp_path, steps=40, batch_size=8, fallen_to=0.6)
    scores = evaluate_retrieval(model, source, rerank=2, num_frames=mini.NUM_FRAMES)
    assert scores["itc"]["tr_r1"] > 0.7  # by chance 1 / 8
    assert scores["itm"]["ir_r1"] > 0.7


def test_questions_about_clips_learn(tmp_path: Path) -> None:
    same = asked_for_backgrounds(write_scenes(tmp_path / "scenes", "clip-questions", 50))[:8]
    source = write_samples(tmp_path / "backgrounds", same, suffix="mp4")
    model = trained(mini.blip_mini_video_qa(), source, tmp_path, steps=40, batch_size=8, fallen_to=0.4)
    answers = [sample.info["answers"][0] for sample in same]
    assert max(answers.count(answer) for answer in answers) / len(answers) < 0.5
    scores = evaluate_question_answering(model, source, num_frames=mini.NUM_FRAMES)
    assert scores["vqa_accuracy"] > 0.8
