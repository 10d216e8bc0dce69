"""The shapes of BLIP and BLIP-2 models, around those of `nn.config`. No torch here: `--help` reads them."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from openblip.errors import ConfigError
from openblip.nn.config import (
    ConnectorConfig,
    GatedConfig,
    Mode,
    QFormerConfig,
    TextConfig,
    VisionConfig,
    check_heads_divide,
    check_positive,
    check_setting,
)

Head = Literal["itc", "itm", "lm", "vqa", "nlvr", "visdial", "mlm", "prefix"]

HEADS: tuple[Head, ...] = get_args(Head)
PRETRAINING_HEADS: tuple[Head, ...] = ("itc", "itm", "lm")
GROUNDED_HEADS: dict[Mode, tuple[Head, ...]] = {
    "encode": ("itm", "vqa", "nlvr", "visdial", "mlm", "prefix"),
    "decode": ("lm", "vqa", "prefix"),
}
"""The heads whose texts attend to images, or to what was read with one, by the mode in which they are read."""
# Heads whose texts attend to something else than one image, so that other heads cannot share their encoder.
_ALONE: dict[Head, tuple[Head, ...]] = {
    "vqa": ("lm", "nlvr", "prefix"),
    "nlvr": ("itm", "visdial", "vqa", "mlm", "prefix"),
}


@dataclass(frozen=True, kw_only=True)
class BlipConfig:
    """A multimodal mixture of encoder-decoder (MED), with the heads that it has weights for."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = 256
    """Width of the space in which ITC compares images and texts."""
    heads: tuple[Head, ...] = PRETRAINING_HEADS
    """itc: unimodal embeddings. itm: image-text matching. lm: caption decoder. vqa: question encoder and
    answer decoder. nlvr: statements about two images. visdial: ranked answers in a dialog. mlm: masked words of a text
    beside its image. prefix: an encoder of a caption's beginning and a decoder of the rest, both over the image."""
    pooled: bool = False
    """Whether ITC is that of transformers' BlipModel: the class token is normalised once more, [CLS] passes a
    tanh pooler, and the projections have no bias."""

    def __post_init__(self) -> None:
        _check_heads(self.heads, HEADS)
        for head, others in _ALONE.items():
            clash = sorted(set(others) & set(self.heads))
            if head in self.heads and clash:
                raise ConfigError(f"heads {self.heads}: {head} and {clash[0]} cannot share a text transformer.")
        dims = set(self.context_dims.values())
        if "vqa" in self.heads and len(dims) > 1 and self.text.sharing in ("all", "all_but_sa"):
            raise ConfigError(
                f"text.sharing {self.text.sharing}: questions and answers attend to contexts of the widths "
                f"{sorted(dims)}, so their cross-attention cannot be shared; choose none or all_but_ca."
            )

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes of the text transformer that these heads need."""
        needed = {"encode": set(self.heads) - {"lm"}, "decode": set(GROUNDED_HEADS["decode"]) & set(self.heads)}
        return tuple(mode for mode in get_args(Mode) if needed[mode])

    @property
    def context_dims(self) -> dict[Mode, int]:
        """Width of what each mode attends to: image tokens, or for answers the question's states. Texts of ITC attend
        to nothing else; transformers' BlipModel has cross-attention for them all the same.
        """
        answers = self.text.hidden_dim if "vqa" in self.heads else self.vision.hidden_dim
        dims: dict[Mode, int] = {"encode": self.vision.hidden_dim, "decode": answers}
        return {mode: dims[mode] for mode in self.modes if self.pooled or set(GROUNDED_HEADS[mode]) & set(self.heads)}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BlipConfig":
        """The inverse of `to_dict`; an unknown or missing field is a ConfigError."""
        try:
            vision, text = VisionConfig(**values["vision"]), TextConfig(**values["text"])
            heads, pooled = tuple(values["heads"]), values.get("pooled", False)
            return cls(vision=vision, text=text, embed_dim=values["embed_dim"], heads=heads, pooled=pooled)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"The model config cannot be read: {error}.") from error


Blip2Head = Literal["itc", "itm", "itg", "llm"]
Projection = Literal["linear", "mlp"]

BLIP2_HEADS: tuple[Blip2Head, ...] = get_args(Blip2Head)
STAGE1_HEADS: tuple[Blip2Head, ...] = ("itc", "itm", "itg")


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """A vision model of transformers as frozen image encoder."""

    name: str
    """Where it was loaded from: a folder, or a name on the hub."""
    hidden_dim: int
    layer: int = -2
    """Index of the hidden states that are taken, without the final norm; -1 is the last layer."""

    def __post_init__(self) -> None:
        check_positive("vision.hidden_dim", self.hidden_dim)


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """How a frozen language model is fed. Its weights, shape and tokenizer are those of transformers."""

    name: str
    """Where it was loaded from: a folder, or a name on the hub."""
    hidden_dim: int
    """Width of its word embeddings, to which the queries are projected."""
    end_of_text: str | None = None
    """The text that ends an answer: "\\n" for OPT in BLIP-2; None is the tokenizer's end token."""
    max_text_tokens: int = 32
    """Most tokens of a text and its prompt in training, the end token included; the queries come on top."""

    def __post_init__(self) -> None:
        check_positive("language.hidden_dim", self.hidden_dim)
        check_setting("language.max_text_tokens", self.max_text_tokens, self.max_text_tokens >= 2, "at least 2")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """LoRA: small trained matrices beside the linear layers of a frozen language model (arXiv 2106.09685)."""

    rank: int | None = None
    """Their inner width, usually 4 to 64; None adds none."""
    alpha: int = 16
    """Their output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout of their input, in training."""
    targets: tuple[str, ...] | None = None
    """Names of the linear layers, such as q_proj; None takes those that peft chooses for the architecture."""

    def __post_init__(self) -> None:
        if (self.rank is not None and self.rank < 1) or self.alpha <= 0:
            raise ConfigError(f"lora: rank {self.rank} and alpha {self.alpha} must be above 0.")
        check_setting("lora.dropout", self.dropout, 0.0 <= self.dropout < 1.0, "from 0 to below 1")


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
    connector: ConnectorConfig | None = None
    """What stands between image encoder and language model in place of the Q-Former; None is the Q-Former."""
    gated: GatedConfig | None = None
    """Layers by which the language model attends to the image, in place of visual prompts (Flamingo)."""
    language: LanguageConfig | None = None
    """The language model of the head llm."""
    embed_dim: int = 256
    """Width of the space in which ITC compares queries and texts."""
    heads: tuple[Blip2Head, ...] = STAGE1_HEADS
    """itc, itm, itg: stage 1. llm: a projection of the queries to a frozen language model, stage 2."""
    instructed: bool = False
    """Whether the Q-Former reads the question or instruction beside its queries, for the language model
    (VQA fine-tuning, BLIP-2 section 4.3; InstructBLIP)."""
    projection: Projection = "linear"
    """What makes visual prompts of the queries: a linear layer (BLIP-2 section 3.3), or two with a GELU between."""
    vision_norm_eps: float = 1e-5
    """Epsilon of the trained norm over the image features; transformers' conversions say 1e-6."""

    def __post_init__(self) -> None:
        _check_heads(self.heads, BLIP2_HEADS)
        if ("llm" in self.heads) != (self.language is not None):
            raise ConfigError("The head llm and a language model belong together: name both or neither.")
        if self.instructed and "llm" not in self.heads:
            raise ConfigError("instructed needs the head llm: the Q-Former reads questions for the language model.")
        if self.projection != "linear" and "llm" not in self.heads:
            raise ConfigError("projection needs the head llm: it is between queries and language model.")
        if self.connector is not None and (self.heads != ("llm",) or self.instructed):
            raise ConfigError("A connector in place of the Q-Former reads no text: it is for the head llm alone.")
        if self.gated is not None:
            if self.language is None:
                raise ConfigError("Gated layers are those of a language model: they need the head llm.")
            check_heads_divide("language", self.language.hidden_dim, self.gated.num_heads)
        check_positive("embed_dim", self.embed_dim)

    @property
    def has_text_branch(self) -> bool:
        """Whether there is a Q-Former with word embeddings and text feed-forwards; stage 2 alone drops them."""
        return self.instructed or bool(set(self.heads) & set(STAGE1_HEADS))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Blip2Config":
        """The inverse of `to_dict`; an unknown or missing field is a ConfigError."""
        later = {"connector": None, "gated": None, "projection": "linear"}  # which earlier versions did not have
        values = {**later, **values}
        unlike = sorted(set(values) ^ {field.name for field in fields(cls)})
        if unlike:
            raise ConfigError(f"The model config cannot be read: missing or unknown are {', '.join(unlike)}.")
        vision, language, connector = (values[name] for name in ("vision", "language", "connector"))
        try:
            vision = TowerConfig(**vision) if "layer" in vision else VisionConfig(**vision)
            language = None if language is None else LanguageConfig(**language)
            gated = None if values["gated"] is None else GatedConfig(**values["gated"])
            parts = {"gated": gated, "vision": vision, "language": language, "connector": _read_connector(connector)}
            qformer, heads = QFormerConfig(**values["qformer"]), tuple(values["heads"])
            return cls(**{**values, **parts, "qformer": qformer, "heads": heads})
        except TypeError as error:
            raise ConfigError(f"The model config cannot be read: {error}.") from error


def _read_connector(values: dict[str, Any] | None) -> ConnectorConfig | None:
    """The connector with exactly these settings; TypeError where there is none."""
    if values is None:
        return None
    kinds = (kind for kind in get_args(ConnectorConfig) if {each.name for each in fields(kind)} == values.keys())
    if (kind := next(kinds, None)) is None:
        raise TypeError(f"no connector has the settings {', '.join(values)}")
    connector: ConnectorConfig = kind(**values)
    return connector


def _check_heads(heads: tuple[str, ...], known: tuple[str, ...]) -> None:
    if not heads or not set(heads) <= set(known):
        raise ConfigError(f"heads {heads}: choose at least one of {', '.join(known)}.")
