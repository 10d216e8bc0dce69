"""The shapes of a BLIP-2 model, as frozen dataclasses. No torch here: `--help` reads them."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from openblip.errors import ConfigError
from openblip.models.config import VisionConfig, check_heads_divide

Blip2Head = Literal["itc", "itm", "itg", "llm"]

BLIP2_HEADS: tuple[Blip2Head, ...] = get_args(Blip2Head)
STAGE1_HEADS: tuple[Blip2Head, ...] = ("itc", "itm", "itg")


@dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """The Q-Former. The defaults are the paper's: 32 queries in BERT-base (BLIP-2 section 3.1)."""

    num_queries: int = 32
    hidden_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    cross_attention_every: int = 2
    """Queries attend to the image in layers 0, 2, 4, ..."""
    vocab_size: int = 30523
    """bert-base-uncased's 30,522 words, then [DEC]."""
    max_positions: int = 512
    dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_heads_divide("qformer", self.hidden_dim, self.num_heads)
        for name, value in asdict(self).items():
            if name not in ("dropout", "layer_norm_eps", "activation_checkpointing"):
                _check_positive(f"qformer.{name}", value)
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"qformer.dropout is {self.dropout}; it must be from 0 to below 1.")


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """A Hugging Face vision model as frozen image encoder."""

    name: str
    """Where it came from: a folder, or a name on the hub."""
    hidden_dim: int
    layer: int = -2
    """Whose output is taken: an index into the hidden states, -1 the last, without the final norm."""

    def __post_init__(self) -> None:
        _check_positive("vision.hidden_dim", self.hidden_dim)


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """How a frozen language model is fed. Its weights, shape and words are Hugging Face's."""

    name: str
    """Where it came from: a folder, or a name on the hub."""
    hidden_dim: int
    """Width of its word embeddings, to which the queries are projected."""
    end_of_text: str | None = None
    """What ends a text: "\\n" for OPT in BLIP-2; None is the tokenizer's own end."""
    max_text_tokens: int = 32
    """Budget of a text and its prompt in training, the end included; the queries come on top."""

    def __post_init__(self) -> None:
        _check_positive("language.hidden_dim", self.hidden_dim)
        if self.max_text_tokens < 2:
            raise ConfigError(f"language.max_text_tokens is {self.max_text_tokens}; it must be at least 2.")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Small trained matrices beside the linear layers of a frozen language model (arXiv 2106.09685)."""

    rank: int = 8
    alpha: int = 16
    """What they add is scaled by alpha / rank."""
    dropout: float = 0.0
    """Of what they read, in training."""
    targets: tuple[str, ...] | None = None
    """Names of the linear layers, q_proj, v_proj, ...; None: those that peft chooses for the architecture."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ConfigError(f"lora: rank {self.rank} and alpha {self.alpha} must be above 0.")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"lora.dropout is {self.dropout}; it must be from 0 to below 1.")


@dataclass(frozen=True, kw_only=True)
class Blip2Config:
    """A frozen image encoder, a Q-Former, and the heads that the model has weights for."""

    vision: VisionConfig | TowerConfig = field(
        # EVA-CLIP ViT-g/14 without its last block and norm (released code).
        default_factory=lambda: VisionConfig(
            patch_size=14, hidden_dim=1408, num_layers=39, num_heads=16, mlp_dim=6144, output_norm=False
        )
    )
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    language: LanguageConfig | None = None
    """What the head llm writes with."""
    embed_dim: int = 256
    """Width of the space in which ITC compares queries and texts."""
    heads: tuple[Blip2Head, ...] = STAGE1_HEADS
    """itc, itm, itg: stage 1. llm: a projection of the queries to a frozen language model, stage 2."""
    instructed: bool = False
    """Whether the Q-Former reads the question or instruction beside its queries, for the language model
    (VQA fine-tuning, BLIP-2 section 4.3; InstructBLIP)."""
    vision_norm_eps: float = 1e-5
    """Of the trained norm over the image features; transformers' conversions say 1e-6."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.heads) - set(BLIP2_HEADS))
        if unknown or not self.heads:
            raise ConfigError(f"heads {self.heads}: choose at least one of {', '.join(BLIP2_HEADS)}.")
        if ("llm" in self.heads) != (self.language is not None):
            raise ConfigError("The head llm and a language model belong together: name both or neither.")
        if self.instructed and "llm" not in self.heads:
            raise ConfigError("instructed is for the head llm: the Q-Former reads questions for it.")
        _check_positive("embed_dim", self.embed_dim)

    @property
    def reads_text(self) -> bool:
        """Whether the Q-Former has a text branch; stage 2 alone drops it."""
        return self.instructed or bool(set(self.heads) & set(STAGE1_HEADS))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Blip2Config":
        """The inverse of `to_dict`; an unknown or missing field is a ConfigError."""
        unlike = sorted(set(values) ^ {field.name for field in fields(cls)})
        if unlike:
            raise ConfigError(f"The model config cannot be read: missing or unknown are {', '.join(unlike)}.")
        vision, language = values["vision"], values["language"]
        try:
            parts = {
                "vision": TowerConfig(**vision) if "layer" in vision else VisionConfig(**vision),
                "qformer": QFormerConfig(**values["qformer"]),
                "language": None if language is None else LanguageConfig(**language),
                "heads": tuple(values["heads"]),
            }
            return cls(**{**values, **parts})
        except TypeError as error:
            raise ConfigError(f"The model config cannot be read: {error}.") from error


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} is {value}; it must be at least 1.")
