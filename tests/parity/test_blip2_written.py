"""Folders of transformers' BLIP-2: its classes and processors read what we write; what is damaged is named."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import blip2_cases as cases
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from damaged_files import WEIGHTS, assert_same_weights, edit_config, edit_weights, truncate
from openblip.checkpoints.checkpoint import Blip2Checkpoint
from openblip.checkpoints.loading import load_checkpoint, save_checkpoint
from openblip.data.config import Preprocessing
from openblip.data.tokenizer import Tokenizer
from openblip.errors import CheckpointError
from openblip.models.blip2 import Blip2
from openblip.models.config import Blip2Config, Blip2Head, LanguageConfig
from openblip.models.language_model import LanguageModel, wrap_language_model
from openblip.nn.config import QFormerConfig, VisionConfig
from tiny_blip import randomise
from written_texts import beam_ids

pytestmark = pytest.mark.slow
VISION = VisionConfig(
    image_size=cases.SIZE, patch_size=8, hidden_dim=36, num_layers=2, num_heads=3, mlp_dim=52, drop_path=0.1,
    layer_norm_eps=1e-6, output_norm=False,
)  # fmt: skip
QFORMER = QFormerConfig(
    num_queries=cases.NUM_QUERIES, hidden_dim=24, num_layers=4, num_heads=3, mlp_dim=44, max_positions=60,
    vocab_size=cases.TOKENIZER.vocab_size - 1, dropout=0.0,
)  # fmt: skip
QUESTIONS = ["a red dog?", "two blue cars?", "is it green?"]


def language_model(kind: cases.Language, spare_rows: int, end_of_text: str | None) -> LanguageModel:
    config = cases.text_config(kind, spare_rows)
    if end_of_text is None:
        config.eos_token_id = 1
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    randomise(model, seed=3, scale=0.4)
    language = wrap_language_model(model, cases.language_words(kind), end_of_text)
    with torch.no_grad():  # so that some texts end
        model.get_output_embeddings().weight[language.end_id] *= 2
    return language


def ours(
    heads: tuple[Blip2Head, ...] = ("llm",),
    kind: cases.Language | None = "opt",
    *,
    spare_rows: int = 3,
    end_of_text: str | None = "\n",
    instructed: bool = False,
) -> Blip2Checkpoint:
    """A model with all that a folder of transformers has no place for."""
    language = LanguageConfig(name="some/model", hidden_dim=16, end_of_text=end_of_text, max_text_tokens=20)
    config = Blip2Config(
        vision=VISION, qformer=QFORMER, language=None if kind is None else language, embed_dim=10, heads=heads,
        instructed=instructed, vision_norm_eps=1e-5,
    )  # fmt: skip
    model = Blip2(config)
    randomise(model, seed=6, scale=0.3)
    model.language = None if kind is None else language_model(kind, spare_rows, end_of_text)
    return Blip2Checkpoint(
        model.eval(),
        cases.TOKENIZER if config.has_text_branch else None,
        Preprocessing(image_size=cases.SIZE, mean=(0.4, 0.5, 0.6)),
        "a photo of",
        "Q: {} A:",
    )


KINDS: list[dict[str, Any]] = [
    {"kind": "opt"},
    {"kind": "opt", "end_of_text": None},
    {"kind": "llama", "instructed": True},
    {"kind": "t5", "end_of_text": None},
    {"kind": "t5", "end_of_text": None, "instructed": True},
    {"kind": None, "heads": ("itc", "itm")},
]


def name_of(kind: dict[str, Any]) -> str:
    return "-".join(str(value) for value in kind.values())


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_nothing_is_lost_on_the_way_there_and_back(tmp_path: Path, kind: dict[str, Any]) -> None:
    before = ours(**kind)
    save_checkpoint(before, tmp_path, "huggingface")
    after = load_checkpoint(tmp_path)
    assert after.model.config == before.model.config
    assert after[2:] == before[2:]  # preprocessing and prompts
    assert_same_weights(after.model, before.model, rounded=("log_temperature",))  # which is written as a number
    if before.model.language is not None:
        assert after.model.require_language().end_id == before.model.language.end_id


def texts_of(checkpoint: Blip2Checkpoint, images: list[Image.Image], decoding: dict[str, Any]) -> list[list[int]]:
    """What we write from images, the Q-Former reading the prompts too where it is taught to."""
    model, language = checkpoint.model, checkpoint.model.require_language()
    arrays = torch.stack([torch.from_numpy(checkpoint.preprocessing(image)) for image in images])
    image_kv = model.image_kv(model.encode_image(checkpoint.preprocessing.normalize(arrays)))
    if model.config.instructed:
        tokens = cases.TOKENIZER.encode(cases.PROMPTS, max_length=60)
        queries = model.encode_multimodal(tokens.ids, tokens.mask, image_kv)
    else:
        queries = model.encode_queries(image_kv).queries
    return beam_ids(language, model.visual_prompts(queries), cases.PROMPTS, cases.MAX_TOKENS, **decoding)


@pytest.mark.parametrize("kind", KINDS[:-1], ids=name_of)
def test_their_processor_and_model_write_the_same(tmp_path: Path, images: list[Any], kind: dict[str, Any]) -> None:
    checkpoint = ours(**kind)
    checkpoint.model.vision_norm.eps = VISION.layer_norm_eps  # theirs has one epsilon for both
    save_checkpoint(checkpoint, tmp_path, "huggingface")
    name = "InstructBlip" if kind.get("instructed") else "Blip2"
    processor = getattr(transformers, f"{name}Processor").from_pretrained(tmp_path)
    theirs = getattr(transformers, f"{name}ForConditionalGeneration").from_pretrained(tmp_path).eval()
    inputs = processor(images=images, text=cases.PROMPTS, padding=True, return_tensors="pt")
    if kind.get("instructed"):  # it pads these as the language model's words, and the Q-Former counts positions
        words = processor.qformer_tokenizer(cases.PROMPTS, padding=True, padding_side="right", return_tensors="pt")
        inputs |= {"qformer_input_ids": words.input_ids, "qformer_attention_mask": words.attention_mask}
    assert (inputs["input_ids"] == theirs.config.image_token_index).sum() == len(images) * cases.NUM_QUERIES
    with torch.no_grad():
        for decoding in cases.DECODINGS.values():
            output = theirs.generate(**inputs, max_new_tokens=cases.MAX_TOKENS, do_sample=False, **decoding)
            first = 1 if kind["kind"] == "t5" else inputs["input_ids"].shape[1]
            end = checkpoint.model.require_language().end_id
            found = texts_of(checkpoint, images, decoding)
            assert [cases.until(row, end) for row in output[:, first:].tolist()] == found
            assert len({tuple(text) for text in found}) > 1


@pytest.mark.parametrize("together", [True, False])
def test_their_processor_and_model_match_the_same(tmp_path: Path, images: list[Image.Image], together: bool) -> None:
    """Whether texts are prepared with their images or alone: no image tokens are asked for, see below."""
    checkpoint = ours(("itc", "itm"), None)
    model = checkpoint.model
    model.vision_norm.eps = VISION.layer_norm_eps
    save_checkpoint(checkpoint, tmp_path, "huggingface")
    processor = transformers.Blip2Processor.from_pretrained(tmp_path)
    theirs = transformers.Blip2ForImageTextRetrieval.from_pretrained(tmp_path).eval()
    inputs = dict(processor(images=images, return_tensors="pt"))
    inputs |= processor(images=images if together else None, text=QUESTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        itc = theirs(**inputs, use_image_text_matching_head=False).logits_per_image
        itm = theirs(**inputs, use_image_text_matching_head=True).logits_per_image
        arrays = torch.stack([torch.from_numpy(checkpoint.preprocessing(image)) for image in images])
        image_kv = model.image_kv(model.encode_image(checkpoint.preprocessing.normalize(arrays)))
        tokens = cases.TOKENIZER.encode(QUESTIONS)
        queries = model.embed_image(model.encode_queries(image_kv).queries)
        similarity = (queries @ model.embed_text(tokens.ids, tokens.mask).T).amax(dim=1)
        match = model.match_logits(tokens.ids, tokens.mask, image_kv)
    torch.testing.assert_close(itc, similarity, atol=1e-5, rtol=0)
    torch.testing.assert_close(itm, match, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["opt", "llama", "t5"])
def test_a_language_model_without_a_spare_row_gets_one(tmp_path: Path, images: list[Any], kind: Any) -> None:
    """The word "<image>" needs an embedding. It is never written, and nothing else changes."""
    checkpoint = ours(kind=kind, spare_rows=0, end_of_text=None if kind == "t5" else "\n")
    save_checkpoint(checkpoint, tmp_path / "once", "huggingface")
    after = load_checkpoint(tmp_path / "once")
    before_words = checkpoint.model.require_language().model.get_input_embeddings().weight
    after_words = after.model.require_language().model.get_input_embeddings().weight
    assert len(after_words) == len(before_words) + 1
    assert torch.equal(after_words[:-1], before_words)
    torch.testing.assert_close(after_words[-1], before_words.mean(dim=0))
    for decoding in cases.DECODINGS.values():
        assert texts_of(after, images, decoding) == texts_of(checkpoint, images, decoding)
    save_checkpoint(after, tmp_path / "twice", "huggingface")
    once, twice = (tmp_path / name / "model.safetensors" for name in ("once", "twice"))
    assert once.read_bytes() == twice.read_bytes()
    assert transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "once")


def with_language(model_class: Any, config: Any) -> Callable[[Blip2Checkpoint], None]:
    def change(checkpoint: Blip2Checkpoint) -> None:
        checkpoint.model.language = wrap_language_model(model_class(config), cases.language_words("opt"), "\n")

    return change


def with_adapters(checkpoint: Blip2Checkpoint) -> None:
    peft = pytest.importorskip("peft")
    language = checkpoint.model.require_language()
    language.model = peft.get_peft_model(language.model, peft.LoraConfig(target_modules=["q_proj"]))


def with_quantised_weights(checkpoint: Blip2Checkpoint) -> None:
    checkpoint.model.require_language().model.is_quantized = True  # as transformers marks it


def with_output_norm(checkpoint: Blip2Checkpoint) -> None:
    model = checkpoint.model
    model.config = replace(model.config, vision=replace(VISION, output_norm=True))


BART = transformers.BartConfig(
    vocab_size=len(cases.language_words("opt")) + 3, d_model=16, encoder_layers=1, decoder_layers=1,
    encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
)  # fmt: skip
NARROW = cases.text_config("opt")
NARROW.word_embed_proj_dim = 8  # as OPT-350M has it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_adapters, "LoRA adapters: merge"),
        (with_quantised_weights, "is quantised"),
        (with_language(transformers.BartForConditionalGeneration, BART), "bart"),
        (with_language(transformers.OPTForCausalLM, NARROW), "8 wide"),
        (with_output_norm, "image encoder"),
    ],
)
def test_what_their_classes_cannot_hold_is_not_written(tmp_path: Path, change: Any, message: str) -> None:
    checkpoint = ours()
    change(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(checkpoint, tmp_path / "out", "huggingface")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("heads", [("itc", "itm", "itg"), ("itg",), ("itc",)])
def test_heads_that_they_have_no_class_for_are_not_written(tmp_path: Path, heads: tuple[Blip2Head, ...]) -> None:
    with pytest.raises(CheckpointError, match=f"heads {', '.join(heads)}"):
        save_checkpoint(ours(heads, None), tmp_path / "out", "huggingface")
    assert not (tmp_path / "out").exists()


# ---- folders that are not what they say: one clear error for each

(WRITER, INSTRUCTED), RETRIEVER = cases.WRITERS, cases.RETRIEVER
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    for name, language in ((WRITER, "opt"), (INSTRUCTED, "t5"), (RETRIEVER, None)):
        cases.write_theirs(root / name, cases.their_model(name, language), language)
    return root


def weights(edit: Callable[[dict[str, Tensor]], object]) -> Damage:
    return lambda folder: edit_weights(folder, edit)


def config(edit: Callable[[dict[str, Any]], object]) -> Damage:
    return lambda folder: edit_config(folder, edit)


def without_words(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)


def with_many_words(folder: Path) -> None:
    texts = [f"word{i} other{i} {chr(200 + i)}" for i in range(90)]
    Tokenizer.train(texts * 3, vocab_size=600).save(folder)


ATTENTION = "language_model.model.decoder.layers.0.self_attn.q_proj.weight"
QUERY = "qformer.encoder.layer.1.attention.attention.query.weight"
DAMAGES: list[tuple[str, Damage, str]] = [
    (WRITER, weights(lambda w: w.pop(ATTENTION)), f"missing {ATTENTION}"),
    (WRITER, weights(lambda w: w.pop(QUERY)), f"missing {QUERY}"),
    (
        WRITER,
        weights(lambda w: w.pop("language_model.model.decoder.embed_tokens.weight")),
        "missing language_model.*embed_tokens",
    ),
    (WRITER, weights(lambda w: w.update({"language_model.extra": torch.zeros(1)})), "left over language_mod"),
    (WRITER, weights(lambda w: w.update(extra=torch.zeros(1))), "left over extra"),
    (WRITER, weights(lambda w: w.update({ATTENTION: torch.zeros(2, 3)})), r"q_proj.weight is \(2, 3\)"),
    (WRITER, weights(lambda w: w.update({QUERY: torch.zeros(24, 3)})), r"query.weight \(24, 3\)"),
    (WRITER, weights(lambda w: w.update(query_tokens=torch.zeros(1, 6, 24))), r"queries is \(1, 6, 24\)"),
    (WRITER, lambda f: truncate(f / WEIGHTS), "Is the file whole"),
    (WRITER, lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    (WRITER, without_words, "no tokenizer of the language model"),
    (WRITER, lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer cannot be read"),
    (WRITER, config(lambda c: c["text_config"].update(model_type="vit")), "a vit is no language model"),
    (WRITER, config(lambda c: c["text_config"].update(model_type="bart")), "a bart is no language model"),
    (WRITER, config(lambda c: c["text_config"].update(model_type="nonsense")), r"nonsense\.(\n|$)"),
    (WRITER, config(lambda c: c["text_config"].update(model_type="gpt2")), "missing language_model.*left"),
    (WRITER, config(lambda c: c["text_config"].update(vocab_size=200)), r"embed_tokens.*\(200, 16\)"),
    (WRITER, config(lambda c: c["text_config"].update(eos_token_id=9999)), "end_of_text"),
    (WRITER, config(lambda c: c["text_config"].update(hidden_size="wide")), "config.json"),
    (WRITER, config(lambda c: c.update(num_query_tokens=0)), "num_queries is 0"),
    (WRITER, config(lambda c: c.update(architectures=[RETRIEVER])), "missing embeddings.*left over language"),
    (WRITER, config(lambda c: c["vision_config"].update(hidden_act="relu")), "relu/gelu"),
    (WRITER, config(lambda c: c["qformer_config"].update(hidden_act="gelu_new")), "gelu/gelu_new"),
    (WRITER, config(lambda c: c["vision_config"].update(qkv_bias=False)), "qkv_bias False"),
    (WRITER, config(lambda c: c["vision_config"].update(image_size=[40, 48])), "image_size"),
    (WRITER, config(lambda c: c["qformer_config"].update(num_attention_heads=5)), "does not divide"),
    (WRITER, config(lambda c: c.update(openblip={"max_text_tokens": "many"})), "openblip entry is damaged"),
    (WRITER, config(lambda c: c.update(openblip=[1])), "openblip entry is damaged"),
    (WRITER, config(lambda c: c.update(model_type="llava")), "llava"),
    (RETRIEVER, weights(lambda w: w.pop("itm_head.bias")), "missing itm_head.bias"),
    (RETRIEVER, with_many_words, "the tokenizer has"),
    (INSTRUCTED, lambda f: with_many_words(f / "qformer_tokenizer"), "the tokenizer has"),
    (INSTRUCTED, without_words, "no tokenizer of the language model"),
    (INSTRUCTED, weights(lambda w: w.pop("qformer.encoder.layer.0.intermediate.dense.weight")), "missing qformer"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES, ids=range(len(DAMAGES)))
def test_what_does_not_fit_is_named(tmp_path: Path, folders: Path, name: str, damage: Damage, message: str) -> None:
    folder = shutil.copytree(folders / name, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_undamaged_they_are_read(folders: Path) -> None:
    for name in (WRITER, INSTRUCTED, cases.RETRIEVER):
        load_checkpoint(folders / name)


@pytest.mark.parametrize("name", [RETRIEVER, INSTRUCTED])
def test_berts_words_are_asked_for(tmp_path: Path, folders: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without those of the Q-Former."""
    folder = shutil.copytree(folders / name, tmp_path / "damaged")
    words = folder / "qformer_tokenizer" if name == INSTRUCTED else folder
    without_words(words)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="bert-base-uncased"):
        load_checkpoint(folder)
    cases.TOKENIZER.save(tmp_path / "words")
    load_checkpoint(folder, tokenizer=tmp_path / "words")


