"""The longest text of a run has to fit the model, and is found out before the first step."""

from dataclasses import replace

import pytest
import torch

from openblip.checkpoints.checkpoint import BlipCheckpoint
from openblip.data.config import DataConfig
from openblip.data.tokenizer import Tokens
from openblip.data.transforms import Preprocessing
from openblip.errors import ConfigError
from openblip.models.blip import Blip
from openblip.recipes.assembly import check_text_fits, make_task
from openblip.recipes.blip_mini import blip_mini, blip_mini_captioner
from openblip.recipes.run import Run
from openblip.tasks.config import CaptioningConfig
from tiny_blip import SIZE, TINY, random_batch, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
POSITIONS = TINY.text.max_positions
PROMPT = "a b"
PROMPT_TOKENS = len(TOKENIZER.prompt(PROMPT))


def checkpoint() -> BlipCheckpoint:
    text = replace(TINY.text, vocab_size=TOKENIZER.vocab_size)
    return BlipCheckpoint(Blip(replace(TINY, text=text)), TOKENIZER, Preprocessing(image_size=SIZE))


def captioner(max_text_length: int) -> Run:
    data, task = DataConfig(source="", max_text_length=max_text_length), CaptioningConfig(prompt=PROMPT)
    return replace(blip_mini_captioner(), data=data, task=task)


def test_the_longest_caption_that_is_accepted_trains() -> None:
    longest = POSITIONS + 2 - PROMPT_TOKENS
    run, start = captioner(longest), checkpoint()
    check_text_fits(run, start)
    batch = random_batch([3], [1])
    ids = torch.full((1, longest), TOKENIZER.pad_id + 5)
    batch = replace(batch, tokens=Tokens(ids, torch.ones_like(ids, dtype=torch.bool)))
    losses = make_task(run.task, start)(batch, 0, torch.Generator())
    assert torch.isfinite(losses["lm"])
    with pytest.raises(ConfigError, match=rf"{POSITIONS + 1} tokens.*{POSITIONS} positions"):
        check_text_fits(captioner(longest + 1), start)


def test_without_a_prompt_positions_are_the_limit() -> None:
    run = blip_mini()
    check_text_fits(replace(run, data=DataConfig(source="", max_text_length=POSITIONS)), checkpoint())
    with pytest.raises(ConfigError, match=r"--data\.max-text-length"):
        check_text_fits(replace(run, data=DataConfig(source="", max_text_length=POSITIONS + 1)), checkpoint())
