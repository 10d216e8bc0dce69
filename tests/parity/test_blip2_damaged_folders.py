"""Folders of transformers' BLIP-2 that are not what they say: one clear error for each."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blip2_cases import RETRIEVER, TOKENIZER, WRITERS, language_words, text_config, their_model, write_theirs
from torch import Tensor

from damaged_files import WEIGHTS, edit_config, edit_weights, truncate
from openblip.checkpoints.loading import load_checkpoint
from openblip.data.tokenizer import Tokenizer
from openblip.errors import CheckpointError

pytestmark = pytest.mark.slow
WRITER, INSTRUCTED = WRITERS
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    for name, language in ((WRITER, "opt"), (INSTRUCTED, "t5"), (RETRIEVER, None)):
        write_theirs(root / name, their_model(name, language), language)
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
    (WRITER, config(lambda c: c["text_config"].update(model_type="nonsense")), "nonsense.$"),
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
    folder = tmp_path / "damaged"
    shutil.copytree(folders / name, folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_undamaged_they_are_read(folders: Path) -> None:
    for name in (WRITER, INSTRUCTED, RETRIEVER):
        load_checkpoint(folders / name)


@pytest.mark.parametrize("name", [RETRIEVER, INSTRUCTED])
def test_without_the_q_formers_words_berts_are_asked_for(
    tmp_path: Path, folders: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(folders / name, folder)
    words = folder / "qformer_tokenizer" if name == INSTRUCTED else folder
    without_words(words)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="bert-base-uncased"):
        load_checkpoint(folder)
    TOKENIZER.save(tmp_path / "words")
    load_checkpoint(folder, tokenizer=tmp_path / "words")


def test_words_of_the_language_model_by_name(tmp_path: Path, folders: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(folders / WRITER, folder)
    without_words(folder)
    language_words("opt").save_pretrained(tmp_path / "words")
    checkpoint = load_checkpoint(folder, tokenizer=tmp_path / "words")
    assert checkpoint.model.config.language is not None
    with pytest.raises(CheckpointError, match="no tokenizer of the language model"):
        load_checkpoint(folder, tokenizer=folder)


def test_words_of_a_larger_language_model(tmp_path: Path, folders: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(folders / WRITER, folder)
    words = language_words("opt")
    larger = type(words).from_pretrained(folder)
    larger.add_tokens([f"word{i}" for i in range(text_config("opt").vocab_size - len(words) + 1)])
    larger.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="another model"):
        load_checkpoint(folder)
