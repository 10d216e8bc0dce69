"""What samples are annotated with, counted: questions, statements, dialogs, instructions, classes and
domains, under the names of docs/data.md.
"""

import contextlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from openblip.data.fields import turns_of
from openblip.errors import SourceError

_MOST_FREQUENT = 10


@dataclass
class TaskCounts:
    """Counts over the `info` of samples; fields of other types than the documented ones are not counted."""

    questions: int = 0
    unanswered: int = 0
    with_choices: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    statements: Counter[str] = field(default_factory=Counter)
    dialogs: int = 0
    rounds: int = 0
    rounds_unanswered: int = 0
    rounds_with_relevance: int = 0
    options: Counter[int] = field(default_factory=Counter)
    instructed: int = 0
    instructions: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    domains: Counter[str] = field(default_factory=Counter)

    def add(self, info: Mapping[str, Any]) -> None:
        label = info.get("label")
        if isinstance(info.get("question"), str):
            self._add_question(info)
        if isinstance(info.get("statement"), str):
            self.statements[str(label).lower() if isinstance(label, bool) else "unlabelled"] += 1
        elif isinstance(label, str):
            self.classes[label] += 1
        if isinstance(info.get("dialog"), list):
            self._add_dialog(info["dialog"])
        if info.keys() & {"instruction", "turns", "conversations"}:
            with contextlib.suppress(SourceError):
                self.instructions += len(turns_of(info))
                self.instructed += 1
        if isinstance(info.get("domain"), str):
            self.domains[info["domain"]] += 1

    def _add_question(self, info: Mapping[str, Any]) -> None:
        answers = info.get("answers")
        self.questions += 1
        if isinstance(answers, list) and answers:
            self.answers.update(answer for answer in answers if isinstance(answer, str))
        else:
            self.unanswered += 1
        self.with_choices += isinstance(info.get("choices"), list)

    def _add_dialog(self, rounds: list[Any]) -> None:
        self.dialogs += 1
        for turn in rounds:
            if isinstance(turn, dict):
                self.rounds += 1
                self.rounds_unanswered += "answer" not in turn
                self.rounds_with_relevance += "relevance" in turn
                if isinstance(turn.get("options"), list):
                    self.options[len(turn["options"])] += 1

    def facts(self) -> dict[str, Any]:
        """What was found, by name; nothing of tasks that no sample is annotated for."""
        found: dict[str, Any] = {}
        if self.questions:
            found |= {
                "questions": self.questions,
                "questions without an answer": _share(self.unanswered, self.questions),
                "answers": self.answers.total(),
                "different answers": len(self.answers),
                "most frequent answers": dict(self.answers.most_common(_MOST_FREQUENT)),
            }
        if self.with_choices:
            found["questions with choices"] = self.with_choices
        if self.statements:
            found["statements"] = dict(self.statements.most_common())
        if self.dialogs:
            found |= {
                "dialogs": self.dialogs,
                "rounds": self.rounds,
                "rounds without an answer": _share(self.rounds_unanswered, self.rounds),
                "rounds with relevance": self.rounds_with_relevance,
                "candidates per round": {str(size): rounds for size, rounds in sorted(self.options.items())},
            }
        if self.instructed:
            found |= {"samples with instructions": self.instructed, "instructions": self.instructions}
        if self.classes:
            found["classes"] = len(self.classes)
            found["most frequent classes"] = dict(self.classes.most_common(_MOST_FREQUENT))
        if self.domains:
            found["domains"] = dict(self.domains.most_common())
        return found


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.1%})" if whole else "0"
