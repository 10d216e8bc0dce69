"""Language models trained on text alone: the loss is that of transformers; where texts are cut, and how often.

T tokens, V vocabulary.
"""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from openblip.data.config import Preprocessing
from openblip.data.sample import Sample
from openblip.recipes.initialize import train_language_tokenizer
from openblip.recipes.run import LanguageShape
from openblip.tasks.config import LanguagePretrainingConfig
from openblip.tasks.language_model import (
    LanguagePretraining,
    TextProcessor,
    split_at_random,
    split_document,
    split_texts,
)

TEXTS = ["a photo of a tree", "a red dog\nQuestion: how many dogs are there? Answer: two\na small dog"]


def tiny(architecture, seed=0):
    tokenizer = train_language_tokenizer(TEXTS * 3, 400, ends=architecture == "t5")
    shape = LanguageShape(
        architecture=architecture, hidden_dim=16, num_layers=2, num_heads=2, mlp_dim=32, max_positions=64
    )
    torch.manual_seed(seed)
    language = shape.build(tokenizer)
    with torch.no_grad():  # so random that texts differ
        for parameter in language.parameters():
            parameter.normal_(std=0.3)
    return language


def batch_of(texts):
    def view(image, rng):
        raise AssertionError("a text has no image")

    processor = TextProcessor()
    samples = [Sample(str(number), "s", b"", (), "x", {"text": text}) for number, text in enumerate(texts)]
    return processor.collate([processor(sample, view, None) for sample in samples], None)


def loss_of(language, texts, max_text_tokens=64):
    config = LanguagePretrainingConfig(max_text_tokens=max_text_tokens)
    task = LanguagePretraining(config, language, tokenizer=None, preprocessing=Preprocessing(image_size=1))
    (loss,) = task(batch_of(texts), 0, torch.Generator().manual_seed(3)).values()
    return loss


def token_losses(logits, ids):
    """Cross-entropies of ids (T,) after logits (T, V)."""
    return F.cross_entropy(logits, ids, reduction="none").tolist()


def test_a_decoder_is_trained_on_every_word_and_the_end_of_each_text():
    language = tiny("opt")
    losses = []
    for text in TEXTS:
        ids = torch.tensor([*language.tokenizer(text).input_ids, language.end_id])
        logits = language.model(input_ids=ids[None]).logits[0]
        losses += token_losses(logits[:-1], ids[1:])
    assert loss_of(language, TEXTS).item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_an_encoder_decoder_is_trained_on_what_follows_the_prefix():
    language = tiny("t5")
    losses = []
    for prefix, rest in zip(*split_texts(TEXTS, split_document, 3, torch.Generator().manual_seed(3)), strict=True):
        read, written = (torch.tensor([language.tokenizer(text).input_ids]) for text in (prefix, rest))
        assert written[0, -1] == language.tokenizer.eos_token_id
        logits = language.model(input_ids=read, labels=written).logits[0]
        losses += token_losses(logits, written[0])
    assert loss_of(language, TEXTS).item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_a_long_text_is_cut_before_its_end_token():
    language = tiny("opt")
    ids = torch.tensor([*language.tokenizer(TEXTS[1]).input_ids[:7], language.end_id])
    logits = language.model(input_ids=ids[None]).logits[0]
    losses = token_losses(logits[:-1], ids[1:])
    assert loss_of(language, TEXTS[1:], max_text_tokens=8).item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@pytest.mark.parametrize("architecture", ["opt", "t5"])
def test_every_weight_is_trained(architecture):
    language = tiny(architecture)
    loss = loss_of(language, TEXTS * 4)
    loss.backward()
    assert math.isfinite(loss.item())
    without = [name for name, p in language.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


DOCUMENT = "one two three four\nQuestion: what is it? Answer: big dog\nfive six"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_text_is_cut_after_one_word_to_half_of_them_equally_often():
    text = "a b c d e f g"
    prefixes, rests = split_texts([text] * 3000, split_at_random, 1, generator())
    assert all(f"{prefix} {rest}" == text for prefix, rest in zip(prefixes, rests, strict=True))
    counts = Counter(prefixes)
    assert set(counts) == {"a", "a b", "a b c"}
    assert min(counts.values()) > 900


def test_the_ends_of_the_range_are_its_first_and_last_place():
    assert split_at_random("a b c d", 0.0) == ("a", "b c d")
    assert split_at_random("a b c d", 0.999999) == ("a b", "c d")
    assert split_at_random("a b", 0.5) == ("a", "b")
    assert split_at_random("dog", 0.5) == ("", "dog")


def test_a_document_is_cut_in_a_line_that_has_lines_before_it():
    counts = Counter(zip(*split_texts([DOCUMENT] * 4000, split_document, 3, generator()), strict=True))
    first, question, last = DOCUMENT.split("\n")
    for prefix, rest in counts:
        *before, cut = prefix.split("\n")
        line = [question, last][len(before) - 1]
        assert before == [first, question][: len(before)]
        assert f"{cut} {rest}".strip() == line
    # Half of the cuts in either line are natural: before the answer, before the whole line.
    assert abs(counts[(f"{first}\nQuestion: what is it? Answer:", "big dog")] / 4000 - 0.25) < 0.03
    assert abs(counts[(f"{first}\n{question}\n", "five six")] / 4000 - 0.25) < 0.03


def test_a_document_of_one_line_is_cut_at_random():
    assert set(split_texts(["a b c d"] * 200, split_document, 3, generator())[0]) == {"a", "a b"}


def test_the_generator_decides():
    texts = [DOCUMENT] * 20
    assert split_texts(texts, split_document, 3, generator(1)) == split_texts(texts, split_document, 3, generator(1))
    assert split_texts(texts, split_document, 3, generator(1)) != split_texts(texts, split_document, 3, generator(2))
