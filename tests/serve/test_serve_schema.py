"""The bodies of the HTTP API: images of data URIs, strategies, and what is refused."""

import base64
from dataclasses import fields
from typing import Any

import pytest
from pydantic import ValidationError

from openblip import Beam, Greedy, Nucleus
from openblip.serve.schema import STRATEGIES, CaptionBody, ChatBody, MatchBody

PNG = "data:image/png;base64," + base64.b64encode(b"png").decode()


def test_images_are_one_or_several() -> None:
    assert CaptionBody(images=PNG).images == b"png"
    assert CaptionBody(images=[PNG, "DATA:;BASE64,anBn", "data:image/svg+xml,%3Cx%3E"]).images == [
        b"png",
        b"jpg",
        b"<x>",
    ]
    assert CaptionBody(images="https://a.org/x.png").images == "https://a.org/x.png"  # the app decides about it


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ("dog.png", "data URI"),
        ("file:///etc/passwd", "data URI"),
        ("data:text/html;base64,aGk=", "text/html"),
        ("data:image/png;base64,a", "no valid base64"),
        ([PNG, "data:image/png;base64,?"], "image 1: the data URI"),
        (3, "int"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_image_is_refused_with_its_reason(images: Any, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason) as error:
        CaptionBody(images=images)
    assert len(error.value.errors()) == 1  # one reason, not one for each form that an image may have


@pytest.mark.parametrize("strategy", [Beam(num_beams=5), Greedy(max_new_tokens=3), Nucleus(top_p=0.5, seed=1)])
def test_strategies_have_all_fields(strategy: Any) -> None:
    settings = {field.name: getattr(strategy, field.name) for field in fields(strategy)}
    kind = next(kind for kind, known in STRATEGIES.items() if isinstance(strategy, known))
    assert CaptionBody(images=PNG, decoding={"kind": kind, **settings}).strategy == strategy
    assert CaptionBody(images=PNG).strategy is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"decoding": {"kind": "beam", "top_p": 0.9}},
        {"decoding": {"kind": "beam", "num_beams": "3"}},
        {"decoding": {"kind": "sample"}},
        {"decoding": {}},
        {"num_captions": 0},
        {"top": 3},
    ],
)
def test_unknown_fields_and_wrong_types_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CaptionBody(images=PNG, **wrong)


def test_texts_that_are_no_unicode_are_refused() -> None:
    with pytest.raises(ValidationError):
        MatchBody.model_validate_json('{"images": "data:,", "texts": "\\ud800"}')


def test_turns_end_with_a_question() -> None:
    assert ChatBody(images=[PNG], turns=[["q", "a"], "q2"]).turns == [("q", "a"), "q2"]
    with pytest.raises(ValidationError):
        ChatBody(images=PNG, turns=[])
