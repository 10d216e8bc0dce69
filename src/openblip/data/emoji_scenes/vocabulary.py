"""The words of the embedded world: nouns, sizes, backgrounds, and which noun pairs belong to which split."""

import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Literal, get_args

Split = Literal["web", "human", "val", "test"]
Size = Literal["small", "normal", "big"]
SPLITS: tuple[Split, ...] = get_args(Split)

COUNT_WORDS = {2: "two", 3: "three"}

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

Pair = tuple[str, str]
Triple = tuple[str, str, str]


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
