"""`openblip evaluate`: a model's scores on a data source."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import tyro

from openblip.cli.listed_texts import read_named_texts, read_texts
from openblip.errors import ConfigError
from openblip.generation.decoding import Beam

if TYPE_CHECKING:
    from openblip.data.sources import Source
    from openblip.predictor import BasePredictor

Task = Literal[
    "caption",
    "retrieval",
    "filter",
    "vqa",
    "nlvr",
    "visdial",
    "video-retrieval",
    "video-qa",
    "classification",
]
LISTS = ("predictions", "results", "rejects")  # written, not printed


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What only some of the tasks look at."""

    rerank: int = 16
    """Retrieval: how many of the best by ITC are ordered anew by ITM (paper: COCO 256, Flickr30k 128)."""
    threshold: float = 0.5
    """Filter: texts with an ITM probability above this are kept."""
    answers: Path | None = None
    """Questions: a JSON list of answers to rank; answers are written when not given."""
    classes: Path | None = None
    """Classification: a JSON list of the classes, or an object with the text for each label."""
    templates: Path | None = None
    """Classification: a JSON list of texts with {} for the class."""
    num_frames: int | None = None
    """Video: frames of a clip; 8 for retrieval and 16 for questions when not given (paper)."""

    num_beams: int | None = None
    """Captions and answers: texts kept while writing; 3, for answers of BLIP-2 5 when not given."""
    max_new_tokens: int | None = None
    """Captions and answers: the most tokens; 20 and 10 when not given (released code)."""
    min_new_tokens: int | None = None
    """Captions and answers: the fewest tokens; 0 and 1 when not given (the paper's COCO captions: 5)."""

    def __post_init__(self) -> None:
        if self.rerank < 1 or (self.num_frames is not None and self.num_frames < 1):
            raise ConfigError("--rerank and --num-frames must be at least 1")

    def beam(self, usual: Beam) -> Beam:
        """How texts are written, as usual where nothing was given."""
        lengths = {"max_new_tokens": self.max_new_tokens, "min_new_tokens": self.min_new_tokens}
        given = {"num_beams": self.num_beams, **lengths}
        return replace(usual, **{name: value for name, value in given.items() if value is not None})

    def listed_answers(self) -> list[str] | None:
        """The answers to rank; None to write them."""
        return None if self.answers is None else read_texts(self.answers, "answers")

    def class_texts(self) -> dict[str, Any]:
        """What `evaluate_classification` is told of classes and templates."""
        told: dict[str, Any] = {}
        if self.templates is not None:
            told["templates"] = read_texts(self.templates, "templates")
        if self.classes is not None:
            told["classes"] = read_named_texts(self.classes, "classes")
        return told


def command(
    task: Annotated[Task, tyro.conf.Positional, tyro.conf.arg(metavar="|".join(get_args(Task)))],
    /,
    *,
    model: str,
    data: str,
    out: Path | None = None,
    results: Path | None = None,
    images: str | None = None,
    limit: int | None = None,
    options: Annotated[TaskOptions, tyro.conf.arg(name="")] = TaskOptions(),
    batch_size: int | None = None,
    device: str | None = None,
) -> int:
    """Measures a model on a data source and prints the scores as JSON; under torchrun, on many processes.

    caption: CIDEr, BLEU, METEOR, ROUGE-L, SPICE and exact match of one caption per image.
    retrieval, video-retrieval: R@1, R@5 and R@10 of texts for images and of images for texts, by ITC, and
    re-ranked by ITM.
    filter: AUC, precision and recall of the ITM filter, on data whose `noise` field says what is true.
    vqa, video-qa: VQA's accuracy of written answers, or of the best in a list.
    nlvr: accuracy of statements about two pictures.
    visdial: NDCG, MRR and R@k of the right answers among candidates.
    classification: zero-shot accuracy, the classes described by templates.

    Args:
        task: what to measure.
        model: a checkpoint folder, or the name of a shipped model.
        data: any one data source.
        out: write the scores, the predictions and what was skipped to this JSON file as well.
        results: write the predictions to this JSON file as the data set's evaluation server takes them.
        images: the folder of the pictures or clips that an annotation file names.
        limit: use only the first so many samples.
        options: settings of single tasks.
        batch_size: images in one step of the model.
        device: "cpu", "cuda", "cuda:1" …; the best there is when not given.
    """
    import openblip
    from openblip.data.sources import open_source
    from openblip.distributed import process_group

    if limit is not None and limit < 1:
        raise ConfigError("--limit must be at least 1")
    if results is not None and task not in ("caption", "vqa", "video-qa", "visdial"):
        raise ConfigError(f"--results: {task} has no server that takes results; use --out")
    with process_group() as process:
        source = open_source(data, images=images)
        where = device or (str(process.device) if process.world_size > 1 else None)
        predictor = openblip.load(model, device=where)
        scores = _measure(task, predictor, source, options, limit, batch_size)
        if not process.is_main:
            return 0  # torchrun ends all processes when one fails, also the one that still writes
        _report({"task": task, "model": model, "data": data}, scores, out, results)
    return 1 if scores["num_rejects"] else 0


def _measure(
    task: Task,
    model: "BasePredictor",
    source: "Source",
    options: TaskOptions,
    limit: int | None,
    batch_size: int | None,
) -> dict[str, Any]:
    common: dict[str, Any] = {"limit": limit, "batch_size": batch_size}
    match task:
        case "caption":
            from openblip.evaluation.captioning import evaluate_captioning

            return evaluate_captioning(model, source, decoding=options.beam(Beam()), **common)
        case "retrieval" | "video-retrieval":
            from openblip.evaluation.retrieval import evaluate_retrieval

            frames = None if task == "retrieval" else options.num_frames or 8
            return evaluate_retrieval(model, source, rerank=options.rerank, num_frames=frames, **common)
        case "filter":
            from openblip.evaluation.filtering import evaluate_filter

            return evaluate_filter(model, source, threshold=options.threshold, **common)
        case "vqa" | "video-qa":
            from openblip.evaluation.question_answering import evaluate_question_answering

            return evaluate_question_answering(
                model,
                source,
                candidates=options.listed_answers(),
                num_frames=None if task == "vqa" else options.num_frames or 16,
                decoding=options.beam(model.answer_decoding),
                **common,
            )
        case "nlvr":
            from openblip.evaluation.nlvr import evaluate_nlvr

            return evaluate_nlvr(model, source, **common)
        case "visdial":
            from openblip.evaluation.visdial import evaluate_visdial

            return evaluate_visdial(model, source, **common)
        case "classification":
            from openblip.evaluation.classification import evaluate_classification

            return evaluate_classification(model, source, **options.class_texts(), **common)


def _report(asked: dict[str, str], scores: dict[str, Any], out: Path | None, results: Path | None) -> None:
    if out is not None:
        _write(out, {**asked, **scores})
    if results is not None:
        _write(results, scores["results"])
    print(json.dumps({name: value for name, value in scores.items() if name not in LISTS}, indent=2))
    for reject in scores["rejects"]:
        print(f"skipped {reject['shard']}/{reject['key']}: {reject['reason']}", file=sys.stderr)


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
