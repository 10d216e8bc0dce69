"""The recipes of the paper: their numbers, their sizes, and a miniature of them that trains."""

import dataclasses
import json

import pytest
import torch
import transformers
from PIL import Image

import openblip
from openblip.data.tokenizer import Tokenizer
from openblip.errors import CheckpointError, ConfigError
from openblip.models.blip import Blip
from openblip.models.config import BlipConfig, TextConfig, VisionConfig
from openblip.recipes import RECIPES
from openblip.recipes.blip import blip_base, blip_large, caption, caption_large, filter_, filter_large
from openblip.tasks.config import ContrastiveConfig
from openblip.training.optimizer import learning_rate_at

replace = dataclasses.replace
GPUS = 32


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_whole_run(name):
    run = RECIPES[name]()
    assert json.loads(json.dumps(dataclasses.asdict(run)))["recipe"] == run.recipe
    assert run.out == f"runs/{name}"
    assert run.out
    for word in ("Source:", "Cost:", "Expected"):
        assert word in (RECIPES[name].__doc__ or "")


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_base_has_the_papers_size():
    with torch.device("meta"):
        model = Blip(blip_base().model)
    assert parameters(model) == pytest.approx(252e6, rel=0.005)  # Table 3, all but self-attention shared
    assert parameters(model.vision) == pytest.approx(85.8e6, rel=0.001)
    assert model.config.vision.grid == 14


def test_large_has_a_vit_l_beside_the_same_text():
    with torch.device("meta"):
        model = Blip(blip_large().model)
    assert parameters(model.vision) == pytest.approx(303.3e6, rel=0.001)
    assert model.text.layers[0].cross_attention["encode"].branch.key_value.weight.shape == (2 * 768, 1024)
    assert model.config.text == blip_base().model.text
    assert model.config.vision.drop_path == 0.1
    assert blip_base().model.vision.drop_path == 0.0


def test_pretraining_follows_the_papers_schedule():
    base, large = blip_base().training, blip_large().training
    assert base.batch_size * base.accumulation * GPUS == 2880
    assert large.batch_size * large.accumulation * GPUS == 2400
    assert base.steps == 97_220
    assert large.steps == 308_320
    for training, peak in ((base, 3e-4), (large, 2e-4)):
        epoch = training.steps // 20
        assert learning_rate_at(0, training) == 1e-6
        assert learning_rate_at(3000, training) == peak
        assert learning_rate_at(3000 + epoch, training) == pytest.approx(0.85 * peak)
        assert learning_rate_at(training.steps - 1, training) == pytest.approx(peak * 0.85**19)
        assert training.min_learning_rate == 1e-6
        assert training.weight_decay == 0.05
    for run in (blip_base(), blip_large()):
        contrastive = run.task.contrastive
        assert (contrastive.queue_size, contrastive.momentum, contrastive.alpha) == (57600, 0.995, 0.4)
        assert contrastive.alpha_ramp_steps == run.training.steps // 10
        assert run.task.label_smoothing == 0.1
        assert run.model.embed_dim == 256
        assert run.model.vision.image_size == 224
        assert run.data.max_text_length == 30


def test_augmentation_is_the_papers():
    for run in (blip_base(), blip_large(), caption(), filter_()):
        views = run.data.augmentation
        assert views.crop_scale == ((0.2, 1.0) if run.model is not None else (0.5, 1.0))
        assert (views.num_ops, views.magnitude, views.op_probability) == (2, 5, 0.5)
        assert views.horizontal_flip


