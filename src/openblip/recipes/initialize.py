"""Weights that a training starts from: strict about which parameters may stay random.

`BlipRun.initialize` and `Blip2Run.initialize` put these steps together.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from openblip.checkpoints.checkpoint import BlipCheckpoint
from openblip.data.reader import read_texts
from openblip.data.sources import Mixture
from openblip.data.texts import normalize_caption
from openblip.data.tokenizer import Tokenizer
from openblip.distributed import gather_objects, rank
from openblip.errors import ConfigError
from openblip.models.blip import Blip
from openblip.models.blip2 import Blip2
from openblip.models.config import Head
from openblip.models.vision_tower import VisionTower
from openblip.nn.vit import interpolate_positions

MAX_VOCABULARY_CAPTIONS = 200_000  # enough for every word that matters; more only costs time

# Parts of a head that no earlier training has, or has in another width: they keep their random weights.
FRESH: dict[Head, tuple[str, ...]] = {
    "nlvr": ("nlvr_head.", ".merge."),
    "visdial": ("caption_proj.", "itm_head."),
    "vqa": (".cross_attention.variants.decode.branch.key_value.weight",),  # reads questions, not images
}
BLIP2_FRESH = ("language_proj.",)
TEXT_EMBEDDINGS = ("qformer.embeddings.word.", "qformer.embeddings.position.")


def with_heads(model: Blip, heads: tuple[Head, ...], drop_path: float | None = None) -> Blip:
    """A model with other heads and the same weights (BLIP section 5: a task takes the parts that it needs).

    Both branches over two images start from the one branch that the model has. Questions and answers get
    separate weights, as in the released VQA fine-tuning. `drop_path` is that of the image encoder; None keeps
    the model's. Raises ConfigError when the model lacks a weight that is no fresh part of a head.
    """
    vision = model.config.vision if drop_path is None else replace(model.config.vision, drop_path=drop_path)
    text = model.config.text
    if "vqa" in heads:
        text = replace(text, sharing="none")
    target = Blip(replace(model.config, heads=heads, vision=vision, text=text))
    fresh = tuple(part for head in heads for part in FRESH.get(head, ()))
    missing = copy_weights(target.state_dict(), model.state_dict(), fresh, _blip_origins)
    if missing:
        raise cannot_start(model.config.heads, heads, missing)
    return target


def take_weights(model: Blip2, start: Blip2, text_branch: Blip2) -> None:
    """Copy the weights of `start` into a model with other heads; image encoder and language model stay.

    `text_branch` gives the weights that read text where `start` has none. Raises ConfigError for a weight
    that neither has and that is no fresh part of a head.
    """
    weights = {n: w for n, w in text_branch.state_dict().items() if _reads_text(n)} | start.state_dict()
    parameters = {
        name: parameter.data
        for name, parameter in model.named_parameters()
        if not name.startswith(("vision.", "language."))
    }
    missing = copy_weights(parameters, weights, BLIP2_FRESH)
    if missing:
        raise cannot_start(start.config.heads, model.config.heads, missing)


def copy_weights(
    parameters: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    fresh: Sequence[str],
    origins: Callable[[str], Sequence[str]] = lambda name: (name,),
) -> list[str]:
    """Copy into each parameter the weight of its name and shape; the names of those that have none.

    Parameters whose name contains one of `fresh` keep what they hold and are not reported. `origins` gives
    the names that a parameter may have in `weights`, the preferred one first.
    """
    missing = []
    for name, parameter in parameters.items():
        weight = next((weights[origin] for origin in origins(name) if origin in weights), None)
        if weight is not None and weight.shape == parameter.shape:
            parameter.copy_(weight)
        elif not any(part in name for part in fresh):
            missing.append(name)
    return missing


def _blip_origins(name: str) -> tuple[str, str, str]:
    """Names of a parameter in a model: the same, of the branch over one image, of weights that modes share."""
    one_image = re.sub(r"\.branch\.(first|second)\.", ".branch.", name)
    shared = re.sub(r"\.variants\.(encode|decode)\.", ".variants.shared.", one_image)
    return name, one_image, shared


def _reads_text(name: str) -> bool:
    """Whether it is a weight of the Q-Former that only text needs."""
    return name.startswith(TEXT_EMBEDDINGS) or ".text_feed_forward." in name


def cannot_start(before: Sequence[str], after: Sequence[str], missing: Sequence[str]) -> ConfigError:
    """The error of a checkpoint that has no weights for some parameters of a model with other heads."""
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return ConfigError(
        f"The checkpoint has the heads {', '.join(before)}, from which a model with {', '.join(after)} "
        f"cannot start: there is no {missing[0]}{more} of that shape. Start from a pre-trained one."
    )


def at_image_size(checkpoint: BlipCheckpoint, image_size: int) -> BlipCheckpoint:
    """The same model for images of another size, its position embeddings interpolated once and for all."""
    config = checkpoint.model.config
    vision = replace(config.vision, image_size=image_size)
    weights = checkpoint.model.state_dict()
    name = "vision.position_embedding"
    weights[name] = interpolate_positions(weights[name], image_size // vision.patch_size)
    resized = Blip(replace(config, vision=vision))
    resized.load_state_dict(weights)
    preprocessing = replace(checkpoint.preprocessing, image_size=image_size)
    return checkpoint._replace(model=resized, preprocessing=preprocessing)


def freeze_unused(model: Blip2, image_size: int) -> None:
    """Freeze what does not contribute to the features of a Hugging Face image encoder that is trained.

    These are layers above the one whose output is taken, and poolers. They would get no gradient, and
    several processes that exchange gradients would wait for it.
    """
    if not isinstance(model.vision, VisionTower):
        return
    parameters = [parameter for parameter in model.vision.parameters() if parameter.requires_grad]
    features = model.vision(torch.zeros(1, 3, image_size, image_size))
    gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def make_tokenizer(name: str | None, vocab_size: int, mixture: Mixture) -> Tokenizer:
    """The tokenizer called `name`, or a WordPiece vocabulary of the captions, trained by one process."""
    if name is not None:
        return Tokenizer.load(name)
    trained = []
    if rank() == 0:
        texts = read_texts(mixture, lambda sample: sample.captions, MAX_VOCABULARY_CAPTIONS)
        trained.append(Tokenizer.train(map(normalize_caption, texts), vocab_size).to_json())
    return Tokenizer.from_json(gather_objects(trained)[0])
