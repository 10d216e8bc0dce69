"""A run measures its model while it trains: with which benchmark, on which weights, and without a trace."""

import dataclasses
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_runs import small, untrained, write_scenes

import openblip
from openblip.errors import ConfigError, SourceError
from openblip.evaluation.retrieval import evaluate_retrieval
from openblip.recipes.mini import (
    blip2_mini_opt,
    blip2_mini_stage2_opt,
    blip_mini_captioner,
    blip_mini_filter,
    blip_mini_video_retrieval,
    blip_mini_vqa,
)
from openblip.recipes.validation import BENCHMARK_OF_TASK, flatten, make_validation
from openblip.tasks.catalog import TASKS
from openblip.tasks.config import LanguagePretrainingConfig

replace = dataclasses.replace


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    source = write_scenes(root / "scenes", "captions", 12)
    untrained(root / "init", source)
    return root, source


def run_of(world, out, validate_every=None, **data):
    root, source = world
    run = small(blip_mini_filter(), source.name, out, steps=4, batch_size=4, init=str(root / "init"))
    task = replace(run.task, contrastive=replace(run.task.contrastive, queue_size=8))
    training = replace(run.training, validate_every=validate_every, checkpoint_every=2)
    return replace(run, task=task, training=training, data=replace(run.data, **data))


def lines(run):
    return [json.loads(line) for line in Path(run.out, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_live_model_is_measured_and_nothing_else_changes(world, tmp_path):
    plain = run_of(world, tmp_path / "plain")
    validated = run_of(world, tmp_path / "validated", validate_every=2, validation=world[1].name)
    assert plain.train()
    assert validated.train()
    losses = [[line["loss"] for line in lines(run) if "loss" in line] for run in (plain, validated)]
    assert losses[0] == losses[1]
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("plain", "validated")]
    assert all(weight.equal(weights[1][name]) for name, weight in weights[0].items())

    scores = [line for line in lines(validated) if "validation/score" in line]
    assert [line["step"] for line in scores] == [2, 4]
    final = openblip.load(tmp_path / "validated" / "model", device="cpu")
    expected = flatten(evaluate_retrieval(final, world[1]))
    assert scores[-1] == {
        "step": 4,
        **{f"validation/{name}": value for name, value in expected.items()},
        "validation/score": expected["itm/r_mean"],
    }
    best = openblip.load(tmp_path / "validated" / "best", device="cpu")
    measured = flatten(evaluate_retrieval(best, world[1]))
    assert measured["itm/r_mean"] == max(line["validation/score"] for line in scores)


def test_a_validation_that_makes_no_sense_is_refused_before_the_first_step(world, tmp_path):
    name = world[1].name
    with pytest.raises(ConfigError, match=r"name a source with --data\.validation"):
        run_of(world, tmp_path, validate_every=2).check()
    with pytest.raises(ConfigError, match="say how many"):
        run_of(world, tmp_path, validation=name).check()
    with pytest.raises(SourceError, match="no sample has answers"):
        make_validation(blip_mini_vqa().task, replace(blip_mini_vqa().data, validation=name), None)
    language = blip2_mini_opt()
    with pytest.raises(ConfigError, match="has no benchmark"):
        make_validation(language.task, replace(language.data, validation=name), None)
    videos = replace(blip_mini_video_retrieval().data, validation=name)
    with pytest.raises(ConfigError, match="on images only"):
        make_validation(blip_mini_captioner().task, videos, None)
    with pytest.raises(ConfigError, match="shard_frozen"):
        replace(blip2_mini_stage2_opt().training, shard_frozen=True, validate_every=2)


def test_only_the_first_samples_are_used(world, tmp_path):
    run = run_of(world, tmp_path / "run", validate_every=4, validation=world[1].name, validation_limit=5)
    assert run.train()
    assert lines(run)[-1]["validation/num_images"] == 5


def test_every_task_with_images_has_a_benchmark():
    assert BENCHMARK_OF_TASK.keys() == TASKS.keys() - {LanguagePretrainingConfig}
