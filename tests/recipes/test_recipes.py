"""The recipes of the papers: their numbers, their sizes, and a miniature of them that trains."""

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
from openblip.models.blip2 import Blip2
from openblip.models.config import Blip2Config, BlipConfig, LanguageConfig
from openblip.nn.config import TextConfig, VisionConfig
from openblip.recipes import RECIPES, blip, blip2, mini
from openblip.recipes.run import ImageEncoderSource, with_settings
from openblip.tasks.config import ContrastiveConfig, InBatchConfig
from openblip.training.optimizer import learning_rate_at
from shared_files import read_lines

replace = dataclasses.replace
COCO_EPOCH = 566_747 // 256


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_whole_run(name):
    run = RECIPES[name]()
    assert json.loads(json.dumps(dataclasses.asdict(run)))["recipe"] == run.recipe == name
    assert run.out == f"runs/{name}"
    for word in ("Source:", "Cost:", "Expected"):
        assert word in (RECIPES[name].__doc__ or "")


def test_blip_has_the_papers_sizes():
    with torch.device("meta"):
        base, large = Blip(blip.blip_base().model), Blip(blip.blip_large().model)
    sizes = [sum(p.numel() for p in module.parameters()) for module in (base, base.vision, large.vision)]
    assert sizes[0] == pytest.approx(252e6, rel=0.005)  # Table 3, all but self-attention shared
    assert sizes[1:] == pytest.approx([85.8e6, 303.3e6], rel=0.001)
    assert base.config.vision.grid == 14
    assert large.text.layers[0].cross_attention["encode"].branch.key_value.weight.shape == (2 * 768, 1024)
    assert large.config.text == blip.blip_base().model.text
    assert [model.config.vision.drop_path for model in (base, large)] == [0.0, 0.1]


