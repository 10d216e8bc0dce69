"""Captions to token ids and back: lower-case WordPiece as bert-base-uncased, with BLIP's [DEC] and [ENC].

Shapes: B batch, T text tokens.
"""

import json
import os
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# Set before the first use: the library warns in every forked loader worker otherwise.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers
from tokenizers import Tokenizer as WordPiece

from openblip.data.sample import clean_text
from openblip.errors import CheckpointError, ConfigError, OpenBlipError, hub_problem
from openblip.files import damage, read_json
from openblip.text_counts import count_text

if TYPE_CHECKING:  # torch takes longer to import than everything here together
    import torch

BATCH_LENGTH_STEP = 8  # texts of a training batch are padded to a multiple of it, so that a GPU meets few shapes
_FIRST = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LAST = ("[DEC]", "[ENC]")
IMAGE_TOKEN = "<image>"  # stands in transformers' BLIP-2 for a visual prompt
_SPECIAL = {*_FIRST, *_LAST, IMAGE_TOKEN}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # a model, or owner/model
# Characters that are written without spaces between them: CJK radicals, punctuation, kana and ideographs, and forms of
# full and half width, but not Hangul.
_UNSPACED = (
    r"[\u2e80-\u312f\u31a0-\u4dbf\u4e00-\u9fff\uf900-\ufaff\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uff9f\uffe0-\uffef"
    r"\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)
_SPACE_BETWEEN_UNSPACED = re.compile(f"(?<={_UNSPACED}) (?={_UNSPACED})")


@dataclass(frozen=True, slots=True)
class Tokens:
    """`ids` int64 (B, T) padded at the end; `mask` bool (B, T), True at real tokens."""

    ids: "torch.Tensor"
    mask: "torch.Tensor"

    def to(self, device: "torch.device | str", non_blocking: bool = True) -> "Tokens":
        return Tokens(self.ids.to(device, non_blocking=non_blocking), self.mask.to(device, non_blocking=non_blocking))

    def part(self, rows: "torch.Tensor") -> "Tokens":
        """Some of the rows, int64 on the same device, padded to the longest of them."""
        mask = self.mask[rows]
        longest = int(mask.sum(dim=1).max())
        return Tokens(self.ids[rows, :longest], mask[:, :longest])

    def pin_memory(self) -> "Tokens":
        return Tokens(self.ids.pin_memory(), self.mask.pin_memory())


class Tokenizer:
    """WordPiece with the special tokens of BLIP. Wraps a tokenizer of the `tokenizers` library that has [PAD], [UNK],
    [CLS] and [SEP]; raises `CheckpointError` when one is missing. [DEC] and [ENC] are added at the end where they are
    missing, which gives 30522 and 30523 with BERT's vocabulary. Special tokens written out in a caption are plain text,
    and those that someone added to the vocabulary of a model are words.
    """

    def __init__(self, wordpiece: WordPiece) -> None:
        content = wordpiece.to_str()
        if any(t.special and t.content not in _SPECIAL for t in wordpiece.get_added_tokens_decoder().values()):
            parsed = json.loads(content)
            for token in parsed["added_tokens"]:
                token["special"] &= token["content"] in _SPECIAL
            content = json.dumps(parsed)
        self._wordpiece = WordPiece.from_str(content)  # the caller's stays as it is
        self._wordpiece.no_padding()
        self._wordpiece.no_truncation()
        self._wordpiece.post_processor = None  # special tokens are put around texts here
        missing = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if wordpiece.token_to_id(token) is None]
        if missing:
            raise CheckpointError(f"the tokenizer has no {', '.join(missing)}: not a BERT-like vocabulary")
        self._wordpiece.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in _LAST])
        self._wordpiece.encode_special_tokens = True
        self.pad_id, self.unknown_id, self.cls_id, self.sep_id, self.dec_id, self.enc_id = (
            self._wordpiece.token_to_id(token) or 0  # never None: they were checked or added above
            for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *_LAST)
        )
        self.mask_id: int | None = self._wordpiece.token_to_id("[MASK]")  # None where the vocabulary has none

    @property
    def vocab_size(self) -> int:
        return int(self._wordpiece.get_vocab_size(with_added_tokens=True))

    @property
    def entries(self) -> dict[str, int]:
        """The id of every entry, added ones included."""
        return dict(self._wordpiece.get_vocab(with_added_tokens=True))

    @property
    def num_words(self) -> int:
        """Number of entries without added ones: all that a text without [DEC] and [ENC] needs."""
        return int(self._wordpiece.get_vocab_size(with_added_tokens=False))

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int = 2000) -> "Tokenizer":
        """A vocabulary of at most `vocab_size` for these captions; equal captions give equal vocabularies. Every ASCII
        letter, digit and punctuation mark is in it, so no ASCII text is unknown. Raises `ConfigError` when there is no
        text or `vocab_size` cannot hold the characters.
        """
        wordpiece = _bert_wordpiece([], keeps_accents=True)
        counts = Counter(
            word
            for caption in captions
            for word, _ in wordpiece.pre_tokenizer.pre_tokenize_str(wordpiece.normalizer.normalize_str(caption))
        )
        if not counts:
            raise ConfigError("no captions to train a vocabulary on")
        starts, continuations = _alphabet(counts, vocab_size)
        fixed = [*_FIRST, *starts, *(f"##{c}" for c in continuations)]
        if len(fixed) + len(_LAST) > vocab_size:
            raise ConfigError(f"vocab_size {vocab_size} is too small: characters alone need {len(fixed) + len(_LAST)}")
        trainer = tokenizers.trainers.WordPieceTrainer(
            vocab_size=vocab_size - len(_LAST),
            min_frequency=2,
            # Characters are fixed entries in our order: the library would number them in the order of a randomised
            # hash map, and it breaks ties between merges by number.
            special_tokens=fixed,
            initial_alphabet=list(starts),
            limit_alphabet=len(starts),
            show_progress=False,
        )
        # Each word is repeated as often as it occurs; they are sorted, so that the order of captions has no influence.
        wordpiece.train_from_iterator((" ".join([w] * n) for w, n in sorted(counts.items())), trainer)
        learned = wordpiece.get_vocab(with_added_tokens=False)
        merges = sorted(learned.keys() - set(fixed), key=learned.__getitem__)
        return cls(_bert_wordpiece([*fixed, *merges], keeps_accents=True))

    @classmethod
    def load(cls, source: str | Path) -> "Tokenizer":
        """Read a folder's tokenizer.json, or else its vocab.txt; or the tokenizer of a model on the Hugging Face
        hub, such as "bert-base-uncased". Raises `CheckpointError`.
        """
        folder = Path(source)
        if not folder.is_dir() and _HUB_NAME.fullmatch(str(source)):
            from huggingface_hub import hf_hub_download  # takes a while to import, and few tokenizers come from there

            try:
                folder = Path(hf_hub_download(str(source), "tokenizer.json")).parent
            except (OSError, ValueError) as error:  # offline, no such model or file, or not a model's name
                reason = str(error).strip().split("\n")[0]
                reason = hub_problem(error) or f"gives no tokenizer.json ({type(error).__name__}: {reason})"
                raise CheckpointError(
                    f"{source} is no folder, and the Hugging Face hub {reason}; name a folder"
                ) from error
        path, vocab = folder / "tokenizer.json", folder / "vocab.txt"
        try:
            if (problem := damage(path if path.is_file() else vocab)) is not None:
                raise CheckpointError(f"the file {problem}")
            if path.is_file():
                return cls.from_json(path.read_text(encoding="utf-8"))
            wordpiece = _bert_wordpiece(vocab.read_text(encoding="utf-8").splitlines())
            if (folder / "added_tokens.json").is_file():  # transformers' slow tokenizers keep what was added apart
                added = read_json(folder / "added_tokens.json")
                wordpiece.add_tokens(sorted(added, key=lambda token: int(added[token])))
            return cls(wordpiece)
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder}: neither tokenizer.json nor vocab.txt") from error
        except (OpenBlipError, OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path if path.is_file() else vocab}: {error}") from error

    @classmethod
    def from_json(cls, content: str) -> "Tokenizer":
        """From the content of a tokenizer.json. Raises `CheckpointError`."""
        try:
            wordpiece = WordPiece.from_str(content)
        except Exception as error:  # the library raises plain Exception for damaged content
            raise CheckpointError(f"the tokenizer cannot be read: {error}") from error
        return cls(wordpiece)

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        return str(self._wordpiece.to_str())

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and, for people to read, vocab.txt."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._wordpiece.save(str(folder / "tokenizer.json"))
        vocab = self._wordpiece.get_vocab(with_added_tokens=True)
        lines = sorted(vocab, key=vocab.__getitem__)
        (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def encode(self, texts: Sequence[str], max_length: int = 30, pad_to_multiple_of: int = 1) -> Tokens:
        """[CLS] words [SEP] of B texts; truncation to `max_length` tokens keeps [SEP]. They are padded to the longest
        text, rounded up to a multiple of `pad_to_multiple_of` within `max_length`. The released code always pads to
        `max_length`; with the mask the result is the same and the work less. What is cut is counted (`text_counts`).
        """
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts, not one string")
        rows = []
        for text in texts:
            ids = self._words(text)
            self._count(text, ids, ids[: max_length - 2], max_length)
            rows.append([self.cls_id, *ids[: max_length - 2], self.sep_id])
        return self._padded(rows, max_length, pad_to_multiple_of)

    def encode_turns(self, dialogs: Sequence[Sequence[str]], max_length: int, pad_to_multiple_of: int = 1) -> Tokens:
        """[CLS] turn [SEP] turn [SEP] ... of B dialogs, padded as by `encode`. A dialog of more than `max_length`
        tokens loses its oldest ones.
        """
        rows = []
        for turns in dialogs:
            ids = [index for turn in turns for index in (*self._words(turn), self.sep_id)]
            rows.append([self.cls_id, *ids[-(max_length - 1) :]])
            self._count(" ".join(turns), ids, rows[-1][1:], max_length)
        return self._padded(rows, max_length, pad_to_multiple_of)

    def _count(self, text: str, ids: Sequence[int], kept: Sequence[int], limit: int) -> None:
        num_tokens = len(kept) - kept.count(self.sep_id)  # between the turns of a dialog
        unknown = kept.count(self.unknown_id)
        count_text(text, num_tokens=num_tokens, num_unknown=unknown, is_cut=len(kept) < len(ids), limit=limit)

    def _words(self, text: str) -> list[int]:
        # The library refuses lone surrogates, which json escapes can make.
        return list(self._wordpiece.encode(clean_text(text), add_special_tokens=False).ids)

    def _padded(self, rows: Sequence[Sequence[int]], max_length: int, multiple: int) -> Tokens:
        import torch

        if max_length < 2:
            raise ConfigError(f"max_length {max_length}: [CLS] and [SEP] alone need 2")
        longest = max((len(row) for row in rows), default=0)
        width = max(longest, min(-(-longest // multiple) * multiple, max_length))
        ids = torch.tensor([[*row, *[self.pad_id] * (width - len(row))] for row in rows], dtype=torch.long)
        lengths = torch.tensor([len(row) for row in rows])
        return Tokens(ids.view(len(rows), width), torch.arange(width) < lengths[:, None])  # (B, T)

    def prompt(self, text: str) -> "torch.Tensor":
        """[DEC] and the words of `text` without [SEP], int64 (P,): the beginning of a caption."""
        import torch

        ids = self._words(text)
        self._count(text, ids, ids, len(ids))
        return torch.tensor([self.dec_id, *ids])

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The entries of the vocabulary with these ids; [UNK] for one that it does not have."""
        return [self._wordpiece.id_to_token(index) or "[UNK]" for index in ids]

    def decode(self, ids: "Sequence[int] | torch.Tensor") -> str:
        """The text of one row of ids without special tokens, spaced as people write: "a dog, a cat", "一只狗。"."""
        row = list(ids) if isinstance(ids, Sequence) else ids.tolist()
        text = unicodedata.normalize("NFC", self._wordpiece.decode(row, skip_special_tokens=True))
        return _SPACE_BETWEEN_UNSPACED.sub("", text).strip()


def _bert_wordpiece(vocab: Sequence[str], *, keeps_accents: bool = False) -> WordPiece:
    """A tokenizer with the rules of bert-base-uncased. It drops accents, and with them the marks of kana and Thai
    vowels, unless it `keeps_accents`.
    """
    ids = {token: index for index, token in enumerate(vocab)}
    wordpiece = WordPiece(tokenizers.models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    bert = tokenizers.normalizers.BertNormalizer(lowercase=True, strip_accents=False if keeps_accents else None)
    composed = tokenizers.normalizers.Sequence([tokenizers.normalizers.NFC(), bert])
    wordpiece.normalizer = composed if keeps_accents else bert
    wordpiece.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    wordpiece.decoder = tokenizers.decoders.WordPiece(prefix="##", cleanup=True)
    wordpiece.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in _FIRST if t in ids])
    return wordpiece


def _alphabet(counts: Counter[str], vocab_size: int) -> tuple[list[str], list[str]]:
    """The characters that begin words, and those that continue them: those of ASCII and the most frequent others.
    Others take at most a quarter of the vocabulary, so that a few captions in another script do not fill it.
    """
    alphanumeric = set(string.ascii_lowercase + string.digits)
    others: Counter[str] = Counter()
    for word, count in counts.items():
        for character in word:
            if not character.isascii():
                others[character] += count
    kept = {c for c, _ in sorted(others.items(), key=lambda item: (-item[1], item[0]))[: vocab_size // 8]}
    return sorted(alphanumeric | set(string.punctuation) | kept), sorted(alphanumeric | kept)
