"""What the benchmarks need of a source, before a model is loaded."""

from typing import Any

import pytest

from listed_source import ListSource
from openblip.data.sample import Sample
from openblip.errors import NoSampleError, SourceError
from openblip.evaluation.catalog import BENCHMARKS

QUESTION = {"question": "what is it?"}
ROUND = {"question": "what is it?", "options": ["a dog", "a cat"]}
STATEMENT = {"statement": "it is a dog"}


def source_of(info: dict[str, Any], *captions: str) -> ListSource:
    return ListSource([Sample("a", "s0", b"0", (), "list/a"), Sample("b", "s0", b"1", captions, "list/b", info)])


@pytest.mark.parametrize(
    ("name", "scored", "unscored"),
    [
        ("caption", source_of({}, "a dog"), source_of(QUESTION)),
        ("caption", source_of({"references": ["a dog"]}), source_of({"references": []})),
        ("retrieval", source_of({}, "a dog"), source_of({"references": ["a dog"]})),
        ("filter", source_of({"noise": None}, "a dog"), source_of({}, "a dog")),
        ("vqa", source_of({**QUESTION, "answers": ["a dog"]}), source_of({**QUESTION, "answers": []})),
        ("vqa", source_of({**QUESTION, "choices": ["a", "b"], "correct_choice": 0}), source_of({}, "a dog")),
        ("nlvr", source_of({**STATEMENT, "label": False}), source_of(STATEMENT)),
        ("visdial", source_of({"dialog": [{**ROUND, "answer_index": 0}]}), source_of({"dialog": [ROUND]})),
        ("visdial", source_of({"dialog": [{**ROUND, "relevance": [1.0, 0.0]}]}), source_of({})),
        ("classification", source_of({"label": "dog"}), source_of({}, "a dog")),
    ],
)
def test_a_source_of_which_nothing_can_be_scored_is_refused(
    name: str, scored: ListSource, unscored: ListSource
) -> None:
    benchmark = BENCHMARKS[name]
    benchmark.require_truth(scored)
    for source, limit in ((unscored, None), (scored, 1)):
        with pytest.raises(SourceError, match=f"list: no sample has {benchmark.annotations}"):
            benchmark.require_truth(source, limit)


def test_what_cannot_be_read_is_named_as_the_reason() -> None:
    damaged = ListSource(["x", Sample("a", "s0", b"0", (), "list/a", {"answers": "red"})])
    with pytest.raises(SourceError, match="nothing to score; s0/x: damaged; s0/a: the answers must be a list"):
        BENCHMARKS["vqa"].require_truth(damaged)
    for nothing in (ListSource([]), ListSource(["x"])):
        with pytest.raises(NoSampleError, match="list: no sample has answers"):
            BENCHMARKS["vqa"].require_truth(nothing)
