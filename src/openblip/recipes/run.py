"""A training as data, and how the data becomes a trained model: `check`, `build`, `train`.

A recipe is a function that returns a `Run`. Nothing here imports torch before a method needs it, because
`openblip train --help` reads every recipe.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, get_args, get_type_hints

from openblip.data.config import DataConfig, Preprocessing
from openblip.data.reader import num_cores
from openblip.errors import Condition, ConfigError, OutputError
from openblip.files import atomic_folder
from openblip.models import config as models
from openblip.nn.config import ConnectorConfig, GatedConfig, QFormerConfig, check_heads_divide
from openblip.tasks.config import (
    Blip2Stage1Config,
    Blip2Stage2Config,
    Blip2TaskConfig,
    BlipTaskConfig,
    LanguagePretrainingConfig,
    NlvrConfig,
    VisdialConfig,
)
from openblip.training.config import TrainingConfig

if TYPE_CHECKING:
    from openblip.checkpoints.backbones import ImageEncoder
    from openblip.checkpoints.checkpoint import Blip2Checkpoint, BlipCheckpoint
    from openblip.data.batch import SampleProcessor
    from openblip.data.sources import Mixture
    from openblip.distributed import Process
    from openblip.models.language_model import LanguageModel
    from openblip.tasks.base import Task
    from openblip.training.trainer import Trainer

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Run(ABC):
    """A training from its data to its final weights; each kind of model adds what its model starts from.

    The fields are the options of `openblip train` and the content of the run folder's config.json.
    """

    recipe: str
    """The recipe this run began as."""
    data: DataConfig
    task: Any  # a subclass names the settings of the tasks that it trains
    training: TrainingConfig
    out: str
    """Folder of the run."""

    conditions: ClassVar[tuple[Condition, ...]] = (
        Condition(
            "data.num-frames",
            lambda run: not isinstance(run.task, NlvrConfig | VisdialConfig | LanguagePretrainingConfig),
            "the task reads images or texts, and no videos",
        ),
        Condition(
            "data.max-text-length",
            lambda run: (
                not isinstance(run.task, LanguagePretrainingConfig | Blip2Stage2Config)
                and getattr(run.task, "instructed", True)
            ),
            "only the language model reads texts; the limit is --max-text-tokens, of a run on texts alone "
            "--task.max-text-tokens",
        ),
        Condition(
            "training.shard-frozen",
            lambda run: isinstance(run, Blip2Run),
            "all of the model is trained, and only what is frozen can be divided",
        ),
        Condition("recipe", lambda run: False, "the recipe is the first word after `train`"),
    )

    @abstractmethod
    def initialize(self, mixture: "Mixture") -> Any:
        """The model with the heads of the task, its tokenizer and preprocessing, as a checkpoint.

        Raises ConfigError when a weight that no task may start without is missing where the run says.
        """

    def check(self) -> None:
        """Raise ConfigError for settings that are missing or contradict each other. `conditions` say which options
        would have no effect.
        """
        if not self.data.source:
            raise ConfigError("No training samples: name the source with --data.source.")
        if self.training.validate_every is not None and not self.data.validation:
            raise ConfigError("--training.validate-every needs samples: name a source with --data.validation.")
        if self.training.validate_every is None and self.data.validation:
            raise ConfigError("--data.validation is used every --training.validate-every steps: say how many.")

    @property
    def task_class(self) -> "type[Task]":
        """The class that is made from the settings `task`."""
        from openblip.tasks.catalog import TASKS

        return TASKS[type(self.task)]

    def sample_processor(self, checkpoint: Any, mixture: "Mixture") -> "SampleProcessor":
        """What the task takes of a sample."""
        return self.task_class.sample_processor(self.task, self.data, question_prompt="{}")

    def save(self, checkpoint: Any, folder: Path) -> None:
        """Write what `initialize` has made, with its present weights; the folder's config.json comes last."""
        from openblip.checkpoints.loading import save_checkpoint

        save_checkpoint(checkpoint, folder)

    def build(self, process: "Process") -> "Trainer":
        """A trainer with everything that the run names, at the newest checkpoint of the run folder.

        Raises ConfigError where the parts do not fit together.
        """
        import torch

        from openblip.data.loader import Loader
        from openblip.data.sources import check_options_used, open_mixture, require_texts
        from openblip.recipes.validation import make_validation
        from openblip.training.run_folder import RunFolder
        from openblip.training.trainer import Trainer

        self.check()
        data, training = self.data, self.in_precision().training
        assert data.source is not None  # `check` has seen to it
        mixture = open_mixture(data.source, **data.reading)
        # The samples of the validation may be those that need the folder of images.
        check_options_used(mixture.sources, data if data.validation is None else replace(data, images=None))
        require_texts(mixture.sources)
        torch.manual_seed(training.seed)
        checkpoint = self.initialize(mixture)
        tokenizer, preprocessing = checkpoint.tokenizer, checkpoint.preprocessing
        task = self.task_class.build(self.task, data, checkpoint.model, tokenizer, preprocessing)
        processor = self.sample_processor(checkpoint, mixture)
        validate = None if training.validate_every is None else make_validation(self.task, data, checkpoint)
        load = partial(
            Loader,
            mixture,
            tokenizer=tokenizer,
            preprocessing=preprocessing,
            augmentation=data.augmentation,
            batch_size=training.batch_size,
            seed=training.seed,
            processor=processor,
            rank=process.rank,
            world_size=process.world_size,
            num_workers=min(data.num_workers, num_cores()),
        )
        save = partial(self.save, checkpoint)
        return Trainer(task, load, training, RunFolder(self.out), process, save, validate)

    def in_precision(self, before: "Run | None" = None) -> Self:
        """This run with a precision where `training.dtype` is "auto": that of the run before, which it goes on with, or
        else bfloat16 where the device has instructions for it, and float32 elsewhere.
        """
        from openblip.distributed import has_bfloat16, training_device

        if self.training.dtype != "auto":
            return self
        dtype = "auto" if before is None else before.training.dtype
        if dtype == "auto":  # no run before, or one whose config.json was changed by hand
            dtype = "bfloat16" if has_bfloat16(training_device()) else "float32"
        return replace(self, training=replace(self.training, dtype=dtype))

    def train(self, resume: bool = False) -> bool:
        """Train, or with `resume` continue, and write model/. False when a signal stopped the training.

        Raises ConfigError for settings that contradict each other or an earlier run in the same folder.
        """
        import torch

        from openblip.distributed import process_group
        from openblip.training.optimizer import describe_change
        from openblip.training.run_folder import RunFolder, differences

        self.check()
        folder = RunFolder(self.out)
        saved = folder.read_config()
        before = None if saved is None else with_settings(self, saved)
        if self.training.dtype == "auto":
            return self.in_precision(before).train(resume)
        config = asdict(self)
        changes = folder.compare(before and asdict(before), config, resume)
        with process_group() as process, ExitStack() as afterwards:
            if self.training.num_threads is not None:
                afterwards.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(self.training.num_threads)
            is_finished, is_longer = folder.is_finished, "training.steps" in {change.setting for change in changes}
            if is_finished and changes and (not is_longer or folder.last_checkpoint() is None):
                raise ConfigError(
                    f"{self.out} is finished, so {', '.join(change.setting for change in changes)} would have no "
                    "effect. To train longer, give more --training.steps (with the last checkpoint still there); to "
                    f"train anew from its weights, start another run with --init {folder.model}."
                )
            if is_finished and not is_longer:
                return True
            trainer = self.build(process)
            if trainer.step > self.training.steps:
                raise ConfigError(f"{self.out} is at step {trainer.step} already; give more --training.steps.")
            if process.is_main:
                try:
                    folder.begin(config, changes, trainer.step)
                except OutputError as error:  # nothing has begun
                    raise ConfigError(str(error)) from error
                lines: list[object] = list(changes)
                if before is not None:
                    left_out = [c.setting for c in differences(saved, asdict(before)) if c.now is None]
                    lines += [f"{setting} of an earlier version has no meaning any more" for setting in left_out]
                    lines.append(describe_change(trainer.step, before.training, self.training))
                for line in filter(None, lines):
                    print(f"resumed at step {trainer.step}: {line}", file=sys.stderr)
            finished = trainer.run()
            if finished:
                trainer.write_model(folder.model)
            return finished

    def derive(self, recipe: str, **changes: Any) -> Self:
        """Another recipe, which differs from this one in `changes`, in its name and in its folder."""
        return replace(self, recipe=recipe, out=f"runs/{recipe}", **changes)


