"""The shapes of the transformers in this folder, as frozen dataclasses. No torch here: `--help` reads them."""

from dataclasses import asdict, dataclass
from typing import Literal, get_args

from openblip.errors import ConfigError

Mode = Literal["encode", "decode"]
Sharing = Literal["all", "all_but_ca", "all_but_sa", "none"]
Activation = Literal["gelu", "quick_gelu"]


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A ViT. The defaults are the paper's ViT-B/16 at pre-training resolution (BLIP section 4.1)."""

    image_size: int = 224
    """Height and width of the input image, in pixels."""
    patch_size: int = 16
    """Height and width of a patch, in pixels."""
    hidden_dim: int = 768
    """Width of the tokens."""
    num_layers: int = 12
    """Number of transformer layers."""
    num_heads: int = 12
    """Attention heads of a layer."""
    mlp_dim: int = 3072
    """Width inside the feed-forward layers."""
    drop_path: float = 0.0
    """Probability of skipping the last layer; earlier layers are skipped less, linearly."""
    layer_norm_eps: float = 1e-6
    """Epsilon of the layer norms."""
    activation: Activation = "gelu"
    """Activation of the feed-forward layers; quick_gelu is CLIP's."""
    input_norm: bool = False
    """Whether there is a norm before the blocks and no bias in the patch embedding, as in CLIP."""
    output_norm: bool = True
    """Whether there is a norm after the blocks. BLIP-2's frozen encoders end at their second-last block without one."""
    activation_checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping their activations."""

    def __post_init__(self) -> None:
        check_heads_divide("vision", self.hidden_dim, self.num_heads)
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"vision.image_size {self.image_size} is no multiple of patch_size {self.patch_size}; "
                "choose a size that the patches tile."
            )
        if self.activation not in get_args(Activation):
            raise ConfigError(f"vision.activation {self.activation}: choose one of {', '.join(get_args(Activation))}.")

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text transformer of MED. The defaults are BERT-base with BLIP's two added tokens."""

    vocab_size: int = 30524
    """bert-base-uncased's 30,522 words, then [DEC] and [ENC]."""
    hidden_dim: int = 768
    """Width of the tokens."""
    num_layers: int = 12
    """Number of transformer layers."""
    num_heads: int = 12
    """Attention heads of a layer."""
    mlp_dim: int = 3072
    """Width inside the feed-forward layers."""
    max_positions: int = 512
    """The longest text, in tokens."""
    dropout: float = 0.1
    """Dropout while training."""
    layer_norm_eps: float = 1e-12
    """Epsilon of the layer norms."""
    sharing: Sharing = "all_but_sa"
    """What encoder and decoder share (BLIP Table 3); the paper's choice is all but self-attention."""
    activation_checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping their activations."""

    def __post_init__(self) -> None:
        check_heads_divide("text", self.hidden_dim, self.num_heads)
        if self.sharing not in get_args(Sharing):
            raise ConfigError(f"text.sharing {self.sharing}: choose one of {', '.join(get_args(Sharing))}.")


@dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """The Q-Former. The defaults are the paper's: 32 queries in BERT-base (BLIP-2 section 3.1)."""

    num_queries: int = 32
    """Number of learned queries."""
    hidden_dim: int = 768
    """Width of the tokens."""
    num_layers: int = 12
    """Number of transformer layers."""
    num_heads: int = 12
    """Attention heads of a layer."""
    mlp_dim: int = 3072
    """Width inside the feed-forward layers."""
    cross_attention_every: int = 2
    """Queries attend to the image in layers 0, 2, 4, ..."""
    vocab_size: int = 30523
    """bert-base-uncased's 30,522 words, then [DEC]."""
    max_positions: int = 512
    """The longest text, in tokens."""
    dropout: float = 0.1
    """Dropout while training."""
    layer_norm_eps: float = 1e-12
    """Epsilon of the layer norms."""
    activation_checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping their activations."""

    def __post_init__(self) -> None:
        check_heads_divide("qformer", self.hidden_dim, self.num_heads)
        for name, value in asdict(self).items():
            if name not in ("dropout", "layer_norm_eps", "activation_checkpointing"):
                check_positive(f"qformer.{name}", value)
        check_setting("qformer.dropout", self.dropout, 0.0 <= self.dropout < 1.0, "from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class PoolingConfig:
    """Average pooling of the patches, in place of the Q-Former."""

    side: int = 4
    """Side of the grid of tokens that is left."""

    def __post_init__(self) -> None:
        check_positive("connector.side", self.side)


@dataclass(frozen=True, kw_only=True)
class PatchMlpConfig:
    """A hidden layer over every image token, in place of the Q-Former (LLaVA 1.5)."""

    hidden_dim: int = 768
    """Width of the hidden layer."""

    def __post_init__(self) -> None:
        check_positive("connector.hidden_dim", self.hidden_dim)


@dataclass(frozen=True, kw_only=True)
class SoftPromptConfig:
    """A linear map of the mean image token to several tokens, in place of the Q-Former (Frozen)."""

    num_queries: int = 2
    """Number of tokens for the language model; the paper's is 2."""
    hidden_dim: int = 768
    """Width of the tokens, before they are projected to that of the language model."""

    def __post_init__(self) -> None:
        check_positive("connector.num_queries", self.num_queries)
        check_positive("connector.hidden_dim", self.hidden_dim)


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig:
    """Learned queries that attend to the image, in place of the Q-Former. The defaults are Flamingo's (section 3.1)."""

    num_queries: int = 64
    """Number of learned queries."""
    hidden_dim: int = 1024
    """Width of the tokens."""
    num_layers: int = 6
    """Number of transformer layers."""
    num_heads: int = 16
    """Attention heads of a layer."""
    mlp_dim: int = 4096
    """Width inside the feed-forward layers."""

    def __post_init__(self) -> None:
        check_heads_divide("connector", self.hidden_dim, self.num_heads)
        for name, value in asdict(self).items():
            check_positive(f"connector.{name}", value)


@dataclass(frozen=True, kw_only=True)
class GatedConfig:
    """Gated cross-attention layers within a frozen language model (Flamingo)."""

    num_layers: int = 8
    """Number of these layers, spread evenly over those of the language model."""
    num_heads: int = 8
    """Attention heads of a layer."""
    mlp_dim: int = 2048
    """Width inside the feed-forward layers."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_positive(f"gated.{name}", value)


ConnectorConfig = PoolingConfig | PatchMlpConfig | SoftPromptConfig | ResamplerConfig


def check_heads_divide(part: str, hidden_dim: int, num_heads: int) -> None:
    """Raise ConfigError unless `num_heads` heads share `hidden_dim` evenly."""
    if num_heads < 1 or hidden_dim % num_heads:
        raise ConfigError(f"{part}.hidden_dim {hidden_dim} does not divide into {num_heads} heads.")


def check_positive(name: str, value: int) -> None:
    """Raise ConfigError unless the setting is at least 1."""
    check_setting(name, value, value >= 1, "at least 1")


def check_setting(name: str, value: float, holds: bool, demand: str) -> None:
    """Raise ConfigError with what is demanded of the setting unless it holds."""
    if not holds:
        raise ConfigError(f"{name} is {value}; it must be {demand}.")
