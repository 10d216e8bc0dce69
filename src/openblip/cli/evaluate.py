"""`openblip evaluate`: a model's scores on a data source."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from openblip.cli.options import ModelOptions, check_output, only_with, read_json_texts
from openblip.data.config import SourceOptions
from openblip.errors import Condition, ConfigError
from openblip.files import read_json, write_json
from openblip.generation.decoding import Beam

TaskName = Literal[
    "caption", "retrieval", "filter", "vqa", "nlvr", "visdial", "video-retrieval", "video-qa", "classification"
]
OF_VIDEOS = {"video-retrieval": "retrieval", "video-qa": "vqa"}  # and what they are called for images
SERVED = ("caption", "vqa", "video-qa", "visdial")  # whose data sets have an evaluation server


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options that only some of the tasks look at."""

    rerank: int = 16
    """Retrieval: how many of the best by ITC are re-ranked by ITM (paper: COCO 256, Flickr30k 128)."""
    threshold: float = 0.5
    """Filter: texts with an ITM probability above this are kept."""
    synonyms: Path | None = None
    """Captions: a JSON object with words for each name, which captions are read for to find objects that are not there;
    COCO's classes when not given, or the `objects` of the samples."""
    answers: Path | None = None
    """Questions: a JSON list of answers to rank; answers are written when not given."""
    classes: Path | None = None
    """Classification: a JSON list of the classes, or an object with the text for each label."""
    templates: Path | None = None
    """Classification: a JSON list of texts with {} for the class."""
    num_examples: int = 0
    """Questions: the first so many stand, with their answers, before each other one; for BLIP-2."""
    num_frames: int | None = None
    """Video: frames of a video; 8 for retrieval and 16 for questions when not given (paper)."""
    num_beams: int | None = None
    """Captions and answers: texts kept while writing; 3, for answers of BLIP-2 5 when not given."""
    max_new_tokens: int | None = None
    """Captions and answers: the most tokens; 20 and 10 when not given (released code)."""
    min_new_tokens: int | None = None
    """Captions and answers: the fewest tokens; 0 and 1 when not given (the paper's COCO captions: 5)."""
    no_repeat_ngram_size: int | None = None
    """Captions and answers: no so many tokens in a row occur twice; 0 (off) when not given."""

    def __post_init__(self) -> None:
        if self.rerank < 1 or self.num_examples < 0 or (self.num_frames is not None and self.num_frames < 1):
            raise ConfigError("--rerank and --num-frames must be at least 1, and --num-examples at least 0")

    def beam(self, default: Beam) -> Beam:
        """Return `default` with what is given."""
        names = ("num_beams", "max_new_tokens", "min_new_tokens", "no_repeat_ngram_size")
        return replace(default, **{n: value for n in names if (value := getattr(self, n)) is not None})


def _for_tasks(options: str, *tasks: str) -> Condition:
    return Condition(options, lambda o: o.task in tasks, f"it is for the tasks {', '.join(tasks)}")


