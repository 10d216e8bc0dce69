"""What a training starts from: weights, vocabularies, and the features of a frozen image encoder.

It is strict about which parameters may stay random. The runs of `run.py` put these steps together.
"""

import hashlib
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openblip.checkpoints.backbones import init_vision
from openblip.checkpoints.checkpoint import CONFIG_FILE, Blip2Checkpoint
from openblip.checkpoints.loading import PRETRAINED, load_checkpoint
from openblip.data.config import DataConfig
from openblip.data.feature_cache import FeatureCache, build_cache, open_cache
from openblip.data.reader import texts_of_sources
from openblip.data.sources import Mixture
from openblip.data.texts import normalize_caption, text_field
from openblip.data.tokenizer import Tokenizer
from openblip.distributed import barrier, gather_objects, rank, world_size
from openblip.errors import ConfigError
from openblip.files import read_json
from openblip.models.blip import Blip
from openblip.models.blip2 import Blip2
from openblip.models.config import Head
from openblip.models.vision_tower import VisionTower
from openblip.nn.vit import VisionTransformer, interpolate_positions
from openblip.tasks.base import image_features

# Enough for every word that matters; more only costs time.
MAX_VOCABULARY_CAPTIONS, MAX_VOCABULARY_TEXTS = 200_000, 10_000
END_OF_LINE = "\n"
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"

# Parts of a head that no earlier training has, or has in another width: they keep their random weights.
FRESH: dict[str, tuple[str, ...]] = {
    "nlvr": ("nlvr_head.", ".merge."),
    "visdial": ("caption_proj.", "itm_head."),
    "llm": ("language_proj.",),
    "mlm": ("mlm_head.",),
    "prefix": ("caption_proj.",),
    "vqa": (".cross_attention.variants.decode.branch.key_value.weight",),  # reads questions, not images
}
BY_ENTRY = (".word.weight", "lm_head.bias")  # parameters with a row for each entry of the vocabulary
TEXT_EMBEDDINGS = ("qformer.embeddings.word.", "qformer.embeddings.position.")
# What does not decide an encoder's features: our settings that matter only while it is trained, and transformers' about
# a model's files, where they lie and who wrote them.
NOT_OF_ENCODER = (
    "drop_path", "activation_checkpointing", "_name_or_path", "architectures", "transformers_version", "dtype",
)  # fmt: skip


class SharedEntries(NamedTuple):
    """The ids of what two vocabularies have in common, in each of them: their embeddings are kept in an exchange."""

    before: list[int]
    after: list[int]
    num_entries: int  # of the new vocabulary

    @classmethod
    def of(cls, before: Tokenizer, after: Tokenizer) -> "SharedEntries":
        """Say on standard error how many entries of the new vocabulary begin at random."""
        known = before.entries
        pairs = sorted((new, known[entry]) for entry, new in after.entries.items() if entry in known)
        if rank() == 0:
            num_new = after.vocab_size - len(pairs)
            line = f"another vocabulary: {len(pairs):,} entries keep their embeddings, {num_new:,} are new"
            print(line, file=sys.stderr)
        return cls([old for _, old in pairs], [new for new, _ in pairs], after.vocab_size)

    def copy(self, parameter: Tensor, weight: Tensor) -> None:
        """Copy the rows; a Q-Former has none for [ENC]."""
        both = zip(self.before, self.after, strict=True)
        rows = [(old, new) for old, new in both if old < len(weight) and new < len(parameter)]
        old, new = (torch.tensor(ids) for ids in zip(*rows, strict=True))
        parameter[new] = weight[old]


def start_vision(vision: VisionTransformer, source: str) -> None:
    """Start a new model's ViT from that of an OpenBLIP checkpoint, or from a ViT of transformers; ConfigError where
    their shapes differ.
    """
    path = Path(source) / CONFIG_FILE
    settings = read_json(path) if path.is_file() else {}
    is_shipped = not Path(source).is_dir() and (PRETRAINED / source).is_dir()
    if not (settings.keys() & {"format", "recipe"} or is_shipped):
        init_vision(vision, source)
        return
    model = load_checkpoint(source).model
    weights = model.vision.state_dict()
    wanted = {name: part.shape for name, part in vision.state_dict().items()}
    positions = "position_embedding"
    if positions in weights:
        grid = math.isqrt(wanted[positions][1] - 1)
        weights[positions] = interpolate_positions(weights[positions], grid)
    if wanted != {name: part.shape for name, part in weights.items()}:
        raise ConfigError(f"The ViT of {source} has another shape than --model.vision says.")
    vision.load_state_dict(weights)


