"""Frozen image encoders: no gradients, eval mode for good, own precision, and features that depend on nothing
but the picture.

B images, N image tokens.
"""

import pytest
import torch
import transformers

from openblip.models import vision_tower
from openblip.models.vision_tower import VisionTower, run_frozen
from tiny_blip import SIZE, randomise
from tiny_blip2 import tiny_blip2

SIGLIP = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": SIZE,
    "patch_size": 8,
}


def encoder(kind, dtype=torch.float32):
    if kind == "ours":
        return tiny_blip2().model.vision.to(dtype).eval()
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP))
    randomise(model, seed=1)
    return VisionTower(model.to(dtype).eval(), -2)


class Rounding(torch.nn.Module):
    """Rounds by the number of pictures, and where `by_place` by their places too, as kernels of several
    threads do."""

    def __init__(self, by_place):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.by_place = by_place

    def forward(self, pixels):
        """(B, 3, S, S) -> (B, 3, S * S)"""
        places = torch.arange(len(pixels)) if self.by_place else torch.zeros(len(pixels))
        return pixels.flatten(2) + 1e-4 * (len(pixels) + places[:, None, None])


FROZEN = {
    "ours": lambda: encoder("ours"),
    "siglip": lambda: encoder("siglip"),
    "ours in bfloat16": lambda: encoder("ours", torch.bfloat16),
    "siglip in bfloat16": lambda: encoder("siglip", torch.bfloat16),
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


def test_features_are_the_encoders():
    for kind in ("ours", "siglip"):
        frozen = encoder(kind)
        pixels = torch.randn(3, 3, SIZE, SIZE)
        with torch.no_grad():
            torch.testing.assert_close(run_frozen(frozen, pixels), frozen(pixels), rtol=1e-5, atol=1e-5)


def test_autocast_does_not_reach_a_frozen_encoder():
    frozen = encoder("ours")
    pixels = torch.randn(2, 3, SIZE, SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = run_frozen(frozen, pixels)
    assert features.dtype == torch.float32
    assert torch.equal(features, run_frozen(frozen, pixels))


@pytest.mark.parametrize("tower", [False, True])
def test_a_frozen_encoder_has_no_gradients(tower):
    model = tiny_blip2(tower=tower).model.freeze("vision").train()
    pixels = torch.randn(2, 3, SIZE, SIZE)
    features = model.encode_image(pixels)
    assert not features.requires_grad
    model.encode_queries(model.image_kv(features)).queries.sum().backward()
    assert all(not p.requires_grad and p.grad is None for p in model.vision.parameters())
    assert all(p.requires_grad for p in model.qformer.parameters())
    assert model.vision_norm.weight.grad is not None  # trained in both stages
    optimized = [p for p in model.parameters() if p.requires_grad]
    assert not {id(p) for p in optimized} & {id(p) for p in model.vision.parameters()}


@pytest.mark.parametrize("tower", [False, True])
def test_a_frozen_encoder_stays_in_eval_mode(tower):
    model = tiny_blip2(tower=tower).model.freeze("vision")
    for _ in range(2):
        model.train()
        assert model.training
        assert model.qformer.training
        assert not any(module.training for module in model.vision.modules())
        model.eval()
    model.freeze().train()
    assert all(module.training for module in model.vision.modules())
    assert all(p.requires_grad for p in model.vision.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_normed_in_float32(dtype):
    model = tiny_blip2().model.freeze("vision")
    model.vision.to(dtype)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    features = model.encode_image(pixels)
    assert features.dtype == dtype
    found, exact = (model.image_kv(given).layers[0] for given in (features, features.float()))
    assert found.key.dtype == torch.float32
    assert torch.equal(found.key, exact.key)
    assert torch.equal(found.value, exact.value)


def test_an_encoder_in_training_gives_gradients():
    model = tiny_blip2().model.train()
    model.encode_image(torch.randn(2, 3, SIZE, SIZE)).sum().backward()
    assert all(p.grad is not None for p in model.vision.parameters())


def test_inference_takes_all_pictures_at_once(monkeypatch):
    """Only what is frozen pays for features that are the same to the last bit."""
    model, sizes = tiny_blip2().model, []
    model.vision.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    with torch.inference_mode():
        model.encode_image(torch.randn(5, 3, SIZE, SIZE))
    model.freeze("vision").encode_image(torch.randn(5, 3, SIZE, SIZE))
    assert sizes == [5, 1, 1, 1, 1, 1]
