"""How a run is optimised. No torch here: `--help` reads it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from openblip.errors import Condition, ConfigError

PRECISIONS = {"bf16": "bfloat16", "fp32": "float32"}  # `precision` of earlier versions, now `dtype`


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """An optimizer over a fixed number of steps. A step is one optimizer update, all processes together."""

    conditions: ClassVar = (
        Condition(
            "decay-rate decay-every", lambda c: c.schedule == "step_decay", "it is for --training.schedule step_decay"
        ),
        Condition("min-learning-rate", lambda c: c.schedule != "constant", "the learning rate is constant"),
        Condition(
            "warmup-learning-rate", lambda c: c.warmup_steps > 0, "there is no warm-up; see --training.warmup-steps"
        ),
    )

    steps: int
    """Number of optimizer updates."""
    batch_size: int
    """Pairs per process and micro-batch; a step sees batch_size * accumulation * processes."""
    accumulation: int = 1
    """Micro-batches per step."""
    learning_rate: float = 3e-4
    """AdamW's, at the schedule's height."""
    muon_learning_rate: float | None = None
    """Muon's, likewise: momentum made orthogonal, for the weights of linear layers; AdamW trains the rest.
    None: AdamW trains everything, as in the paper. Measured in docs/results.md."""
    schedule: Literal["cosine", "step_decay", "constant"] = "cosine"
    """How the learning rate falls after the warm-up: to min_learning_rate along a cosine, in steps, or not at all."""
    min_learning_rate: float = 0.0
    """The learning rate at the end of cosine, and the lowest of step_decay."""
    warmup_steps: int = 0
    """Steps of linear rise from warmup_learning_rate; the schedule counts from their end."""
    warmup_learning_rate: float = 1e-6
    """The learning rate of the first step, where there is a warm-up."""
    decay_rate: float = 0.9
    """step_decay: multiplied in after every decay_every steps."""
    decay_every: int = 1000
    """step_decay: number of steps between two decays."""
    weight_decay: float = 0.05
    """For matrices; vectors and scalars (biases, norms, temperature) are not decayed."""
    beta1: float = 0.9
    """AdamW's, of the mean of gradients."""
    beta2: float = 0.999
    """AdamW's, of the mean of squared gradients."""
    layer_decay: float | None = None
    """Layer-wise: a block of a trained image encoder has this share of the learning rate of the block above
    it, at every step; the last block this share of that of all outside the encoder. None: all alike."""
    clip_norm: float | None = None
    """Largest norm of the joint gradient; None for no clipping."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of losses and gradients; weights and optimizer are float32 in all. With a language model
    bfloat16 is autocast, otherwise the weights are cast once a step. auto: bfloat16 where the device has
    instructions for it, float32 elsewhere; a run keeps what it was begun with."""
    shard_frozen: bool = False
    """Divide frozen language models (all frozen models of transformers) among the processes, block by block
    (FSDP2); what is trained stays on each."""
    activation_checkpointing: bool = False
    """Compute every transformer block again in the backward pass instead of keeping its activations: less
    memory, more time, the same losses. False leaves the choice to the model's own settings."""
    seed: int = 0
    """Of everything random: new weights, order of samples, augmentation, dropout."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between two checkpoints, from which --resume continues."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints that are kept."""
    model_every: int | None = None
    """Also write the model itself every so many steps, to models/step_*/, for curves over the training."""
    validate_every: int | None = None
    """Measure the model on --data.validation every so many steps and at the end. The scores go to
    metrics.jsonl, and the best model to best/. None does not validate."""
    num_threads: int | None = None
    """CPU threads of the process; None leaves torch's choice."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, to the run's folder."""
    wandb_project: str | None = None
    """Also send the metrics to this project of Weights & Biases."""
    trackio_project: str | None = None
    """Also send the metrics to this project of trackio, which keeps them on this machine."""

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "decay_every")
        for name in (*counts, "model_every", "validate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"training.{name} is {value}; it must be at least 1.")
        for name in ("model_every", "validate_every"):
            if getattr(self, name) is not None and self.shard_frozen:
                raise ConfigError(
                    f"training.{name}: a model that shard_frozen divides is whole at the end only; leave out "
                    "one of the two."
                )
        for name in ("learning_rate", "muon_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and rate <= 0:
                raise ConfigError(f"training.{name} is {rate}; it must be positive.")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ConfigError(f"training.layer_decay is {self.layer_decay}; it must be above 0 and at most 1.")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError(f"training.clip_norm is {self.clip_norm}; use a positive norm or none.")
