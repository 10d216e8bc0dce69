"""Language models by name: every architecture, in fewer bits, with adapters; saved and read again.

R rows, Q visual prompts, Dl width.
"""

import sys
from dataclasses import replace

import pytest
import torch
import transformers

from damaged_files import edit_config
from openblip.checkpoints import backbones
from openblip.checkpoints.backbones import load_language_model, save_language_model, with_rows
from openblip.checkpoints.checkpoint import load_native, save_native
from openblip.errors import CheckpointError, ConfigError, MissingExtraError
from openblip.models.config import LoraSettings
from openblip.models.language_model import (
    IGNORED_LABEL,
    CausalLanguageModel,
    Seq2SeqLanguageModel,
    with_lora,
    wrap_language_model,
)
from tiny_blip import SIZE, randomise
from tiny_blip2 import tiny_blip2, tiny_language_model
from written_texts import beam_ids

DIM = 64  # bitsandbytes' kernels take no less
LORA = LoraSettings(rank=2, alpha=4, dropout=0.5)
PROMPTS, TEXTS = ["a photo of", ""], ["a small red dog", "two cats"]


def architectures(num_words):
    t = transformers
    shape = {"vocab_size": num_words, "hidden_size": DIM, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "opt": t.OPTConfig(**shape, word_embed_proj_dim=DIM, ffn_dim=DIM),
        "gpt2": t.GPT2Config(vocab_size=num_words, n_embd=DIM, n_layer=1, n_head=2),
        "llama": t.LlamaConfig(**shape, intermediate_size=DIM),
        # With a row for the end of text that its class of tokenizers adds.
        "qwen2": t.Qwen2Config(
            **{**shape, "vocab_size": num_words + 1}, intermediate_size=DIM, num_key_value_heads=2
        ),
        "t5": t.T5Config(
            vocab_size=num_words, d_model=DIM, d_kv=DIM // 2, d_ff=DIM, num_layers=1, num_heads=2,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0,
        ),
        "bart": t.BartConfig(
            vocab_size=num_words, d_model=DIM, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=DIM,
            encoder_attention_heads=2, decoder_attention_heads=2, decoder_ffn_dim=DIM,
        ),
    }  # fmt: skip


ARCHITECTURES = ("opt", "gpt2", "llama", "qwen2", "t5", "bart")


def tiny(architecture):
    tokenizer = tiny_language_model("t5" if architecture in ("t5", "bart") else "opt").tokenizer
    config = architectures(len(tokenizer))[architecture]
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    config.bos_token_id = tokenizer.eos_token_id
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    model = auto.from_config(config)
    randomise(model, seed=2, scale=0.1)
    return wrap_language_model(model.eval(), tokenizer)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("languages")
    for name in ARCHITECTURES:
        save_language_model(root / name, tiny(name))
    return root


def visual(language, count=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, language.hidden_dim, generator=generator)


def logits(language):
    with torch.no_grad():
        return language.predict(visual(language), PROMPTS, TEXTS, 16).logits.float()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_by_folder(folders, name, capfd):
    language, before = load_language_model(folders / name), tiny(name)
    assert capfd.readouterr() == ("", "")
    kind = Seq2SeqLanguageModel if name in ("t5", "bart") else CausalLanguageModel
    assert type(language) is kind
    assert language.hidden_dim == DIM
    assert not language.model.training
    assert torch.equal(logits(language), logits(before))
    written = beam_ids(language, visual(language), PROMPTS, 5)
    assert written == beam_ids(before, visual(before), PROMPTS, 5)
    alone = beam_ids(language, visual(language)[1:], PROMPTS[1:], 5)
    assert alone == written[1:]


def test_precision(folders):
    language = load_language_model(folders / "opt", dtype=torch.bfloat16)
    assert language.model.dtype == torch.bfloat16


@pytest.mark.slow
def test_what_is_no_language_model(folders, tmp_path):
    with pytest.raises(CheckpointError, match="no folder"):
        load_language_model(str(tmp_path / "nothing"))
    transformers.ViTModel(
        transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path)
    tiny_language_model("opt").tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_language_model(tmp_path)


