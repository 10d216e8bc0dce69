"""An option that would change nothing is refused, whatever its value; the same option where it counts is taken."""

from typing import Any

import pytest

from openblip.cli.main import COMMANDS
from openblip.cli.options import parse
from openblip.recipes import RECIPES

pytestmark = pytest.mark.slow

TRAIN: dict[str, dict[str, str | None]] = {
    "blip-mini --data.source x": {
        "--training.decay-rate 0.9": "--training.schedule step_decay --training.decay-rate 0.9",
        "--training.min-learning-rate 0 --training.schedule constant": "--training.min-learning-rate 0",
        "--training.warmup-learning-rate=0.1 --training.warmup-steps 0": "--training.warmup-learning-rate=0.1",
        "--data.validation-limit 3": "--data.validation-limit 3 --data.validation y --training.validate-every 2",
        "--data.augmentation.magnitude 2": "--data.augmentation.magnitude 2 --data.augmentation.num-ops 1",
        "--init y --model.text.num-layers 2": "--model.text.num-layers 2",
        "--tokenizer y --vocab_size 1000": "--vocab_size 1000",
        "--model.text.vocab-size 0": "--vocab-size 0",
        "--training.shard-frozen": None,
        "--recipe blip-base": None,
    },
    "blip-mini-nlvr --data.source x --init y": {"--data.num-frames 2": None, "--vocab-size 50": "--tokenizer z"},
    "blip2-mini-t5 --data.source x": {
        "--shape.max-positions 9": None,
        "--data.max-text-length 9": "--task.max-text-tokens 9",
    },
    "blip2-mini-stage1 --data.source x": {
        "--question-prompt {}": "--prompt a",
        "--init y --embed-dim 9": "--embed-dim 9",
        "--frozen-dtype float16": "--vision.dtype float16",
    },
    "blip2-vqa --data.source x --init y": {
        "--task.no-instructed --tokenizer z": "--tokenizer z",
        "--task.no-instructed --data.max-text-length 9": "--data.max-text-length 9",
    },
    "blip2-caption --data.source x --init y": {
        "--prompt a": "--task.prompt a",
        "--data.max-text-length 9": "--max-text-tokens 9",
    },
}
OTHERS: dict[str, dict[str, str | None]] = {
    "bootstrap blip-mini --web a --human b --out c": {
        "--recipe.filter.init x": None,
        "--recipe.captioner.training.decay-every 3": None,
    },
    "caption x --model y": {
        "--top-p 0.9": "--top-p 0.9 --decoding nucleus",
        "--seed 0": "--seed 0 --decoding nucleus",
        "--num-beams 3 --decoding greedy": "--num-beams 3",
        "--overwrite": "--sidecar --overwrite",
        "--sidecar --confidences": "--sidecar --confidences --out x.jsonl",
        "--encoder-token [CLS]": None,
    },
    "capfilt x --captioner a --filter b --out c": {"--seed 3 --decoding beam": "--seed 3"},
    "answer x y --model z": {"--candidates x --num-beams 2": "--num-beams 2"},
    "evaluate vqa --model y --data x": {"--rerank 16": "--answers x", "--answers x --num-beams 3": "--num-beams 3"},
    "evaluate classification --model y --data x": {"--encoder-token [ENC]": "--classes x"},
    "data emoji-scenes out --num-samples 3": {"--split human --noise 0": "--split web --noise 0"},
    "data inspect x": {"--as-json --examples 5": "--examples 5"},
}
TABLE: dict[str, dict[str, str | None]] = {
    **{f"train {command}": options for command, options in TRAIN.items()},
    **OTHERS,
}
CASES: list[tuple[str, str, str | None]] = [
    (command, *pair) for command, pairs in TABLE.items() for pair in pairs.items()
]


@pytest.mark.parametrize(("command", "without_effect", "with_effect"), CASES)
def test_an_option_without_effect_is_refused(
    refusal: Any, command: str, without_effect: str, with_effect: str | None
) -> None:
    message = refusal(*command.split(), *without_effect.split())
    assert message.startswith("openblip: --")
    option, reason = message.removeprefix("openblip: --").split(" has no effect here: ")
    assert option in without_effect.replace("_", "-")
    assert len(reason) > 10
    if with_effect is None:
        return
    name, *words = [*command.split(), *with_effect.split()]
    if name == "train":
        recipe = RECIPES[words.pop(0)]()
        parse(type(recipe), words, prog="train", default=recipe)
    else:
        name = name if name in COMMANDS else f"{name} {words.pop(0)}"
        COMMANDS[name].bind(words, prog=name)
