"""Starting weights from Hugging Face backbones, against transformers' own outputs. Nothing is downloaded."""

import shutil
from dataclasses import replace

import huggingface_hub
import pytest
import torch
import transformers

from damaged_files import edit_weights
from marks import slow
from openblip.checkpoints.backbones import init_text, init_vision
from openblip.errors import CheckpointError
from openblip.models.blip import Blip
from openblip.models.config import BlipConfig
from openblip.nn.config import QFormerConfig, TextConfig, VisionConfig
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


WIDTHS = {"hidden_dim": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 48}


def make_model(image_size=64, sharing="all_but_sa", heads=("itc", "itm", "lm"), **text):
    torch.manual_seed(0)
    settings = {**WIDTHS, "vocab_size": NUM_WORDS + NEW_WORDS, "max_positions": 24, "sharing": sharing, **text}
    vision = VisionConfig(image_size=image_size, patch_size=16, **WIDTHS)
    return Blip(BlipConfig(vision=vision, text=TextConfig(**settings), embed_dim=16, heads=heads)).eval()


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "size"), [("vit", 64), ("vit", 96), ("blip", 64), ("classifier", 64), ("deit", 64)])
def test_vision_equals_hugging_face(folders, kind, size):
    """At another resolution with interpolated positions; without a head for classes, and DeiT's distillation token."""
    classes = {
        "vit": transformers.ViTModel,
        "blip": transformers.BlipVisionModel,
        "classifier": transformers.ViTForImageClassification,
        "deit": transformers.DeiTModel,
    }
    vision = make_model(image_size=size).vision
    init_vision(vision, str(folders / kind))
    assert vision.position_embedding.shape == (1, (size // 16) ** 2 + 1, 32)
    theirs = classes[kind].from_pretrained(folders / kind).eval()
    if kind == "deit":
        theirs.embeddings.register_forward_hook(lambda _, inputs, out: torch.cat([out[:, :1], out[:, 2:]], 1))
    pixels, interpolation = torch.randn(2, 3, size, size), {"interpolate_pos_encoding": True} if size == 96 else {}
    close(vision(pixels), getattr(theirs, "vit", theirs)(pixels, **interpolation).last_hidden_state)


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
    close(found[mask], expected[mask])

    decoder = transformers.BertLMHeadModel.from_pretrained(folders / kind, is_decoder=True)
    decoder = zeroed_token_types(decoder)
    logits = text.predict_words(text(ids, "decode"))
    expected = decoder(ids, use_cache=False).logits
    close(logits[..., :NUM_WORDS], expected)


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
    close(model.text(ids, "encode", mask)[mask], expected[mask])


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


BIAS, TRANSFORM = "bert.encoder.layer.1.output.dense.bias", "cls.predictions.transform.dense.weight"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("vit", lambda weights: weights.pop("layernorm.weight"), "missing layernorm.weight"),
        ("vit", lambda weights: weights.pop("embeddings.cls_token"), "missing embeddings.cls_token"),
        ("bert", lambda weights: weights.pop(BIAS), f"missing {BIAS}"),
        ("bert", lambda weights: weights.pop(TRANSFORM), f"missing {TRANSFORM}"),
        ("vit", lambda weights: weights.update(x=torch.zeros(2)), "left over x"),
        ("bert", lambda weights: weights.update(x=torch.zeros(2)), "left over x"),
    ],
)
def test_what_does_not_fit_is_named(folders, tmp_path, kind, change, message):
    shutil.copytree(folders / kind, tmp_path / "c")
    edit_weights(tmp_path / "c", change)
    model = make_model()
    with pytest.raises(CheckpointError, match=message):
        init_vision(model.vision, str(tmp_path / "c")) if kind == "vit" else init_text(model.text, str(tmp_path / "c"))


def test_more_layers_than_the_run_are_left_over(folders):
    config = make_model().config
    vision, text = replace(config.vision, num_layers=1), replace(config.text, num_layers=1)
    shallow = Blip(replace(config, vision=vision, text=text))
    with pytest.raises(CheckpointError, match=r"left over layers\.1\."):
        init_vision(shallow.vision, str(folders / "vit"))
    with pytest.raises(CheckpointError, match=r"left over bert\.encoder\.layer\.1\."):
        init_text(shallow.text, str(folders / "bert"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_model(mlp_dim=64).text, r"feed_forward.*\(48, 32\).*\(64, 32\)"),
        (lambda: make_model(num_heads=8).text, "4 attention heads, the run's model 8"),
        (lambda: make_model(vocab_size=300).text, "60 words, the run's tokenizer 300"),
        (lambda: make_qformer(mlp_dim=64), r"exactly the weights of the model: .*\(48,.*\(64,"),
        (lambda: make_qformer(num_heads=8), "4 attention heads, the run's model 8"),
        (lambda: make_qformer(vocab_size=99), "use BERT's own"),
    ],
)
def test_other_shapes_heads_and_words_are_refused(folders, make, message):
    with pytest.raises(CheckpointError, match=message):
        init_text(make(), str(folders / "bert"))


def test_other_kinds_are_refused(folders):
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
    with pytest.raises(CheckpointError, match="hub was not asked, since offline mode"):
        init_text(model.text, "no-such-owner/no-such-bert")


# ---- a Q-Former


def make_qformer(has_text_branch=True, has_lm_head=True, **changes):
    torch.manual_seed(0)
    words = {"vocab_size": NUM_WORDS + 1, "max_positions": 24}
    config = QFormerConfig(**{**WIDTHS, **words, "num_queries": 3, "dropout": 0.0, **changes})
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
    close(states[mask], expected[mask])
    logits = qformer.predict_words(states)[..., :NUM_WORDS]
    close(logits[mask], theirs.cls(expected)[mask])
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
