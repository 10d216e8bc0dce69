"""The longest text of a run has to fit the model, and is found out before the first step."""

from dataclasses import replace

import pytest
import torch

from openblip.data.config import DataConfig, Preprocessing
from openblip.data.tokenizer import Tokens
from openblip.errors import ConfigError
from openblip.models.blip import Blip
from openblip.tasks.base import Task
from openblip.tasks.catalog import TASKS
from openblip.tasks.config import Blip2Stage1Config, Blip2Stage2Config, CaptioningConfig, PretrainingConfig
from openblip.tasks.contrastive import Blip2Stage1
from openblip.tasks.language_model import Blip2Stage2
from tiny_blip import SIZE, TINY, random_batch, tiny_tokenizer
from tiny_blip2 import tiny_blip2

TOKENIZER = tiny_tokenizer()
POSITIONS = TINY.text.max_positions
PROMPT = "a b"
PROMPT_TOKENS = len(TOKENIZER.prompt(PROMPT))


def build(config: CaptioningConfig | PretrainingConfig, max_text_length: int) -> Task:
    model = Blip(replace(TINY, text=replace(TINY.text, vocab_size=TOKENIZER.vocab_size)))
    data = DataConfig(source="", max_text_length=max_text_length)
    task_class = TASKS[type(config)]
    return task_class.build(config, data, model, TOKENIZER, Preprocessing(image_size=SIZE))


def test_the_longest_caption_that_is_accepted_trains() -> None:
    longest = POSITIONS + 2 - PROMPT_TOKENS
    task = build(CaptioningConfig(prompt=PROMPT), longest)
    batch = random_batch([3], [1])
    ids = torch.full((1, longest), TOKENIZER.pad_id + 5)
    batch = replace(batch, tokens=Tokens(ids, torch.ones_like(ids, dtype=torch.bool)))
    assert torch.isfinite(task(batch, 0, torch.Generator())["lm"])
    with pytest.raises(ConfigError, match=rf"{POSITIONS + 1} tokens.*{POSITIONS} positions"):
        build(CaptioningConfig(prompt=PROMPT), longest + 1)


def test_without_a_prompt_positions_are_the_limit() -> None:
    build(PretrainingConfig(), POSITIONS)
    with pytest.raises(ConfigError, match=r"--data\.max-text-length"):
        build(PretrainingConfig(), POSITIONS + 1)


def test_the_text_branch_of_a_qformer_limits_what_it_is_given() -> None:
    """Without one, as in stage 2, the language model has a limit of its own."""
    model = tiny_blip2().model
    positions = model.config.qformer.max_positions
    data = DataConfig(source="", max_text_length=positions + 1)
    preprocessing = Preprocessing(image_size=SIZE)
    with pytest.raises(ConfigError, match=rf"{positions + 1} tokens: the Q-Former has {positions} positions"):
        Blip2Stage1.build(Blip2Stage1Config(), data, model, tiny_tokenizer(), preprocessing)
    Blip2Stage2.build(Blip2Stage2Config(), data, tiny_blip2((), "opt").model, None, preprocessing)
