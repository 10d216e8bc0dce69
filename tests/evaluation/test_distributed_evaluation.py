"""Two processes under torchrun measure what one does: every evaluation, over seven samples of which two cannot be used.

Under torchrun this file writes OUT/scores-<rank>.json.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from listed_source import ListSource
from openblip.data.sample import Sample
from openblip.distributed import process_group
from openblip.evaluation.captioning import evaluate_captioning
from openblip.evaluation.classification import evaluate_classification
from openblip.evaluation.filtering import evaluate_filter
from openblip.evaluation.nlvr import evaluate_nlvr
from openblip.evaluation.question_answering import evaluate_question_answering
from openblip.evaluation.retrieval import evaluate_retrieval
from openblip.evaluation.visdial import evaluate_visdial
from openblip.generation.decoding import Beam
from openblip.metrics import captioning
from openblip.models.config import Head
from openblip.predictor import BlipPredictor
from tiny_blip import tiny_checkpoint
from two_processes_of import launch

TEXTS = ["a red dog", "two blue cars", "the small cat", "a big tree", "a green bird", "one tree", "two dogs"]
COUNT, UNREADABLE, UNDECODABLE = 7, 2, 5
SHORT = Beam(num_beams=2, max_new_tokens=4)


def image(seed: int) -> bytes:
    buffer = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def source(second: bool = False, **fields: list[Any]) -> ListSource:
    """`fields`: the samples' info, by name, an entry for each."""
    samples: list[Sample | str] = []
    for i in range(COUNT):
        samples.append(
            Sample(
                key=f"{i:03d}",
                shard=f"s{i // 3}",
                image=b"damaged" if i == UNDECODABLE else image(i),
                captions=(TEXTS[i], f"not {TEXTS[i - 1]}"),  # no two texts alike, whose order would be rounding's
                image_id=f"list/{i}",
                info={name: values[i] for name, values in fields.items()},
                second_image=image(i + 50) if second else None,
            )
        )
    samples[UNREADABLE] = "gone"
    return ListSource(samples, per_shard=3)


def predictor(*heads: Head) -> BlipPredictor:
    return BlipPredictor(tiny_checkpoint(heads), device="cpu")


def dialog(number: int) -> list[dict[str, Any]]:
    return [
        {
            "question": f"a {text}?",
            "answer": text,
            "options": TEXTS,
            "answer_index": (number + place) % COUNT,
            "relevance": [float(i == number) for i in range(COUNT)],
        }
        for place, text in enumerate(TEXTS[: 1 + number % 2])
    ]


@patch.object(captioning, "java_runs", lambda: False)  # METEOR would only take time
def evaluate_everything() -> dict[str, Any]:
    """The result of every evaluation, by its name."""
    kinds = [None, "shop", None, "shop", None, None, "shop"]
    answers = [[TEXTS[i], TEXTS[0], TEXTS[i]] for i in range(COUNT)]
    labels = [i % 2 == 0 for i in range(COUNT)]
    retrieval, questions = predictor("itc", "itm"), predictor("vqa")
    asked = source(question=[f"is it {text}" for text in TEXTS], answers=answers, choices=[TEXTS[:3]] * COUNT)
    return {
        "caption": evaluate_captioning(predictor("lm"), source(), decoding=SHORT),
        "retrieval": evaluate_retrieval(retrieval, source(), rerank=3),
        "filter": evaluate_filter(retrieval, source(noise=kinds)),
        "vqa": evaluate_question_answering(questions, asked, decoding=SHORT),
        "vqa-ranked": evaluate_question_answering(questions, asked, candidates=TEXTS),
        "nlvr": evaluate_nlvr(predictor("nlvr"), source(second=True, statement=TEXTS, label=labels)),
        "visdial": evaluate_visdial(
            predictor("visdial"), source(caption=TEXTS, dialog=[dialog(i) for i in range(COUNT)])
        ),
        "classification": evaluate_classification(
            retrieval, source(label=[text.split()[-1] for text in TEXTS]), templates=["a {}", "the {}"]
        ),
    }


def assert_alike(found: Any, expected: Any, where: str) -> None:
    """Equal, but for rounding: a image may be in another batch."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            assert_alike(found[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_alike(one, other, f"{where}[{place}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-5), where
    else:
        assert found == expected, where


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    """Scores, predictions and rejects, in the order of the source, on both processes."""
    finished = launch(Path(__file__), str(tmp_path))
    assert finished.returncode == 0, finished.stderr[-3000:]
    expected = json.loads(json.dumps(evaluate_everything()))
    assert all(scores["num_rejects"] == len(scores["rejects"]) == 2 for scores in expected.values())
    for rank in range(2):
        assert_alike(json.loads((tmp_path / f"scores-{rank}.json").read_text()), expected, "")


if __name__ == "__main__":
    with process_group() as process:
        scores = json.dumps(evaluate_everything())
        (Path(sys.argv[1]) / f"scores-{process.rank}.json").write_text(scores)
