import subprocess
import sys
import unicodedata

import huggingface_hub.constants
import pytest
import torch
from tokenizers import Tokenizer as WordPiece
from tokenizers import decoders, models, normalizers, pre_tokenizers

from openblip.data.tokenizer import Tokenizer
from openblip.errors import CheckpointError, ConfigError
from openblip.text_counts import count_texts

CAPTIONS = [f"A red dog{s} next to {n} cats, on the left" for n in range(60) for s in ("", "s", "gy")] + [
    "ein süßer Hund"
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS, 300)


def test_special_tokens_have_their_places(tokenizer):
    assert tokenizer.pad_id == 0
    assert (tokenizer.cls_id, tokenizer.sep_id) == (2, 3)
    assert (tokenizer.dec_id, tokenizer.enc_id) == (tokenizer.vocab_size - 2, tokenizer.vocab_size - 1)
    assert tokenizer.vocab_size <= 300


def test_encode_pads_to_the_longest_and_truncates_before_sep(tokenizer):
    tokens = tokenizer.encode(["a dog", "a red dog next to 3 cats", ""], max_length=6)
    assert tokens.ids.shape == (3, 6)
    assert tokens.ids.dtype == torch.long
    assert tokens.mask.dtype == torch.bool
    assert tokens.mask.sum(1).tolist() == [4, 6, 2]
    assert (tokens.ids[:, 0] == tokenizer.cls_id).all()
    assert [int(row[mask.sum() - 1]) for row, mask in zip(tokens.ids, tokens.mask, strict=True)] == [3, 3, 3]
    assert (tokens.ids[~tokens.mask] == tokenizer.pad_id).all()
    assert tokenizer.encode(["a dog"], max_length=30).ids.shape == (1, 4)


def test_lengths_are_rounded_up_within_the_limit(tokenizer):
    plain, padded = (tokenizer.encode(["a dog", "a"], 30, multiple) for multiple in (1, 8))
    assert padded.ids.shape == (2, 8)
    assert torch.equal(padded.ids[:, : plain.ids.shape[1]], plain.ids)
    assert (padded.ids[:, plain.ids.shape[1] :] == tokenizer.pad_id).all()
    assert torch.equal(padded.mask.sum(1), plain.mask.sum(1))
    assert tokenizer.encode(["a dog " * 9], 13, 8).ids.shape == (1, 13)
    assert tokenizer.encode_turns([["a dog", "a cat"]], 30, 8).ids.shape == (1, 8)


@pytest.mark.parametrize("text", ["a dog, a cat", "two red dogs next to a cat on the left, 7 cats", "t"])
def test_decode_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode([text]).ids[0]) == text
    assert tokenizer.decode(tokenizer.encode([text.upper()]).ids[0].tolist()) == text


@pytest.mark.parametrize(
    "text",
    [
        "一只狗。", "红色的球、在猫的左边\uff01", "ダンスをする三匹の犬が、がんばる。", "「犬」と猫", "赤いtシャツ",
        "빨간 강아지가 달린다", "แมวที่นั่ง", "café à la crème, süß", "iphone 手机",
    ],
)  # fmt: skip
def test_any_script_comes_back_as_it_is_written(text):
    """Chinese and Japanese without spaces, Korean and Latin with theirs, and with every accent."""
    tokenizer = Tokenizer.train([text] * 2, 400)
    with count_texts() as counts:
        ids = tokenizer.encode([text, unicodedata.normalize("NFD", text)], 100).ids
    assert [tokenizer.decode(row) for row in ids] == [text, text]
    assert counts.unknown == 0


def test_what_is_cut_or_unknown_is_counted(tokenizer):
    with count_texts() as counts:
        tokenizer.encode(["a dog", "a red dog next to 3 cats", "狗 dog"], max_length=6)
        tokenizer.encode_turns([["a dog", "a cat"], ["a dog next to 3 cats", "a cat"]], max_length=8)
    assert (counts.texts, len(counts.cut), counts.limit) == (5, 2, 8)
    assert counts.unknown == 1
    with count_texts() as counts:
        tokenizer.encode_turns([["狗", "猫"], ["狗"]], max_length=8)
    assert counts.unknown_share == 1, "what stands between turns is no token of a text"


def test_any_ascii_text_is_known(tokenizer):
    text = "zyx qwerty! #5 (jpg) ~ http://a.b/c?d=e 'x' \"y\" `z` $%^&*_+{}|<>[];\\ 0123456789"
    unknown = 1
    assert unknown not in tokenizer.encode([text], 500).ids
    assert unknown in tokenizer.encode(["漢"], 500).ids


def test_special_tokens_in_a_caption_are_text(tokenizer):
    ids = tokenizer.encode(["a [SEP] [DEC] dog [PAD]"]).ids[0, 1:-1].tolist()
    assert not {tokenizer.sep_id, tokenizer.dec_id, tokenizer.pad_id} & set(ids)


def test_half_a_character_is_text(tokenizer):
    """JSON escapes can make lone surrogates, which the library refuses."""
    texts = ["a \ud83d dog", "\udfff"]
    assert tokenizer.encode(texts).ids.shape[0] == 2
    assert tokenizer.encode_turns([texts], 30).ids.shape[0] == 1
    assert tokenizer.decode(tokenizer.prompt("a \ud83d dog")) == "a dog"


