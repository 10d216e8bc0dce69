"""Validation of a model while it is trained: the benchmark of each task, and the score by which models compare."""

from collections.abc import Callable
from typing import Any

from openblip.checkpoints.checkpoint import Blip2Checkpoint
from openblip.data.config import DataConfig
from openblip.data.sources import open_source, require_texts
from openblip.errors import ConfigError
from openblip.evaluation.catalog import BENCHMARKS
from openblip.predictor import Blip2Predictor, BlipPredictor
from openblip.tasks import config as tasks

BENCHMARK_OF_TASK = {
    tasks.PretrainingConfig: "retrieval",
    tasks.RetrievalConfig: "retrieval",
    tasks.PrefixConfig: "caption",
    tasks.CaptioningConfig: "caption",
    tasks.QuestionAnsweringConfig: "vqa",
    tasks.NlvrConfig: "nlvr",
    tasks.VisdialConfig: "visdial",
    tasks.Blip2Stage1Config: "retrieval",
    tasks.Blip2Stage2Config: "caption",
    tasks.PromptedAnsweringConfig: "vqa",
    tasks.InstructionConfig: "vqa",
}


def make_validation(task: Any, data: DataConfig, checkpoint: Any) -> Callable[[], dict[str, float]]:
    """A function that measures the model of a checkpoint, with the weights that it has then, by the task's benchmark.

    The predictor around the model neither moves nor casts it. `score` among the results is the one by which models
    compare. Raises ConfigError for a task without a benchmark, and for videos where the benchmark is of images;
    SourceError when nothing in the source can be scored.
    """
    if type(task) not in BENCHMARK_OF_TASK:
        raise ConfigError("This task has no benchmark: leave out --training.validate-every.")
    only_writes = getattr(task, "objectives", ()) == ("lm",)
    benchmark = BENCHMARKS["caption" if only_writes else BENCHMARK_OF_TASK[type(task)]]
    if data.num_frames is not None and benchmark.num_frames is None:
        raise ConfigError("This task is measured on images only: leave out --training.validate-every.")
    frames = {} if benchmark.num_frames is None else {"num_frames": data.num_frames}
    assert data.validation is not None  # `Run.check` has seen to it
    source = open_source(data.validation, **data.reading)
    require_texts([source])
    benchmark.require_truth(source, data.validation_limit)
    predictor = (Blip2Predictor if isinstance(checkpoint, Blip2Checkpoint) else BlipPredictor)(checkpoint)

    def validate() -> dict[str, float]:
        scores = flatten(benchmark.evaluate(predictor, source, limit=data.validation_limit, **frames))
        decisive = next((scores[name] for name in benchmark.best_by if name in scores), None)
        if decisive is None:
            raise ConfigError(
                f"{data.validation} has no annotations for {' or '.join(benchmark.best_by)}, by which the best "
                "model is chosen."
            )
        return {**scores, "score": decisive}

    return validate


def flatten(scores: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers among nested scores, with their path as name."""
    flat: dict[str, float] = {}
    for name, value in scores.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat[prefix + name] = float(value)
    return flat
