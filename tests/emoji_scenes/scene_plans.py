"""Plans of emoji scenes for the tests: what samples show and say, without painting anything."""

import json
from random import Random

from openblip.emoji_scenes.scene import NOUNS, SceneObject
from openblip.emoji_scenes.writer import KINDS, SceneRequest, sample_members

# Every form of a noun, and the noun.
SINGULAR = {form: name for name in NOUNS for form in (name, SceneObject(name=name).plural)}


def draw_plans(kind, split="web", number=1):
    return [KINDS[kind].draw(Random(f"{split}{index}"), split) for index in range(number)]


def request(kind="captions", split="web", num_samples=1) -> SceneRequest:
    return SceneRequest(kind=kind, split=split, num_samples=num_samples, seed=0, noise=0.0, samples_per_shard=1000)


def sample_files(kind, index=0, split="web"):
    """The names of a sample's files, and the content of its json file."""
    members = dict(sample_members(request(kind, split), index))
    return list(members), json.loads(members["json"])
