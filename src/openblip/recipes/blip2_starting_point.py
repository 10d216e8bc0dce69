"""What a run of BLIP-2 trains: a Q-Former, new or of a checkpoint, between the models that the run names."""

from dataclasses import replace
from typing import NamedTuple

import torch

from openblip.checkpoints.backbones import load_language_model, resize_encoder
from openblip.checkpoints.checkpoint import Blip2Checkpoint, ImageEncoder
from openblip.checkpoints.loading import load_checkpoint, load_image_encoder
from openblip.data.sources import Mixture
from openblip.errors import ConfigError
from openblip.models.blip2 import Blip2
from openblip.models.config import Blip2Config, Blip2Head, LanguageConfig, QFormerConfig
from openblip.models.language_model import LanguageModel, with_lora
from openblip.models.vision_tower import VisionTower
from openblip.recipes.blip2_run import Blip2Run, LanguageModelSource
from openblip.recipes.starting_point import make_tokenizer
from openblip.tasks.config import InstructionConfig, PromptedAnsweringConfig

# What no earlier training may have, or not in that width: it keeps its random start.
_FRESH = ("language_proj.",)
_TEXT_EMBEDDINGS = ("qformer.embeddings.word.", "qformer.embeddings.position.")


class _Language(NamedTuple):
    config: LanguageConfig
    model: LanguageModel


def blip2_starting_point(run: Blip2Run, heads: tuple[Blip2Head, ...], mixture: Mixture) -> Blip2Checkpoint:
    """The model of a run with the heads its task trains, around its frozen parts.

    Raises ConfigError when the checkpoint it starts from lacks something that is no fresh part of a head.
    """
    start = None if run.init is None else _load_blip2(run.init)
    encoder = _image_encoder(run, start)
    language = _language_model(run, start) if "llm" in heads else None
    reader = start if run.text_branch is None else _load_blip2(run.text_branch)
    config = Blip2Config(
        vision=encoder.config,
        qformer=_qformer_config(run, start, reader),
        language=None if language is None else language.config,
        embed_dim=run.embed_dim if start is None else start.model.config.embed_dim,
        heads=heads,
        instructed=is_instructed(run),
        vision_norm_eps=Blip2Config.vision_norm_eps if start is None else start.model.config.vision_norm_eps,
    )
    tokenizer = None
    if config.has_text_branch:
        if reader is not None and not reader.model.config.has_text_branch:
            raise _reads_no_text(run)
        named = None if reader is None else reader.tokenizer
        tokenizer = named or make_tokenizer(run.tokenizer, run.vocab_size, mixture)
        if start is None:
            # [ENC], the last word of our vocabularies, does not exist in BLIP-2.
            config = replace(config, qformer=replace(config.qformer, vocab_size=tokenizer.vocab_size - 1))
    model = Blip2(config, encoder.model, None if language is None else language.model)
    if start is not None:
        take_weights(model, start.model, None if reader is None else reader.model)
    elif run.text_init is not None:
        from openblip.checkpoints.backbones import init_qformer  # transformers takes seconds

        init_qformer(model.qformer, run.text_init)
    model.freeze(*(["language"] if run.train_vision else ["vision", "language"]))
    if run.train_vision:
        freeze_unread(model, encoder.preprocessing.image_size)
    return Blip2Checkpoint(model, tokenizer, encoder.preprocessing, run.prompt, run.question_prompt)


def is_instructed(run: Blip2Run) -> bool:
    """Whether the Q-Former is to read questions or instructions for its language model."""
    return isinstance(run.task, PromptedAnsweringConfig | InstructionConfig) and run.task.instructed


def take_weights(model: Blip2, start: Blip2, reader: Blip2 | None = None) -> None:
    """Put the weights of `start` into a model with other heads; ConfigError for what neither has.

    reader: whose weights that read text are taken where `start` has none.
    """
    theirs = dict(start.state_dict())
    if reader is not None:
        theirs = {n: w for n, w in reader.state_dict().items() if _reads_text(n)} | theirs
    missing = []
    for name, parameter in model.named_parameters():
        if name.startswith(("vision.", "language.")):
            continue
        found = theirs.get(name)
        if found is not None and found.shape == parameter.shape:
            parameter.data.copy_(found)
        elif not name.startswith(_FRESH):
            missing.append(name)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(
            f"The checkpoint has the heads {', '.join(start.config.heads)}, from which a model with "
            f"{', '.join(model.config.heads)} cannot start: there is no {missing[0]}{more} of that shape."
        )


def _reads_text(name: str) -> bool:
    """Whether it is a weight of the Q-Former that only text needs."""
    return name.startswith(_TEXT_EMBEDDINGS) or ".text_feed_forward." in name


