"""The settings of each training task. No torch here: `--help` reads them."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from openblip.errors import Condition, ConfigError

Objective = Literal["itc", "itm", "lm", "mlm"]
Negatives = Literal["hard", "random"]


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """ITC against a queue; a momentum model gives soft targets to it and to MLM (BLIP section 3.2, appendix; ALBEF)."""

    queue_size: int = 57600
    """Number of image and text embeddings of earlier steps that serve as further keys."""
    momentum: float = 0.995
    """Share of the momentum model's weights that stays at a step; the rest comes from the trained model."""
    alpha: float = 0.4
    """Weight of the momentum model's soft targets."""
    alpha_ramp_steps: int = 0
    """Number of steps over which alpha rises from 0."""


@dataclass(frozen=True, kw_only=True)
class InBatchConfig:
    """ITC among the pairs of a batch, without a momentum model and a queue (CLIP; BLIP-2 section 3.2)."""

    label_smoothing: float = 0.0
    """Share of the target that is spread over all pairs of the batch."""


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """ITC + ITM + LM, unweighted (BLIP section 3.2), or some of them."""

    objectives: tuple[Objective, ...] = ("itc", "itm", "lm")
    """The losses that are added up, which are also the model's heads. mlm: masked words (ALBEF section 3.2)."""
    contrastive: ContrastiveConfig | InBatchConfig = field(default_factory=ContrastiveConfig)
    """What ITC compares a pair with, and whether a momentum model gives soft targets."""
    negatives: Negatives = "hard"
    """Which wrong pairs ITM sees: those that ITC finds similar, or any of the batch."""
    label_smoothing: float = 0.1
    """Of the predicted tokens: the share of the target that is spread over the whole vocabulary."""

    conditions: ClassVar[tuple[Condition, ...]] = (
        Condition(
            "contrastive",
            lambda task: bool({"itc", "mlm"} & set(task.objectives)),
            "the objectives are without itc and mlm",
        ),
        Condition("negatives", lambda task: "itm" in task.objectives, "the objectives are without itm"),
        Condition("label-smoothing", lambda task: "lm" in task.objectives, "the objectives are without lm"),
    )

    def __post_init__(self) -> None:
        known = get_args(Objective)
        if not self.objectives or not set(self.objectives) <= set(known):
            raise ConfigError(f"objectives {self.objectives}: choose at least one of {', '.join(known)}.")
        if "itm" in self.objectives and "itc" not in self.objectives and self.negatives == "hard":
            raise ConfigError("Hard negatives of ITM are those that ITC finds similar: add itc, or choose random ones.")


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """ITC + ITM, of images or videos (BLIP section 5.1); also makes the filter of CapFilt (section 3.3)."""

    objectives: ClassVar[tuple[Objective, ...]] = ("itc", "itm")
    contrastive: ContrastiveConfig | InBatchConfig = field(default_factory=ContrastiveConfig)
    """What ITC compares a pair with."""
    negatives: Negatives = "hard"
    """Which wrong pairs ITM sees: those that ITC finds similar, or any of the batch."""


@dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """Prefix language modelling: an encoder reads a caption's beginning, a decoder writes the rest (SimVLM)."""

    label_smoothing: float = 0.0
    """Of the predicted tokens: the share of the target that is spread over the whole vocabulary."""


@dataclass(frozen=True, kw_only=True)
class CaptioningConfig:
    """LM alone: caption fine-tuning, which also makes the captioner of CapFilt (BLIP section 3.3)."""

    prompt: str = "a picture of "
    """Stands before every caption and is not predicted; empty for none."""
    label_smoothing: float = 0.1
    """Of the predicted tokens: the share of the target that is spread over the whole vocabulary."""


@dataclass(frozen=True, kw_only=True)
class QuestionAnsweringConfig:
    """A decoder writes answers to questions about images or videos (BLIP section 5.3)."""

    label_smoothing: float = 0.1
    """Of the predicted tokens: the share of the target that is spread over the whole vocabulary."""


@dataclass(frozen=True, kw_only=True)
class NlvrConfig:
    """Whether statements about two images are true (BLIP section 5.4)."""


@dataclass(frozen=True, kw_only=True)
class VisdialConfig:
    """ITM tells the right answer to a dialog's question from wrong ones (BLIP section 5.5)."""

    num_negatives: int = 3
    """Number of wrong answers, drawn from the candidates. The paper does not give it."""


@dataclass(frozen=True, kw_only=True)
class Blip2Stage1Config:
    """Stage 1 of BLIP-2, ITC + ITM + ITG, unweighted (BLIP-2 section 3.2), and retrieval (section 4.4)."""

    itm: bool = True
    """Whether ITM is trained too."""
    itg: bool = True
    """Whether ITG is trained too; without it, the comparison of the paper's Table 6."""
    label_smoothing: float = 0.1
    """Of ITC's targets and of ITG's tokens, as in the released code."""


@dataclass(frozen=True, kw_only=True)
class Blip2Stage2Config:
    """Stage 2 of BLIP-2: a frozen language model writes captions after visual prompts (BLIP-2 section 3.3).

    A decoder writes the whole caption. Of an encoder-decoder, the encoder reads the caption's beginning and
    the decoder writes the rest.
    """

    prompt: str = ""
    """Stands before every caption and is not predicted, as in fine-tuning (section 4.2); an encoder reads it
    in place of the caption's beginning. Empty for none."""
    images_per_sequence: int = 1
    """The largest number of pairs that a decoder reads as one sequence, each image before its caption (Flamingo, arXiv
    2204.14198): it then learns to write after other images and texts, which is what examples in a prompt are. Every
    step draws the number, from 1 on."""

    def __post_init__(self) -> None:
        if self.images_per_sequence < 1:
            raise ConfigError(f"images_per_sequence {self.images_per_sequence}: a sequence has an image or more.")


@dataclass(frozen=True, kw_only=True)
class PromptedAnsweringConfig:
    """Questions that BLIP-2's language model answers (BLIP-2 section 4.3)."""

    instructed: bool = True
    """Whether the Q-Former reads the question too, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class InstructionConfig:
    """Instructions and conversations that BLIP-2's language model answers (InstructBLIP)."""

    instructed: bool = True
    """Whether the Q-Former reads the instruction too, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class LanguagePretrainingConfig:
    """Language modelling on text alone, for a model that BLIP-2 then freezes."""

    max_text_tokens: int = 128
    """Number of tokens of a text, its end included; more are cut."""


BlipTaskConfig = (
    PretrainingConfig
    | RetrievalConfig
    | PrefixConfig
    | CaptioningConfig
    | QuestionAnsweringConfig
    | NlvrConfig
    | VisdialConfig
)
Blip2TaskConfig = Blip2Stage1Config | Blip2Stage2Config | PromptedAnsweringConfig | InstructionConfig
