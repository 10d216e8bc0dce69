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
class FilterConfig:
    """ITC + ITM: the filter of CapFilt (BLIP section 3.3), as in retrieval fine-tuning."""

    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)


@dataclass(frozen=True, kw_only=True)
class CaptioningConfig:
    """LM alone: the captioner of CapFilt (BLIP section 3.3), as in caption fine-tuning."""

    prompt: str = "a picture of "
    """Put before every caption and not predicted; empty for none."""
    label_smoothing: float = 0.1


TaskConfig = PretrainingConfig | FilterConfig | CaptioningConfig
