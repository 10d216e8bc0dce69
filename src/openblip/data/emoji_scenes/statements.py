"""Samples with two pictures and a statement about them that is true or false, as in NLVR2."""

from collections.abc import Hashable
from random import Random
from typing import Any

from openblip.data.emoji_scenes.encoding import Member, jpeg_bytes, json_bytes, scene_json
from openblip.data.emoji_scenes.rendering import render
from openblip.data.emoji_scenes.request import SceneRequest
from openblip.data.emoji_scenes.sprites import require_demo_packages
from openblip.data.emoji_scenes.stating import Statement, draw_statement
from openblip.data.emoji_scenes.vocabulary import Split


class StatementSamples:
    """`left.jpg`, `right.jpg` and `json` with `statement`, `label`, `statement_kind` and both `scenes`."""

    def require_packages(self) -> None:
        require_demo_packages()

    def draw(self, rng: Random, split: Split) -> Statement:
        return draw_statement(rng, split)

    def claims(self, statement: Statement) -> tuple[Hashable, ...]:
        return ((statement.left.content(), statement.right.content(), statement.text),)

    def members(self, request: SceneRequest, index: int, statement: Statement) -> list[Member]:
        left = render(statement.left, request.rng(index, "left image"))
        right = render(statement.right, request.rng(index, "right image"))
        content = {
            "statement": statement.text,
            "label": statement.label,
            "statement_kind": statement.kind,
            "scenes": [scene_json(statement.left, left), scene_json(statement.right, right)],
        }
        return [
            ("left.jpg", jpeg_bytes(left.image)),
            ("right.jpg", jpeg_bytes(right.image)),
            ("json", json_bytes(content)),
        ]

    def companions(self) -> dict[str, Any]:
        return {}
