"""A frozen language model of transformers that attends to images by gated layers (Flamingo section 3.1.2, figure 4).

The layers are trained and belong to the model around the language model, which stays transformers' own: while an
`attending` is open, hooks put them before some of its layers. Where an image stands in a text, the text has a tag, a
learned embedding, and each token attends to the image of the last tag before it. So images and texts can be
interleaved: in training several of them in a sequence (`images_per_sequence`), in use examples before a text.

R texts, T tokens, G sequences of I texts and their images, S tokens of a sequence with padding, Q tokens of an image,
N = I * Q, Dl width.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from openblip.errors import ConfigError
from openblip.models.language_model import sequences_of
from openblip.nn.attention import CrossAttention, KeyValue
from openblip.nn.config import GatedConfig
from openblip.nn.linear import FeedForward


class GatedLayer(nn.Module):
    """Cross-attention to images and a feed-forward, each after a norm and times the tanh of a gate, which starts at 0:
    at first the language model is as it was.
    """

    def __init__(self, config: GatedConfig, width: int) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CrossAttention(width, width, config.num_heads)
        self.feed_forward = FeedForward(width, config.mlp_dim)
        self.attention_gate, self.feed_forward_gate = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(self, x: Tensor, images: KeyValue) -> Tensor:
        """States (R, T, Dl) of texts over the keys and values of R rows of images -> (R, T, Dl)."""
        x = x + self.attention_gate.tanh() * self.attention(self.attention_norm(x), images)
        return cast(Tensor, x + self.feed_forward_gate.tanh() * self.feed_forward(self.feed_forward_norm(x)))


class ShownExamples(NamedTuple):
    """Examples that a text follows."""

    visual: Tensor
    """(I, Q, Dl), the tokens of their images."""
    words: Tensor
    """(P, Dl), their texts as embeddings, each after its visual prompts, or with gated layers after a tag."""


class Gating(nn.Module):
    """The gated layers of a language model of width Dl, and the tag that stands for an image."""

    def __init__(self, config: GatedConfig, width: int) -> None:
        super().__init__()
        self.tag = nn.Parameter(torch.zeros(1, 1, width))
        self.layers = nn.ModuleList(GatedLayer(config, width) for _ in range(config.num_layers))

    def tags(self, num_rows: int) -> Tensor:
        """The visual prompts (R, 1, Dl) of texts: a tag for each."""
        return self.tag.expand(num_rows, -1, -1)

    @contextmanager
    def attending(
        self, model: Any, visual: Tensor, examples: ShownExamples | None = None, images_per_sequence: int = 1
    ) -> Iterator[Tensor]:
        """Let a decoder of transformers attend to images, and give the visual prompts that its texts stand behind.

        visual: (R, Q, Dl), of the image of each text. images_per_sequence: how many texts after one another, each with
        its image, the model reads as one. Raises ConfigError for a model that is no decoder.
        """
        layers = _layers_of(model)
        prompts, num_tokens = self.tags(len(visual)), visual.shape[1]
        if images_per_sequence > 1:
            visual = sequences_of(visual, images_per_sequence).flatten(1, 2)  # (G, N, Dl)
        if examples is not None:
            before = examples.visual.flatten(0, 1).expand(len(visual), -1, -1)
            visual = torch.cat([before.to(visual.dtype), visual], dim=1)
            prompts = torch.cat([examples.words.expand(len(prompts), -1, -1).to(prompts.dtype), prompts], dim=1)
        projected = [layer.attention.project(visual) for layer in self.gated]
        reading = _Reading(self.tag, num_tokens, projected)
        with ExitStack() as hooks:
            handle = model.register_forward_pre_hook(reading.begin, with_kwargs=True)
            hooks.callback(handle.remove)
            for number, gated in enumerate(self.gated):
                layer = layers[number * len(layers) // len(self.gated)]
                handle = layer.register_forward_pre_hook(reading.before_layer(number, gated), with_kwargs=True)
                hooks.callback(handle.remove)
            yield prompts

    @property
    def gated(self) -> list[GatedLayer]:
        return [cast(GatedLayer, layer) for layer in self.layers]


class _Reading:
    """What the hooks know: the images of every row, and which of them each token attends to.

    A language model in use has a cache, whose rows become those of other texts while texts are written. It gets one
    more layer, which holds the numbers of the rows that were read first, so that it stays known whose images a row
    attends to.
    """

    def __init__(self, tag: Tensor, num_tokens: int, images: Sequence[KeyValue]) -> None:
        self.tag, self.num_tokens, self.images = tag, num_tokens, images
        self.num_images = images[0].key.shape[2] // num_tokens if images else 0
        self.shown: Tensor | None = None
        self.num_layers = 0

    def begin(self, model: Any, args: Any, inputs: dict[str, Any]) -> None:
        """Before a forward pass: which image each token attends to, (G, S); None is the last one."""
        self.shown, self.num_layers = None, int(model.config.num_hidden_layers)
        embeddings = inputs.get("inputs_embeds")
        if self.num_images > 1 and embeddings is not None:
            is_tag = (embeddings == self.tag.to(embeddings.dtype)).all(dim=2)
            self.shown = (is_tag.cumsum(dim=1) - 1).clamp(min=0)

    def before_layer(self, number: int, gated: GatedLayer) -> Any:
        def attend(layer: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
            states = args[0] if args else inputs["hidden_states"]
            images = self._images(number, states, inputs.get("past_key_values"))
            changed = gated(states.to(gated.attention_gate.dtype), images).to(states.dtype)
            return ((changed, *args[1:]), inputs) if args else (args, {**inputs, "hidden_states": changed})

        return attend

    def _images(self, number: int, states: Tensor, cache: Any) -> KeyValue:
        key, value, _ = self.images[number]
        if cache is not None:
            if len(cache.layers) == self.num_layers:
                from transformers.cache_utils import DynamicLayer  # it takes a while to import

                rows = torch.arange(len(states), device=states.device, dtype=torch.float32)[:, None, None, None]
                cache.layers.append(numbers := DynamicLayer())  # type: ignore[no-untyped-call]
                numbers.update(rows, rows)
            rows = cache.layers[self.num_layers].keys[:, 0, 0, 0].long()
            key, value = key[rows], value[rows]
        if self.num_images == 1:
            return KeyValue(key, value)
        image_of_slot = torch.arange(key.shape[2], device=key.device) // self.num_tokens  # (N,)
        if self.shown is None:
            mask = (image_of_slot == self.num_images - 1).expand(len(key), 1, 1, -1)
        else:
            mask = (image_of_slot == self.shown[:, :, None])[:, None]  # (G, 1, S, N)
        return KeyValue(key, value, mask)


def _layers_of(model: Any) -> nn.ModuleList:
    """The layers of a decoder of transformers, or of peft around one."""
    count = int(getattr(model.config, "num_hidden_layers", 0))
    found = (part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == count)
    layers = next(found, None)
    if layers is None or model.config.is_encoder_decoder:
        raise ConfigError("Gated layers are for decoders of transformers, and this language model is none.")
    return layers
