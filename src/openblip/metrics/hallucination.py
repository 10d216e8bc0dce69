"""What captions say that is not in their images: objects (CHAIR, arXiv 1809.02156), attributes, counts, relations.

A caption is read for phrases of a vocabulary: the names, attributes and relations that the images of a set have, or
lists of synonyms. What is in no vocabulary is not judged. Everything else about a language is left out: there is no
parser, and a claim is taken only where the words stand as they do in plain captions:

    two small dogs to the left of a red car        counts and attributes stand before the name, a relation after it
    a dog on the left and a cat on the right       a relation without a second object is a place
    the dog is small                               other attributes belong to the object before them

A name that another name follows at once describes it and is no object of its own: "a dog bowl", "an orange cat".
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from openblip.errors import ConfigError

ClaimKind = Literal["object", "attribute", "count", "relation"]
CLAIM_KINDS: tuple[ClaimKind, ...] = get_args(ClaimKind)
Phrase = tuple[str, ...]  # words of a phrase

NUMBERS = {"a": 1, "an": 1, "one": 1, "single": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7,
           "eight": 8, "nine": 9, "ten": 10}  # fmt: skip
IRREGULAR_PLURALS = {
    "child": "children", "person": "people", "foot": "feet", "tooth": "teeth",
    "mouse": "mice", "goose": "geese", "knife": "knives", "wife": "wives", "leaf": "leaves", "loaf": "loaves",
    "wolf": "wolves", "calf": "calves", "half": "halves", "shelf": "shelves", "scarf": "scarves", "potato": "potatoes",
    "tomato": "tomatoes", "sheep": "sheep", "fish": "fish", "deer": "deer", "skis": "skis", "scissors": "scissors",
}  # fmt: skip
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*|[.,;:!?]")


class ObjectRelation(NamedTuple):
    """How an object stands to another one ("left of", "dog"), or where it is ("on the left", None)."""

    phrase: str
    to: str | None = None


@dataclass(frozen=True, slots=True)
class DepictedObject:
    """Things of one name in an image. None stands for what is not known, and is not judged."""

    name: str
    synonyms: Sequence[str] = ()
    count: int | None = None
    attributes: Sequence[str] | None = None
    """All that are true of it."""
    relations: Sequence[ObjectRelation] | None = None
    """All that hold from it to others, in all words that may say them."""
    stuff: bool = False
    """Whether it is no thing but a background or the like, whose mention does not count as an object."""


@dataclass(frozen=True, slots=True)
class Mention:
    """An object that a caption speaks of, and what it says of it."""

    name: str
    text: str
    count: tuple[str, int, bool] | None  # the words, the number, and whether it is the least one that they allow
    attributes: list[str]
    relations: list[ObjectRelation]


class Claim(NamedTuple):
    """Something that a caption says and that can be judged."""

    kind: ClaimKind
    text: str
    is_true: bool


class Judgement(NamedTuple):
    """The claims of a caption, and how many of the image's objects it names."""

    claims: list[Claim]
    num_named: int
    num_objects: int

    def hallucinated(self) -> dict[str, list[str]]:
        """What is not true, by kind."""
        return {
            kind: texts
            for kind in CLAIM_KINDS
            if (texts := [claim.text for claim in self.claims if claim.kind == kind and not claim.is_true])
        }


