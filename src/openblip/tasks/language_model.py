"""Tasks whose texts a language model of transformers writes.

With BLIP-2, after visual prompts: stage 2 and captioning (BLIP-2 sections 3.3 and 4.2), questions (section 4.3),
instructions (InstructBLIP section 2.2). Where the model is instructed, the Q-Former reads the question as well, so that
its queries extract what the question asks about. And on text alone, for a language model that BLIP-2 then freezes.

B images, R rows of text, G rows of all processes, Q queries, T text tokens, D width of the Q-Former, Dl of the language
model, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from openblip.data import texts as data_texts
from openblip.data.batch import Batch, Example, PixelReader, SampleProcessor, View, pixel_reader, shared_fields
from openblip.data.config import DataConfig
from openblip.data.sample import Sample
from openblip.data.tokenizer import BATCH_LENGTH_STEP, Tokenizer, Tokens
from openblip.distributed import local_rows, world_size
from openblip.models.language_model import LanguageModel, Predicted
from openblip.objectives import answer_loss, lm_loss
from openblip.tasks.base import Blip2Task, Task
from openblip.tasks.config import Blip2Stage2Config, LanguagePretrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptedBatch(Batch):
    """R texts after prompts, several about one of B images. The language model has a tokenizer of its own, and reads
    texts as they are written.
    """

    prompts: list[str]
    """Read by the language model before the texts, and not predicted; "" for none."""
    texts: list[str]
    owners: torch.Tensor
    """int64 (R,), ascending: the image that each text is about."""
    weights: torch.Tensor
    """float32 (R,)."""
    instructions: Tokens | None = None
    """What the Q-Former reads beside its queries, (R, T): [CLS] ... [SEP]; None where it reads nothing."""

    @property
    def shape(self) -> tuple[Any, ...]:
        """Nearly so: the number of tokens follows from the number of characters, here in steps of 64."""
        characters = sum(map(len, self.prompts)) + sum(map(len, self.texts))
        return (*super(PromptedBatch, self).shape, characters // 64)


class PromptedText(NamedTuple):
    """A text to be written, with what the language model (`prompt`) and the Q-Former (`instruction`) read."""

    text: str
    prompt: str = ""
    instruction: str = ""
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PromptedProcessor(SampleProcessor):
    """The base of the tasks' processors: the content of an example is a list of `PromptedText`."""

    instruction_tokens: int | None = None
    """Number of tokens of an instruction that the Q-Former reads at most; None: it reads none."""

    def collate(self, examples: Sequence[Example], tokenizer: Tokenizer | None) -> PromptedBatch:
        rows: list[PromptedText] = [row for example in examples for row in example.content]
        instructions = None
        if self.instruction_tokens is not None:
            assert tokenizer is not None  # a Q-Former that reads instructions has one
            instructions = tokenizer.encode(
                [row.instruction for row in rows], self.instruction_tokens, BATCH_LENGTH_STEP
            )
        return PromptedBatch(
            **shared_fields(examples),
            prompts=[row.prompt for row in rows],
            texts=[row.text for row in rows],
            owners=torch.tensor([i for i, example in enumerate(examples) for _ in example.content]),
            weights=torch.tensor([row.weight for row in rows]),
            instructions=instructions,
        )