def test_flan_t5_with_the_activation_of_lavis(folders, tmp_path):
    """It replaces the tanh approximation by the exact gelu; a saved model keeps it."""
    own = load_language_model(folders / "t5")
    assert own.model.config.dense_act_fn == "gelu_new"
    exact = load_language_model(folders / "t5", changes={"dense_act_fn": "gelu"})
    difference = (logits(exact) - logits(own)).abs().max()
    assert 0 < difference < 1e-2
    save_language_model(tmp_path, exact)
    assert torch.equal(logits(load_language_model(tmp_path)), logits(exact))


# Fewer bits


def test_fewer_bits_need_bitsandbytes(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"openblip\[quantized\]"):
        load_language_model(folders / "opt", quantization="8bit")
    save_language_model(tmp_path, load_language_model(folders / "opt"))
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    edit_config(tmp_path, lambda config: config.update(quantization_config=quantization))
    with pytest.raises(MissingExtraError, match=r"openblip\[quantized\]"):
        load_language_model(tmp_path)


def test_what_transformers_is_asked_for(monkeypatch):
    monkeypatch.setattr(backbones, "_require_bitsandbytes", lambda: None)
    eight = backbones.quantized_settings("8bit", torch.bfloat16)["quantization_config"]
    assert (eight.load_in_8bit, eight.load_in_4bit) == (True, False)
    four = backbones.quantized_settings("4bit", torch.bfloat16)["quantization_config"]
    assert (four.load_in_8bit, four.load_in_4bit) == (False, True)
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    with pytest.raises(ConfigError, match="choose 8bit or 4bit"):
        backbones.quantized_settings("2bit", torch.bfloat16)


BITS = [(name, bits) for name in ("opt", "t5") for bits in ("8bit", "4bit")]
LINEAR = {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}


def kinds(language):
    return {type(module).__name__ for module in language.model.modules()}


@pytest.mark.parametrize(("name", "bits"), BITS)
def test_fewer_bits_say_nearly_the_same(folders, name, bits, capfd):
    exact = logits(load_language_model(folders / name))
    language = load_language_model(folders / name, quantization=bits)
    assert LINEAR[bits] in kinds(language)
    relative = (logits(language) - exact).norm() / exact.norm()
    assert 0 < relative < {"8bit": 0.05, "4bit": 0.3}[bits]
    assert "MatMul" not in "".join(capfd.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("name", "bits"), BITS)
def test_fewer_bits_are_trained_through_and_saved(folders, tmp_path, name, bits, lora):
    """Training comes first: bitsandbytes' CPU kernels repack weights for inference, and have no way back."""
    language = load_language_model(folders / name, quantization=bits).requires_grad_(False)
    if lora:
        with_lora(language, LORA)
        randomise_adapters(language)
    prompts = visual(language).requires_grad_()
    language.predict(prompts, PROMPTS, TEXTS, 16).logits.sum().backward()
    assert prompts.grad is not None
    assert prompts.grad.abs().sum() > 0
    language.eval()
    save_language_model(tmp_path, language)
    again = load_language_model(tmp_path)
    assert LINEAR[bits] in kinds(again)
    assert torch.equal(logits(again), logits(language))


# Adapters


def randomise_adapters(language):
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in language.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_adapters_begin_with_no_change_and_are_saved_apart(folders, tmp_path, name):
    language = load_language_model(folders / name)
    before = logits(language)
    assert with_lora(language, LORA) is language
    language.eval()
    torch.testing.assert_close(logits(language), before, rtol=1e-6, atol=1e-6)
    randomise_adapters(language)
    changed = logits(language)
    assert not torch.allclose(changed, before, atol=1e-3)
    save_language_model(tmp_path, language)
    again = load_language_model(tmp_path)
    assert torch.equal(logits(again), changed)
    prompts = visual(language)
    assert beam_ids(again, prompts, PROMPTS, 5) == beam_ids(language, prompts, PROMPTS, 5)
    (tmp_path / "adapter").rename(tmp_path / "elsewhere")
    assert torch.equal(logits(load_language_model(tmp_path)), before)


