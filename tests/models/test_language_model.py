"""Frozen language models in training: what is predicted, from what, whatever stands beside it in the batch.

R rows, Q visual prompts, T text tokens.
"""

import logging
import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from marks import slow
from openblip.errors import CheckpointError, ConfigError
from openblip.models.language_decoder import read_prompts
from openblip.models.language_model import (
    IGNORED_LABEL,
    CausalLanguageModel,
    LanguageModel,
    Predicted,
    wrap_language_model,
)
from tiny_blip import randomise
from tiny_language_models import (
    CAUSAL,
    DIM,
    END,
    MODELS,
    SEQ2SEQ,
    START,
    byte_tokenizer,
    tiny_language_model,
    tokens_of,
    untrained,
    visual_prompts,
    word_tokenizer,
)
from written_texts import beam_ids, ids_of_transformers

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


def predicted_tokens(language: LanguageModel, predicted: Predicted) -> list[list[str]]:
    """The tokens that each row is to say."""
    return [tokens_of(language, [i for i in row if i != IGNORED_LABEL]) for row in predicted.labels.tolist()]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_decoder_predicts_the_text_and_its_end_and_nothing_before(name: str) -> None:
    language = tiny_language_model(name)
    number = language.tokenizer.get_vocab()
    first = int(name in ("opt", "llama"))  # their <s>
    found = language.predict(visual_prompts(3), ["", "a photo of", "a"], ["a dog", "two dogs", ""], 20).labels
    no = IGNORED_LABEL
    expected = [
        [no] * first + [number["a"], number["dog"], END, no, no, no],
        [no] * first + [no, no, no, number["two"], number["dogs"], END],
        [no] * first + [no, END, no, no, no, no],
    ]
    assert found.tolist() == expected


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_writer_with_an_encoder_predicts_all_that_its_decoder_reads(name: str) -> None:
    language = tiny_language_model(name)
    number = language.tokenizer.get_vocab()
    first = [START] if name == "bart" else []
    found = language.predict(visual_prompts(3), ["", "a photo of", "a"], ["a dog", "two", ""], 20).labels
    no = IGNORED_LABEL
    assert found.tolist() == [
        [*first, number["a"], number["dog"], END],
        [*first, number["two"], END, no],
        [*first, END, no, no],
    ]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_blank_between_prompt_and_text_belongs_to_the_text(name: str) -> None:
    language = tiny_language_model(name, "bytes")
    prompts = ["a photo of", "a photo of ", "Answer:", "", "a tree\n"]
    found = language.predict(visual_prompts(5), prompts, ["big dog"] * 5, 30)
    alone = tokens_of(language, language.tokenizer("big dog", add_special_tokens=False).input_ids)
    assert predicted_tokens(language, found) == [["Ġbig", "Ġdog", "</s>"]] * 3 + [[*alone, "</s>"]] * 2
    silent = language.predict(visual_prompts(5), prompts, [""] * 5, 30)
    assert predicted_tokens(language, silent) == [["</s>"]] * 5


def test_a_prompt_keeps_its_tokens_though_the_text_would_change_them() -> None:
    """GPT-2's words make one token of two line ends, unless a word follows."""
    language = tiny_language_model("gpt2", "bytes")
    prompt, text = "a tree\n\n", "the dog"
    alone = language.tokenizer(prompt).input_ids
    assert language.tokenizer(prompt + text).input_ids[: len(alone)] != alone
    labels = language.predict(visual_prompts(1), [prompt], [text], 30).labels[0].tolist()
    assert labels == [IGNORED_LABEL] * len(alone) + [*language.tokenizer(text).input_ids, END]


@pytest.mark.parametrize("name", list(MODELS))
def test_a_text_that_is_too_long_loses_words_and_keeps_its_end(name: str) -> None:
    language = tiny_language_model(name)
    text = "a small red dog left of two big blue cats"
    (said,) = predicted_tokens(language, language.predict(visual_prompts(1), ["a photo"], [text], 7))
    prompted = 2 * (name in CAUSAL) + len(language.first_ids)
    read = ["<s>"] if name == "bart" else []
    assert said == [*read, *text.split()[: 6 - prompted], "</s>"]
    (said,) = predicted_tokens(language, language.predict(visual_prompts(1), ["a photo"], [text], 2))
    assert said == ([*read, "a", "</s>"][-2:] if name == "t5" else [*read, "</s>"])


