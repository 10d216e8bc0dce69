"""Frozen parts of a BLIP-2: no gradients, no noise, own precision, and features that depend on the image alone."""

import warnings
from dataclasses import replace
from functools import partial

import peft
import pytest
import torch
import transformers
from torch import Tensor

from openblip.errors import ConfigError
from openblip.models import vision_tower
from openblip.models.blip2 import Blip2
from openblip.models.config import Blip2Config, LanguageConfig
from openblip.models.language_model import LanguageModel, wrap_language_model
from openblip.models.vision_tower import VisionTower, run_frozen
from openblip.nn.config import QFormerConfig
from tiny_blip import SIZE, TINY, random_pixels, randomise
from tiny_blip2 import tiny_blip2
from tiny_language_models import DIM, tiny_language_model

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


def test_what_does_not_fit_is_refused() -> None:
    model = Blip2(CONFIG, language=noisy_language())
    with pytest.raises(ValueError, match="qformer cannot be frozen"):
        model.freeze("vision", "qformer")
    assert model.frozen == ()
    assert Blip2(CONFIG).freeze("language").train().training  # one that comes later
    wide = LanguageConfig(name="x", hidden_dim=99)
    with pytest.raises(ConfigError, match=f"language model is {DIM} wide; the config says 99"):
        Blip2(replace(CONFIG, language=wide), language=noisy_language())
    without = replace(CONFIG, heads=("itc",), language=None)
    with pytest.raises(ConfigError, match="the config says that there is none"):
        Blip2(without, language=noisy_language())


SIGLIP = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": SIZE,
    "patch_size": 8,
}  # fmt: skip


def encoder(kind, dtype=torch.float32):
    if kind == "ours":
        return tiny_blip2().model.vision.to(dtype).eval()
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP))
    randomise(model, seed=1)
    return VisionTower(model.to(dtype).eval(), -2)


class Rounding(torch.nn.Module):
    """Rounds by the number of images, and where `by_place` by their places too, as kernels of several threads do."""

    def __init__(self, by_place):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.by_place = by_place

    def forward(self, pixels):
        """(B, 3, S, S) -> (B, 3, S * S)"""
        places = torch.arange(len(pixels)) if self.by_place else torch.zeros(len(pixels))
        return pixels.flatten(2) + 1e-4 * (len(pixels) + places[:, None, None])


FROZEN = {
    **{kind: partial(encoder, kind) for kind in ("ours", "siglip")},
    **{f"{kind} in bfloat16": partial(encoder, kind, torch.bfloat16) for kind in ("ours", "siglip")},
    "rounding by place": lambda: Rounding(by_place=True),
    "rounding, in groups": lambda: Rounding(by_place=False),
}


@pytest.mark.parametrize("name", FROZEN)
def test_features_do_not_depend_on_the_batch(name, monkeypatch):
    """Whatever its size, its order and who else is in it; in groups as on an accelerator too."""
    frozen = FROZEN[name]()
    pixels = torch.randn(13, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    if name.endswith("in groups"):
        monkeypatch.setattr(vision_tower, "_group_size", lambda device: 4)
    together = run_frozen(frozen, pixels)
    assert together.dtype == next(frozen.parameters()).dtype
    for size in (1, 2, 5):
        in_batches = torch.cat([run_frozen(frozen, batch) for batch in pixels.split(size)])
        assert torch.equal(in_batches, together)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    assert torch.equal(run_frozen(frozen, pixels[order]), together[order])
    others = torch.cat([pixels[3:4], torch.full((5, 3, SIZE, SIZE), 9.0)])
    assert torch.equal(run_frozen(frozen, others)[:1], together[3:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["ours", "siglip"])
def test_features_are_the_encoders_whatever_autocast_says(kind, dtype):
    frozen, pixels = encoder(kind, dtype), torch.randn(3, 3, SIZE, SIZE)
    rtol = atol = 1e-5 if dtype == torch.float32 else 1e-2
    with torch.no_grad():
        torch.testing.assert_close(run_frozen(frozen, pixels), frozen(pixels.to(dtype)), rtol=rtol, atol=atol)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = run_frozen(frozen, pixels)
    assert features.dtype == dtype
    assert torch.equal(features, run_frozen(frozen, pixels))


@pytest.mark.parametrize("tower", [False, True])
def test_a_frozen_encoder_has_no_gradients_and_stays_in_eval_mode(tower):
    model = tiny_blip2(tower=tower).model.freeze("vision")
    for _ in range(2):
        model.eval().train()
        assert model.training
        assert model.qformer.training
        assert not any(module.training for module in model.vision.modules())
    features = model.encode_image(torch.randn(2, 3, SIZE, SIZE))
    assert not features.requires_grad
    model.encode_queries(model.image_kv(features)).queries.sum().backward()
    assert all(not p.requires_grad and p.grad is None for p in model.vision.parameters())
    assert all(p.requires_grad for p in model.qformer.parameters())
    assert model.vision_norm.weight.grad is not None  # trained in both stages
    model.freeze().train()
    assert all(module.training for module in model.vision.modules())
    assert all(p.requires_grad for p in model.vision.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_normed_in_float32(dtype):
    model = tiny_blip2().model.freeze("vision")
    model.vision.to(dtype)
    features = model.encode_image(torch.randn(2, 3, SIZE, SIZE))
    assert features.dtype == dtype
    found, exact = (model.image_kv(given).layers[0] for given in (features, features.float()))
    assert found.key.dtype == torch.float32
    torch.testing.assert_close(found[:2], exact[:2], atol=0, rtol=0)


def test_inference_takes_all_images_at_once():
    """Only what is frozen pays for features that are the same to the last bit."""
    model, sizes = tiny_blip2().model, []
    model.vision.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    with torch.inference_mode():
        model.encode_image(torch.randn(5, 3, SIZE, SIZE))
    model.freeze("vision").encode_image(torch.randn(5, 3, SIZE, SIZE))
    assert sizes == [5, 1, 1, 1, 1, 1]