def with_heads(
    model: Blip,
    heads: tuple[Head, ...],
    drop_path: float | None = None,
    image_size: int | None = None,
    entries: SharedEntries | None = None,
) -> Blip:
    """A model with other heads and the same weights (BLIP section 5: a task takes the parts that it needs).

    Both branches over two images start from the one branch that the model has. Questions and answers get separate
    weights, as in the released VQA fine-tuning. `drop_path` and `image_size` are those of the image encoder, None keeps
    the model's; position embeddings are interpolated once and for all. entries: of another vocabulary. Raises
    ConfigError when the model lacks a weight that is no fresh part of a head.
    """
    vision, text = model.config.vision, model.config.text
    text = text if entries is None else replace(text, vocab_size=entries.num_entries)
    drop_path = vision.drop_path if drop_path is None else drop_path
    vision = replace(vision, drop_path=drop_path, image_size=image_size or vision.image_size)
    if "vqa" in heads:
        text = replace(text, sharing="none")
    target = Blip(replace(model.config, heads=heads, vision=vision, text=text))
    weights, positions = model.state_dict(), "vision.position_embedding"
    weights[positions] = interpolate_positions(weights[positions], target.config.vision.grid)
    copy_weights(target.state_dict(), weights, model.config.heads, heads, entries)
    return target


def take_weights(model: Blip2, start: Blip2, text_branch: Blip2, entries: SharedEntries | None = None) -> None:
    """Copy the weights of `start` into a model with other heads; image encoder and language model stay.

    `text_branch` gives the weights that read text where `start` has none. entries: of another vocabulary. Raises
    ConfigError for a weight that neither has and that is no fresh part of a head.
    """
    weights = {
        name: weight
        for name, weight in text_branch.state_dict().items()
        if name.startswith(TEXT_EMBEDDINGS) or ".text_feed_forward." in name
    } | start.state_dict()
    named = model.named_parameters()
    parameters = {name: part.data for name, part in named if not name.startswith(("vision.", "language."))}
    copy_weights(parameters, weights, start.config.heads, model.config.heads, entries)


def copy_weights(
    parameters: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    before: Sequence[str],
    after: Sequence[str],
    entries: SharedEntries | None = None,
) -> None:
    """Copy into each parameter of a model with the heads `after` its weight in a model with the heads `before`.

    It has the parameter's name and shape, or the name of the branch over one image or of weights that modes share.
    Fresh parts of heads may have none; ConfigError for others. With another vocabulary, the rows of new entries stay.
    """
    fresh = [part for head in after for part in FRESH.get(head, ())]
    missing = []
    for name, parameter in parameters.items():
        one_image = re.sub(r"\.branch\.(first|second)\.", ".branch.", name)
        shared = re.sub(r"\.variants\.(encode|decode)\.", ".variants.shared.", one_image)
        weight = next((weights[origin] for origin in (name, one_image, shared) if origin in weights), None)
        if weight is not None and entries is not None and name.endswith(BY_ENTRY):
            entries.copy(parameter, weight)
        elif weight is not None and weight.shape == parameter.shape:
            parameter.copy_(weight)
        elif not any(part in name for part in fresh):
            missing.append(name)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(
            f"The checkpoint has the heads {', '.join(before)}, from which a model with {', '.join(after)} "
            f"cannot start: there is no {missing[0]}{more} of that shape. Start from a pre-trained one."
        )


def freeze_unused(model: Blip2, image_size: int) -> None:
    """Freeze what does not contribute to the features of a Hugging Face image encoder that is trained.

    These are layers above the one whose output is taken, and poolers. They would get no gradient, and several processes
    that exchange gradients would wait for it.
    """
    if not isinstance(model.vision, VisionTower):
        return
    parameters = [parameter for parameter in model.vision.parameters() if parameter.requires_grad]
    features = model.vision(torch.zeros(1, 3, image_size, image_size))
    gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def load_blip2_checkpoint(source: str) -> Blip2Checkpoint:
    """The checkpoint of BLIP-2 that `source` names; ConfigError for one of BLIP."""
    checkpoint = load_checkpoint(source)
    if not isinstance(checkpoint, Blip2Checkpoint):
        raise ConfigError(f"{source} is no checkpoint of BLIP-2; name one with --init.")
    return checkpoint


