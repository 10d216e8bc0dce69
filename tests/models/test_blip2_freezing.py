"""What `Blip2.freeze` leaves without gradients and noise, and what it does not touch."""

import warnings
from dataclasses import replace

import peft
import pytest
import torch
from tiny_language_models import DIM, tiny_language_model
from torch import Tensor

from openblip.errors import ConfigError
from openblip.models.blip2 import Blip2
from openblip.models.config import Blip2Config, LanguageConfig, QFormerConfig
from openblip.models.language_model import LanguageModel, wrap_language_model
from tiny_blip import TINY, random_pixels

CONFIG = Blip2Config(
    vision=replace(TINY.vision, output_norm=False, drop_path=0.5),
    qformer=QFormerConfig(
        num_queries=4, hidden_dim=32, num_layers=2, num_heads=4, mlp_dim=48, dropout=0.5, vocab_size=60
    ),
    heads=("llm",),
    language=LanguageConfig(name="x", hidden_dim=DIM),
)


def noisy_language() -> LanguageModel:
    language = tiny_language_model("llama")
    language.model.config.attention_dropout = 0.5
    for layer in language.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    return language


def adapted_language() -> LanguageModel:
    language = noisy_language()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, task_type="CAUSAL_LM")
    with warnings.catch_warnings(action="ignore"):  # peft's, about transformers
        return wrap_language_model(peft.get_peft_model(language.model, config), language.tokenizer)


def loss(model: Blip2) -> Tensor:
    queries = model.encode_queries(model.image_kv(model.encode_image(random_pixels(2)))).queries
    predicted = model.require_language().predict(model.visual_prompts(queries), ["a", ""], ["dog", "cats"], 9)
    return predicted.logits.sin().sum()


def with_gradient(model: Blip2) -> set[str]:
    """First parts of the names of parameters that a backward pass reaches."""
    model.zero_grad()
    loss(model).backward()
    return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}


def frozen_parts(model: Blip2) -> set[str]:
    return {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}


def test_frozen_parts_get_no_gradient_and_the_others_do() -> None:
    model = Blip2(CONFIG, language=noisy_language()).freeze("vision", "language").train()
    assert frozen_parts(model) == {"vision", "language"}
    assert with_gradient(model) == {"vision_norm", "qformer", "language_proj"}
    model.freeze("language")
    assert frozen_parts(model) == {"language"}
    assert with_gradient(model) == {"vision", "vision_norm", "qformer", "language_proj"}
    model.freeze()
    assert frozen_parts(model) == set()
    assert with_gradient(model) == {"vision", "vision_norm", "qformer", "language_proj", "language"}


def test_frozen_parts_stay_in_eval_mode_whatever_mode_is_asked_for() -> None:
    model = Blip2(CONFIG, language=noisy_language()).train().freeze("vision", "language")
    for mode in (True, False, True):
        assert model.train(mode) is model
        assert (model.training, model.qformer.training) == (mode, mode)
        assert not any(part.training for part in (*model.vision.modules(), *model.language.modules()))
    model.freeze("language")
    assert model.vision.training
    assert all(module.training for module in model.vision.modules())
    assert not model.language.training
    assert not model.eval().freeze("language").training


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_parts_make_no_noise_in_training(frozen: bool) -> None:
    """Stochastic depth of the image encoder, dropout of the language model."""
    model = Blip2(CONFIG, language=noisy_language()).freeze(*(["vision", "language"] if frozen else []))
    model.train()
    pixels, visual = random_pixels(8), torch.randn(2, 3, DIM)
    features = [model.encode_image(pixels) for _ in range(2)]
    logits = [model.language.predict(visual, ["a", ""], ["dog", "cats"], 9).logits for _ in range(2)]
    assert torch.equal(*features) == torch.equal(*logits) == frozen
    assert features[0].requires_grad is not frozen
    assert not torch.equal(loss(model), loss(model))  # the Q-Former's dropout


def test_adapters_of_a_frozen_language_model_are_trained() -> None:
    model = Blip2(CONFIG, language=adapted_language()).freeze("vision", "language").train()
    trained = {n for n, p in model.language.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    with_gradient(model)
    for name, parameter in model.language.named_parameters():
        assert (parameter.grad is not None) == (name in trained)


def test_a_frozen_encoder_computes_in_its_own_precision() -> None:
    model = Blip2(CONFIG, language=noisy_language()).freeze("vision")
    model.vision.double()
    with torch.autocast("cpu"):
        features = model.encode_image(random_pixels(2))
    assert features.dtype == torch.float64
    torch.testing.assert_close(features, model.vision(random_pixels(2).double()), atol=1e-12, rtol=0)
    assert model.encode_queries(model.image_kv(features)).queries.dtype == torch.float32


def test_only_parts_that_there_are_can_be_frozen() -> None:
    model = Blip2(CONFIG, language=noisy_language())
    with pytest.raises(ValueError, match="qformer cannot be frozen"):
        model.freeze("vision", "qformer")
    assert model.frozen == ()
    assert Blip2(CONFIG).freeze("language").train().training  # one that comes later


def test_a_language_model_of_another_width_than_described_is_refused() -> None:
    wide = LanguageConfig(name="x", hidden_dim=99)
    with pytest.raises(ConfigError, match=f"language model is {DIM} wide; the config says 99"):
        Blip2(replace(CONFIG, language=wide), language=noisy_language())
    without = replace(CONFIG, heads=("itc",), language=None)
    with pytest.raises(ConfigError, match="the config says that there is none"):
        Blip2(without, language=noisy_language())
