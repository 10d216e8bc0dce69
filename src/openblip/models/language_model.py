"""A frozen language model of transformers that reads soft visual prompts (BLIP-2 section 3.3, Figure 3).

Visual prompts stand before the text: in a decoder (OPT, GPT-2, Llama, ...) before its first token, in an
encoder-decoder (T5, BART, ...) before the encoder's. Padding is placed by this file and never by the
tokenizer's mutable `padding_side`: at the right in training, at the very left in generation.

R rows, Q visual prompts, T text tokens, S = Q + T, G sequences of I rows, Dl width of the language model, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openblip.errors import CheckpointError, ConfigError, MissingExtraError
from openblip.models.config import LoraSettings
from openblip.text_counts import count_text

IGNORED_LABEL = -100


class Predicted(NamedTuple):
    """Logits (R, T, V) of a language model over texts, and the labels (R, T) that they are compared with. IGNORED_LABEL
    marks what is not predicted: visual prompts, the text prompt and padding. Of sequences, (G, S, V) and (G, S).
    """

    logits: Tensor
    labels: Tensor


class LanguageModel(nn.Module, ABC):
    """A language model of transformers, or of peft around one, with its tokenizer.

    end_of_text: a text of one token that ends generated texts; None is the tokenizer's end token. Raises
    CheckpointError when it is not one token of this tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any, end_of_text: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.first_ids, self.last_ids = _added_ids(tokenizer)
        self.end_id = _end_id(tokenizer, end_of_text)
        self.pad_id: int = self.end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @property
    def hidden_dim(self) -> int:
        """Dl, the width of the word embeddings."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether an encoder reads the prompts."""
        return bool(self.model.config.is_encoder_decoder)

    def predict(
        self,
        visual: Tensor,
        prompts: Sequence[str],
        texts: Sequence[str],
        max_text_tokens: int | None,
        rows_per_sequence: int = 1,
    ) -> Predicted:
        """Predict each text after its visual prompts (R, Q, Dl) and its text prompt. Only the text and its end token
        are predicted. A text that is too long for `max_text_tokens`, prompt included, is cut before its end token,
        which always stays; None cuts nothing.

        rows_per_sequence: So many rows are read as one sequence, as in Flamingo (arXiv 2204.14198): a text also follows
        the visual prompts and texts of the rows before it. The last sequence may have fewer rows. Raises ConfigError
        when a sequence is longer than the model can read, or if an encoder reads the prompts.
        """
        rows = []
        for prompt, text in zip(prompts, texts, strict=True):
            whole = self._prompt_ids(prompt), self.text_ids(prompt, text)
            row = whole if max_text_tokens is None else self._cut(*whole, max_text_tokens)
            unknown = row[1].count(self.tokenizer.unk_token_id)
            is_cut, limit = row != whole, max_text_tokens or 0
            count_text(prompt + text, num_tokens=len(row[1]), num_unknown=unknown, is_cut=is_cut, limit=limit)
            rows.append(row)
        written = [[*text, self.end_id] for _, text in rows]
        return self._predict(visual, [prompt for prompt, _ in rows], written, rows_per_sequence)

    def predict_ids(self, visual: Tensor, prompts: Sequence[str], written: Sequence[Sequence[int]]) -> Predicted:
        """Predict token ids as `generate` writes them after the prompts, each row with its end token if it has one."""
        return self._predict(visual, [self._prompt_ids(prompt) for prompt in prompts], written, 1)

    def embed_example(self, prompt: str, text: str) -> Tensor:
        """The words of a prompt and the text that continues it as an example before other prompts, (T, Dl)."""
        ids = torch.tensor(self._example_ids(prompt, text), device=self.model.device)
        return cast(Tensor, self.model.get_input_embeddings()(ids))

    @abstractmethod
    def _example_ids(self, prompt: str, text: str) -> list[int]:
        """The token ids of a prompt with the text that continues it, as what another prompt follows."""

    @abstractmethod
    def text_ids(self, prompt: str, text: str) -> list[int]:
        """The token ids of a text that continues a prompt, without an end token."""

    @abstractmethod
    def _prompt_ids(self, prompt: str) -> list[int]:
        """The token ids of a prompt, with the special tokens around it."""

    @abstractmethod
    def _cut(self, prompt: list[int], text: list[int], max_text_tokens: int) -> tuple[list[int], list[int]]:
        """As much of a prompt and the text after it as `predict` takes."""

    @abstractmethod
    def _predict(
        self, visual: Tensor, prompts: list[list[int]], written: Sequence[Sequence[int]], rows_per_sequence: int
    ) -> Predicted:
        """Predict the token ids of each row in `written` after its prompt."""

    def generation_inputs(self, visual: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The inputs of transformers' `generate`: inputs_embeds (R, S, Dl) and attention_mask (R, S)."""
        *_, inputs, mask = self._embed(visual, [self._prompt_ids(prompt) for prompt in prompts])
        return {"inputs_embeds": inputs, "attention_mask": mask}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens and outer spaces."""
        return cast(str, self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _token_ids(self, text: str) -> list[int]:
        """Token ids of a text, without the special tokens that the tokenizer adds before and after it."""
        return cast(list[int], self.tokenizer(text, add_special_tokens=False).input_ids)

    def _embed(self, visual: Tensor, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids (R, T) padded at the right and their mask (R, T); then visual prompts and words as the model takes them:
        embeddings (R, S, Dl) and their mask (R, S), int64.
        """
        ids, mask = padded_right(rows, self.pad_id, visual.device)
        words = self.model.get_input_embeddings()(ids)
        inputs = torch.cat([visual.to(words.dtype), words], dim=1)
        return ids, mask, inputs, torch.cat([mask.new_ones(visual.shape[:2]), mask], dim=1).long()


class CausalLanguageModel(LanguageModel):
    """A decoder: visual prompts, its first token, the prompt and the text (BLIP-2 Figure 3, top)."""

    def text_ids(self, prompt: str, text: str) -> list[int]:
        """Prompt and text are tokenised together, because in many tokenizers the space between them is part of the
        text's first token. Where that would change the prompt's tokens (two line breaks are one token, unless a word
        follows), the text is tokenised alone.
        """
        if not text:
            return []
        before, prompt = self._prompt_ids(prompt), prompt.rstrip(" ")
        space = " " if prompt and not prompt[-1].isspace() else ""
        whole = [*self.first_ids, *self._token_ids(f"{prompt}{space}{text}")]
        return whole[len(before) :] if whole[: len(before)] == before else self._token_ids(text)

    def _example_ids(self, prompt: str, text: str) -> list[int]:
        """With the end of the text, so that the model sees where an answer ends."""
        return [*self._prompt_ids(prompt), *self.text_ids(prompt, text), self.end_id]

    def _prompt_ids(self, prompt: str) -> list[int]:
        """The tokenizer's first token and the prompt, whose last space belongs to the text."""
        return [*self.first_ids, *self._token_ids(prompt.rstrip(" "))]

    def _cut(self, prompt: list[int], text: list[int], max_text_tokens: int) -> tuple[list[int], list[int]]:
        row = [*prompt, *text][: max_text_tokens - 1]
        return row[: len(prompt)], row[len(prompt) :]

    def _predict(
        self, visual: Tensor, prompts: list[list[int]], written: Sequence[Sequence[int]], rows_per_sequence: int
    ) -> Predicted:
        rows = [[*prompt, *ids] for prompt, ids in zip(prompts, written, strict=True)]
        ids, mask, inputs, input_mask = self._embed(visual, rows)
        starts = torch.tensor([len(prompt) for prompt in prompts], device=ids.device)
        predicted = mask & (torch.arange(ids.shape[1], device=ids.device) >= starts[:, None])
        labels = ids.masked_fill(~predicted, IGNORED_LABEL)
        labels = F.pad(labels, (visual.shape[1], 0), value=IGNORED_LABEL)  # (R, S)
        if rows_per_sequence > 1:
            inputs, input_mask, labels = self._join(inputs, input_mask, labels, rows_per_sequence)
        logits = self.model(inputs_embeds=inputs, attention_mask=input_mask, use_cache=False).logits
        first = max(visual.shape[1], 1)  # each token is predicted by the one before it
        return Predicted(logits[:, first - 1 : -1], labels[:, first:])

    def _join(self, inputs: Tensor, mask: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (R, S, Dl), mask and labels (R, S) of rows -> those of sequences of `count` rows, padded at the
        right.
        """
        inputs, mask, labels = (sequences_of(each, count).flatten(1, 2) for each in (inputs, mask, labels))
        longest, most = int(mask.sum(dim=1).max()), getattr(self.model.config, "max_position_embeddings", None)
        if most is not None and longest > most:
            raise ConfigError(
                f"{count} images with their texts are {longest} tokens, and the language model reads {most} at most: "
                "put fewer in a sequence (--task.images-per-sequence)."
            )
        order = mask.argsort(dim=1, descending=True, stable=True)[:, :longest]  # padding behind the rest
        inputs = inputs.gather(1, order[..., None].expand(-1, -1, inputs.shape[2]))
        mask = mask.gather(1, order)
        return inputs, mask, labels.gather(1, order).masked_fill(mask == 0, IGNORED_LABEL)

    def generation_inputs(self, visual: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        inputs, mask = super().generation_inputs(visual, prompts).values()
        order = mask.argsort(dim=1, stable=True)  # padding to the very left, the rest in its order
        return {
            "inputs_embeds": inputs.gather(1, order[..., None].expand_as(inputs)),
            "attention_mask": mask.gather(1, order),
        }


class Seq2SeqLanguageModel(LanguageModel):
    """An encoder-decoder: the encoder reads visual prompts and prompt, the decoder writes the text."""

    def text_ids(self, prompt: str, text: str) -> list[int]:
        return [*self.first_ids, *self._token_ids(text)]

    def _example_ids(self, prompt: str, text: str) -> list[int]:
        """Both stand before the encoder, so they are one text."""
        return self._prompt_ids(f"{prompt.rstrip(' ')} {text}")

    def _prompt_ids(self, prompt: str) -> list[int]:
        return [*self.first_ids, *self._token_ids(prompt), *self.last_ids]

    def _cut(self, prompt: list[int], text: list[int], max_text_tokens: int) -> tuple[list[int], list[int]]:
        num_last = len(self.last_ids)
        body = prompt[: len(prompt) - num_last][: max_text_tokens - num_last]
        return [*body, *self.last_ids], text[: max_text_tokens - 1]

    def _predict(
        self, visual: Tensor, prompts: list[list[int]], written: Sequence[Sequence[int]], rows_per_sequence: int
    ) -> Predicted:
        if rows_per_sequence > 1:
            raise ConfigError(
                "Only a decoder reads several images and texts as one sequence, and this language model has an "
                "encoder: leave out --task.images-per-sequence."
            )
        *_, inputs, input_mask = self._embed(visual, prompts)
        ids, mask = padded_right(written, self.pad_id, visual.device)
        labels = ids.masked_fill(~mask, IGNORED_LABEL)  # the model shifts them itself
        logits = self.model(inputs_embeds=inputs, attention_mask=input_mask, labels=labels, use_cache=False).logits
        return Predicted(logits, labels)


def wrap_language_model(model: Any, tokenizer: Any, end_of_text: str | None = None) -> LanguageModel:
    """Wrap a model of transformers as a decoder or an encoder-decoder, whichever it is."""
    wrapper = Seq2SeqLanguageModel if model.config.is_encoder_decoder else CausalLanguageModel
    return wrapper(model, tokenizer, end_of_text)


def padded_right(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids of different lengths -> int64 (R, T) and their mask, bool (R, T), True at real tokens."""
    longest = max((len(row) for row in rows), default=0)
    ids = torch.tensor(
        [[*row, *[pad_id] * (longest - len(row))] for row in rows], dtype=torch.long, device=device
    ).view(len(rows), longest)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(longest, device=device) < lengths[:, None]


def sequences_of(rows: Tensor, count: int) -> Tensor:
    """(R, ...) -> (G, I, ...): `count` rows after one another make a sequence; missing ones of the last are zeros."""
    missing = -len(rows) % count
    whole = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
    return whole.view(-1, count, *rows.shape[1:])


def _added_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer adds before and after every text."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    first = next(i for i in range(len(whole) + 1) if whole[i : i + len(plain)] == plain)
    return whole[:first], whole[first + len(plain) :]


def _end_id(tokenizer: Any, end_of_text: str | None) -> int:
    if end_of_text is None:
        if tokenizer.eos_token_id is None:
            raise CheckpointError("The language model's tokenizer has no end token: name an end_of_text.")
        return int(tokenizer.eos_token_id)
    ids = tokenizer(end_of_text, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise CheckpointError(
            f"end_of_text {end_of_text!r} is {len(ids)} tokens of the language model; it must be one."
        )
    return int(ids[0])


def with_lora(language: LanguageModel, settings: LoraSettings) -> LanguageModel:
    """Add LoRA adapters, through peft; they start at zero, so outputs do not change yet. `Blip2.freeze("language")`
    leaves the adapters trainable, and nothing else of the language model.

    Raises ConfigError when the model has adapters already, or no layers of the given names; MissingExtraError without
    peft.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError('LoRA needs peft: pip install "openblip[language]"') from error
    if settings.rank is None:
        raise ConfigError("LoRA adapters need a rank: say it with --lora.rank.")
    if has_lora(language):
        raise ConfigError("The language model has LoRA adapters already: leave out the new ones.")
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets) if settings.targets else None,
    )
    try:
        language.model = peft.get_peft_model(language.model, config)
    except ValueError as error:
        raise ConfigError(f"LoRA cannot be added to this language model: {error}") from error
    return language


def has_lora(language: LanguageModel) -> bool:
    """Whether a language model has LoRA adapters."""
    return hasattr(language.model, "peft_config")


def train_adapters(module: nn.Module, mode: bool) -> None:
    """Turn the dropout of adapters on or off, whatever the mode of the frozen model around them."""
    for name, part in module.named_modules():
        if name.endswith(".lora_dropout"):
            part.train(mode)