def freeze_unread(model: Blip2, image_size: int) -> None:
    """Leave out of the training what of a Hugging Face encoder never reaches its features.

    Layers behind the one that is read, and poolers: they would get no gradient, and several processes that
    exchange gradients would wait for it.
    """
    if not isinstance(model.vision, VisionTower):
        return
    parameters = [parameter for parameter in model.vision.parameters() if parameter.requires_grad]
    features = model.vision(torch.zeros(1, 3, image_size, image_size))
    found = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.requires_grad_(gradient is not None)


def check_blip2_start(run: Blip2Run) -> None:
    """ConfigError when the run does not say what it starts from, or says it twice."""
    if run.init == "":
        raise ConfigError(f"The recipe {run.recipe} starts from a BLIP-2 checkpoint: name one with --init.")
    if run.init is None and (run.qformer is None or run.vision is None):
        raise ConfigError(
            "A new Q-Former needs its shape and an image encoder: --qformer and --vision.source."
        )
    if run.init is not None and run.text_init is not None:
        raise ConfigError("--init brings all weights: leave out --text-init, or --init.")
    if run.text_init is not None and run.tokenizer is None:
        raise ConfigError(
            f"--text-init {run.text_init} knows the words of its own tokenizer: name that with --tokenizer."
        )
    if run.text_branch is not None and (run.init is None or not is_instructed(run)):
        raise ConfigError("--text-branch is for a checkpoint whose Q-Former is to read instructions.")
    if run.vision is not None and not run.vision.source:
        raise ConfigError("Name the image encoder with --vision.source.")
    if run.language is not None and not run.language.source:
        raise ConfigError("Name the language model with --language.source.")


def _load_blip2(source: str) -> Blip2Checkpoint:
    checkpoint = load_checkpoint(source)
    if not isinstance(checkpoint, Blip2Checkpoint):
        raise ConfigError(f"{source} is no checkpoint of BLIP-2; name one with --init.")
    return checkpoint


def _image_encoder(run: Blip2Run, start: Blip2Checkpoint | None) -> ImageEncoder:
    if run.vision is not None:
        dtype = torch.float32 if run.train_vision else getattr(torch, run.vision.dtype)
        return load_image_encoder(
            run.vision.source, layer=run.vision.layer, image_size=run.image_size, dtype=dtype
        )
    assert start is not None  # `check_blip2_start` has seen to it
    encoder = ImageEncoder(start.model.vision, start.model.config.vision, start.preprocessing)
    if run.image_size is not None:
        encoder = resize_encoder(encoder, run.image_size)
    # Trained in half precision it would soon be NaN (LAVIS issue 409).
    encoder.model.to(torch.float32 if run.train_vision else _frozen_dtype(run))
    return encoder


def _frozen_dtype(run: Blip2Run) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, run.frozen_dtype or "float32")
    return dtype


def _language_model(run: Blip2Run, start: Blip2Checkpoint | None) -> _Language:
    if run.language is not None:
        found = _named_language_model(run.language)
    elif start is None or start.model.language is None or start.model.config.language is None:
        raise ConfigError(f"The recipe {run.recipe} needs a language model: name it with --language.source.")
    else:
        found = _Language(start.model.config.language, start.model.language)
        found.model.to(_frozen_dtype(run))
    if run.max_text_tokens is None:
        return found
    return found._replace(config=replace(found.config, max_text_tokens=run.max_text_tokens))


def _named_language_model(named: LanguageModelSource) -> _Language:
    model = load_language_model(
        named.source,
        end_of_text=named.end_of_text,
        dtype=getattr(torch, named.dtype),
        quantization=named.quantization,
    )
    if named.lora is not None:
        with_lora(model, named.lora)
    config = LanguageConfig(
        name=named.source,
        hidden_dim=model.hidden_dim,
        end_of_text=named.end_of_text,
        max_text_tokens=named.max_text_tokens,
    )
    return _Language(config, model)


def _qformer_config(
    run: Blip2Run, start: Blip2Checkpoint | None, reader: Blip2Checkpoint | None
) -> QFormerConfig:
    if start is None:
        assert run.qformer is not None  # `check_blip2_start` has seen to it
        return run.qformer
    assert reader is not None  # the start, where no other is named
    theirs = reader.model.config.qformer
    return replace(
        start.model.config.qformer, vocab_size=theirs.vocab_size, max_positions=theirs.max_positions
    )


def _reads_no_text(run: Blip2Run) -> ConfigError:
    if run.text_branch is not None:
        return ConfigError(
            f"The Q-Former of {run.text_branch} reads no text: name one of stage 1 with --text-branch."
        )
    if is_instructed(run):
        return ConfigError(
            f"The Q-Former is to read questions, and that of {run.init} has dropped the weights which read "
            "text: name the checkpoint of stage 1 with --text-branch, or add --task.no-instructed."
        )
    return ConfigError(
        f"The Q-Former of {run.init} reads no text, and {run.recipe} trains it on texts: start from stage 1."
    )