def test_training_is_deterministic_across_processes_and_orders(tmp_path, tokenizer):
    script = (
        "import sys; from openblip.data.tokenizer import Tokenizer; "
        "Tokenizer.train(open(sys.argv[1], encoding='utf-8').read().split('\\n'), 300).save(sys.argv[2]); "
        "assert 'torch' not in sys.modules"
    )
    (tmp_path / "captions").write_text("\n".join(CAPTIONS[::-1]), encoding="utf-8")
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "captions"), str(tmp_path / "other")], check=True)
    tokenizer.save(tmp_path / "own")
    assert (tmp_path / "own" / "tokenizer.json").read_bytes() == (tmp_path / "other" / "tokenizer.json").read_bytes()


def test_frequent_words_are_whole(tokenizer):
    assert tokenizer.encode(["red dog next cats left"]).ids.shape == (1, 7)


def test_save_and_load(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "t")
    texts = ["a red dog, 5 cats", "[ENC] strange words"]
    expected = tokenizer.encode(texts)
    loaded = Tokenizer.load(tmp_path / "t")
    assert torch.equal(loaded.encode(texts).ids, expected.ids)
    assert (loaded.dec_id, loaded.enc_id) == (tokenizer.dec_id, tokenizer.enc_id)
    (tmp_path / "t" / "tokenizer.json").unlink()
    from_vocab = Tokenizer.load(tmp_path / "t")
    assert torch.equal(from_vocab.encode(texts).ids, expected.ids)
    assert (from_vocab.vocab_size, from_vocab.enc_id) == (tokenizer.vocab_size, tokenizer.enc_id)


def test_loading_errors(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor vocab\.txt"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(CheckpointError, match="PAD"):
        Tokenizer.load(tmp_path)


def test_berts_vocabulary_gets_dec_and_enc_at_the_end():
    vocab = {"[PAD]": 0, **{f"[unused{i}]": i for i in range(1, 100)}, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102}
    vocab |= {"[MASK]": 103} | {f"word{i}": i for i in range(104, 30522)}
    wordpiece = WordPiece(models.WordPiece(vocab, unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer()
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.decoder = decoders.WordPiece()
    wordpiece.enable_padding()
    tokenizer = Tokenizer(wordpiece)
    assert (tokenizer.dec_id, tokenizer.enc_id, tokenizer.vocab_size) == (30522, 30523, 30524)
    assert (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id) == (0, 101, 102)
    assert wordpiece.get_vocab_size() == 30522  # the caller's is untouched
    assert wordpiece.padding is not None


def test_training_errors():
    with pytest.raises(ConfigError, match="no captions"):
        Tokenizer.train([], 300)
    with pytest.raises(ConfigError, match="too small"):
        Tokenizer.train(["a dog"], 20)


def test_every_turn_ends_with_a_separator(tokenizer):
    tokens = tokenizer.encode_turns([["is it red? yes", "no"], ["two"]], 30)
    words = [tokenizer.encode([text]).ids[0, 1:].tolist() for text in ("is it red? yes", "no", "two")]
    expected, short = [tokenizer.cls_id, *words[0], *words[1]], [tokenizer.cls_id, *words[2]]
    assert tokens.ids[0].tolist() == expected
    assert tokens.ids[0].tolist().count(tokenizer.sep_id) == 2
    assert tokens.ids[1, : len(short)].tolist() == short
    assert tokens.mask.sum(dim=1).tolist() == [len(expected), len(short)]
    assert (tokens.ids[~tokens.mask] == tokenizer.pad_id).all()


@pytest.mark.parametrize("max_length", [2, 3, 5, 9])
def test_a_dialog_that_is_too_long_loses_its_oldest_tokens(tokenizer, max_length):
    turns = ["is it red? yes", "how many dogs two", "one cat"]
    whole = tokenizer.encode_turns([turns], 100).ids[0].tolist()
    cut = tokenizer.encode_turns([turns], max_length)
    assert cut.ids[0].tolist() == [tokenizer.cls_id, *whole[-(max_length - 1) :]]
    assert cut.mask.all()
    assert cut.ids.dtype == torch.int64


def test_a_length_without_room_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="max_length 1"):
        tokenizer.encode_turns([["red"]], 1)
    assert tokenizer.encode_turns([[]], 5).ids.tolist() == [[tokenizer.cls_id]]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["tiny-bert", "someone/tiny-bert"])
def test_a_cached_model_loads_by_its_name(offline, tokenizer, name):
    model = offline / f"models--{name.replace('/', '--')}"
    tokenizer.save(model / "snapshots" / "0123abcd")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0123abcd")
    loaded = Tokenizer.load(name)
    assert torch.equal(loaded.encode(["a red cat"]).ids, tokenizer.encode(["a red cat"]).ids)


@pytest.mark.parametrize("name", ["bert-base-uncased", "someone/bert"])
def test_offline_says_so(offline, name):
    with pytest.raises(CheckpointError, match=f"{name} is no folder.*offline"):
        Tokenizer.load(name)


def test_a_missing_folder_is_not_looked_up(offline, tmp_path):
    with pytest.raises(CheckpointError, match="neither tokenizer"):
        Tokenizer.load(str(tmp_path / "nothing"))
