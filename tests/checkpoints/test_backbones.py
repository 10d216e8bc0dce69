"""Starting weights from Hugging Face backbones, against transformers' own outputs. Nothing is downloaded."""

from dataclasses import replace

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from marks import slow
from openblip.checkpoints.backbones import init_text, init_vision
from openblip.errors import CheckpointError
from openblip.models.blip import Blip
from openblip.models.config import BlipConfig, QFormerConfig, TextConfig, VisionConfig
from openblip.nn.qformer import QFormer

NUM_WORDS, NEW_WORDS = 60, 2
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def randomised(model):
    """Every parameter random, so that none that is forgotten looks right."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter == 1))
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny random checkpoints of every kind, as transformers saves them."""
    root = tmp_path_factory.mktemp("backbones")
    vit = {**SHAPE, "image_size": 64, "patch_size": 16, "layer_norm_eps": 1e-6}
    bert = transformers.BertConfig(**SHAPE, vocab_size=NUM_WORDS, max_position_embeddings=24)
    models = {
        "vit": transformers.ViTModel(transformers.ViTConfig(**vit)),
        "classifier": transformers.ViTForImageClassification(transformers.ViTConfig(**vit, num_labels=3)),
        "deit": transformers.DeiTModel(transformers.DeiTConfig(**vit)),
        "blip": transformers.BlipVisionModel(transformers.BlipVisionConfig(**vit)),
        "clip": transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vit)),
        "bert": transformers.BertForMaskedLM(bert),
        "pretraining": transformers.BertForPreTraining(bert),
        "bare_bert": transformers.BertModel(bert),
    }
    for name, model in models.items():
        randomised(model).save_pretrained(root / name)
    return root


def make_model(image_size=64, sharing="all_but_sa", heads=("itc", "itm", "lm"), seed=0, **text):
    torch.manual_seed(seed)
    shape = {"hidden_dim": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 48}
    settings = {**shape, "vocab_size": NUM_WORDS + NEW_WORDS, "max_positions": 24, "sharing": sharing, **text}
    return Blip(
        BlipConfig(
            vision=VisionConfig(image_size=image_size, patch_size=16, **shape),
            text=TextConfig(**settings),
            embed_dim=16,
            heads=heads,
        )
    ).eval()


THEIR_VISION = {"vit": transformers.ViTModel, "blip": transformers.BlipVisionModel}


