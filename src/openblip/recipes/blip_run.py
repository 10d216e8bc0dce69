"""A training of BLIP: its settings, and how its model is made from a checkpoint or from random weights."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from openblip.errors import ConfigError
from openblip.models.config import BlipConfig
from openblip.recipes.run import Run, check_text_start
from openblip.tasks.config import BlipTaskConfig

if TYPE_CHECKING:
    from openblip.checkpoints.checkpoint import BlipCheckpoint
    from openblip.data.sources import Mixture


@dataclass(frozen=True, kw_only=True)
class BlipRun(Run):
    """A training of BLIP from its data to its final weights."""

    init: str | None = None
    """Checkpoint to start from; None starts from random weights."""
    model: BlipConfig | None = None
    """The shape of a model that starts from random weights; None takes the checkpoint's."""
    vocab_size: int = 30524
    """Size of the WordPiece vocabulary trained on the captions when there is no checkpoint or tokenizer."""
    tokenizer: str | None = None
    """Tokenizer to use instead of training one: a folder, or a name on the Hugging Face hub."""
    task: BlipTaskConfig
    vision_init: str | None = None
    """ViT or DeiT to start the image side of a new model from: a Hugging Face folder or hub name."""
    text_init: str | None = None
    """BERT to start the text side of a new model from, likewise; needs that BERT's `tokenizer`."""
    image_size: int | None = None
    """Resolution to fine-tune the checkpoint at; None keeps its own."""
    drop_path: float | None = None
    """Stochastic depth of the checkpoint's image encoder while it is fine-tuned; None keeps its own."""

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
        check_text_start(self.init, self.text_init, self.tokenizer)

    def initialize(self, mixture: "Mixture") -> "BlipCheckpoint":
        checkpoint = self._new(mixture) if self.init is None else self._loaded(self.init)
        # Every task that reads texts beside images begins them with [ENC], whatever the checkpoint did.
        prompt = getattr(self.task, "prompt", checkpoint.prompt)
        return checkpoint._replace(prompt=prompt, encoder_token="[ENC]")

    def _loaded(self, init: str) -> "BlipCheckpoint":
        """The checkpoint `init` with the heads of the task, for images of the run's size."""
        from openblip.checkpoints.checkpoint import BlipCheckpoint
        from openblip.checkpoints.loading import load_checkpoint
        from openblip.recipes.initialize import at_image_size, with_heads

        checkpoint = load_checkpoint(init)
        if not isinstance(checkpoint, BlipCheckpoint):
            raise ConfigError(f"{init} is a checkpoint of BLIP-2; the recipe {self.recipe} trains BLIP.")
        heads = self.task_class.heads(self.task)
        checkpoint = checkpoint._replace(model=with_heads(checkpoint.model, heads, self.drop_path))
        return checkpoint if self.image_size is None else at_image_size(checkpoint, self.image_size)

    def _new(self, mixture: "Mixture") -> "BlipCheckpoint":
        """A model with random weights, or with those of the backbones that the run names."""
        from openblip.checkpoints.backbones import init_text, init_vision
        from openblip.checkpoints.checkpoint import BlipCheckpoint
        from openblip.data.config import Preprocessing
        from openblip.models.blip import Blip
        from openblip.recipes.initialize import make_tokenizer

        assert self.model is not None  # `check` has seen to it
        tokenizer = make_tokenizer(self.tokenizer, self.vocab_size, mixture)
        text = replace(self.model.text, vocab_size=tokenizer.vocab_size)
        model = Blip(replace(self.model, text=text, heads=self.task_class.heads(self.task)))
        if self.vision_init is not None:
            init_vision(model.vision, self.vision_init)
        if self.text_init is not None:
            init_text(model.text, self.text_init)
        return BlipCheckpoint(model, tokenizer, Preprocessing(image_size=self.model.vision.image_size))
