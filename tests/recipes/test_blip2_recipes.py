"""BLIP-2's recipes at the size of the paper: their numbers, their sizes, and how they start."""

from dataclasses import replace

import pytest
import torch

from openblip.errors import ConfigError
from openblip.models.blip2 import Blip2
from openblip.models.config import Blip2Config, LanguageConfig, VisionConfig
from openblip.recipes.blip2 import (
    blip2_caption,
    blip2_instruct,
    blip2_retrieval,
    blip2_stage1,
    blip2_stage1_vit_l,
    blip2_stage2_opt,
    blip2_stage2_t5,
    blip2_vqa,
)
from openblip.recipes.run import Blip2Run, ImageEncoderSource
from openblip.training.optimizer import learning_rate_at

GPUS = 16
CLIP_L = VisionConfig(
    patch_size=14,
    hidden_dim=1024,
    num_layers=23,
    num_heads=16,
    mlp_dim=4096,
    activation="quick_gelu",
    input_norm=True,
    output_norm=False,
)


def test_pretraining_follows_section_3_4() -> None:
    for run, batch, steps, lowest in (
        (blip2_stage1(), 1680, 250_000, 1e-5),
        (blip2_stage1_vit_l(), 2320, 250_000, 1e-5),
        (blip2_stage2_opt(), 1920, 80_000, 5e-5),
        (blip2_stage2_t5(), 1520, 80_000, 5e-5),
    ):
        training = run.training
        assert training.batch_size * training.accumulation * GPUS == batch
        assert training.steps == steps
        assert (training.beta1, training.beta2, training.weight_decay) == (0.9, 0.98, 0.05)
        assert learning_rate_at(2000, training) == 1e-4
        assert learning_rate_at(steps, training) == pytest.approx(lowest)
        middle = 2000 + (steps - 2000) // 2
        assert learning_rate_at(middle, training) == pytest.approx((1e-4 + lowest) / 2)
        assert run.data.augmentation is not None
        assert run.data.augmentation.horizontal_flip
        assert run.data.augmentation.num_ops == 0
        assert not run.train_vision


def test_what_stays_frozen_is_in_half_precision() -> None:
    assert blip2_stage1().vision == ImageEncoderSource(source="Salesforce/blip2-itm-vit-g", dtype="float16")
    for run, end in ((blip2_stage2_opt(), "\n"), (blip2_stage2_t5(), None)):
        assert run.frozen_dtype == "float16"
        assert run.language is not None
        assert (run.language.dtype, run.language.end_of_text) == ("bfloat16", end)
        assert run.language.max_text_tokens == 32


def test_fine_tuning_follows_the_appendix() -> None:
    for run, batch, steps, size, decay in (
        (blip2_caption(), 256, 5 * (566_747 // 256), 364, 0.95),
        (blip2_vqa(), 128, 5 * (2_103_521 // 128), 490, 0.95),
        (blip2_retrieval(), 224, 5 * (566_747 // 224), 364, None),
        (blip2_instruct(), 192, 60_000, None, None),
    ):
        training = run.training
        assert training.batch_size * training.accumulation * GPUS == batch
        assert (training.steps, run.image_size, training.layer_decay) == (steps, size, decay)
        assert (training.beta1, training.beta2, training.weight_decay) == (0.9, 0.999, 0.05)
        assert learning_rate_at(1000, training) == 1e-5
        assert learning_rate_at(steps, training) == pytest.approx(0.0, abs=1e-12)
        assert run.train_vision == (size is not None)
        assert run.image_size is None or run.image_size % 14 == 0
    assert blip2_caption().task.prompt == "a photo of"  # type: ignore[union-attr]


def trained_parameters(config: Blip2Config) -> int:
    """Of all but the image encoder, which is not built: its width is all that counts."""
    with torch.device("meta"):
        model = Blip2(replace(config, vision=replace(config.vision, num_layers=0)))
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("vision."))


def test_the_papers_sizes() -> None:
    """Section 3.1 and Table 2: 188M with the text side, 107M (ViT-g) and 104M (ViT-L) without it."""
    assert trained_parameters(Blip2Config()) == pytest.approx(188e6, rel=0.01)
    opt = LanguageConfig(name="opt", hidden_dim=2560)
    assert trained_parameters(Blip2Config(heads=("llm",), language=opt)) == pytest.approx(107e6, rel=0.005)
    on_l = Blip2Config(heads=("llm",), language=opt, vision=CLIP_L)
    assert trained_parameters(on_l) == pytest.approx(104e6, rel=0.005)


def with_data(run: Blip2Run) -> Blip2Run:
    return replace(run, data=replace(run.data, source="pairs"))


def test_a_run_that_does_not_say_how_it_starts() -> None:
    for recipe, message in (
        (blip2_stage2_opt(), "name one with --init"),
        (replace(blip2_stage1(), qformer=None), "needs its shape and an image encoder"),
        (replace(blip2_stage1(), init="x"), "leave out --text-init"),
        (replace(blip2_stage1(), init="x", text_init=None), "leave out --tokenizer"),
        (replace(blip2_stage1(), tokenizer=None), "name it with --tokenizer"),
        (replace(blip2_caption(), init="x", text_branch="y"), "whose Q-Former is to read instructions"),
        (replace(blip2_stage1(), vision=ImageEncoderSource(source="")), "--vision.source"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_data(recipe).check()
    with_data(replace(blip2_vqa(), init="x", text_branch="y")).check()
    with_data(blip2_stage1()).check()