@pytest.mark.parametrize(
    ("run", "batch", "steps", "peak"),
    [(blip.blip_base(), 2880, 97_220, 3e-4), (blip.blip_large(), 2400, 308_320, 2e-4)],
)
def test_pretraining_of_blip_follows_the_papers_schedule(run, batch, steps, peak):
    training, contrastive = run.training, run.task.contrastive
    assert training.batch_size * training.accumulation * 32 == batch
    assert training.steps == steps
    epoch = steps // 20
    assert learning_rate_at(0, training) == 1e-6
    assert learning_rate_at(3000, training) == peak
    assert learning_rate_at(3000 + epoch, training) == pytest.approx(0.85 * peak)
    assert learning_rate_at(steps - 1, training) == pytest.approx(peak * 0.85**19)
    assert (training.min_learning_rate, training.weight_decay) == (1e-6, 0.05)
    assert contrastive == ContrastiveConfig(queue_size=57600, momentum=0.995, alpha=0.4, alpha_ramp_steps=steps // 10)
    assert (run.task.label_smoothing, run.data.max_text_length) == (0.1, 30)
    assert (run.model.embed_dim, run.model.vision.image_size) == (256, 224)


def test_augmentation_is_the_papers():
    for run in (blip.blip_base(), blip.blip_large(), blip.caption(), blip.filter_()):
        views = run.data.augmentation
        assert views.crop_scale == ((0.2, 1.0) if run.model is not None else (0.5, 1.0))
        assert (views.num_ops, views.magnitude, views.op_probability) == (2, 5, 0.5)
        assert views.horizontal_flip


@pytest.mark.parametrize(
    ("run", "peak", "epochs"),
    [
        (blip.caption(), 1e-5, 5),
        (blip.caption_large(), 2e-6, 5),
        (blip.filter_(), 1e-5, 6),
        (blip.filter_large(), 5e-6, 6),
    ],
)
def test_fine_tuning_of_blip_follows_table_14(run, peak, epochs):
    training = run.training
    assert training.batch_size * training.accumulation * 8 == 256
    assert training.steps == epochs * COCO_EPOCH
    assert learning_rate_at(0, training) == peak
    assert learning_rate_at(training.steps // 2, training) == pytest.approx(peak / 2, rel=1e-3)
    assert learning_rate_at(training.steps, training) == pytest.approx(0.0, abs=1e-12)
    assert (training.weight_decay, run.image_size) == (0.05, 384)


def test_filter_and_captioner_have_the_papers_settings():
    """Prompt and caption have forty tokens together."""
    contrastive = ContrastiveConfig(queue_size=57600, momentum=0.995, alpha=0.4, alpha_ramp_steps=COCO_EPOCH)
    assert blip.filter_().task.contrastive == contrastive
    assert blip.filter_().data.max_text_length == 35
    assert blip.caption().task.prompt == "a picture of "
    tokenizer = Tokenizer.train(["a picture of a dog"] * 3, 120)
    longest = tokenizer.encode(["dog " * 60], blip.caption().data.max_text_length)
    assert len(tokenizer.prompt("a picture of ")) + longest.ids.shape[1] - 1 == 40


@pytest.mark.parametrize(
    ("run", "batch", "steps", "lowest"),
    [
        (blip2.blip2_stage1(), 1680, 250_000, 1e-5),
        (blip2.blip2_stage1_vit_l(), 2320, 250_000, 1e-5),
        (blip2.blip2_stage2_opt(), 1920, 80_000, 5e-5),
        (blip2.blip2_stage2_t5(), 1520, 80_000, 5e-5),
    ],
)
def test_pretraining_of_blip2_follows_section_3_4(run, batch, steps, lowest):
    training, views = run.training, run.data.augmentation
    assert training.batch_size * training.accumulation * 16 == batch
    assert training.steps == steps
    assert (training.beta1, training.beta2, training.weight_decay) == (0.9, 0.98, 0.05)
    assert learning_rate_at(2000, training) == 1e-4
    assert learning_rate_at(steps, training) == pytest.approx(lowest)
    assert learning_rate_at(2000 + (steps - 2000) // 2, training) == pytest.approx((1e-4 + lowest) / 2)
    assert views.horizontal_flip
    assert (views.num_ops, run.train_vision) == (0, False)


def test_what_stays_frozen_is_in_half_precision():
    assert blip2.blip2_stage1().vision == ImageEncoderSource(source="Salesforce/blip2-itm-vit-g", dtype="float16")
    for run, end in ((blip2.blip2_stage2_opt(), "\n"), (blip2.blip2_stage2_t5(), None)):
        assert run.frozen_dtype == "float16"
        language = run.language
        assert (language.dtype, language.end_of_text, language.max_text_tokens) == ("bfloat16", end, 32)


@pytest.mark.parametrize(
    ("run", "batch", "steps", "size", "decay"),
    [
        (blip2.blip2_caption(), 256, 5 * COCO_EPOCH, 364, 0.95),
        (blip2.blip2_vqa(), 128, 5 * (2_103_521 // 128), 490, 0.95),
        (blip2.blip2_retrieval(), 224, 5 * (566_747 // 224), 364, None),
        (blip2.blip2_instruct(), 192, 60_000, None, None),
    ],
)
def test_fine_tuning_of_blip2_follows_the_appendix(run, batch, steps, size, decay):
    training = run.training
    assert training.batch_size * training.accumulation * 16 == batch
    assert (training.steps, run.image_size, training.layer_decay) == (steps, size, decay)
    assert (training.beta1, training.beta2, training.weight_decay) == (0.9, 0.999, 0.05)
    assert learning_rate_at(1000, training) == 1e-5
    assert learning_rate_at(steps, training) == pytest.approx(0.0, abs=1e-12)
    assert run.train_vision == (size is not None)
    assert size is None or size % 14 == 0
    assert getattr(run.task, "prompt", "a photo of") == "a photo of"


def test_blip2_has_the_papers_sizes():
    """Section 3.1 and Table 2: 188M with the text side, 107M (ViT-g) and 104M (ViT-L) without it."""
    opt = LanguageConfig(name="opt", hidden_dim=2560)
    settings = {"patch_size": 14, "hidden_dim": 1024, "num_heads": 16, "mlp_dim": 4096, "activation": "quick_gelu"}
    vit_l = VisionConfig(**settings, input_norm=True, output_norm=False)
    for config, size, within in (
        (Blip2Config(), 188e6, 0.01),
        (Blip2Config(heads=("llm",), language=opt), 107e6, 0.005),
        (Blip2Config(heads=("llm",), language=opt, vision=vit_l), 104e6, 0.005),
    ):
        with torch.device("meta"):  # the image encoder has no layers: its width is all that counts
            model = Blip2(replace(config, vision=replace(config.vision, num_layers=0)))
        parameters = (p.numel() for name, p in model.named_parameters() if not name.startswith("vision."))
        assert sum(parameters) == pytest.approx(size, rel=within)


def test_a_run_of_blip2_that_does_not_say_how_it_starts():
    stage1, caption = blip2.blip2_stage1(), blip2.blip2_caption()

    def check(run, **changes):
        replace(run, data=replace(run.data, source="pairs"), **changes).check()

    for run, changes, message in (
        (blip2.blip2_stage2_opt(), {}, "name one with --init"),
        (stage1, {"qformer": None}, "needs its shape and an image encoder"),
        (stage1, {"init": "x"}, "leave out --text-init"),
        (stage1, {"tokenizer": None}, "name it with --tokenizer"),
        (caption, {"init": "x", "text_branch": "y"}, "whose Q-Former is to read instructions"),
        (stage1, {"vision": ImageEncoderSource(source="")}, "--vision.source"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(run, **changes)
    check(blip2.blip2_vqa(), init="x", text_branch="y")
    check(stage1)


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
    run = blip.blip_base()
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
        training=replace(run.training, steps=2, batch_size=4, dtype="float32"),
        out=str(out),
    )
    return replace(run, **changes)


@pytest.mark.slow
def test_a_miniature_of_the_paper_trains_end_to_end(world, tmp_path):
    assert miniature(world, tmp_path / "base").train()
    losses = read_lines(tmp_path / "base" / "metrics.jsonl")
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

    for recipe, tasks in ((blip.caption(), {"caption"}), (blip.filter_(), {"match", "similarity"})):
        run = replace(
            recipe,
            init=str(tmp_path / "base" / "model"),
            image_size=80,
            data=replace(recipe.data, source=str(world / "pairs"), num_workers=0),
            training=replace(recipe.training, steps=1, batch_size=4, dtype="float32"),
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
        ({"tokenizer": None}, "name it with --tokenizer"),
        ({"image_size": 96}, "is for fine-tuning"),
        ({"model": None}, "starts from a checkpoint"),
    ):
        with pytest.raises(ConfigError, match=message):
            miniature(world, tmp_path / "run", **changes).train()
    assert not (tmp_path / "run").exists()


def test_a_backbone_that_is_not_there_is_named_and_threads_are_given_back(world, tmp_path, monkeypatch):
    counts = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    for num_threads in (None, 7):
        run = miniature(world, tmp_path / f"run-{num_threads}", vision_init=str(world / "no-vit"))
        with pytest.raises(CheckpointError, match="no folder"):
            replace(run, training=replace(run.training, num_threads=num_threads)).train()
    assert counts == [7, torch.get_num_threads()]


def test_settings_of_another_class_than_the_recipes_come_back_from_json():
    """A training whose ITC is that of the batch goes on as one, not with a queue."""
    run = mini.blip_mini()
    changed = replace(run, task=replace(run.task, contrastive=InBatchConfig(label_smoothing=0.1)))
    assert with_settings(run, json.loads(json.dumps(dataclasses.asdict(changed)))) == changed