class PromptedTask(Blip2Task):
    """The loss of texts that the language model of a BLIP-2 writes after visual prompts and text prompts."""

    trained_heads = ("llm",)
    needs_autocast = True
    vocabulary_option = "--language.source"
    text_limit = "--max-text-tokens; of what the Q-Former reads, --data.max-text-length"

    def predict(self, batch: PromptedBatch, images_per_sequence: int = 1) -> Predicted:
        """Logits (R, T, V) and labels (R, T) of a batch's texts; each image is encoded once. With `images_per_sequence`
        a text follows other images and texts of the batch, as in `Blip2.predict_text`.
        """
        features = self.encode(batch.pixels)
        if batch.instructions is None:
            visual = self.model.visual_prompts(self.model.encode_visual(features))  # (B, Q, Dl)
            return self.model.predict_text(visual[batch.owners], batch.prompts, batch.texts, images_per_sequence)
        ids, mask = batch.instructions.ids, batch.instructions.mask
        image_kv = self.model.image_kv(features).select(batch.owners)
        queries = self.model.encode_multimodal(ids, mask, image_kv)  # (R, Q, D)
        visual = self.model.visual_prompts(queries)
        return self.model.predict_text(visual, batch.prompts, batch.texts, images_per_sequence)

    def forward(self, batch: PromptedBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss lm: cross-entropy of the texts after their prompts, the mean over tokens."""
        return {"lm": lm_loss(*self.predict(batch))}


@dataclass(frozen=True, kw_only=True)
class PromptedCaptionProcessor(PromptedProcessor):
    """An image or video with one of its captions, drawn at random, after a prompt that all have in common."""

    prompt: str = ""

    def content(self, sample: Sample, rng: np.random.Generator) -> list[PromptedText]:
        return [PromptedText(data_texts.draw_caption(sample, rng, data_texts.plain_text), self.prompt)]


class Blip2Stage2(PromptedTask):
    """Captions; with a prompt before every caption, this is fine-tuning for captioning."""

    @classmethod
    def sample_processor(cls, config: Blip2Stage2Config, data: DataConfig, question_prompt: str) -> SampleProcessor:
        return PromptedCaptionProcessor(read_pixels=pixel_reader(data.num_frames), prompt=config.prompt)

    def forward(self, batch: PromptedBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss lm. Without a prompt, the encoder of an encoder-decoder reads the beginning of each text, cut off at
        random, and the decoder writes the rest.
        """
        if self.model.require_language().is_encoder_decoder and not any(batch.prompts):
            prompts, rests = split_texts(batch.texts, split_at_random, 1, generator)
            batch = replace(batch, prompts=prompts, texts=rests)
        most = self.config.images_per_sequence
        count = int(torch.randint(1, most + 1, (), generator=generator))  # the same in all processes
        return {"lm": lm_loss(*self.predict(batch, count))}


@dataclass(frozen=True, kw_only=True)
class PromptedQuestionProcessor(PromptedProcessor):
    """A question with its distinct answers, each weighted by the share of annotators who gave it."""

    question_prompt: str
    """How a question or instruction is put to the language model, with `{}` in its place."""

    def content(self, sample: Sample, rng: np.random.Generator) -> list[PromptedText]:
        question, answers = data_texts.question_with_answers(sample, data_texts.plain_text)
        prompt = data_texts.conversation_prompt(self.question_prompt, (), question)
        instruction = data_texts.normalize_question(question)  # as the paper's Q-Former reads it
        return [PromptedText(answer, prompt, instruction, weight) for answer, weight in answers]


@dataclass(frozen=True, kw_only=True)
class InstructionProcessor(PromptedQuestionProcessor):
    """Every turn of a conversation about an image: its answer, after everything that was said before. The Q-Former
    reads the turn's own instruction, the language model also the turns before it. A sample that has only a question is
    one turn, with one of its annotators' answers, drawn at random.
    """

    def content(self, sample: Sample, rng: np.random.Generator) -> list[PromptedText]:
        turns, rows = data_texts.draw_turns(sample, rng), []
        for number, (question, answer) in enumerate(turns):
            prompt = data_texts.conversation_prompt(self.question_prompt, turns[:number], question)
            rows.append(PromptedText(answer, prompt, question))
        return rows


class InstructionFollowing(PromptedTask):
    """Conversations, in which every token of every answer counts alike."""

    processor_class: ClassVar[type[PromptedQuestionProcessor]] = InstructionProcessor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.model.config.instructed and set(self.model.config.heads) == {"llm"}:
            # Nothing reads the states of the instruction after the last layer, so these get no gradient.
            self.model.qformer.layers[-1].text_feed_forward.requires_grad_(False)

    @classmethod
    def sample_processor(cls, config: Any, data: DataConfig, question_prompt: str) -> SampleProcessor:
        return cls.processor_class(
            read_pixels=pixel_reader(data.num_frames),
            question_prompt=question_prompt,
            instruction_tokens=data.max_text_length if config.instructed else None,
        )


class PromptedAnswering(InstructionFollowing):
    """Questions with all their answers, each of which counts by its weight."""

    processor_class = PromptedQuestionProcessor

    def forward(self, batch: PromptedBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss vqa, the same as BLIP's: the BLIP-2 paper does not define one."""
        return {"vqa": answer_loss(*self.predict(batch), batch.weights, len(batch))}


# --- Text alone


def no_pixels(sample: Sample, view: View, rng: np.random.Generator) -> np.ndarray:
    """The empty array that stands for the image of a text; no image is decoded."""
    return np.empty(0, np.uint8)


@dataclass(frozen=True, kw_only=True)
class TextProcessor(PromptedProcessor):
    """The field `text`, unchanged and with its line breaks, without the sample's image."""

    read_pixels: PixelReader = no_pixels

    def content(self, sample: Sample, rng: np.random.Generator) -> list[PromptedText]:
        return [PromptedText(data_texts.text_field(sample, "text"))]


class LanguagePretraining(Task):
    """A language model and its loss: over all tokens, or with an encoder over those that follow a prefix."""

    config: LanguagePretrainingConfig
    model: LanguageModel
    needs_autocast = True
    text_limit = "--task.max-text-tokens"

    @classmethod
    def sample_processor(cls, config: Any, data: DataConfig, question_prompt: str) -> SampleProcessor:
        return TextProcessor()

    def forward(self, batch: PromptedBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss lm: cross-entropy, the mean over tokens."""
        prompts, texts = batch.prompts, batch.texts
        if self.model.is_encoder_decoder:
            prompts, texts = split_texts(texts, split_document, 3, generator)
        visual = no_visual(self.model, len(texts))
        return {"lm": lm_loss(*self.model.predict(visual, prompts, texts, self.config.max_text_tokens))}


def no_visual(language: LanguageModel, num_rows: int) -> Tensor:
    """The visual prompts (R, 0, Dl) of texts without images."""
    words: Tensor = language.model.get_input_embeddings().weight
    return words.new_zeros(num_rows, 0, language.hidden_dim)


# --- Texts cut in two for prefix language modelling: an encoder reads the prefix, a decoder writes the rest
#
# BLIP-2 section 3.3. The paper does not say where a text is cut; here it is cut as its author describes in LAVIS issue
# 139. All shares are uniform from 0 to 1.


def split_texts(
    texts: Sequence[str], split: Callable[..., tuple[str, str]], num_shares: int, generator: torch.Generator
) -> tuple[list[str], list[str]]:
    """The prefixes and the rests of this process's texts, cut by `split`, which takes a text and `num_shares` shares.

    Every process draws the shares of all G texts alike. So several processes cut as one process would, whatever the
    lengths of their texts.
    """
    joint = torch.rand(len(texts) * world_size(), num_shares, generator=generator, dtype=torch.float64)
    shares = local_rows(joint, len(texts)).tolist()
    pairs = [split(text, *own) for text, own in zip(texts, shares, strict=True)]
    return [prefix for prefix, _ in pairs], [rest for _, rest in pairs]


def split_at_random(text: str, share: float) -> tuple[str, str]:
    """The first words of a text, and the rest, without the space between them. The number of first words is uniform
    from 1 to half of all. A text of one word has an empty prefix.
    """
    words = text.split(" ")
    if len(words) < 2:
        return "", text
    cut = 1 + int(share * (len(words) // 2))
    return " ".join(words[:cut]), " ".join(words[cut:])


def split_document(text: str, line_share: float, cut_share: float, word_share: float) -> tuple[str, str]:
    """A text of several lines: one line after the first is cut, and the lines after it are left out.

    The prefix holds all lines before the cut. In a random half of the cases the line is cut at a natural place: after
    its last colon, where an answer begins, and without a colon before the line; otherwise at random. A text of one line
    is cut at random.
    """
    lines = text.split("\n")
    if len(lines) == 1:
        return split_at_random(text, word_share)
    number = 1 + int(line_share * (len(lines) - 1))
    line = lines[number]
    if cut_share < 0.5:
        question, colon, answer = line.rpartition(": ")
        prefix, rest = question + colon.strip(), answer
    else:
        prefix, rest = split_at_random(line, word_share)
    return "\n".join([*lines[:number], prefix]), rest
