"""The words of the embedded world: nouns, sizes, backgrounds, and which noun pairs belong to which split."""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from random import Random
from typing import Literal, get_args

Split = Literal["web", "human", "val", "test"]
Size = Literal["small", "normal", "big"]
SPLITS: tuple[Split, ...] = get_args(Split)

COUNT_WORDS = {2: "two", 3: "three"}  # of a caption, where one is said with the article
NUMBER_WORDS = {1: "one", **COUNT_WORDS}

# Far apart in hue or lightness, so that neither jitter nor JPEG nor a photometric augmentation mixes two up.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (208, 52, 48),
    "yellow": (246, 216, 72),
    "green": (84, 170, 84),
    "blue": (66, 122, 214),
    "purple": (134, 76, 176),
    "pink": (248, 168, 200),
    "white": (244, 244, 242),
    "black": (40, 40, 44),
}


@dataclass(frozen=True, slots=True)
class Noun:
    """A thing that scenes show: how a person calls it, and its name in the package `emoji`."""

    name: str
    plural: str
    emoji_name: str
    article: Literal["a", "an"] = "a"


# Chosen by eye: distinct at 26 pixels, one common name each, and no colour words (no orange, no rose).
NOUNS: tuple[Noun, ...] = (
    Noun("dog", "dogs", "dog_face"),
    Noun("cat", "cats", "cat_face"),
    Noun("rabbit", "rabbits", "rabbit_face"),
    Noun("fox", "foxes", "fox"),
    Noun("panda", "pandas", "panda"),
    Noun("pig", "pigs", "pig_face"),
    Noun("frog", "frogs", "frog"),
    Noun("penguin", "penguins", "penguin"),
    Noun("owl", "owls", "owl", "an"),
    Noun("butterfly", "butterflies", "butterfly"),
    Noun("snail", "snails", "snail"),
    Noun("bee", "bees", "honeybee"),
    Noun("ladybug", "ladybugs", "lady_beetle"),
    Noun("turtle", "turtles", "turtle"),
    Noun("octopus", "octopuses", "octopus", "an"),
    Noun("whale", "whales", "whale"),
    Noun("elephant", "elephants", "elephant", "an"),
    Noun("giraffe", "giraffes", "giraffe"),
    Noun("duck", "ducks", "duck"),
    Noun("unicorn", "unicorns", "unicorn"),
    Noun("spider", "spiders", "spider"),
    Noun("flamingo", "flamingos", "flamingo"),
    Noun("cactus", "cactuses", "cactus"),
    Noun("palm tree", "palm trees", "palm_tree"),
    Noun("mushroom", "mushrooms", "mushroom"),
    Noun("sunflower", "sunflowers", "sunflower"),
    Noun("apple", "apples", "red_apple", "an"),
    Noun("banana", "bananas", "banana"),
    Noun("pineapple", "pineapples", "pineapple"),
    Noun("watermelon", "watermelons", "watermelon"),
    Noun("lemon", "lemons", "lemon"),
    Noun("carrot", "carrots", "carrot"),
    Noun("eggplant", "eggplants", "eggplant", "an"),
    Noun("avocado", "avocados", "avocado", "an"),
    Noun("burger", "burgers", "hamburger"),
    Noun("pizza", "pizzas", "pizza"),
    Noun("donut", "donuts", "doughnut"),
    Noun("cake", "cakes", "birthday_cake"),
    Noun("trophy", "trophies", "trophy"),
    Noun("guitar", "guitars", "guitar"),
    Noun("drum", "drums", "drum"),
    Noun("balloon", "balloons", "balloon"),
    Noun("gift", "gifts", "wrapped_gift"),
    Noun("key", "keys", "key"),
    Noun("bell", "bells", "bell"),
    Noun("camera", "cameras", "camera"),
    Noun("candle", "candles", "candle"),
    Noun("clock", "clocks", "alarm_clock"),
    Noun("umbrella", "umbrellas", "umbrella", "an"),
    Noun("shirt", "shirts", "t-shirt"),
    Noun("car", "cars", "automobile"),
    Noun("tractor", "tractors", "tractor"),
    Noun("bicycle", "bicycles", "bicycle"),
    Noun("rocket", "rockets", "rocket"),
    Noun("house", "houses", "house"),
    Noun("moon", "moons", "crescent_moon"),
    Noun("star", "stars", "star"),
    Noun("cloud", "clouds", "cloud"),
    Noun("robot", "robots", "robot"),
    Noun("ghost", "ghosts", "ghost"),
)
NOUN_BY_NAME = {noun.name: noun for noun in NOUNS}