@pytest.mark.parametrize(("name", "words"), EVERY)
def test_a_row_is_predicted_as_if_it_were_alone(name: str, words: str) -> None:
    language, visual = tiny_language_model(name, words), visual_prompts(4)
    language.model.double()  # T5 does not scale its attention, which enlarges rounding
    together = language.predict(visual, PROMPTS, TEXTS, 40)
    for row in range(4):
        alone = language.predict(visual[row : row + 1], PROMPTS[row : row + 1], TEXTS[row : row + 1], 40)
        length = alone.labels.shape[1]
        assert together.labels[row, :length].tolist() == alone.labels[0].tolist()
        assert (together.labels[row, length:] == IGNORED_LABEL).all()
        said = alone.labels[0] != IGNORED_LABEL
        torch.testing.assert_close(together.logits[row, :length][said], alone.logits[0][said], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_label_is_compared_with_what_is_said_just_before_it(name: str, count: int) -> None:
    """Logits as a plain pass gives them over the visual prompts and the ids up to there."""
    language, visual = tiny_language_model(name), visual_prompts(1, count)
    found = language.predict(visual, ["a photo of"], ["two dogs"], 20)
    ids = language.tokenizer("a photo of two dogs").input_ids
    words = language.model.get_input_embeddings()(torch.tensor([ids]))
    plain = language.model(inputs_embeds=torch.cat([visual, words], dim=1)).logits[0]
    torch.testing.assert_close(found.logits[0, -3:], plain[-3:], atol=1e-5, rtol=1e-5)
    assert found.labels[0, -3:].tolist() == [*ids[-2:], END]
    assert found.logits.shape[1] == found.labels.shape[1] == len(ids) + 1 - (count == 0)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_an_encoder_reads_visual_prompts_before_the_prompt(name: str) -> None:
    language, visual = tiny_language_model(name), visual_prompts(1)
    found = language.predict(visual, ["a photo of"], ["two dogs"], 20)
    embed = language.model.get_input_embeddings()
    read = torch.cat([visual, embed(torch.tensor([language.tokenizer("a photo of").input_ids]))], dim=1)
    target = language.tokenizer("two dogs").input_ids
    start = language.model.config.decoder_start_token_id
    plain = language.model(inputs_embeds=read, decoder_input_ids=torch.tensor([[start, *target[:-1]]])).logits
    assert found.labels.tolist() == [target]
    torch.testing.assert_close(found.logits, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", list(MODELS))
def test_gradients_reach_the_visual_prompts_of_every_row(name: str) -> None:
    language, visual = tiny_language_model(name), visual_prompts(4).requires_grad_()
    found = language.predict(visual, PROMPTS, TEXTS, 20)
    torch.nn.functional.cross_entropy(found.logits.flatten(0, 1), found.labels.flatten()).backward()
    assert (visual.grad.abs().sum(dim=-1) > 0).all()


def test_visual_prompts_follow_the_precision_of_the_model() -> None:
    language = tiny_language_model("llama")
    language.model.bfloat16()
    assert language.model.dtype == torch.bfloat16
    assert language.predict(visual_prompts(1), ["a"], ["dog"], 20).logits.dtype == torch.bfloat16
    assert len(beam_ids(language, visual_prompts(1), ["a"], 2, min_new_tokens=2)[0]) == 2


@pytest.mark.parametrize("end", ["a dog", ""])
def test_an_end_that_is_not_one_token_is_refused(end: str) -> None:
    with pytest.raises(CheckpointError, match=f"end_of_text '{end}' is {len(end.split())} tokens"):
        tiny_language_model("gpt2", "words", end_of_text=end)
    tokenizer = byte_tokenizer("$A")
    tokenizer.eos_token = None
    with pytest.raises(CheckpointError, match="has no end token: name an end_of_text"):
        wrap_language_model(untrained("gpt2", len(tokenizer)), tokenizer)


class SlowTokenizer(transformers.PreTrainedTokenizer):
    """One written in Python, which knows no offsets."""

    def __init__(self, vocab: dict[str, int], **settings: Any) -> None:
        self.vocab = vocab
        super().__init__(**settings)

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.vocab)

    def _tokenize(self, text: str, **settings: Any) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return self.vocab.get(token, self.vocab["<unk>"])

    def _convert_id_to_token(self, index: int) -> str:
        return {number: token for token, number in self.vocab.items()}[index]

    def save_vocabulary(self, folder: str, prefix: str | None = None) -> tuple[str, ...]:
        return (str(Path(folder)),)


def test_tokenizers_without_offsets_serve_as_well() -> None:
    fast = word_tokenizer("$A")
    slow = SlowTokenizer(fast.get_vocab(), pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    language = tiny_language_model("gpt2")
    other = wrap_language_model(language.model, slow)
    prompts, texts = ["a photo of", ""], ["two dogs", "a tree"]
    expected, found = (model.predict(visual_prompts(2), prompts, texts, 20) for model in (language, other))
    assert not slow.is_fast
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_the_width_is_that_of_the_words() -> None:
    """As in OPT-350m, whose words are narrower than its layers."""
    config = transformers.OPTConfig(
        vocab_size=30, hidden_size=16, word_embed_proj_dim=8, ffn_dim=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    language = wrap_language_model(transformers.OPTForCausalLM(config).eval(), word_tokenizer("<s> $A"))
    assert language.hidden_dim == 8
    assert tiny_language_model("opt").hidden_dim == DIM
    assert language.predict(torch.zeros(1, 2, 8), [""], ["a dog"], 20).logits.shape == (1, 4, 30)


@pytest.mark.parametrize(("name", "words"), EVERY)
def test_a_text_has_in_writing_the_probability_that_training_gave_it(name: str, words: str) -> None:
    """Texts are forced through generation, padded on the other side; logits agree token by token."""
    language, visual = tiny_language_model(name, words), visual_prompts(4)
    language.model.double()
    taught = language.predict(visual, PROMPTS, TEXTS, 40)
    rows = [labels != IGNORED_LABEL for labels in taught.labels]
    forced = [labels[row] for labels, row in zip(taught.labels, rows, strict=True)]
    ids = pad_sequence(forced, batch_first=True)  # (R, T)
    with torch.no_grad():
        read = read_prompts(language, visual, PROMPTS, ids.shape[1])
        decoder = read.texts(torch.arange(4), ids.shape[1])
        steps = [read.logits, *(decoder.step(chosen) for chosen in ids.T[:-1])]
        at_once = read.texts(torch.arange(4), ids.shape[1]).read(ids[:, :-1])
    written = torch.stack(steps, dim=1)  # (R, T, V)
    torch.testing.assert_close(at_once.float(), written[:, 1:], atol=1e-5, rtol=1e-5)
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
    found = beam_ids(language, visual, PROMPTS, 8)
    for row, prompt in enumerate(PROMPTS):
        assert found[row] == by_plain_passes(language, visual[row : row + 1], prompt, 8)
    assert beam_ids(language, visual, PROMPTS, 3) == [row[:3] for row in found]


@pytest.mark.parametrize(("name", "words"), EVERY)
def test_beams_are_those_of_transformers(name: str, words: str) -> None:
    language, visual = tiny_language_model(name, words), visual_prompts(4)
    language.model.double()
    settings = {"max_new_tokens": 9, "num_beams": 3, "length_penalty": 0.5}
    assert beam_ids(language, visual, PROMPTS, **settings) == ids_of_transformers(language, visual, PROMPTS, **settings)


@pytest.mark.parametrize("num_beams", [3, *slow(1)])
@pytest.mark.parametrize("name", list(MODELS))
def test_prompts_of_different_lengths_do_not_disturb_each_other(name: str, num_beams: int) -> None:
    language, visual = tiny_language_model(name), visual_prompts(4)
    language.model.double()
    together = beam_ids(language, visual, PROMPTS, 8, num_beams)
    alone = [beam_ids(language, visual[row : row + 1], PROMPTS[row : row + 1], 8, num_beams)[0] for row in range(4)]
    assert together == alone


@pytest.mark.parametrize("name", list(MODELS))
def test_only_what_was_written_comes_back(name: str) -> None:
    """No prompt, start token, end or padding, also when the end is what pads."""
    language, visual = tiny_language_model(name), visual_prompts(6)
    prompts = [*PROMPTS, "two", "a dog"]
    with torch.no_grad():
        language.model.get_output_embeddings().weight[END] = 0  # another token is the end here
    whole = beam_ids(language, visual, prompts, 12, min_new_tokens=12)
    ends = {token: [until(row, token) for row in whole] for row in whole for token in row}
    end, expected = max(ends.items(), key=lambda item: len(set(map(len, item[1]))))
    assert len(set(map(len, expected))) > 1
    language.end_id = end
    assert beam_ids(language, visual, prompts, 12) == expected
    language.pad_id = end
    assert beam_ids(language, visual, prompts, 12) == expected


def until(row: list[int], end: int) -> list[int]:
    return row[: row.index(end)] if end in row else row


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_settings_that_the_model_brings_along_do_not_count(name: str) -> None:
    language, visual = tiny_language_model(name), visual_prompts(4)
    expected, beams = beam_ids(language, visual, PROMPTS, 8), beam_ids(language, visual, PROMPTS, 8, 2)
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
    assert beam_ids(other, visual, PROMPTS, 8) == expected
    assert beam_ids(other, visual, PROMPTS, 8, 2) == beams
    assert other.model.generation_config is own
    assert own.to_dict() == before


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_adapters_write_too(name: str) -> None:
    language, visual = tiny_language_model(name), visual_prompts(4)
    plain = beam_ids(language, visual, PROMPTS, 8)
    targets = ["q_proj", "v_proj"] if name in CAUSAL else ["q", "v"]
    kind = "CAUSAL_LM" if name in CAUSAL else "SEQ_2_SEQ_LM"
    config = peft.LoraConfig(r=2, target_modules=targets, task_type=kind)
    with warnings.catch_warnings(action="ignore"):  # peft's, about transformers
        adapted = wrap_language_model(peft.get_peft_model(language.model, config), language.tokenizer).eval()
    assert beam_ids(adapted, visual, PROMPTS, 8) == plain  # adapters begin as nothing
    for part, module in adapted.named_modules():
        if "lora_B" in part:
            randomise(module, seed=0, scale=1.0)
    found = beam_ids(adapted, visual, PROMPTS, 8)
    assert found != plain
    with torch.no_grad():
        assert found == [by_plain_passes(adapted, visual[row : row + 1], PROMPTS[row], 8) for row in range(4)]


def test_a_line_end_ends_what_is_written() -> None:
    one_line = tiny_language_model("gpt2", "bytes", end_of_text="\n")
    predicted = one_line.predict(visual_prompts(1), ["a"], ["dog"], 20)
    assert predicted_tokens(one_line, predicted) == [["Ġdog", "Ċ"]]
    language, visual = tiny_language_model("opt", "bytes", end_of_text="\n"), visual_prompts(4)
    with torch.no_grad():
        language.model.get_output_embeddings().weight[language.end_id] *= 3
    found = beam_ids(language, visual, PROMPTS, 20)
    assert any(len(row) < 20 for row in found)
    assert not any(language.end_id in row for row in found)


def test_words_are_read_back_without_special_tokens_and_outer_blanks() -> None:
    language = tiny_language_model("gpt2", "bytes")
    ids = [START, *language.tokenizer(" a big dog ").input_ids, END]
    assert language.decode(ids) == "a big dog"


def test_a_sequence_says_when_it_is_too_long_or_has_an_encoder() -> None:
    language = tiny_language_model("opt")
    positions = language.model.config.max_position_embeddings
    count = positions // 4
    with pytest.raises(ConfigError, match=f"reads {positions} at most: put fewer"):
        language.predict(visual_prompts(count), [""] * count, ["a dog"] * count, 20, count)
    with pytest.raises(ConfigError, match="Only a decoder"):
        tiny_language_model("t5").predict(visual_prompts(2), ["a", "a"], ["dog", "car"], 20, 2)