def choose_tokenizer(
    own: Tokenizer | None, name: str | None, vocab_size: int, mixture: Mixture
) -> tuple[Tokenizer, SharedEntries | None]:
    """The tokenizer called `name`, and what it shares with a model's `own` in whose place it comes. Without a name, the
    own one, or a WordPiece vocabulary of the captions, trained by one process.
    """
    if name is not None:
        tokenizer = Tokenizer.load(name)
        return tokenizer, None if own is None else SharedEntries.of(own, tokenizer)
    if own is not None:
        return own, None
    texts = map(normalize_caption, texts_of_sources(mixture, lambda sample: sample.captions, MAX_VOCABULARY_CAPTIONS))
    trained = [Tokenizer.train(texts, vocab_size).to_json()] if rank() == 0 else []
    return Tokenizer.from_json(gather_objects(trained)[0]), None


def make_language_tokenizer(mixture: Mixture, vocab_size: int, *, ends: bool) -> Any:
    """`train_language_tokenizer` on the field text of a mixture's samples, by one process."""
    texts = texts_of_sources(mixture, lambda sample: [text_field(sample, "text")], MAX_VOCABULARY_TEXTS)
    return gather_objects([train_language_tokenizer(texts, vocab_size, ends=ends)] if rank() == 0 else [])[0]


def train_language_tokenizer(texts: Iterable[str], vocab_size: int, *, ends: bool) -> Any:
    """A byte-level BPE vocabulary as a tokenizer of transformers: every text can be written and read back.

    A line break is one token, and each line begins as after a space, so a word has one form. `ends`: whether each text
    is closed with the end token, as T5 has it. Raises ConfigError without texts.
    """
    import transformers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Bpe

    library: Any = transformers  # its tokenizers are not typed
    bpe = Bpe(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # one entry is left for the line break
        special_tokens=[PAD, END, UNKNOWN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    lines = [line for text in texts for line in text.split(END_OF_LINE)]
    if not lines:
        raise ConfigError("no text to train a vocabulary on: samples need the field text")
    bpe.train_from_iterator(lines, trainer)
    bpe.add_tokens([AddedToken(END_OF_LINE, normalized=False)])
    if ends:
        special_tokens = [(END, bpe.token_to_id(END))]
        bpe.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=special_tokens)
    return library.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, eos_token=END, bos_token=END, unk_token=UNKNOWN
    )


def cached_features(folder: str, checkpoint: Blip2Checkpoint, data: DataConfig, mixture: Mixture) -> FeatureCache:
    """The features of all images of a mixture; all processes together compute those that are missing.

    To the last bit they are what the run would compute from the images at every step on this kind of device. Raises
    ConfigError where the images of a run or its encoder change from step to step, and for a folder that belongs to
    another encoder.
    """
    model, preprocessing = checkpoint.model, checkpoint.preprocessing
    if data.augmentation is not None:
        raise ConfigError(
            "A feature cache holds one view of each image, and augmentation makes a new one at every step: "
            "leave out --data.augmentation or --feature-cache."
        )
    if data.num_frames is not None:
        raise ConfigError("A feature cache is for images, not for videos: leave out --feature-cache.")
    if "vision" not in model.frozen:
        raise ConfigError(
            "The image encoder is trained, so its features change: leave out --train-vision or --feature-cache."
        )
    root = Path(folder)
    open_cache(root, describe_encoder(checkpoint))
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    model.vision.to(device)

    def encode(pixels: Tensor) -> Tensor:
        return image_features(model, preprocessing, pixels.to(device))

    process = {"rank": rank(), "world_size": world_size()}
    build_cache(root, mixture, preprocessing, encode, **process, num_workers=data.num_workers)
    barrier()  # until every process has computed its share
    return FeatureCache(root)


def describe_encoder(checkpoint: Blip2Checkpoint) -> dict[str, Any]:
    """All that decides an encoder's features: its shape, its preprocessing, and a hash of its weights."""
    model = checkpoint.model.vision
    if isinstance(model, VisionTower):
        settings = {**model.model.config.to_dict(), "layer": model.layer}
    else:
        settings = asdict(checkpoint.model.config.vision)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {
        **{f"encoder.{name}": value for name, value in settings.items() if name not in NOT_OF_ENCODER},
        **{f"pixels.{name}": value for name, value in asdict(checkpoint.preprocessing).items()},
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "weights": digest.hexdigest(),
    }