def test_fine_tuning_follows_table_14():
    epoch = 566_747 // 256
    for run, peak, epochs in (
        (caption(), 1e-5, 5),
        (caption_large(), 2e-6, 5),
        (filter_(), 1e-5, 6),
        (filter_large(), 5e-6, 6),
    ):
        training = run.training
        assert training.batch_size * training.accumulation * 8 == 256
        assert training.steps == epochs * epoch
        assert learning_rate_at(0, training) == peak
        assert learning_rate_at(training.steps // 2, training) == pytest.approx(peak / 2, rel=1e-3)
        assert learning_rate_at(training.steps, training) == pytest.approx(0.0, abs=1e-12)
        assert training.weight_decay == 0.05
        assert run.image_size == 384
    assert filter_().task.contrastive == ContrastiveConfig(
        queue_size=57600, momentum=0.995, alpha=0.4, alpha_ramp_steps=epoch
    )
    assert filter_().data.max_text_length == 35
    assert caption().task.prompt == "a picture of "


def test_prompt_and_caption_have_forty_tokens_together():
    tokenizer = Tokenizer.train(["a picture of a dog"] * 3, 120)
    prompt = tokenizer.prompt(caption().task.prompt)
    longest = tokenizer.encode(["dog " * 60], caption().data.max_text_length)
    assert len(prompt) + longest.ids.shape[1] - 1 == 40


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Eight captioned images, a tokenizer, and a tiny random ViT and BERT as transformers saves them."""
    root = tmp_path_factory.mktemp("world")
    (root / "pairs").mkdir()
    colors = ("red", "blue", "green", "grey")
    captions = [f"a picture of {n} {color} dogs" for n in range(2) for color in colors]
    for number, text in enumerate(captions):
        image = Image.new("RGB", (48, 40), (number * 30, 99, 255 - number * 30))
        image.save(root / "pairs" / f"{number}.png")
        (root / "pairs" / f"{number}.txt").write_text(text)
    tokenizer = Tokenizer.train(captions, 120)
    tokenizer.save(root / "tokenizer")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    vit = transformers.ViTModel(transformers.ViTConfig(**shape, image_size=32, patch_size=16))
    vit.embeddings.cls_token.data.normal_()
    vit.save_pretrained(root / "vit")
    bert = transformers.BertConfig(**shape, vocab_size=tokenizer.vocab_size - 2, max_position_embeddings=64)
    transformers.BertForMaskedLM(bert).save_pretrained(root / "bert")
    return root


def miniature(world, out, **changes):
    """blip-base with everything made small."""
    run = blip_base()
    small = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32}
    run = replace(
        run,
        model=BlipConfig(
            vision=VisionConfig(image_size=48, **small), text=TextConfig(max_positions=64, **small), embed_dim=8
        ),
        tokenizer=str(world / "tokenizer"),
        vision_init=str(world / "vit"),
        text_init=str(world / "bert"),
        data=replace(run.data, source=str(world / "pairs"), num_workers=0),
        task=replace(run.task, contrastive=replace(run.task.contrastive, queue_size=8, alpha_ramp_steps=1)),
        training=replace(run.training, steps=2, batch_size=4, precision="fp32"),
        out=str(out),
    )
    return replace(run, **changes)


@pytest.mark.slow
def test_a_miniature_of_the_paper_trains_end_to_end(world, tmp_path):
    assert miniature(world, tmp_path / "base").train()
    losses = [json.loads(line) for line in (tmp_path / "base" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1]["step"] == 2
    assert {"itc", "itm", "lm"} <= losses[-1].keys()
    pretrained = openblip.load(tmp_path / "base" / "model")
    # two steps of warm-up at 1e-6 hardly move a weight: it is still the backbone's
    vit = transformers.ViTModel.from_pretrained(world / "vit")
    bert = transformers.BertModel.from_pretrained(world / "bert")
    class_token = pretrained.model.vision.class_token
    torch.testing.assert_close(class_token, vit.embeddings.cls_token, atol=1e-4, rtol=0)
    words = pretrained.model.text.embeddings["decode"].word.weight[:-2]
    torch.testing.assert_close(words, bert.embeddings.word_embeddings.weight, atol=1e-4, rtol=0)

    for recipe, tasks in ((caption(), {"caption"}), (filter_(), {"match", "similarity"})):
        run = replace(
            recipe,
            init=str(tmp_path / "base" / "model"),
            image_size=80,
            data=replace(recipe.data, source=str(world / "pairs"), num_workers=0),
            training=replace(recipe.training, steps=1, batch_size=4, precision="fp32"),
            out=str(tmp_path / recipe.recipe),
        )
        assert run.train()
        tuned = openblip.load(tmp_path / recipe.recipe / "model")
        assert tasks <= tuned.tasks
        assert tuned.preprocessing.image_size == 80
        assert tuned.model.config.vision.grid == 5
        pixels = torch.randn(1, 3, 80, 80)
        moved = tuned.model.encode_image(pixels) - pretrained.model.encode_image(pixels)
        assert moved.abs().max() < 1e-2  # one step at 1e-5 away from the interpolated positions


def test_contradictory_starts_are_refused(world, tmp_path):
    for changes, message in (
        ({"init": "x"}, "brings all weights"),
        ({"init": "x", "vision_init": None, "text_init": None}, "leave out --tokenizer"),
        ({"tokenizer": None}, "name it with --tokenizer"),
        ({"image_size": 96}, "is for fine-tuning"),
        ({"model": None}, "starts from a checkpoint"),
    ):
        with pytest.raises(ConfigError, match=message):
            miniature(world, tmp_path / "run", **changes).train()
    assert not (tmp_path / "run").exists()


def test_a_backbone_that_is_not_there_is_named(world, tmp_path):
    with pytest.raises(CheckpointError, match="no folder"):
        miniature(world, tmp_path / "run", vision_init=str(world / "no-vit")).train()


def test_a_run_gives_the_number_of_threads_back(world, tmp_path, monkeypatch):
    run, counts = miniature(world, tmp_path / "run", vision_init=str(world / "no-vit")), []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    for num_threads in (None, 7):
        with pytest.raises(CheckpointError):
            replace(
                run, training=replace(run.training, num_threads=num_threads), out=f"{run.out}-{num_threads}"
            ).train()
    assert counts == [7, torch.get_num_threads()]