class Vocabulary:
    """The phrases that captions are read for.

    images: the objects of each image of the set. synonyms: further words for names, which may be names of their own;
    under the name "" phrases that contain a name and mean something else. Plurals are formed by rule.
    """

    def __init__(
        self, images: Iterable[Sequence[DepictedObject]] = (), synonyms: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self.names: dict[Phrase, tuple[str, bool]] = {}  # the name, and whether the phrase is its plural
        self.attributes: set[Phrase] = set()
        self.places: set[Phrase] = set()
        self.relations: set[Phrase] = set()
        for name, others in (synonyms or {}).items():
            self._add_name(name, others)
        for depicted in dict.fromkeys(each for objects in images for each in map(_hashable, objects)):
            self._add_name(depicted.name, depicted.synonyms)
            self.attributes.update(_words(attribute) for attribute in depicted.attributes or ())
            for relation in depicted.relations or ():
                (self.places if relation.to is None else self.relations).add(_words(relation.phrase))
        self._longest = max(map(len, [*self.names, *self.attributes, *self.places, *self.relations]), default=0)

    def _add_name(self, name: str, others: Sequence[str]) -> None:
        for phrase in (name, *others) if name else others:
            words = _words(phrase)
            plural = (*words[:-1], plural_of(words[-1])) if words else words
            if plural != words:
                self.names.setdefault(plural, (name, True))
            self.names[words] = (name, False)

    def mentions(self, caption: str) -> list[Mention]:
        """The objects of a caption, in its order."""
        words = _words(caption)
        spans = list(self._spans(words))
        # A name that another name follows at once describes it.
        starts = {start for start, _, phrase in spans if phrase in self.names}
        heads = [(start, end, phrase) for start, end, phrase in spans if start in starts and end not in starts]
        attached: set[tuple[int, int, Phrase]] = set()
        described = []
        for start, end, phrase in heads:
            attributes, first = [], start
            while before := next((span for span in spans if span[1] == first and span not in heads), None):
                if before[2] not in self.attributes and before[2] not in self.names:
                    break
                first = before[0]
                attached.add(before)
                if before[2] in self.attributes:
                    attributes.append(" ".join(before[2]))
            name, is_plural = self.names[phrase]
            number = words[first - 1] if first else ""
            count = None
            if is_plural or number in NUMBERS or number.isdecimal():
                known = int(number) if number.isdecimal() else NUMBERS.get(number)
                said = " ".join([number, *words[first:end]]) if known is not None else " ".join(words[first:end])
                count = (said, 2 if known is None else known, known is None)
            described.append(Mention(name, " ".join(phrase), count, attributes[::-1], []))
        for span in spans:
            earlier = [i for i, (_, end, _) in enumerate(heads) if end <= span[0]]
            if span in attached or not earlier:
                continue
            subject, following = described[earlier[-1]], earlier[-1] + 1
            phrase = span[2]
            if phrase in self.relations and following < len(heads):
                subject.relations.append(ObjectRelation(" ".join(phrase), described[following].name))
            elif phrase in self.places:
                subject.relations.append(ObjectRelation(" ".join(phrase)))
            elif phrase in self.attributes:
                subject.attributes.append(" ".join(phrase))
        return [mention for mention in described if mention.name]

    def _spans(self, words: Phrase) -> Iterable[tuple[int, int, Phrase]]:
        """Start, end and words of the longest phrases, from left to right."""
        start = 0
        while start < len(words):
            for end in range(min(start + self._longest, len(words)), start, -1):
                phrase = words[start:end]
                if any(phrase in known for known in (self.names, self.attributes, self.places, self.relations)):
                    yield start, end, phrase
                    start = end
                    break
            else:
                start += 1

    def judge(self, caption: str, objects: Sequence[DepictedObject]) -> Judgement:
        """What a caption says of an image that has these objects.

        An attribute, a count or a relation is judged where its object is in the image and the image's description has
        what it takes; a relation also where the other object is there. A number must be the `count` of one object of
        the name, or of all of them. "a" says one, and a plural alone two or more.
        """
        by_name: dict[str, list[DepictedObject]] = {}
        for each in objects:
            by_name.setdefault(each.name, []).append(each)
        claims: list[Claim] = []
        mentioned: set[str] = set()
        stuff = {name for name, alike in by_name.items() if all(each.stuff for each in alike)}
        for mention in self.mentions(caption):
            alike = by_name.get(mention.name, [])
            mentioned.add(mention.name)
            if mention.name not in stuff:
                claims.append(Claim("object", mention.text, bool(alike)))
            if not alike:
                continue
            claims += _judged_attributes(mention, alike)
            if mention.count is not None and (known := [each.count for each in alike if each.count is not None]):
                said, number, is_least = mention.count
                possible = {*known, sum(known)}
                is_true = max(possible) >= number if is_least else number in possible
                claims.append(Claim("count", said, is_true))
            if all(each.relations is not None for each in alike):
                holding = {relation for each in alike for relation in each.relations or ()}
                for relation in mention.relations:
                    if relation.to is None or relation.to in by_name:
                        text = " ".join(filter(None, (mention.text, relation.phrase, relation.to)))
                        claims.append(Claim("relation", text, relation in holding))
        things = by_name.keys() - stuff
        return Judgement(claims, len(things & mentioned), len(things))


def _judged_attributes(mention: Mention, alike: Sequence[DepictedObject]) -> list[Claim]:
    if any(each.attributes is None for each in alike):
        return []
    true = {attribute for each in alike for attribute in each.attributes or ()}
    return [Claim("attribute", f"{attribute} {mention.text}", attribute in true) for attribute in mention.attributes]


def hallucination_rates(judgements: Sequence[Judgement]) -> dict[str, float | None]:
    """Return which share of what captions say is not true, of each kind, over all captions.

    `chair_i`: of the objects that captions name, each as often as it is named. `attributes`, `counts`, `relations`: of
    those that can be judged. `chair_s`: the captions that name an object which is not there; `captions`: those that say
    anything false. `object_recall`: which share of an image's objects its caption names, over all images. A share of
    nothing is None. Raises `ConfigError` for no captions.
    """
    if not judgements:
        raise ConfigError("hallucination_rates: there is no caption")
    claims = [claim for judgement in judgements for claim in judgement.claims]

    def share(kind: ClaimKind) -> float | None:
        judged = [claim for claim in claims if claim.kind == kind]
        return sum(not claim.is_true for claim in judged) / len(judged) if judged else None

    false = [judgement.hallucinated() for judgement in judgements]
    num_objects = sum(judgement.num_objects for judgement in judgements)
    return {
        "chair_i": share("object"),
        "chair_s": sum("object" in each for each in false) / len(false),
        "attributes": share("attribute"),
        "counts": share("count"),
        "relations": share("relation"),
        "captions": sum(bool(each) for each in false) / len(false),
        "object_recall": sum(each.num_named for each in judgements) / num_objects if num_objects else None,
    }


@cache
def coco_synonyms() -> Mapping[str, Sequence[str]]:
    """The 80 classes of COCO with words by which captions name them."""
    return parse_synonyms(json.loads(Path(__file__).with_name("coco_synonyms.json").read_text()), "coco_synonyms.json")


def parse_synonyms(content: Mapping[str, Any], name: str) -> dict[str, list[str]]:
    """An object with a list of further words for each name; raises `ConfigError`, with `name`, for anything else."""
    if not content:
        raise ConfigError(f"{name} has no names")
    for key, others in content.items():
        if not isinstance(others, list) or not all(isinstance(each, str) and _words(each) for each in others):
            raise ConfigError(f"{name}: the words for {key!r} must be a list of texts, not {others!r:.80}")
    return dict(content)


def plural_of(word: str) -> str:
    """The plural of an English noun by rule, with the exceptions that captions need."""
    if word in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[word]
    if word.endswith("man") and word != "human":
        return f"{word[:-3]}men"
    if re.search(r"(?:[sxz]|ch|sh)$", word):
        return f"{word}es"
    return f"{word[:-1]}ies" if re.search(r"[^aeiou]y$", word) else f"{word}s"


def _words(text: str) -> Phrase:
    """Lower-case words; punctuation stays, so that no phrase goes beyond it."""
    return tuple(_WORD.findall(text.lower()))


def _hashable(each: DepictedObject) -> DepictedObject:
    return DepictedObject(
        each.name,
        tuple(each.synonyms),
        attributes=None if each.attributes is None else tuple(each.attributes),
        relations=None if each.relations is None else tuple(each.relations),
    )
