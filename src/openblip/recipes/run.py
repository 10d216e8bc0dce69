"""A training as data, and how the data becomes a trained model: `check`, `build`, `train`.

A recipe is a function that returns a `Run`. Nothing here imports torch before a method needs it, because
`openblip train --help` reads every recipe.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from openblip.data.config import DataConfig
from openblip.errors import ConfigError
from openblip.training.config import TrainingConfig

if TYPE_CHECKING:
    from pathlib import Path

    from openblip.data.batch import SampleProcessor
    from openblip.data.sources import Mixture
    from openblip.distributed import Process
    from openblip.tasks.base import Task
    from openblip.training.trainer import Trainer


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

    @abstractmethod
    def initialize(self, mixture: "Mixture") -> Any:
        """The model with the heads of the task, its tokenizer and preprocessing, as a checkpoint.

        The weights come from where the run says. Raises ConfigError when a weight is missing there that no
        task may start without.
        """

    def check(self) -> None:
        """Raise ConfigError for settings that are missing, contradict each other or would have no effect."""
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

    def save(self, checkpoint: Any, folder: "Path") -> None:
        """Write what `initialize` has made, with its present weights; the folder's config.json comes last."""
        from openblip.checkpoints.loading import save_checkpoint

        save_checkpoint(checkpoint, folder)

    def build(self, process: "Process") -> "Trainer":
        """A trainer with everything that the run names, at the newest checkpoint of the run folder.

        Raises ConfigError where the parts do not fit together.
        """
        import torch

        from openblip.data.loader import Loader
        from openblip.data.sources import open_mixture
        from openblip.training.run_folder import RunFolder
        from openblip.training.trainer import Trainer

        self.check()
        data, training = self.data, self.training
        assert data.source is not None  # `check` has seen to it
        mixture = open_mixture(data.source, images=data.images)
        torch.manual_seed(training.seed)
        checkpoint = self.initialize(mixture)
        tokenizer, preprocessing = checkpoint.tokenizer, checkpoint.preprocessing
        task = self.task_class.build(self.task, data, checkpoint.model, tokenizer, preprocessing)
        processor = self.sample_processor(checkpoint, mixture)

        validation = None
        if training.validate_every is not None:
            from openblip.recipes.validation import make_validation

            validation = make_validation(self.task, data, checkpoint)

        def load(cursor: dict[str, Any] | None) -> Loader:
            return Loader(
                mixture,
                tokenizer=tokenizer,
                preprocessing=preprocessing,
                augmentation=data.augmentation,
                batch_size=training.batch_size,
                seed=training.seed,
                processor=processor,
                rank=process.rank,
                world_size=process.world_size,
                num_workers=data.num_workers,
                cursor=cursor,
            )

        def save(folder: "Path") -> None:
            self.save(checkpoint, folder)

        return Trainer(task, load, training, RunFolder(self.out), process, save, validation)

    def train(self, resume: bool = False) -> bool:
        """Train, or with `resume` continue, and write model/. False when a signal stopped the training.

        Raises ConfigError for settings that contradict each other or an earlier run in the same folder.
        """
        from openblip.distributed import barrier, process_group
        from openblip.training.run_folder import RunFolder

        self.check()
        folder = RunFolder(self.out)
        with process_group() as process, cpu_threads(self.training.num_threads):
            if process.is_main:
                folder.start(self.to_dict(), resume)
            barrier()
            if resume and (folder.model / "config.json").is_file():
                return True
            trainer = self.build(process)
            finished = trainer.run()
            if finished and process.is_main and trainer.save_model is not None:
                trainer.save_model(folder.model)
            barrier()
            return finished

    def derive(self, recipe: str, **changes: Any) -> Self:
        """Another recipe, which differs from this one in `changes`, in its name and in its folder."""
        return replace(self, recipe=recipe, out=f"runs/{recipe}", **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for config.json."""
        return asdict(self)


def check_text_start(init: str | None, text_init: str | None, tokenizer: str | None) -> None:
    """Raise ConfigError for a tokenizer beside a checkpoint, and for a BERT without its tokenizer."""
    if init is not None and tokenizer is not None:
        raise ConfigError("--init brings its own tokenizer: leave out --tokenizer, or --init.")
    if text_init is not None and tokenizer is None:
        raise ConfigError(f"--text-init {text_init} was trained with a tokenizer: name it with --tokenizer.")


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Set torch's number of threads, or leave it for None; afterwards it is what it was before."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