@only_with(
    _for_tasks("rerank", "retrieval", "video-retrieval"),
    _for_tasks("threshold", "filter"),
    _for_tasks("synonyms", "caption"),
    _for_tasks("answers", "vqa", "video-qa"),
    _for_tasks("num-examples", "vqa"),
    _for_tasks("classes templates", "classification"),
    _for_tasks("num-frames", *OF_VIDEOS),
    _for_tasks("num-beams max-new-tokens min-new-tokens no-repeat-ngram-size", "caption", "vqa", "video-qa"),
    _for_tasks("encoder-token", *(task for task in get_args(TaskName) if task not in ("caption", "classification"))),
    Condition(
        "num-beams max-new-tokens min-new-tokens no-repeat-ngram-size",
        lambda o: o.tasks.answers is None,
        "with --answers no answer is written, one of them is chosen",
    ),
)
def command(
    task: Annotated[TaskName, tyro.conf.arg(metavar="|".join(get_args(TaskName)))],
    /,
    *,
    model: ModelOptions,
    data: str,
    out: Path | None = None,
    results: Path | None = None,
    reading: SourceOptions,
    limit: int | None = None,
    tasks: TaskOptions,
    batch_size: int | None = None,
    jpeg: Literal["exact", "scaled"] = "exact",
) -> int:
    """Measures a model on a data source and prints the scores as JSON; under torchrun, on many processes.

    - caption: CIDEr, BLEU, METEOR, ROUGE-L, SPICE and exact match of one caption per image, and what is not true in it.
    - retrieval, video-retrieval: R@1, R@5, R@10, mAP@R of texts for images and images for texts, re-ranked by ITM.
    - filter: AUC, curves, precision, recall and calibration, on data whose `noise` field says what is true.
    - vqa, video-qa: VQA's accuracy of written answers, or of the best in a list.
    - nlvr: accuracy of statements about two images.
    - visdial: NDCG, MRR and R@k of the right answers among candidates.
    - classification: zero-shot accuracy, the classes described by templates.

    CIDEr is printed as papers print it, 133.3; all other scores are shares, from 0 to 1.

    Args:
        task: what to measure.
        data: any data source, or several joined by commas.
        out: write the scores, the predictions and what was skipped to this JSON file as well.
        results: write the predictions to this JSON file as the data set's evaluation server takes them.
        limit: use only the first so many samples.
        batch_size: images in one step of the model.
        jpeg: how large JPEG files are decoded: exact, as the papers' scores were measured, or scaled, which is faster.
    """
    if limit is not None and limit < 1:
        raise ConfigError("--limit must be at least 1")
    for option, path in (("--out", out), ("--results", results)):
        if path is not None:
            check_output(option, path)
    if results is not None and task not in SERVED:
        raise ConfigError(f"--results: {task} has no server that takes results; use --out")
    from openblip.data.sample import Reject, unused_line
    from openblip.data.sources import check_options_used, open_source, require_texts
    from openblip.distributed import process_group
    from openblip.evaluation.catalog import BENCHMARKS
    from openblip.evaluation.run import without_lists

    benchmark = BENCHMARKS[OF_VIDEOS.get(task, task)]
    with process_group() as process:
        source = open_source(data, **reading.reading)
        check_options_used([source], reading)
        require_texts([source])
        if model.device is None and process.world_size > 1:
            model = replace(model, device=str(process.device))
        if results is None:  # a test split has no truth
            benchmark.require_truth(source, limit)
        predictor = model.load()
        predictor.scales_jpegs = jpeg == "scaled"
        settings = {"limit": limit, "batch_size": batch_size, **_settings(task, tasks, predictor.answer_decoding)}
        if task in OF_VIDEOS:
            settings["num_frames"] = tasks.num_frames or benchmark.num_frames
        scores = benchmark.evaluate(predictor, source, **settings)
        if not process.is_main:
            return 0  # torchrun ends all processes when one fails, also the one that still writes
        if out is not None:
            write_json(out, {"task": task, "model": model.model, "dtype": predictor.precision, "data": data, **scores})
        if results is not None:
            write_json(results, scores["results"])
        print(json.dumps(without_lists(scores), indent=2))
        if unused := unused_line([source.count_unused()]):
            print(unused, file=sys.stderr)
        for reject in scores["rejects"]:
            print(f"skipped {Reject(reject['shard'], reject['key'], reject['reason'])}", file=sys.stderr)
    return 1 if scores["num_rejects"] else 0


def _settings(task: TaskName, tasks: TaskOptions, answer_decoding: Beam) -> dict[str, Any]:
    """The settings of a benchmark in the options of the command."""
    match task:
        case "caption":
            from openblip.metrics.hallucination import parse_synonyms

            path = tasks.synonyms
            synonyms = None if path is None else parse_synonyms(read_json(path), str(path))
            return {"decoding": tasks.beam(Beam()), "synonyms": synonyms}
        case "retrieval" | "video-retrieval":
            return {"rerank": tasks.rerank}
        case "filter":
            return {"threshold": tasks.threshold}
        case "vqa" | "video-qa":
            candidates = read_json_texts(tasks.answers, "answers")
            decoding = tasks.beam(answer_decoding)
            return {"candidates": candidates, "decoding": decoding, "num_examples": tasks.num_examples}
        case "classification":
            templates = read_json_texts(tasks.templates, "templates")
            classes = read_json_texts(tasks.classes, "classes", may_be_named=True)
            if isinstance(classes, list):
                classes = {name: name for name in classes}
            return {"classes": classes, **({} if templates is None else {"templates": templates})}
    return {}