def test_words_of_the_language_model_by_name(tmp_path: Path, folders: Path) -> None:
    folder = shutil.copytree(folders / WRITER, tmp_path / "damaged")
    without_words(folder)
    cases.language_words("opt").save_pretrained(tmp_path / "words")
    checkpoint = load_checkpoint(folder, tokenizer=tmp_path / "words")
    assert checkpoint.model.config.language
    with pytest.raises(CheckpointError, match="no tokenizer of the language model"):
        load_checkpoint(folder, tokenizer=folder)


def test_a_word_without_an_embedding_gets_one(tmp_path: Path, folders: Path) -> None:
    folder = shutil.copytree(folders / WRITER, tmp_path / "damaged")
    words = cases.language_words("opt")
    larger = type(words).from_pretrained(folder)
    larger.add_tokens([f"word{i}" for i in range(cases.text_config("opt").vocab_size - len(words) + 1)])
    larger.save_pretrained(folder)
    with pytest.warns(UserWarning, match=r"1 words of its tokenizer \(word\d+\) have no word embedding"):
        language = load_checkpoint(folder).model.require_language()
    rows = language.model.get_input_embeddings().weight
    assert len(rows) == len(larger)
    torch.testing.assert_close(rows[-1], rows[:-1].mean(dim=0))