def with_settings(like: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass of the class of `like` with values from JSON; of those that are absent it has its own defaults.

    Where a field allows several dataclasses, it is the one that has exactly these fields, or may have them: that which
    `like` has there, else the first.
    Settings of an earlier version that are none any more are left out.
    """

    def read(hint: Any, value: Any, like: Any) -> Any:
        if not isinstance(value, dict):
            return tuple(value) if isinstance(value, list) else value
        classes = [*([like] if is_dataclass(like) else []), *filter(is_dataclass, get_args(hint))]
        unlike = [value.keys() ^ {each.name for each in fields(part)} for part in classes]
        exact = [part for part, names in zip(classes, unlike, strict=True) if not names]
        fitting = [part for part, names in zip(classes, unlike, strict=True) if not names & value.keys()]
        return with_settings((exact or fitting or classes)[0], value)

    cls = like if isinstance(like, type) else type(like)
    hints, known = get_type_hints(cls), {each.name for each in fields(cls)} & values.keys()
    return cls(**{name: read(hints[name], values[name], getattr(like, name, None)) for name in known})


def check_text_start(text_init: str | None, tokenizer: str | None) -> None:
    """Raise ConfigError for a BERT without its tokenizer."""
    if text_init is not None and tokenizer is None:
        raise ConfigError(f"--text-init {text_init} was trained with a tokenizer: name it with --tokenizer.")


@dataclass(frozen=True, kw_only=True)
class BlipRun(Run):
    """A training of BLIP from its data to its final weights."""

    init: str | None = None
    """Checkpoint to start from; None starts from random weights."""
    model: models.BlipConfig | None = None
    """The shape of a model that starts from random weights; None takes the checkpoint's."""
    vocab_size: int = 30524
    """Size of the WordPiece vocabulary trained on the captions when there is no checkpoint or tokenizer."""
    tokenizer: str | None = None
    """Tokenizer of a new model instead of a trained one, or of a checkpoint in place of its own: embeddings of
    entries that both have are kept. A folder, or a name on the Hugging Face hub."""
    task: BlipTaskConfig
    vision_init: str | None = None
    """ViT or DeiT to start the image side of a new model from: a Hugging Face folder or hub name, or an OpenBLIP
    checkpoint, whose ViT is taken."""
    text_init: str | None = None
    """BERT to start the text side of a new model from, likewise; needs that BERT's `tokenizer`."""
    image_size: int | None = None
    """Resolution to fine-tune the checkpoint at; None keeps its own."""
    drop_path: float | None = None
    """Stochastic depth of the checkpoint's image encoder while it is fine-tuned; None keeps its own."""
    train_vision: bool = True
    """Whether the image encoder is trained too; otherwise it stays as `init` or `vision_init` has it (LiT)."""

    conditions = (
        *Run.conditions,
        Condition("drop-path model.vision.drop-path", lambda run: run.train_vision, "the image encoder is frozen"),
        Condition(
            "vocab-size",
            lambda run: run.init is None and run.tokenizer is None,
            "the model's vocabulary is that of --tokenizer or --init; it is for one that is trained on the captions",
        ),
        Condition(
            "model.text.vocab-size", lambda run: False, "the vocabulary decides it; that of a new one is --vocab-size"
        ),
        Condition("model.heads", lambda run: False, "the model has the heads of the task"),
        Condition("model", lambda run: run.init is None, "--init brings a model with its shape"),
    )

    def check(self) -> None:
        super().check()
        if self.init is None and self.model is None:
            raise ConfigError(f"The recipe {self.recipe} starts from a checkpoint: name one with --init.")
        if self.init is not None and (self.vision_init is not None or self.text_init is not None):
            raise ConfigError("--init brings all weights: leave out --vision-init and --text-init, or --init.")
        if self.init is None and self.drop_path is not None:
            raise ConfigError("--drop-path is for fine-tuning; a new model's is --model.vision.drop-path.")
        if self.init is None and self.image_size is not None:
            raise ConfigError("--image-size is for fine-tuning; a new model's is --model.vision.image-size.")
        if not self.train_vision and self.init is None and self.vision_init is None:
            raise ConfigError("An image encoder that is not trained must come from --vision-init or --init.")
        check_text_start(self.text_init, self.tokenizer)

    def initialize(self, mixture: "Mixture") -> "BlipCheckpoint":
        from openblip.checkpoints import backbones
        from openblip.checkpoints.checkpoint import BlipCheckpoint
        from openblip.checkpoints.loading import load_checkpoint
        from openblip.models.blip import Blip
        from openblip.recipes.initialize import choose_tokenizer, start_vision, with_heads

        heads = self.task_class.heads(self.task)
        if self.init is not None:
            checkpoint = load_checkpoint(self.init)
            if not isinstance(checkpoint, BlipCheckpoint):
                raise ConfigError(f"{self.init} is a checkpoint of BLIP-2; the recipe {self.recipe} trains BLIP.")
            size = self.image_size or checkpoint.preprocessing.image_size
            tokenizer, entries = choose_tokenizer(checkpoint.tokenizer, self.tokenizer, self.vocab_size, mixture)
            model = with_heads(checkpoint.model, heads, self.drop_path, self.image_size, entries)
            preprocessing = replace(checkpoint.preprocessing, image_size=size)
            checkpoint = checkpoint._replace(model=model, tokenizer=tokenizer, preprocessing=preprocessing)
        else:
            assert self.model is not None  # `check` has seen to it
            tokenizer, _ = choose_tokenizer(None, self.tokenizer, self.vocab_size, mixture)
            text = replace(self.model.text, vocab_size=tokenizer.vocab_size)
            model = Blip(replace(self.model, text=text, heads=heads))
            if self.vision_init is not None:
                start_vision(model.vision, self.vision_init)
            if self.text_init is not None:
                backbones.init_text(model.text, self.text_init)
            checkpoint = BlipCheckpoint(model, tokenizer, Preprocessing(image_size=self.model.vision.image_size))
        if not self.train_vision:
            checkpoint.model.freeze("vision")
        # Every task that reads texts beside images begins them with [ENC], whatever the checkpoint did.
        return checkpoint._replace(prompt=getattr(self.task, "prompt", checkpoint.prompt), encoder_token="[ENC]")


@dataclass(frozen=True, kw_only=True)
class ImageEncoderSource:
    """An image encoder that somebody else has trained."""

    source: str
    """An OpenBLIP checkpoint, whose ViT is taken; a Hugging Face vision model by folder or hub name, with its
    preprocessor_config.json."""
    layer: int | None = None
    """The layer whose output is taken: -2 is the second last, -1 the last. None is the paper's choice: the
    second last, or the last of an encoder that was cut there already."""
    dtype: Precision = "float32"
    """Precision of its weights while it is frozen."""


@dataclass(frozen=True, kw_only=True)
class LanguageModelSource:
    """A language model that somebody else has trained."""

    source: str | None = None
    """A causal or sequence-to-sequence model of Hugging Face, by folder or hub name."""
    end_of_text: str | None = None
    """What ends a text; None is the tokenizer's own end. BLIP-2 ends OPT's texts with a line break."""
    dtype: Precision = "float32"
    """Precision of its weights while it is frozen."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Keep its linear layers in fewer bits, by bitsandbytes."""
    max_text_tokens: int = 32
    """Budget of a text and its prompt, the end included."""


@dataclass(frozen=True, kw_only=True)
class Blip2Run(Run):
    """A training of a Q-Former from its data to its final weights."""

    init: str | None = None
    """BLIP-2 checkpoint to start from, for stage 2 that of stage 1; None starts from a new Q-Former."""
    vision: ImageEncoderSource | None = None
    """The image encoder; None takes the checkpoint's."""
    language: LanguageModelSource | None = None
    """The language model of a generative task; None takes the checkpoint's."""
    qformer: QFormerConfig | None = None
    """The shape of a new Q-Former; None takes the checkpoint's."""
    connector: ConnectorConfig | None = None
    """What takes the place of a new Q-Former where a language model writes all texts; None is a Q-Former."""
    gated: GatedConfig | None = None
    """New layers by which the frozen language model attends to the image, in place of visual prompts (Flamingo)."""
    vocab_size: int = 30524
    """Size of the WordPiece vocabulary trained on the captions when there is no checkpoint or tokenizer."""
    tokenizer: str | None = None
    """Tokenizer of a new Q-Former instead of a trained one, or of a checkpoint's in place of its own: embeddings
    of entries that both have are kept. A folder, or a name on the Hugging Face hub."""
    task: Blip2TaskConfig
    embed_dim: int = 256
    """Width of the space in which ITC compares queries and texts."""
    projection: models.Projection | None = None
    """What makes the language model's visual prompts of the queries; None: as the checkpoint, else a linear layer."""
    text_init: str | None = None
    """BERT to start a new Q-Former from: a Hugging Face folder or hub name; needs that BERT's `tokenizer`."""
    text_branch: str | None = None
    """BLIP-2 checkpoint whose Q-Former gives the weights that read text to a model that is to read
    instructions: stage 2 has dropped them. Name that of stage 1; None where `init` still has its own."""
    train_vision: bool = False
    """Also train the image encoder, as the paper does in fine-tuning; its weights become float32."""
    lora: models.LoraSettings = field(default_factory=models.LoraSettings)
    """Adapters that are trained in the language model, which is frozen otherwise; without a rank there are none."""
    frozen_dtype: Precision | None = None
    """Precision of the checkpoint's image encoder and language model where they are frozen; None: float32."""
    max_text_tokens: int | None = None
    """Budget of a text and its prompt; None keeps that of the checkpoint or of `language`."""
    image_size: int | None = None
    """Resolution of the images; None keeps the image encoder's own."""
    prompt: str = "a photo of"
    """Text that the trained model's captions continue, unless the caller says otherwise."""
    question_prompt: str = "Question: {} Answer:"
    """How the trained model puts a question to its language model."""
    feature_cache: str | None = None
    """Folder for the features of the frozen image encoder, computed once and then reused; None computes them
    at every step. Without augmentation only."""

    conditions = (
        *Run.conditions,
        Condition(
            "vocab-size",
            lambda run: run.reads_text and run.init is None and run.tokenizer is None,
            "it is for the vocabulary of a new Q-Former that reads text, trained on the captions",
        ),
        Condition("tokenizer", lambda run: run.reads_text or run.text_init is not None, "the Q-Former reads no text"),
        Condition(
            "qformer.vocab-size", lambda run: False, "the vocabulary decides it; that of a new one is --vocab-size"
        ),
        Condition("qformer", lambda run: run.connector is None, "a connector takes the place of the Q-Former"),
        Condition("qformer connector gated", lambda run: run.init is None, "--init brings a Q-Former with its shape"),
        Condition(
            "embed-dim",
            lambda run: run.init is None and isinstance(run.task, Blip2Stage1Config),
            "it is for a new Q-Former that is trained with ITC",
        ),
        Condition(
            "frozen-dtype",
            lambda run: (run.vision is None and not run.train_vision) or (run.writes_text and run.language is None),
            "no frozen part comes from --init; it is for these",
        ),
        Condition("vision.dtype", lambda run: not run.train_vision, "an image encoder that is trained is float32"),
        Condition("language projection", lambda run: run.writes_text, "the task has no language model"),
        Condition(
            "language.max-text-tokens",
            lambda run: run.max_text_tokens is None,
            "--max-text-tokens says the same and goes before it",
        ),
        Condition("max-text-tokens question-prompt", lambda run: run.writes_text, "the task has no language model"),
        Condition("prompt", lambda run: not getattr(run.task, "prompt", ""), "--task.prompt goes before it"),
    )

    @property
    def writes_text(self) -> bool:
        """Whether a language model writes the texts of the task."""
        return not isinstance(self.task, Blip2Stage1Config)

    @property
    def reads_text(self) -> bool:
        """Whether the Q-Former reads texts."""
        return self.instructed or not self.writes_text

    @property
    def instructed(self) -> bool:
        """Whether the Q-Former is to read questions or instructions for its language model."""
        return bool(getattr(self.task, "instructed", False))

    def check(self) -> None:
        super().check()
        shape = self.qformer or self.connector
        if self.init is None and shape is None and self.vision is None:
            raise ConfigError(f"The recipe {self.recipe} starts from a BLIP-2 checkpoint: name one with --init.")
        if self.init is None and (shape is None or self.vision is None):
            raise ConfigError("A new Q-Former needs its shape and an image encoder: --qformer and --vision.source.")
        if self.init is not None and self.text_init is not None:
            raise ConfigError("--init brings all weights: leave out --text-init, or --init.")
        if self.connector is not None and self.text_init is not None:
            raise ConfigError("--text-init is for a Q-Former, and a connector takes its place: leave one of them out.")
        check_text_start(self.text_init, self.tokenizer)
        if self.text_branch is not None and (self.init is None or not self.instructed):
            raise ConfigError("--text-branch is for a checkpoint whose Q-Former is to read instructions.")
        if self.vision is not None and not self.vision.source:
            raise ConfigError("Name the image encoder with --vision.source.")
        if self.language is not None and not self.language.source:
            raise ConfigError("Name the language model with --language.source.")
        if self.lora.rank is None and self.lora != models.LoraSettings():
            raise ConfigError("The settings of --lora are for adapters: say their rank with --lora.rank.")
        if self.lora.rank is not None and "llm" not in self.task_class.heads(self.task):
            raise ConfigError(f"--lora is for a language model, and the recipe {self.recipe} has none.")

    def initialize(self, mixture: "Mixture") -> "Blip2Checkpoint":
        from openblip.checkpoints.backbones import init_text
        from openblip.checkpoints.checkpoint import Blip2Checkpoint
        from openblip.models.blip2 import Blip2
        from openblip.recipes.initialize import choose_tokenizer, freeze_unused, load_blip2_checkpoint, take_weights

        heads = self.task_class.heads(self.task)
        start = None if self.init is None else load_blip2_checkpoint(self.init)
        encoder = self._image_encoder(start)
        language, language_config = self._language_model(start) if "llm" in heads else (None, None)
        text_branch = start if self.text_branch is None else load_blip2_checkpoint(self.text_branch)
        if start is None or text_branch is None:
            config = models.Blip2Config(qformer=self.qformer or QFormerConfig(), embed_dim=self.embed_dim)
        else:  # a checkpoint's shape stays, and its text branch may come from another
            config, texts = start.model.config, text_branch.model.config.qformer
            qformer = replace(config.qformer, vocab_size=texts.vocab_size, max_positions=texts.max_positions)
            config = replace(config, qformer=qformer)
        projection = self.projection or (config.projection if "llm" in heads else "linear")
        config = replace(
            config,
            vision=encoder.config,
            language=language_config,
            heads=heads,
            instructed=self.instructed,
            projection=projection,
            connector=self.connector if start is None else config.connector,
            gated=self.gated if start is None else config.gated,
        )
        tokenizer = entries = None
        if config.has_text_branch:
            if text_branch is not None and not text_branch.model.config.has_text_branch:
                raise ConfigError(self._no_text_branch())
            own = None if text_branch is None else text_branch.tokenizer
            tokenizer, entries = choose_tokenizer(own, self.tokenizer, self.vocab_size, mixture)
            if tokenizer is not own:  # [ENC], the last token of our vocabularies, does not exist in BLIP-2
                if tokenizer.enc_id != tokenizer.vocab_size - 1:
                    raise ConfigError(f"{self.tokenizer} is no vocabulary for BLIP-2: entries stand behind [ENC].")
                config = replace(config, qformer=replace(config.qformer, vocab_size=tokenizer.vocab_size - 1))
        model = Blip2(config, encoder.model, language)
        if start is not None and text_branch is not None:
            take_weights(model, start.model, text_branch.model, entries)
        elif self.text_init is not None:
            init_text(model.qformer, self.text_init)
        model.freeze(*(["language"] if self.train_vision else ["vision", "language"]))
        if self.train_vision:
            freeze_unused(model, encoder.preprocessing.image_size)
        prompt = getattr(self.task, "prompt", "") or self.prompt
        return Blip2Checkpoint(model, tokenizer, encoder.preprocessing, prompt, self.question_prompt)

    def sample_processor(self, checkpoint: "Blip2Checkpoint", mixture: "Mixture") -> "SampleProcessor":
        processor = self.task_class.sample_processor(self.task, self.data, self.question_prompt)
        if self.feature_cache is None:
            return processor
        from openblip.recipes.initialize import cached_features

        features = cached_features(self.feature_cache, checkpoint, self.data, mixture)
        return replace(processor, read_pixels=features)

    def _image_encoder(self, start: "Blip2Checkpoint | None") -> "ImageEncoder":
        import torch

        from openblip.checkpoints.backbones import ImageEncoder, resize_encoder
        from openblip.checkpoints.loading import load_image_encoder

        # Trained in half precision the encoder would soon be NaN (LAVIS issue 409).
        precision = self.frozen_dtype if self.vision is None else self.vision.dtype
        dtype = getattr(torch, "float32" if self.train_vision or precision is None else precision)
        if self.vision is not None:
            source, layer = self.vision.source, self.vision.layer
            return load_image_encoder(source, layer=layer, image_size=self.image_size, dtype=dtype)
        assert start is not None  # `check` has seen to it
        encoder = ImageEncoder(start.model.vision, start.model.config.vision, start.preprocessing)
        if self.image_size is not None:
            encoder = resize_encoder(encoder, self.image_size)
        encoder.model.to(dtype)
        return encoder

    def _language_model(self, start: "Blip2Checkpoint | None") -> "tuple[LanguageModel, models.LanguageConfig]":
        import torch

        from openblip.checkpoints.backbones import load_language_model
        from openblip.models.language_model import with_lora

        if self.language is not None:
            settings = self.language
            assert settings.source is not None  # `check` has seen to it
            name, end, dtype = settings.source, settings.end_of_text, getattr(torch, settings.dtype)
            model = load_language_model(name, end_of_text=end, dtype=dtype, quantization=settings.quantization)
            budget = settings.max_text_tokens
            config = models.LanguageConfig(
                name=name, hidden_dim=model.hidden_dim, end_of_text=end, max_text_tokens=budget
            )
        elif start is None or start.model.language is None or start.model.config.language is None:
            raise ConfigError(f"The recipe {self.recipe} needs a language model: name it with --language.source.")
        else:
            model, config = start.model.language, start.model.config.language
            model.to(getattr(torch, self.frozen_dtype or "float32"))
        if self.lora.rank is not None:
            with_lora(model, self.lora)
        if self.max_text_tokens is not None:
            config = replace(config, max_text_tokens=self.max_text_tokens)
        return model, config

    def _no_text_branch(self) -> str:
        if self.text_branch is not None:
            return f"The Q-Former of {self.text_branch} reads no text: name one of stage 1 with --text-branch."
        if self.instructed:
            return (
                f"The Q-Former is to read questions, and that of {self.init} has dropped the weights which "
                "read text: name the checkpoint of stage 1 with --text-branch, or add --task.no-instructed."
            )
        return f"The Q-Former of {self.init} reads no text, and {self.recipe} trains it on texts: start from stage 1."


@dataclass(frozen=True, kw_only=True)
class LanguageShape:
    """The shape of a language model that starts from random weights."""

    architecture: Literal["opt", "t5"]
    """opt: a decoder. t5: an encoder-decoder, as T5 1.1 and FlanT5."""
    hidden_dim: int = 128
    """Width of the tokens."""
    num_layers: int = 4
    """Layers of the decoder; for t5 the encoder has as many."""
    num_heads: int = 4
    """Attention heads of a layer."""
    mlp_dim: int = 512
    """Width inside the feed-forward layers."""
    max_positions: int = 160
    """Visual prompts and tokens together; t5 knows only distances and has no limit."""

    def __post_init__(self) -> None:
        check_heads_divide("shape", self.hidden_dim, self.num_heads)

    def build(self, tokenizer: Any) -> "LanguageModel":
        """An OPT or T5 of transformers with random weights. OPT ends what it writes with a line break."""
        import transformers

        from openblip.models.language_model import wrap_language_model

        library: Any = transformers  # their settings are not typed
        pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
        special = {"vocab_size": len(tokenizer), "pad_token_id": pad, "eos_token_id": end}
        if self.architecture == "opt":
            config = library.OPTConfig(
                **special,
                bos_token_id=end,
                hidden_size=self.hidden_dim,
                word_embed_proj_dim=self.hidden_dim,
                num_hidden_layers=self.num_layers,
                num_attention_heads=self.num_heads,
                ffn_dim=self.mlp_dim,
                max_position_embeddings=self.max_positions,
                dropout=0.0,
            )
            return wrap_language_model(library.OPTForCausalLM(config), tokenizer, end_of_text="\n")
        config = library.T5Config(
            **special,
            decoder_start_token_id=pad,
            d_model=self.hidden_dim,
            d_kv=self.hidden_dim // self.num_heads,
            d_ff=self.mlp_dim,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
        return wrap_language_model(library.T5ForConditionalGeneration(config), tokenizer)


class LanguageCheckpoint(NamedTuple):
    """A language model in the form in which a run takes the checkpoints of BLIP and BLIP-2."""

    model: "LanguageModel"
    tokenizer: None = None  # the model has its own
    preprocessing: Preprocessing = Preprocessing(image_size=1)  # no image is decoded


@dataclass(frozen=True, kw_only=True)
class LanguageRun(Run):
    """A training of a language model on text alone, for a BLIP-2 to freeze; its model/ is a folder of Hugging Face."""

    shape: LanguageShape
    vocab_size: int
    """Size of the vocabulary (byte-level BPE) trained on the texts."""
    task: LanguagePretrainingConfig

    conditions = (
        *Run.conditions,
        Condition("shape.max-positions", lambda run: run.shape.architecture == "opt", "T5 has no limit of positions"),
    )

    def check(self) -> None:
        super().check()
        longest, positions = self.task.max_text_tokens, self.shape.max_positions
        if self.shape.architecture == "opt" and longest > positions:
            raise ConfigError(
                f"Texts of up to {longest} tokens: the model has {positions} positions; lower --task.max-text-tokens."
            )

    def initialize(self, mixture: "Mixture") -> LanguageCheckpoint:
        from openblip.recipes.initialize import make_language_tokenizer

        tokenizer = make_language_tokenizer(mixture, self.vocab_size, ends=self.shape.architecture == "t5")
        return LanguageCheckpoint(self.shape.build(tokenizer))

    def save(self, checkpoint: LanguageCheckpoint, folder: Path) -> None:
        with atomic_folder(folder) as partial:
            checkpoint.model.model.save_pretrained(partial)
            checkpoint.model.tokenizer.save_pretrained(partial)
