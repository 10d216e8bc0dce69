"""The shapes of a BLIP model, as frozen dataclasses. No torch here: `--help` reads them."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from openblip.errors import ConfigError

Head = Literal["itc", "itm", "lm", "vqa", "nlvr", "visdial"]
Mode = Literal["encode", "decode"]
Sharing = Literal["all", "all_but_ca", "all_but_sa", "none"]
Activation = Literal["gelu", "quick_gelu"]

HEADS: tuple[Head, ...] = get_args(Head)
PRETRAINING_HEADS: tuple[Head, ...] = ("itc", "itm", "lm")
# Heads that read their texts with something else than one image, so that no other head can share the reading.
_ALONE: dict[Head, tuple[Head, ...]] = {"vqa": ("lm", "nlvr"), "nlvr": ("itm", "visdial", "vqa")}


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A ViT. The defaults are the paper's ViT-B/16 at pre-training resolution (BLIP section 4.1)."""

    image_size: int = 224
    """Height and width of the input picture, in pixels."""
    patch_size: int = 16
    hidden_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    drop_path: float = 0.0
    """Probability of skipping the last layer; earlier layers are skipped less, linearly."""
    layer_norm_eps: float = 1e-6
    activation: Activation = "gelu"
    input_norm: bool = False
    """CLIP's: one more norm before the blocks, and patches without bias."""
    output_norm: bool = True
    """The norm after the blocks; BLIP-2's frozen encoders end at their second-last block, without."""
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_heads_divide("vision", self.hidden_dim, self.num_heads)
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"vision.image_size {self.image_size} is no multiple of patch_size {self.patch_size}; "
                "choose a size that the patches tile."
            )
        if self.activation not in get_args(Activation):
            raise ConfigError(
                f"vision.activation {self.activation}: choose one of {', '.join(get_args(Activation))}."
            )

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Patches plus the class token."""
        return self.grid**2 + 1


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text transformer of MED. The defaults are BERT-base with BLIP's two added tokens."""

    vocab_size: int = 30524
    """bert-base-uncased's 30,522 words, then [DEC] and [ENC]."""
    hidden_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    max_positions: int = 512
    dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    sharing: Sharing = "all_but_sa"
    """What encoder and decoder share (BLIP Table 3); the paper's choice is all but self-attention."""
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_heads_divide("text", self.hidden_dim, self.num_heads)
        if self.sharing not in get_args(Sharing):
            raise ConfigError(f"text.sharing {self.sharing}: choose one of {', '.join(get_args(Sharing))}.")


@dataclass(frozen=True, kw_only=True)
class BlipConfig:
    """A multimodal mixture of encoder-decoder (MED), with the heads that it has weights for."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = 256
    """Width of the space in which ITC compares images and texts."""
    heads: tuple[Head, ...] = PRETRAINING_HEADS
    """itc: unimodal embeddings. itm: image-text matching. lm: caption decoder. vqa: question encoder and
    answer decoder. nlvr: statements about two images. visdial: answers of a dialog."""
    pooled: bool = False
    """ITC as transformers' BlipModel has it: the class token normalised once more, a tanh pooler on [CLS]
    and projections without bias."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.heads) - set(HEADS))
        if unknown or not self.heads:
            raise ConfigError(f"heads {self.heads}: choose at least one of {', '.join(HEADS)}.")
        for head, others in _ALONE.items():
            clash = sorted(set(others) & set(self.heads))
            if head in self.heads and clash:
                raise ConfigError(
                    f"heads {self.heads}: {head} and {clash[0]} cannot share a text transformer."
                )
        dims = set(self.context_dims.values())
        if "vqa" in self.heads and len(dims) > 1 and self.text.sharing in ("all", "all_but_sa"):
            raise ConfigError(
                f"text.sharing {self.text.sharing}: questions and answers read contexts of the widths "
                f"{sorted(dims)}, so their cross-attention cannot be shared; choose none or all_but_ca."
            )

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The readings of the text transformer that these heads need."""
        modes: list[Mode] = []
        if set(self.heads) - {"lm"}:
            modes.append("encode")
        if {"lm", "vqa"} & set(self.heads):
            modes.append("decode")
        return tuple(modes)

    @property
    def context_dims(self) -> dict[Mode, int]:
        """Widths of what the readings attend to: the image, but for answers the question."""
        answers = self.text.hidden_dim if "vqa" in self.heads else self.vision.hidden_dim
        return {"encode": self.vision.hidden_dim, "decode": answers}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BlipConfig":
        """The inverse of `to_dict`; an unknown or missing field is a ConfigError."""
        try:
            return cls(
                vision=VisionConfig(**values["vision"]),
                text=TextConfig(**values["text"]),
                embed_dim=values["embed_dim"],
                heads=tuple(values["heads"]),
                pooled=values.get("pooled", False),
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(f"The model config cannot be read: {error}.") from error


def check_heads_divide(part: str, hidden_dim: int, num_heads: int) -> None:
    """ConfigError unless `num_heads` heads share `hidden_dim` evenly."""
    if num_heads < 1 or hidden_dim % num_heads:
        raise ConfigError(f"{part}.hidden_dim {hidden_dim} does not divide into {num_heads} heads.")
