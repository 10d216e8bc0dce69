"""`openblip evaluate`: a model's scores on a data source."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from openblip.errors import ConfigError

if TYPE_CHECKING:
    from openblip.data.sources import Source
    from openblip.predictor import Predictor

Task = Literal["caption", "retrieval", "filter"]


def command(
    task: Annotated[Task, tyro.conf.Positional, tyro.conf.arg(metavar="caption|retrieval|filter")],
    /,
    *,
    model: str,
    data: str,
    out: Path | None = None,
    images: str | None = None,
    limit: int | None = None,
    threshold: float = 0.5,
    rerank: int = 16,
    batch_size: int | None = None,
    device: str | None = None,
) -> int:
    """Measures a model on a data source and prints the scores as JSON.

    caption: CIDEr, BLEU and exact match of one caption per image (beam search, three beams).
    retrieval: R@1, R@5 and R@10 of texts for images and of images for texts, by ITC, and re-ranked by ITM.
    filter: AUC, precision and recall of the ITM filter, on data whose `noise` field says what is true.

    Args:
        task: what to measure.
        model: a checkpoint folder, or the name of a shipped model.
        data: any one data source.
        out: write the scores, and the captions for caption, to this JSON file as well.
        images: the image folder of a COCO captions file.
        limit: use only the first so many samples.
        threshold: filter: texts with an ITM probability above this are kept.
        rerank: retrieval: how many of the best by ITC are ordered anew by ITM.
        batch_size: images in one step of the model.
        device: "cpu", "cuda", "cuda:1" …; the best there is when not given.
    """
    import openblip
    from openblip.data.sources import open_source

    if (limit is not None and limit < 1) or rerank < 1:
        raise ConfigError("--limit and --rerank must be at least 1")
    source = open_source(data, images=images)
    predictor = openblip.load(model, device=device)
    scores = _measure(
        task, predictor, source, threshold=threshold, rerank=rerank, limit=limit, batch_size=batch_size
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        whole = {"task": task, "model": model, "data": data, **scores}
        out.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in scores.items() if name != "predictions"}, indent=2))
    if scores["num_rejects"]:
        print(f"{scores['num_rejects']} samples could not be used", file=sys.stderr)
    return 0


def _measure(
    task: Task,
    predictor: "Predictor",
    source: "Source",
    *,
    threshold: float,
    rerank: int,
    limit: int | None,
    batch_size: int | None,
) -> dict[str, Any]:
    from openblip.tasks.evaluation import evaluate_captioning, evaluate_filter, evaluate_retrieval

    match task:
        case "caption":
            return evaluate_captioning(predictor, source, limit=limit, batch_size=batch_size)
        case "retrieval":
            return evaluate_retrieval(predictor, source, rerank=rerank, limit=limit, batch_size=batch_size)
        case "filter":
            return evaluate_filter(predictor, source, threshold=threshold, limit=limit, batch_size=batch_size)
