"""What each training task can be told. No torch here: `--help` reads them."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """The momentum side of ITC (BLIP section 3.2 and appendix; ALBEF)."""

    queue_size: int = 57600
    """Image and text embeddings kept as further keys."""
    momentum: float = 0.995
    """How slowly the momentum encoders follow."""
    alpha: float = 0.4
    """Weight of the momentum model's soft targets."""
    alpha_ramp_steps: int = 0
    """Steps over which alpha rises from 0."""


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """ITC + ITM + LM, unweighted (BLIP section 3.2)."""

    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    label_smoothing: float = 0.1


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """ITC + ITM (BLIP section 5.1), also of clips; and how the filter of CapFilt is made (section 3.3)."""

    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)


@dataclass(frozen=True, kw_only=True)
class CaptioningConfig:
    """LM alone: the captioner of CapFilt (BLIP section 3.3), as in caption fine-tuning."""

    prompt: str = "a picture of "
    """Put before every caption and not predicted; empty for none."""
    label_smoothing: float = 0.1


@dataclass(frozen=True, kw_only=True)
class QuestionAnsweringConfig:
    """Answers written by a decoder that reads the question with its image or clip (BLIP section 5.3)."""

    label_smoothing: float = 0.1


@dataclass(frozen=True, kw_only=True)
class NlvrConfig:
    """True or false of statements about two images (BLIP section 5.4)."""


@dataclass(frozen=True, kw_only=True)
class VisdialConfig:
    """The right answer of a dialog's question, told from wrong ones by ITM (BLIP section 5.5)."""

    num_negatives: int = 3
    """Wrong answers beside the right one, drawn from the candidates. The paper does not say how many."""


@dataclass(frozen=True, kw_only=True)
class RepresentationConfig:
    """Stage 1 of BLIP-2, ITC + ITM + ITG, unweighted (BLIP-2 section 3.2), and retrieval (section 4.4)."""

    itg: bool = True
    """Off: ITC + ITM alone, the comparison of the paper's Table 6."""
    label_smoothing: float = 0.1
    """Of ITC's targets and of ITG's words, as in the released code."""


@dataclass(frozen=True, kw_only=True)
class GenerativeConfig:
    """Stage 2 of BLIP-2: captions after soft visual prompts, by a frozen language model (BLIP-2 section 3.3).

    A decoder writes the whole caption; of an encoder-decoder the encoder reads its beginning.
    """

    prompt: str = ""
    """Put before every caption and not predicted, as in fine-tuning (section 4.2); an encoder reads it in
    place of the caption's beginning. Empty for none."""


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
    """Language modelling on text alone, of models that BLIP-2 then freezes."""

    max_text_tokens: int = 128
    """Tokens of a text, its end included; more is cut."""


BlipTaskConfig = (
    PretrainingConfig
    | RetrievalConfig
    | CaptioningConfig
    | QuestionAnsweringConfig
    | NlvrConfig
    | VisdialConfig
)
Blip2TaskConfig = RepresentationConfig | GenerativeConfig | PromptedAnsweringConfig | InstructionConfig