# Nouns that are mistaken for each other: in a row each looks, or is, like the others.
LOOKALIKES: tuple[tuple[str, ...], ...] = (
    ("dog", "cat", "rabbit", "fox", "panda", "pig", "frog"),
    ("butterfly", "snail", "bee", "ladybug", "turtle", "spider", "octopus"),
    ("penguin", "owl", "duck", "flamingo"),
    ("whale", "elephant", "giraffe", "unicorn"),
    ("cactus", "palm tree", "mushroom", "sunflower"),
    ("apple", "banana", "pineapple", "watermelon", "lemon", "carrot", "eggplant", "avocado"),
    ("burger", "pizza", "donut", "cake"),
    ("trophy", "guitar", "drum", "bell", "candle"),
    ("gift", "key", "camera", "clock", "umbrella", "shirt"),
    ("car", "tractor", "bicycle", "rocket", "house"),
    ("moon", "star", "cloud", "balloon"),
    ("robot", "ghost"),
)

Pair = tuple[str, str]
Triple = tuple[str, str, str]


@cache
def pair_split(first: str, second: str) -> Literal["train", "val", "test"]:
    """Where the unordered pair of two nouns may be seen together: fixed for ever, whatever the seed."""
    digest = hashlib.sha256("|".join(sorted((first, second))).encode()).digest()
    bucket = int.from_bytes(digest[:4], "big") % 100
    return "test" if bucket < 10 else "val" if bucket < 16 else "train"


def pair_allowed(split: Split, first: str, second: str) -> bool:
    """Whether scenes of `split` may show both nouns together."""
    home = pair_split(first, second)
    return home == split if split in ("val", "test") else home == "train"


@cache
def lookalikes(name: str) -> tuple[str, ...]:
    """The nouns that look, or are, most like `name`."""
    (row,) = (row for row in LOOKALIKES if name in row)
    return tuple(other for other in row if other != name)


def draw_absent_noun(rng: Random, split: Split, shown: Collection[str]) -> str:
    """A noun that is not `shown`, half the time a lookalike of one that is.

    It makes pairs of `split` with all that is shown, so that no text of training names nouns together that
    are held out. Val and test have few pairs: there one such pair is enough, or none where no noun makes one.
    """
    absent = [noun.name for noun in NOUNS if noun.name not in shown]
    paired = {name: [pair_allowed(split, name, other) for other in shown] for name in absent}
    choices = next(
        found
        for found in (
            [name for name in absent if all(paired[name])],
            [name for name in absent if any(paired[name])],
            absent,
        )
        if found
    )
    if rng.random() < 0.5:
        alike = {other for name in shown for other in lookalikes(name)}
        choices = [name for name in choices if name in alike] or choices
    return rng.choice(choices)


@cache
def pairs_of(split: Split) -> tuple[Pair, ...]:
    """The unordered noun pairs of `split`, in vocabulary order."""
    names = [noun.name for noun in NOUNS]
    return tuple(pair for pair in combinations(names, 2) if pair_allowed(split, *pair))


@cache
def triples_of(split: Split) -> tuple[Triple, ...]:
    """The unordered noun triples all of whose pairs belong to `split`, in vocabulary order."""
    pairs = set(pairs_of(split))
    names = [noun.name for noun in NOUNS]
    return tuple((a, b, c) for a, b in pairs_of(split) for c in names if (b, c) in pairs and (a, c) in pairs)
