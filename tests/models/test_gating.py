"""Gated layers in a frozen language model: what a token attends to, with and without a cache, and where they begin."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from openblip.checkpoints.checkpoint import Blip2Checkpoint
from openblip.errors import ConfigError
from openblip.generation.decoding import Beam, Greedy
from openblip.models import flops
from openblip.models.blip2 import Blip2
from openblip.models.gating import ShownExamples
from openblip.models.language_model import IGNORED_LABEL
from openblip.nn.attention import KeyValue
from openblip.nn.config import GatedConfig, ResamplerConfig
from openblip.predictor import Blip2Predictor
from tiny_blip import random_pixels, randomise
from tiny_blip2 import tiny_blip2
from tiny_language_models import tiny_language_model

GATED = GatedConfig(num_layers=2, num_heads=2, mlp_dim=24)
RESAMPLER = ResamplerConfig(num_queries=3, hidden_dim=24, num_layers=1, num_heads=2, mlp_dim=32)


def gated_checkpoint(gates: float = 0.8) -> Blip2Checkpoint:
    checkpoint = tiny_blip2((), "opt")
    model = Blip2(replace(checkpoint.model.config, connector=RESAMPLER, gated=GATED))
    randomise(model, seed=3)
    with torch.no_grad():
        for layer in model.gating.gated:
            layer.attention_gate.fill_(gates)
            layer.feed_forward_gate.fill_(gates)
    model.language = tiny_language_model("opt")
    return checkpoint._replace(model=model.eval())


def visual_of(model: Blip2, count: int) -> Tensor:
    return model.visual_prompts(model.encode_visual(model.encode_image(random_pixels(count))))


@torch.no_grad()
def test_a_token_attends_to_the_image_of_the_last_tag_before_it() -> None:
    model = gated_checkpoint().model
    language, seen = model.require_language(), list[Tensor]()
    visual = visual_of(model, 4)
    words = torch.randn(5, visual.shape[2])
    words[[0, 3]] = model.gating.tag[0]
    examples = ShownExamples(visual[:2], words)

    def record(layer: Any, args: Any, inputs: Any) -> None:
        seen.append(args[0] if args else inputs["hidden_states"])

    first = next(part for part in language.model.modules() if isinstance(part, torch.nn.ModuleList))[0]
    before = first.register_forward_pre_hook(record, with_kwargs=True)
    with model.attending(visual[2:], examples) as shown:
        after = first.register_forward_pre_hook(record, with_kwargs=True)
        language.predict(shown, ["a red", "a"], ["dog", "big blue car"], None)
    before.remove()
    after.remove()
    plain, changed = seen
    gated = model.gating.gated[0]
    for row in range(2):
        images = [*visual[:2], visual[2 + row]]
        for place in range(plain.shape[1]):
            image = images[0 if place < 3 else 1 if place < 5 else 2]
            projected: KeyValue = gated.attention.project(image[None])
            expected = gated(plain[row : row + 1, place : place + 1], projected)[0, 0]
            torch.testing.assert_close(changed[row, place], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("gated", [True, False])
def test_a_text_of_a_sequence_is_predicted_as_after_an_example(gated: bool) -> None:
    """What training shows of the images and texts before is what examples in a prompt look like."""
    model = (gated_checkpoint() if gated else tiny_blip2((), "opt")).model
    language, visual = model.require_language(), visual_of(model, 5)
    prompts, texts = ["a photo of", "a", "", "a", "the"], ["a dog", "two big cars", "red", "car", "big blue dog"]
    standing = model.gating.tags(5) if gated else visual
    expected = []
    for row in range(5):
        shown_before, own = range(0 if row < 3 else 3, row), slice(row, row + 1)
        words = [torch.cat([standing[i], language.embed_example(prompts[i], texts[i])]) for i in shown_before]
        examples = ShownExamples(visual[list(shown_before)], torch.cat(words)) if words else None
        with model.attending(visual[own], examples) as shown:
            expected.append(language.predict(shown, prompts[own], texts[own], None))
    found = model.predict_text(visual, prompts, texts, images_per_sequence=3)
    assert len(found.logits) == 2
    said = found.labels != IGNORED_LABEL
    assert found.labels[said].tolist() == [i for each in expected for i in each.labels[0].tolist() if i >= 0]
    logits = torch.cat([each.logits[each.labels != IGNORED_LABEL] for each in expected])
    torch.testing.assert_close(found.logits[said], logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_closed_gates_leave_the_language_model_as_it_is() -> None:
    model = gated_checkpoint(gates=0.0).model
    language, visual = model.require_language(), visual_of(model, 2)
    texts = (["a photo of", "a"], ["a dog", "two big cars"])
    predicted = model.predict_text(visual, *texts)
    expected = language.predict(model.gating.tags(2), *texts, 32)
    torch.testing.assert_close(predicted.logits, expected.logits)
    for layer in model.gating.gated:
        layer.attention_gate.fill_(0.5)
    assert (model.predict_text(visual, *texts).logits - expected.logits).abs().max() > 1e-2


EXAMPLES = [(0, "what color is it?", "red"), (1, "how many dogs are there?", "two")]


@torch.no_grad()
@pytest.mark.parametrize("num_examples", [0, 2])
def test_texts_are_written_with_a_cache_as_they_are_predicted(num_examples: int) -> None:
    """Beams change places, texts end at different steps, and images go to their own rows."""
    checkpoint = gated_checkpoint()
    predictor = Blip2Predictor(checkpoint)
    pixels = (random_pixels(6) * 40 + 128).clamp(0, 255).to(torch.uint8)
    examples = [(pixels[place], *texts) for place, *texts in EXAMPLES[:num_examples]]
    shown = [(image.permute(1, 2, 0).numpy(), *texts) for image, *texts in examples]
    view = predictor._with_examples(shown) if shown else predictor
    images = predictor.encode(pixels[2:])
    questions = [f"what is {word}?" for word in ("it", "the big red dog", "that", "this blue car")]
    for decoding in (Greedy(max_new_tokens=6, min_new_tokens=3), Beam(max_new_tokens=6, min_new_tokens=3)):
        together = view.answer(images, questions, decoding=decoding, return_scores=True)
        alone = [
            view.answer(images.part(slice(row, row + 1)), [question], decoding=decoding, return_scores=True)[0]
            for row, question in enumerate(questions)
        ]
        assert [answer.text for answer in together] == [answer.text for answer in alone]
        for row, answer in enumerate(together):
            prompts = view._question_prompts([questions[row]])[1]
            with view._shown(images.part(slice(row, row + 1)).tokens, prompts) as shown:
                logits, labels = checkpoint.model.require_language().predict_ids(shown, prompts, [answer.ids])
            chosen = logits[0].log_softmax(1)[labels[0] >= 0].gather(1, labels[0][labels[0] >= 0][:, None])
            assert float(chosen.sum()) == pytest.approx(answer.logprob, abs=1e-3)
    assert len({answer.ids for answer in together}) > 1


def test_the_operations_of_gated_layers() -> None:
    model = gated_checkpoint().model.requires_grad_(False)
    language, visual = model.require_language(), visual_of(model, 1)
    prompt = torch.zeros(1, 6, dtype=torch.long)
    inputs = {"inputs_embeds": language.model.get_input_embeddings()(prompt), "use_cache": False}
    counts = []
    for gated in (False, True):
        shown = model.attending(visual) if gated else nullcontext()
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), shown:
            language.model(**inputs)
        counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == flops.gated_flops(model.config, 5, visual.shape[2], 6)


def test_an_encoder_decoder_has_no_gated_layers() -> None:
    model = gated_checkpoint().model
    model.language = tiny_language_model("t5")
    with pytest.raises(ConfigError, match="for decoders"):
        model.predict_text(visual_of(model, 1), ["a"], ["dog"])
