"""Validation of a model while it is trained: the benchmark of each task, and the score by which models compare."""

from collections.abc import Callable
from typing import Any, NamedTuple

from openblip.checkpoints.checkpoint import Blip2Checkpoint
from openblip.data.config import DataConfig
from openblip.data.sources import open_source
from openblip.errors import ConfigError
from openblip.evaluation.captioning import evaluate_captioning
from openblip.evaluation.nlvr import evaluate_nlvr
from openblip.evaluation.question_answering import evaluate_question_answering
from openblip.evaluation.retrieval import evaluate_retrieval
from openblip.evaluation.visdial import evaluate_visdial
from openblip.predictor import BasePredictor, Blip2Predictor, BlipPredictor
from openblip.tasks import config as tasks


class Benchmark(NamedTuple):
    """How a task is measured."""

    evaluate: Callable[..., dict[str, Any]]
    best_by: tuple[str, ...]
    """The score by which models compare: the first of these that the annotations of the data allow."""
    takes_videos: bool = False


def _answer(predictor: BasePredictor, source: Any, **settings: Any) -> dict[str, Any]:
    return evaluate_question_answering(predictor, source, decoding=predictor.answer_decoding, **settings)


# The released code chooses its best model by the mean of all recalls after re-ranking, by BLEU-4 + CIDEr, and by
# accuracy; here CIDEr alone chooses captioners.
RETRIEVAL = Benchmark(evaluate_retrieval, ("itm/r_mean",), takes_videos=True)
CAPTIONING = Benchmark(evaluate_captioning, ("cider",))
ACCURACIES = ("vqa_accuracy", "accuracy", "direct_answer_accuracy", "multiple_choice_accuracy")
ANSWERING = Benchmark(_answer, ACCURACIES, takes_videos=True)

BENCHMARKS: dict[type, Benchmark] = {
    tasks.PretrainingConfig: RETRIEVAL,
    tasks.RetrievalConfig: RETRIEVAL,
    tasks.CaptioningConfig: CAPTIONING,
    tasks.QuestionAnsweringConfig: ANSWERING,
    tasks.NlvrConfig: Benchmark(evaluate_nlvr, ("accuracy",)),
    tasks.VisdialConfig: Benchmark(evaluate_visdial, ("mrr", "ndcg")),
    tasks.Blip2Stage1Config: RETRIEVAL,
    tasks.Blip2Stage2Config: CAPTIONING,
    tasks.PromptedAnsweringConfig: ANSWERING,
    tasks.InstructionConfig: ANSWERING,
}


def make_validation(task: Any, data: DataConfig, checkpoint: Any) -> Callable[[], dict[str, float]]:
    """A function that measures the model of a checkpoint, with the weights that it has then, by the task's benchmark.

    The predictor around the model neither moves nor casts it. `score` among the results is the one by which models
    compare. Raises ConfigError for a task without a benchmark, and for videos where the benchmark is of images.
    """
    benchmark = BENCHMARKS.get(type(task))
    if benchmark is None:
        raise ConfigError("This task has no benchmark: leave out --training.validate-every.")
    if data.num_frames is not None and not benchmark.takes_videos:
        raise ConfigError("This task is measured on images only: leave out --training.validate-every.")
    frames = {"num_frames": data.num_frames} if benchmark.takes_videos else {}
    assert data.validation is not None  # `Run.check` has seen to it
    source = open_source(data.validation, images=data.images)
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
