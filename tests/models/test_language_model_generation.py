"""Frozen language models that write: as they were taught, whatever stands beside a row, as the caller says.

R rows, Q visual prompts.
"""

import logging
import warnings
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
from tiny_language_models import CAUSAL, END, MODELS, PAD, START, UNKNOWN, tiny_language_model, visual_prompts
from torch import Tensor

from marks import slow
from openblip.errors import ConfigError
from openblip.models.language_model import IGNORED_LABEL, CausalLanguageModel, LanguageModel, wrap_language_model
from tiny_blip import randomise

PROMPTS = ["", "Question: how many dogs?", "a photo of", "a"]
TEXTS = ["a small red dog", "two", "a big tree left of a cats", "dog"]
EVERY = [(name, words) for name in MODELS for words in ("words", "bytes")]


@pytest.fixture(autouse=True)
def _silence(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """No test here may make transformers say anything."""
    logger, said = logging.getLogger("transformers"), []
    handler = logging.Handler(logging.WARNING)
    handler.emit = said.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert [record.getMessage() for record in said] == []
    assert [str(warning.message) for warning in recwarn] == []


def greedy(language: LanguageModel, visual: Tensor, prompts: list[str], **settings: Any) -> list[list[int]]:
    return language.generate(visual, prompts, do_sample=False, **{"max_new_tokens": 8, **settings})


@pytest.mark.parametrize(("name", "words"), EVERY)
def test_a_text_has_in_writing_the_probability_that_training_gave_it(name: str, words: str) -> None:
    """Texts are forced through generation, padded on the other side; logits agree token by token."""
    language, visual = tiny_language_model(name, words), visual_prompts(4)
    language.model.double()
    taught = language.predict(visual, PROMPTS, TEXTS, 40)
    rows = [labels != IGNORED_LABEL for labels in taught.labels]
    forced = [labels[row].tolist() for labels, row in zip(taught.labels, rows, strict=True)]
    first = int(language.is_encoder_decoder)

    def only(row: int, written: Tensor) -> list[int]:
        step = len(written) - first
        return [forced[row][step] if step < len(forced[row]) else PAD]

    output = language.model.generate(
        **language.generation_inputs(visual, PROMPTS),
        prefix_allowed_tokens_fn=only,
        max_new_tokens=max(map(len, forced)),
        eos_token_id=END,
        pad_token_id=PAD,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    written = torch.stack(output.logits, dim=1)  # (R, T, V)
    for row, said in enumerate(rows):
        expected = taught.logits[row, : len(said)][said].log_softmax(dim=-1)
        found = written[row, : len(expected)].log_softmax(dim=-1)
        torch.testing.assert_close(found.to(expected.dtype), expected, atol=1e-5, rtol=1e-5)


def by_plain_passes(language: LanguageModel, visual: Tensor, prompt: str, steps: int) -> list[int]:
    """The likeliest token, one after another, each by a whole pass over one row without mask and cache."""
    embed, model = language.model.get_input_embeddings(), language.model
    words = language.tokenizer(prompt).input_ids
    read = torch.cat([visual, embed(torch.tensor(words, dtype=torch.long)[None]).to(visual.dtype)], dim=1)
    written: list[int] = []
    for _ in range(steps):
        if isinstance(language, CausalLanguageModel):
            after = embed(torch.tensor(written, dtype=torch.long)[None]).to(visual.dtype)
            logits = model(inputs_embeds=torch.cat([read, after], dim=1)).logits
        else:
            ids = torch.tensor([[model.config.decoder_start_token_id, *written]])
            logits = model(inputs_embeds=read, decoder_input_ids=ids).logits
        token = int(logits[0, -1].argmax())
        if token == language.end_id:
            break
        written.append(token)
    return written


@torch.no_grad()
@pytest.mark.parametrize(("name", "words"), EVERY)
def test_greedy_text_is_that_of_plain_passes(name: str, words: str) -> None:
    language, visual = tiny_language_model(name, words), visual_prompts(4)
    found = greedy(language, visual, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        assert found[row] == by_plain_passes(language, visual[row : row + 1], prompt, 8)
    assert greedy(language, visual, PROMPTS, num_beams=1, max_new_tokens=3) == [row[:3] for row in found]


@pytest.mark.parametrize("settings", [{"num_beams": 3}, *slow({}, {"num_beams": 3, "num_return_sequences": 2})])
@pytest.mark.parametrize("name", list(MODELS))
def test_prompts_of_different_lengths_do_not_disturb_each_other(name: str, settings: Any) -> None:
    language, visual = tiny_language_model(name), visual_prompts(4)
    language.model.double()
    together = greedy(language, visual, PROMPTS, length_penalty=1.0, **settings)
    alone = [
        text
        for row in range(4)
        for text in greedy(language, visual[row : row + 1], PROMPTS[row : row + 1], length_penalty=1.0, **settings)
    ]
    assert together == alone
    assert len(together) == 4 * settings.get("num_return_sequences", 1)


@pytest.mark.parametrize("name", list(MODELS))
def test_only_what_was_written_comes_back(name: str) -> None:
    """No prompt, start token, end or padding, also when the end is what pads."""
    language, visual = tiny_language_model(name), visual_prompts(6)
    prompts = [*PROMPTS, "two", "a dog"]
    settings = {"max_new_tokens": 12, "suppress_tokens": [END]}
    whole = greedy(language, visual, prompts, **settings)
    ends = {token: [until(row, token) for row in whole] for row in whole for token in row}
    end, expected = max(ends.items(), key=lambda item: len(set(map(len, item[1]))))
    assert len(set(map(len, expected))) > 1
    language.end_id = end
    assert greedy(language, visual, prompts, **settings) == expected
    language.pad_id = end
    assert greedy(language, visual, prompts, **settings) == expected


def until(row: list[int], end: int) -> list[int]:
    return row[: row.index(end)] if end in row else row


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_settings_that_the_model_brings_along_do_not_count(name: str) -> None:
    language, visual = tiny_language_model(name), visual_prompts(4)
    expected = greedy(language, visual, PROMPTS)
    beams = greedy(language, visual, PROMPTS, num_beams=2)
    other = deepcopy(language)
    own = other.model.generation_config
    likely = max(expected, key=len)[0]
    own.update(
        max_length=3, min_length=2, max_new_tokens=2, min_new_tokens=1, do_sample=True, temperature=9.0,
        top_k=3, top_p=0.3, num_beams=3, num_return_sequences=2, no_repeat_ngram_size=1,
        repetition_penalty=3.0, length_penalty=-9.0, early_stopping=True, eos_token_id=[4, 5, 6],
        pad_token_id=7, forced_bos_token_id=9, forced_eos_token_id=9, suppress_tokens=[likely],
        begin_suppress_tokens=[likely], bad_words_ids=[[likely]], output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    before = own.to_dict()
    assert other.generate(visual, PROMPTS, max_new_tokens=8) == expected
    assert greedy(other, visual, PROMPTS, num_beams=2) == beams
    assert other.model.generation_config is own
    assert own.to_dict() == before


def test_settings_of_the_caller_count() -> None:
    language, visual = tiny_language_model("bart"), visual_prompts(2)
    found = greedy(language, visual, ["a", ""], forced_bos_token_id=UNKNOWN, max_new_tokens=3, min_new_tokens=3)
    assert [row[0] for row in found] == [UNKNOWN, UNKNOWN]
    assert [len(row) for row in found] == [3, 3]
    sampled = []
    for _ in range(2):
        torch.manual_seed(1)
        sampled.append(
            language.generate(visual, ["a", ""], do_sample=True, top_p=0.9, temperature=2.0, max_new_tokens=8)
        )
    assert sampled[0] == sampled[1] != greedy(language, visual, ["a", ""])


def test_how_much_is_written_must_be_said() -> None:
    with pytest.raises(ConfigError, match="max_new_tokens"):
        tiny_language_model("t5").generate(visual_prompts(1), ["a"], num_beams=2)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_adapters_write_too(name: str) -> None:
    language, visual = tiny_language_model(name), visual_prompts(4)
    plain = greedy(language, visual, PROMPTS)
    targets = ["q_proj", "v_proj"] if name in CAUSAL else ["q", "v"]
    kind = "CAUSAL_LM" if name in CAUSAL else "SEQ_2_SEQ_LM"
    config = peft.LoraConfig(r=2, target_modules=targets, task_type=kind)
    with warnings.catch_warnings(action="ignore"):  # peft's, about transformers
        adapted = wrap_language_model(peft.get_peft_model(language.model, config), language.tokenizer).eval()
    assert greedy(adapted, visual, PROMPTS) == plain  # adapters begin as nothing
    for part, module in adapted.named_modules():
        if "lora_B" in part:
            randomise(module, seed=0, scale=1.0)
    found = greedy(adapted, visual, PROMPTS)
    assert found != plain
    with torch.no_grad():
        assert found == [by_plain_passes(adapted, visual[row : row + 1], PROMPTS[row], 8) for row in range(4)]


def test_a_line_end_ends_what_is_written() -> None:
    language, visual = tiny_language_model("opt", "bytes", end_of_text="\n"), visual_prompts(4)
    with torch.no_grad():
        language.model.get_output_embeddings().weight[language.end_id] *= 3
    found = greedy(language, visual, PROMPTS, max_new_tokens=20)
    assert any(len(row) < 20 for row in found)
    assert not any(language.end_id in row for row in found)


def test_words_are_read_back_without_special_tokens_and_outer_blanks() -> None:
    language = tiny_language_model("gpt2", "bytes")
    ids = [START, *language.tokenizer(" a big dog ").input_ids, END]
    assert language.decode(ids) == "a big dog"