@torch.no_grad()
@pytest.mark.parametrize("kind", THEIR_VISION)
def test_vision_equals_hugging_face(folders, kind):
    vision = make_model().vision
    init_vision(vision, str(folders / kind))
    theirs = THEIR_VISION[kind].from_pretrained(folders / kind).eval()
    pixels = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(vision(pixels), theirs(pixels).last_hidden_state, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_classification_heads_are_left_out(folders):
    vision = make_model().vision
    init_vision(vision, str(folders / "classifier"))
    theirs = transformers.ViTForImageClassification.from_pretrained(folders / "classifier").eval()
    pixels = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(vision(pixels), theirs.vit(pixels).last_hidden_state, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_deit_is_read_without_its_distillation_token(folders):
    vision = make_model().vision
    init_vision(vision, str(folders / "deit"))
    theirs = transformers.DeiTModel.from_pretrained(folders / "deit").eval()
    theirs.embeddings.register_forward_hook(lambda _, inputs, out: torch.cat([out[:, :1], out[:, 2:]], 1))
    pixels = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(vision(pixels), theirs(pixels).last_hidden_state, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_positions_are_interpolated_to_the_runs_resolution(folders):
    vision = make_model(image_size=96).vision
    init_vision(vision, str(folders / "vit"))
    assert vision.position_embedding.shape == (1, 37, 32)
    theirs = transformers.ViTModel.from_pretrained(folders / "vit").eval()
    pixels = torch.randn(1, 3, 96, 96)
    expected = theirs(pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(vision(pixels), expected, rtol=1e-5, atol=1e-5)


def zeroed_token_types(model):
    model.bert.embeddings.token_type_embeddings.weight.data.zero_()
    return model.eval()


def some_ids():
    ids = torch.randint(0, NUM_WORDS, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(9) < torch.tensor([9, 5, 7])[:, None]
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("sharing", ["all_but_sa", *slow("all", "all_but_ca", "none")])
@pytest.mark.parametrize("kind", ["bert", "pretraining"])
def test_text_reads_as_bert_without_token_types(folders, sharing, kind):
    text = make_model(sharing=sharing).text
    init_text(text, str(folders / kind))
    ids, mask = some_ids()
    encoder = zeroed_token_types(transformers.BertForMaskedLM.from_pretrained(folders / kind)).bert
    expected = encoder(ids, attention_mask=mask.long()).last_hidden_state
    found = text(ids, "encode", mask)
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-5, atol=1e-5)

    decoder = transformers.BertLMHeadModel.from_pretrained(folders / kind, is_decoder=True)
    decoder = zeroed_token_types(decoder)
    logits = text.predict_words(text(ids, "decode"))
    expected = decoder(ids, use_cache=False).logits
    torch.testing.assert_close(logits[..., :NUM_WORDS], expected, rtol=1e-5, atol=1e-5)


def test_new_words_and_cross_attention_keep_their_random_start(folders):
    model, before = make_model(sharing="none"), make_model(sharing="none")
    init_text(model.text, str(folders / "bert"))
    old = dict(before.text.named_parameters())
    for name, parameter in model.text.named_parameters():
        if "cross_attention" in name:
            assert torch.equal(parameter, old[name])
        elif name.endswith("word.weight"):
            assert torch.equal(parameter[NUM_WORDS:], old[name][NUM_WORDS:])
            assert not torch.isclose(parameter[:NUM_WORDS], old[name][:NUM_WORDS]).all()
        else:
            assert not torch.equal(parameter, old[name]), name


@torch.no_grad()
def test_a_bert_without_a_head_leaves_ours_random(folders):
    model, before = make_model(), make_model()
    init_text(model.text, str(folders / "bare_bert"))
    for name, parameter in model.text.lm_head.named_parameters():
        assert torch.equal(parameter, dict(before.text.lm_head.named_parameters())[name])
    encoder = transformers.BertModel.from_pretrained(folders / "bare_bert").eval()
    encoder.embeddings.token_type_embeddings.weight.zero_()
    ids, mask = some_ids()
    expected = encoder(ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(model.text(ids, "encode", mask)[mask], expected[mask], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_models_with_one_reading_start_from_bert_too(folders):
    ids, _ = some_ids()
    both = make_model().text
    init_text(both, str(folders / "bert"))
    encoder, decoder = make_model(heads=("itc",)).text, make_model(heads=("lm",), max_positions=9).text
    init_text(encoder, str(folders / "bert"))
    init_text(decoder, str(folders / "bert"))
    assert torch.equal(encoder(ids, "encode"), both(ids, "encode"))
    assert torch.equal(decoder(ids, "decode"), both(ids, "decode"))


def changed(folder, out, change):
    """A copy of a checkpoint whose weights `change` has worked on."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    out.mkdir()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((folder / "config.json").read_text())
    return str(out)


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("vit", "layernorm.weight"),
        ("vit", "embeddings.cls_token"),
        ("bert", "bert.encoder.layer.1.output.dense.bias"),
        ("bert", "cls.predictions.transform.dense.weight"),
    ],
)
def test_missing_weights_are_named(folders, tmp_path, kind, key):
    source = changed(folders / kind, tmp_path / "c", lambda weights: weights.pop(key))
    model = make_model()
    with pytest.raises(CheckpointError, match=f"missing {key}"):
        init_vision(model.vision, source) if kind == "vit" else init_text(model.text, source)


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_left_over_weights_are_named(folders, tmp_path, kind):
    source = changed(folders / kind, tmp_path / "c", lambda w: w.update({"adapter.weight": torch.zeros(2)}))
    model = make_model()
    with pytest.raises(CheckpointError, match=r"left over adapter\.weight"):
        init_vision(model.vision, source) if kind == "vit" else init_text(model.text, source)


def test_more_layers_than_the_run_are_left_over(folders):
    config = make_model().config
    vision, text = replace(config.vision, num_layers=1), replace(config.text, num_layers=1)
    shallow = Blip(replace(config, vision=vision, text=text))
    with pytest.raises(CheckpointError, match=r"left over layers\.1\."):
        init_vision(shallow.vision, str(folders / "vit"))
    with pytest.raises(CheckpointError, match=r"left over bert\.encoder\.layer\.1\."):
        init_text(shallow.text, str(folders / "bert"))


def test_other_shapes_heads_and_kinds_are_refused(folders):
    wide = make_model(mlp_dim=64)
    with pytest.raises(CheckpointError, match=r"feed_forward.*\(48, 32\).*\(64, 32\)"):
        init_text(wide.text, str(folders / "bert"))
    with pytest.raises(CheckpointError, match="4 attention heads, the run's model 8"):
        init_text(make_model(num_heads=8).text, str(folders / "bert"))
    with pytest.raises(CheckpointError, match="60 words, the run's tokenizer 300"):
        init_text(make_model(vocab_size=300).text, str(folders / "bert"))
    with pytest.raises(CheckpointError, match="clip_vision_model"):
        init_vision(make_model().vision, str(folders / "clip"))
    with pytest.raises(CheckpointError, match="is a vit"):
        init_text(make_model().text, str(folders / "vit"))


def test_unreadable_sources_are_named(folders, tmp_path, monkeypatch):
    model = make_model()
    with pytest.raises(CheckpointError, match="no folder"):
        init_vision(model.vision, str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        init_vision(model.vision, str(tmp_path))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text((folders / "bert" / "config.json").read_text())
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"0123456789")
    with pytest.raises(CheckpointError, match="cannot be read"):
        init_text(model.text, str(tmp_path / "torn"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="offline, name a folder"):
        init_text(model.text, "no-such-owner/no-such-bert")


# ---- a Q-Former


def make_qformer(has_text_branch=True, has_lm_head=True, **changes):
    torch.manual_seed(0)
    config = QFormerConfig(
        num_queries=3, hidden_dim=32, num_layers=2, num_heads=4, mlp_dim=48, vocab_size=NUM_WORDS + 1,
        max_positions=24, dropout=0.0,
    )  # fmt: skip
    config = replace(config, **changes)
    return QFormer(config, context_dim=12, has_text_branch=has_text_branch, has_lm_head=has_lm_head).eval()


@torch.no_grad()
def test_text_alone_is_read_and_predicted_as_by_bert(folders):
    qformer = make_qformer()
    fresh = make_qformer()
    init_text(qformer, str(folders / "bert"))
    theirs = zeroed_token_types(transformers.BertForMaskedLM.from_pretrained(folders / "bert"))
    ids = torch.randint(0, NUM_WORDS, (2, 7))
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    states = qformer(ids, mask=mask[:, None, None, :])
    expected = theirs.bert(ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(states[mask], expected[mask], rtol=1e-5, atol=1e-5)
    logits = qformer.predict_words(states)[..., :NUM_WORDS]
    torch.testing.assert_close(logits[mask], theirs.cls(expected)[mask], rtol=1e-5, atol=1e-5)
    assert torch.equal(qformer.embeddings.word.weight[NUM_WORDS:], fresh.embeddings.word.weight[NUM_WORDS:])


@torch.no_grad()
def test_queries_start_with_berts_feed_forward_too(folders):
    qformer, fresh = make_qformer(), make_qformer()
    init_text(qformer, str(folders / "bert"))
    before = fresh.state_dict()
    for name, weight in qformer.state_dict().items():
        if ".query_feed_forward." in name:
            text = name.replace("query_feed_forward", "text_feed_forward")
            assert torch.equal(weight, qformer.state_dict()[text]), name
        is_new = ".cross_attention." in name or name == "embeddings.queries"
        assert torch.equal(weight, before[name]) == is_new, name


def test_a_qformer_without_text_takes_what_queries_need(folders):
    whole, queries = make_qformer(), make_qformer(has_text_branch=False, has_lm_head=False)
    init_text(whole, str(folders / "bert"))
    init_text(queries, str(folders / "bert"))
    for name, weight in queries.state_dict().items():
        if ".cross_attention." not in name and name != "embeddings.queries":
            assert torch.equal(weight, whole.state_dict()[name]), name


def test_a_qformer_of_another_shape_or_vocabulary_is_refused(folders):
    with pytest.raises(CheckpointError, match="4 attention heads, the run's model 8"):
        init_text(make_qformer(num_heads=8), str(folders / "bert"))
    with pytest.raises(CheckpointError, match="use BERT's own"):
        init_text(make_qformer(vocab_size=99), str(folders / "bert"))
    with pytest.raises(CheckpointError, match=r"exactly the weights of the model: .*\(48,.*\(64,"):
        init_text(make_qformer(mlp_dim=64), str(folders / "bert"))
