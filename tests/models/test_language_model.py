"""Frozen language models in training: what is predicted, from what, whatever stands beside it in the batch.

R rows, Q visual prompts, T text tokens.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_language_models import (
    CAUSAL,
    DIM,
    END,
    MODELS,
    SEQ2SEQ,
    START,
    byte_tokenizer,
    gpt2,
    tiny_language_model,
    tokens_of,
    visual_prompts,
    word_tokenizer,
)

from openblip.errors import CheckpointError
from openblip.models.language_model import IGNORED_LABEL, LanguageModel, Predicted, wrap_language_model

PROMPTS = ["", "Question: how many?", "a photo of", "a"]
TEXTS = ["a small red dog", "two", "a big tree left of a cats", "dog"]


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


@pytest.mark.parametrize("words", ["words", "bytes"])
@pytest.mark.parametrize("name", list(MODELS))
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
    assert len(language.generate(visual_prompts(1), ["a"], max_new_tokens=2, min_new_tokens=2)[0]) == 2


def test_a_line_end_may_end_texts() -> None:
    language = tiny_language_model("gpt2", "bytes", end_of_text="\n")
    found = language.predict(visual_prompts(1), ["a"], ["dog"], 20)
    assert predicted_tokens(language, found) == [["Ġdog", "Ċ"]]


@pytest.mark.parametrize("end", ["a dog", ""])
def test_an_end_that_is_not_one_token_is_refused(end: str) -> None:
    with pytest.raises(CheckpointError, match=f"end_of_text '{end}' is {len(end.split())} tokens"):
        tiny_language_model("gpt2", "words", end_of_text=end)


def test_a_tokenizer_without_end_asks_for_one() -> None:
    tokenizer = byte_tokenizer("$A")
    tokenizer.eos_token = None
    with pytest.raises(CheckpointError, match="has no end token: name an end_of_text"):
        wrap_language_model(gpt2(len(tokenizer)), tokenizer)


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
    expected, found = (
        lm.predict(visual_prompts(2), ["a photo of", ""], ["two dogs", "a tree"], 20) for lm in (language, other)
    )
    assert not slow.is_fast
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.logits, expected.logits)


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
