"""How a language model of blip2-mini answers and captions from a text, before it sees any image.

    python benchmarks/language_answers.py FOLDER SOURCE [--limit N]

FOLDER is the model/ of `openblip train blip2-mini-opt` or `blip2-mini-t5`; SOURCE: scenes of kind documents.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from openblip.checkpoints.backbones import load_language_model
from openblip.data.sample import Sample, Source
from openblip.data.sources import open_source
from openblip.data.texts import answers_of, normalize_caption, text_field
from openblip.evaluation.captioning import reference_captions
from openblip.evaluation.run import run_evaluation
from openblip.generation.decoding import Greedy
from openblip.generation.language import write_texts
from openblip.metrics.captioning import exact_match
from openblip.metrics.vqa import vqa_accuracy
from openblip.models.language_model import LanguageModel
from openblip.tasks.language_model import no_visual

MAX_WRITTEN_TOKENS = 30


def evaluate_language(
    language: LanguageModel,
    source: Source,
    *,
    question_prompt: str = "Question: {} Answer:",
    caption_prompt: str = "a photo of",
    limit: int | None = None,
) -> dict[str, Any]:
    """How a language model answers and captions after a line that says all, which visual prompts can at best.

    `source` has documents of emoji scenes: samples with `context`, `question`, `answers`, `question_kind` and
    `references`. `answers` is VQA's accuracy, `captions` the share of true ones; both written greedily.

    Raises SourceError for a source without such samples.
    """

    def check_sample(sample: Sample) -> None:
        text_field(sample, "context")
        text_field(sample, "question")

    def write(samples: Sequence[Sample], prompt: str) -> list[str]:
        prompts = [f"{s.info['context']}\n{prompt.format(s.info['question'])}" for s in samples]
        visual = no_visual(language, len(prompts))
        texts = write_texts(language, visual, prompts, Greedy(max_new_tokens=MAX_WRITTEN_TOKENS))
        return [language.decode(text.ids) for (text,) in texts]

    def predict(samples: list[Sample]) -> list[tuple[str, str]]:
        return list(zip(write(samples, question_prompt), write(samples, caption_prompt), strict=True))

    language.eval()
    samples, results, rejects = run_evaluation(
        source, predict, label="language", check_sample=check_sample, limit=limit
    )
    answers, captions = zip(*results, strict=True)
    truths, references = [answers_of(s) for s in samples], [reference_captions(s) for s in samples]
    accuracies = vqa_accuracy(answers, truths)
    by_kind: dict[str, list[float]] = {}
    for sample, accuracy in zip(samples, accuracies, strict=True):
        by_kind.setdefault(str(sample.info["question_kind"]), []).append(accuracy)
    fields = ("answer", "answers", "kind", "caption", "references")
    rows = zip(answers, truths, [str(s.info["question_kind"]) for s in samples], captions, references, strict=True)
    return {
        "num_texts": len(results),
        "answers": fmean(accuracies),
        "answers_by_kind": {kind: fmean(values) for kind, values in by_kind.items()},
        "captions": exact_match(captions, references, normalize_caption),
        "predictions": [dict(zip(fields, row, strict=True)) for row in rows],
        "rejects": [asdict(reject) for reject in rejects],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("source")
    parser.add_argument("--limit", type=int, default=None)
    options = parser.parse_args()
    language = load_language_model(options.folder)
    if not language.is_encoder_decoder:  # a decoder's line ends as BLIP-2 ends OPT's
        language = load_language_model(options.folder, end_of_text="\n")
    prompt = "Question: {} Short answer:" if language.is_encoder_decoder else "Question: {} Answer:"
    source = open_source(options.source)
    scores = evaluate_language(language, source, question_prompt=prompt, limit=options.limit)
    shown = ("num_texts", "answers", "answers_by_kind", "captions")
    print(json.dumps({name: scores[name] for name in shown}, indent=2))


if __name__ == "__main__":
    main()
