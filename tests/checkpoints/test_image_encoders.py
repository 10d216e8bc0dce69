"""Image encoders of every kind, tiny and random, against what transformers computes with the same weights."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers

from damaged_files import edit_weights
from marks import slow
from openblip.checkpoints.loading import load_checkpoint, load_image_encoder
from openblip.errors import CheckpointError, ConfigError
from openblip.models.config import TowerConfig
from openblip.models.vision_tower import VisionTower
from openblip.nn.config import VisionConfig
from openblip.nn.vit import VisionTransformer

SIZE, PATCH, DEPTH, WIDTH = 32, 8, 3, 32
SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "patch_size": PATCH}
DINO = {**SHAPE, "image_size": SIZE}
NAFLEX = {**SHAPE, "intermediate_size": 48}
SHAPE = {**DINO, **NAFLEX}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT |= {"vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
QFORMER = {**TEXT, "hidden_size": 16, "encoder_hidden_size": WIDTH, "vocab_size": 40}
OPT = {"model_type": "opt", "vocab_size": 40, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16}
OPT |= {"num_hidden_layers": 1, "num_attention_heads": 2}


def make_tower(kind):
    """A model of transformers with random weights far from their start, in eval mode."""
    t = transformers
    makers = {
        "clip": lambda: t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=SHAPE, projection_dim=16)),
        "clip_gelu": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**SHAPE, hidden_act="gelu")),
        "clip_tanh": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**SHAPE, hidden_act="gelu_new")),
        "blip2": lambda: t.Blip2ForConditionalGeneration(
            t.Blip2Config(vision_config=SHAPE, qformer_config=QFORMER, text_config=OPT)
        ),
        "siglip": lambda: t.SiglipModel(t.SiglipConfig(text_config=TEXT, vision_config=SHAPE)),
        "siglip2": lambda: t.Siglip2Model(
            t.Siglip2Config(text_config=TEXT, vision_config={**NAFLEX, "num_patches": (SIZE // PATCH) ** 2})
        ),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**DINO, mlp_ratio=2)),
        "dinov2_registers": lambda: t.Dinov2WithRegistersModel(
            t.Dinov2WithRegistersConfig(**DINO, mlp_ratio=2, num_register_tokens=3)
        ),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**SHAPE)),
        "convnext": lambda: t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[4, 4], depths=[1, 1], num_stages=2)),
        "bert": lambda: t.BertModel(t.BertConfig(**TEXT)),
    }
    torch.manual_seed(7)
    model = makers[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter == 1))
    return model.eval()


def save_tower(kind, folder, processor=True):
    """Write the model and, unless told otherwise, how it wants its pixels. Returns the model."""
    model = make_tower(kind)
    model.save_pretrained(folder)
    if processor:
        square = {"height": SIZE, "width": SIZE}
        transformers.ViTImageProcessor(
            size=square, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]
        ).save_pretrained(folder)
    return model


OURS = ("clip", "clip_gelu", "blip2")
TOWERS = ("siglip", "dinov2", "dinov2_registers", "vit", "clip_tanh")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a kind and the model in it, made once."""
    root = tmp_path_factory.mktemp("towers")
    made = {}

    def folder_and_model(kind):
        if kind not in made:
            made[kind] = (root / kind, save_tower(kind, root / kind))
        return made[kind]

    return folder_and_model


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def vision_side(model):
    return getattr(model, "vision_model", getattr(model, "vit", model))


def images(size=SIZE):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("layer", [-2, *slow(-1, 0, 2)])
@pytest.mark.parametrize("kind", OURS + TOWERS)
def test_features_are_hidden_states(saved, kind, layer):
    folder, theirs = saved(kind)
    encoder = load_image_encoder(folder, layer=layer)
    expected = vision_side(theirs)(images(), output_hidden_states=True).hidden_states[layer]
    close(encoder.model(images()), expected)
    assert encoder.config.hidden_dim == WIDTH
    assert isinstance(encoder.model, VisionTransformer if kind in OURS else VisionTower)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["siglip", "dinov2", "vit"])
def test_no_final_norm(saved, kind):
    folder, theirs = saved(kind)
    theirs = vision_side(theirs)
    norm = theirs.post_layernorm if kind == "siglip" else theirs.layernorm
    features = load_image_encoder(folder, layer=-1).model(images())
    close(norm(features), theirs(images()).last_hidden_state)


@torch.no_grad()
def test_siglip2_of_flexible_shapes(saved, tmp_path):
    _, theirs = saved("siglip2")
    processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    theirs.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = load_image_encoder(tmp_path, layer=-1)
    assert encoder.preprocessing.image_size == SIZE
    assert encoder.preprocessing.mean == (0.5, 0.5, 0.5)
    # Their own processor cuts a square image of the right size into patches, and does nothing else to it.
    image = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8)
    inputs = processor(images=[image], return_tensors="pt")
    expected = theirs.vision_model(**inputs, output_hidden_states=True).hidden_states[-1]
    features = encoder.model(encoder.preprocessing.normalize(image[None]))
    close(features, expected)


def test_the_default_is_the_second_last_layer(saved):
    for kind in ("clip", "siglip"):
        folder, _ = saved(kind)
        by_default, second_last = load_image_encoder(folder), load_image_encoder(folder, layer=-2)
        assert by_default.config == second_last.config
        assert torch.equal(by_default.model(images()), second_last.model(images()))