def test_a_folder_forgets_an_earlier_models_adapters(folders, tmp_path):
    save_language_model(tmp_path, with_lora(load_language_model(folders / "opt"), LORA))
    plain = load_language_model(folders / "opt")
    save_language_model(tmp_path, plain)
    assert not (tmp_path / "adapter").exists()
    assert torch.equal(logits(load_language_model(tmp_path)), logits(plain))


def test_chosen_layers(folders):
    settings = replace(LORA, targets=("fc1",))
    language = with_lora(load_language_model(folders / "opt"), settings)
    adapted = {n.split(".lora_")[0] for n, _ in language.model.named_parameters() if "lora_" in n}
    assert {name.rpartition(".")[2] for name in adapted} == {"fc1"}
    with pytest.raises(ConfigError, match="adapters already"):
        with_lora(language, settings)
    with pytest.raises(ConfigError, match="no_such_layer"):
        with_lora(load_language_model(folders / "opt"), replace(LORA, targets=("no_such_layer",)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_more_word_embeddings_share_the_other_weights(folders, name):
    """A large model is not there twice, and keeps its own rows."""
    model = load_language_model(folders / name).model
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    num_rows = len(model.get_input_embeddings().weight)
    larger = with_rows(model, num_rows + 5)
    assert len(larger.get_input_embeddings().weight) == len(larger.get_output_embeddings().weight) == num_rows + 5
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    own = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in own for parameter in larger.parameters() if len(parameter) != num_rows + 5)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_words_of_the_tokenizer_alone_get_the_mean(tmp_path, kind):
    """In transformers they are an index error at their first use."""
    language = tiny_language_model(kind)
    rows = language.model.get_input_embeddings().weight
    language.tokenizer.add_tokens(["quokka", "axolotl"])
    save_language_model(tmp_path, language)
    with pytest.warns(UserWarning, match=r"2 words of its tokenizer \(axolotl, quokka\) have no word embedding"):
        found = load_language_model(tmp_path)
    ids = torch.tensor(found.tokenizer("axolotl", add_special_tokens=False).input_ids)
    torch.testing.assert_close(found.model.get_input_embeddings()(ids), rows.mean(dim=0, keepdim=True))


@pytest.mark.parametrize("settings", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}])
def test_settings_are_checked(settings):
    with pytest.raises(ConfigError, match="lora"):
        LoraSettings(**settings)


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_only_adapters_of_a_frozen_language_model_are_trained(language, tmp_path):
    checkpoint = tiny_blip2((), language)
    model = checkpoint.model
    with_lora(model.language, LORA)
    randomise_adapters(model.language)
    model.freeze("vision", "language").train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("language.")}
    assert trained
    assert all("lora_" in name for name in trained)

    def loss():
        features = model.encode_image(torch.ones(2, 3, SIZE, SIZE))
        queries = model.encode_queries(model.image_kv(features)).queries
        predicted = model.predict_text(model.visual_prompts(queries), PROMPTS, TEXTS)
        return torch.nn.functional.cross_entropy(
            predicted.logits.flatten(0, 1), predicted.labels.flatten(), ignore_index=IGNORED_LABEL
        )

    loss().backward()
    named = dict(model.named_parameters())
    assert all(named[name].grad is not None for name in trained)
    assert all(p.grad is None for name, p in named.items() if name.startswith("language.") and name not in trained)
    # The adapters' dropout is on in training, and nothing else of the frozen model is.
    assert not torch.equal(loss(), loss())
    assert {n for n, m in model.language.named_modules() if m.training} == {
        n for n, _ in model.language.named_modules() if ".lora_dropout" in n
    }
    model.eval()
    assert torch.equal(loss(), loss())
    assert not any(module.training for module in model.modules())
    save_native(tmp_path, checkpoint)
    before, model = loss(), load_native(tmp_path).model
    assert torch.equal(loss(), before)
    model.freeze("vision", "language")
    assert {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("language.")} == trained
