"""The benchmarks by name. A new benchmark adds one entry."""

from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

from openblip.data.reader import items_without_images
from openblip.data.sample import Reject, Sample, Source, unused_line
from openblip.data.texts import answers_of, label_of, open_rounds
from openblip.errors import NoSampleError, SourceError
from openblip.evaluation.captioning import evaluate_captioning, reference_captions
from openblip.evaluation.classification import evaluate_classification
from openblip.evaluation.filtering import evaluate_filter
from openblip.evaluation.nlvr import evaluate_nlvr
from openblip.evaluation.question_answering import evaluate_question_answering
from openblip.evaluation.retrieval import evaluate_retrieval
from openblip.evaluation.visdial import evaluate_visdial


class Benchmark(NamedTuple):
    """How a model is measured on one kind of data."""

    evaluate: Callable[..., dict[str, Any]]
    best_by: tuple[str, ...]
    """The score by which models compare: the first of these that the annotations of the data allow."""
    annotations: str
    """What samples are scored by."""
    has_truth: Callable[[Sample], object]
    """Whether a sample has it; may raise `SourceError`."""
    num_frames: int | None = None
    """Of a video, in the paper (BLIP section 5.6); None for a benchmark of images only."""

    def require_truth(self, source: Source, limit: int | None = None) -> None:
        """Raise `SourceError` unless one of the first `limit` samples can be scored, `NoSampleError` when there is no
        sample. No image is read.
        """
        has_sample, rejects = False, list[Reject]()
        for item in islice(items_without_images(source), limit):
            if isinstance(item, Sample):
                has_sample = True
                try:
                    if self.has_truth(item):
                        return
                    continue
                except SourceError as error:
                    item = Reject(item.shard, item.key, str(error))
            rejects = [*rejects, item][:3]
        unused = unused_line([source.count_unused()])
        reasons = "".join(f"; {reason}" for reason in [*rejects, unused] if reason)
        message = f"{source.name}: no sample has {self.annotations}, so there is nothing to score{reasons}"
        raise (SourceError if has_sample else NoSampleError)(message)


# The released code chooses its best model by the mean of all recalls after re-ranking, by BLEU-4 + CIDEr, and by
# accuracy; here CIDEr alone chooses captioners.
BENCHMARKS = {
    "caption": Benchmark(evaluate_captioning, ("cider",), "captions", reference_captions),
    "retrieval": Benchmark(
        evaluate_retrieval, ("itm/r_mean", "itc/r_mean", "lm/r_mean"), "captions", lambda sample: sample.captions, 8
    ),
    "filter": Benchmark(evaluate_filter, ("auc",), "a `noise` field", lambda sample: "noise" in sample.info),
    "vqa": Benchmark(
        evaluate_question_answering,
        ("vqa_accuracy", "accuracy", "direct_answer_accuracy", "multiple_choice_accuracy"),
        "answers",
        lambda sample: answers_of(sample) or sample.info.get("correct_choice") is not None,
        16,
    ),
    "nlvr": Benchmark(evaluate_nlvr, ("accuracy",), "a label", lambda sample: label_of(sample) is not None),
    "visdial": Benchmark(
        evaluate_visdial,
        ("mrr", "ndcg"),
        "right answers",
        lambda sample: any(each.answer_index is not None or each.relevance for each in open_rounds(sample)),
    ),
    "classification": Benchmark(evaluate_classification, ("top1",), "a label", lambda sample: "label" in sample.info),
}