def test_a_blip2_has_been_cut_already(saved):
    """EVA-CLIP's last block is not in the file."""
    assert load_image_encoder(saved("blip2")[0]).config.num_layers == DEPTH


def test_a_cut_encoder_has_no_weights_beyond_its_layer(saved):
    encoder = load_image_encoder(saved("clip")[0], layer=-3)
    assert encoder.config == VisionConfig(
        image_size=SIZE, patch_size=8, hidden_dim=WIDTH, num_layers=DEPTH - 2, num_heads=4, mlp_dim=48,
        layer_norm_eps=1e-5, activation="quick_gelu", input_norm=True, output_norm=False,
    )  # fmt: skip
    assert len(encoder.model.blocks) == DEPTH - 2
    assert not any(name.startswith("norm") for name in encoder.model.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -2])
def test_the_vit_of_a_blip(layer):
    whole = load_checkpoint("openblip-mini")
    encoder = load_image_encoder("openblip-mini", layer=layer)
    x = images(whole.preprocessing.image_size)
    states = []
    for block in whole.model.vision.blocks:
        block.register_forward_hook(lambda _, __, output: states.append(output))
    whole.model.encode_image(x)
    assert torch.equal(encoder.model(x), states[layer])
    assert encoder.preprocessing == whole.preprocessing
    assert encoder.config == replace(
        whole.model.config.vision, num_layers=whole.model.config.vision.num_layers + 1 + layer, output_norm=False
    )


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_pixels_are_prepared_as_the_processor_says(saved, kind):
    preprocessing = load_image_encoder(saved(kind)[0]).preprocessing
    assert preprocessing.image_size == SIZE
    assert preprocessing.mean == (0.5, 0.4, 0.3)
    assert preprocessing.std == (0.2, 0.3, 0.4)


def write_processor(folder, **settings):
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"rescale_factor": 1 / 255, "image_mean": [0, 0, 0], "image_std": [1, 1, 1], **settings})
    )


def test_a_crop_is_what_reaches_the_model(tmp_path):
    save_tower("dinov2", tmp_path, processor=False)
    write_processor(tmp_path, size={"shortest_edge": 60}, do_center_crop=True, crop_size={"height": 48, "width": 48})
    assert load_image_encoder(tmp_path).preprocessing.image_size == 48


def test_a_model_without_processor(tmp_path):
    save_tower("clip", tmp_path / "clip", processor=False)
    assert load_image_encoder(tmp_path / "clip").preprocessing.image_size == SIZE  # CLIP's statistics are known
    save_tower("vit", tmp_path / "vit", processor=False)
    with pytest.raises(
        CheckpointError, match=r"no preprocessor_config\.json.*save_pretrained of the model's image processor"
    ):
        load_image_encoder(tmp_path / "vit")
    with pytest.raises(CheckpointError, match="no folder"):
        load_image_encoder(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "settings", [{"rescale_factor": 1 / 127.5}, {"size": {"height": 32, "width": 48}}, {"size": "large"}]
)
def test_an_unknown_preparation_is_refused(tmp_path, settings):
    save_tower("vit", tmp_path, processor=False)
    write_processor(tmp_path, **{"size": {"height": 32, "width": 32}, **settings})
    with pytest.raises(CheckpointError, match="prepares images"):
        load_image_encoder(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["siglip", "vit", "dinov2", "clip"])
def test_another_image_size(saved, kind):
    folder, theirs = saved(kind)
    encoder = load_image_encoder(folder, layer=-1, image_size=48)
    assert encoder.preprocessing.image_size == 48
    interpolation = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    output = vision_side(theirs)(images(48), output_hidden_states=True, **interpolation)
    close(encoder.model(images(48)), output.hidden_states[-1])
    if kind == "clip":
        assert encoder.config.image_size == 48
        assert encoder.model.position_embedding.shape == (1, 37, WIDTH)


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_a_size_that_patches_do_not_tile(saved, kind):
    with pytest.raises((CheckpointError, ConfigError), match="4"):
        load_image_encoder(saved(kind)[0], image_size=4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_half_precision(saved, kind):
    encoder = load_image_encoder(saved(kind)[0], dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.bfloat16}
    assert not encoder.model.training


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_an_unknown_layer(saved, kind):
    with pytest.raises(CheckpointError, match="4 hidden states, embeddings first, and no layer -5"):
        load_image_encoder(saved(kind)[0], layer=-5)


@pytest.mark.parametrize(("kind", "message"), [("bert", "takes no images"), ("convnext", "sequence of tokens")])
def test_what_is_no_transformer_of_images(saved, kind, message):
    with pytest.raises(CheckpointError, match=message):
        load_image_encoder(saved(kind)[0], layer=-1)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_missing_weights_are_named(saved, tmp_path, kind):
    shutil.copytree(saved(kind)[0], tmp_path / "damaged")
    name = "vision_model.encoder.layers.1.mlp.fc1.bias"
    edit_weights(tmp_path / "damaged", lambda weights: weights.pop(name))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.fc1\.bias"):
        load_image_encoder(tmp_path / "damaged")


def test_nothing_is_printed(saved, capfd):
    load_image_encoder(saved("siglip")[0])
    load_image_encoder(saved("clip")[0])
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_a_tower_says_where_it_came_from(saved):
    folder, _ = saved("vit")
    assert load_image_encoder(folder).config == TowerConfig(name=str(folder), hidden_dim=WIDTH, layer=-2)
