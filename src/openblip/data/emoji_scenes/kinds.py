"""The kinds of samples, and what the writer asks of each."""

from collections.abc import Hashable, Iterable
from random import Random
from typing import Any, Protocol, TypeVar

from openblip.data.emoji_scenes.captions import CaptionSamples
from openblip.data.emoji_scenes.classes import ClassSamples
from openblip.data.emoji_scenes.clip_questions import ClipQuestionSamples
from openblip.data.emoji_scenes.clips import ClipSamples
from openblip.data.emoji_scenes.dialogs import DialogSamples
from openblip.data.emoji_scenes.documents import DocumentSamples
from openblip.data.emoji_scenes.encoding import Member
from openblip.data.emoji_scenes.questions import QuestionSamples
from openblip.data.emoji_scenes.request import Kind, SceneRequest
from openblip.data.emoji_scenes.statements import StatementSamples
from openblip.data.emoji_scenes.vocabulary import Split
from openblip.errors import ConfigError

MAX_REDRAWS = 5000  # in a row, before a split counts as exhausted

Plan = TypeVar("Plan")


class SampleKind(Protocol[Plan]):
    """Makes samples in two steps: a plan of what is shown and said, then the files that show and say it."""

    def require_packages(self) -> None:
        """Raises MissingExtraError, with the pip command, where a package is missing that this kind needs."""

    def draw(self, rng: Random, split: Split) -> Plan:
        """The plan of a sample: picklable, without pixels, decided by the state of `rng`."""
        ...

    def claims(self, plan: Plan) -> Iterable[Hashable]:
        """What no other sample of split val or test may claim too."""
        ...

    def members(self, request: SceneRequest, index: int, plan: Plan) -> list[Member]:
        """The files of sample `index`."""
        ...

    def companions(self) -> dict[str, Any]:
        """Files beside the shards: name to json value."""
        ...


SAMPLE_KINDS: dict[Kind, SampleKind[Any]] = {
    "captions": CaptionSamples(),
    "questions": QuestionSamples(),
    "statements": StatementSamples(),
    "clips": ClipSamples(),
    "clip-questions": ClipQuestionSamples(),
    "dialogs": DialogSamples(),
    "classes": ClassSamples(),
    "documents": DocumentSamples(),
}


def draw_distinct(request: SceneRequest) -> list[Any]:
    """The plans of all samples of a request, no two with a claim in common.

    Raises ConfigError if the split has too few.
    """
    kind = SAMPLE_KINDS[request.kind]
    plans: list[Any] = []
    claimed: set[Hashable] = set()
    for index in range(request.num_samples):
        rng = request.rng(index, "scene")
        for _ in range(MAX_REDRAWS):
            plan = kind.draw(rng, request.split)
            claims = tuple(kind.claims(plan))
            if claimed.isdisjoint(claims):
                break
        else:
            raise ConfigError(
                f"split {request.split} has no {request.num_samples} distinct {request.kind}: after "
                f"{len(plans)} no new one was found; ask for fewer samples"
            )
        claimed.update(claims)
        plans.append(plan)
    return plans


def sample_members(request: SceneRequest, index: int, plan: Any = None) -> list[Member]:
    """The files of sample `index` of a request; `plan` where it was drawn before (val and test)."""
    kind = SAMPLE_KINDS[request.kind]
    if plan is None:
        plan = kind.draw(request.rng(index, "scene"), request.split)
    return kind.members(request, index, plan)
