"""The trainings of which tables are made, at two sizes: `mini` for laptops and emoji scenes, `base` for the papers'.

Costs of mini were measured on one core of an AMD EPYC with bfloat16 in its instructions, in core-seconds; a run of it
takes at most four core-minutes there. As the papers' models start from a ViT of ImageNet, those of mini start from the
ViT of the shipped openblip-mini. CapFilt's captioner and filter start from the model that was pre-trained on the raw
pairs with seed 0, and all seeds share them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from openblip.recipes import blip, blip2, mini
from openblip.recipes.run import Blip2Run, BlipRun, LanguageRun, Run
from openblip.tasks.config import ContrastiveConfig, PretrainingConfig

SomeRun = TypeVar("SomeRun", bound=Run)
LanguageKind = Literal["opt", "t5"]
MINI_STEPS, STAGE1_STEPS, STAGE2_STEPS = 350, 250, 300


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The trainings that tables vary, and what they cost."""

    name: str
    pretrain: BlipRun
    """BLIP's pre-training."""
    captioner: BlipRun
    filter: BlipRun
    """The fine-tunings of CapFilt's two models."""
    shared: BlipRun
    """The fine-tuning of one model that is both."""
    stage1: Blip2Run
    """BLIP-2's stage 1."""
    stage2: Mapping[LanguageKind, Blip2Run]
    """BLIP-2's stage 2, by the kind of language model."""
    languages: Mapping[LanguageKind, LanguageRun] = field(default_factory=dict)
    """The trainings of the language models that stage 2 freezes; of a kind without one, stage 2 names its own."""
    fine_tunes: bool = False
    """Whether captioning and retrieval are measured after a fine-tuning on clean pairs, as in the papers; otherwise the
    pre-trained model is measured."""
    test_limit: int | None = None
    """Samples of each benchmark; None takes all."""
    steps_factor: float = 1.0
    """All trainings take so many times their steps."""
    overhead: float = 0.0
    """Core-seconds of a process besides its steps."""
    capfilt_seconds: float = 0.0
    """Core-seconds of a run of CapFilt."""
    seconds_per_step: Mapping[str, float] = field(default_factory=dict)
    """Core-seconds in bfloat16, by recipe; without one, dry runs cannot tell."""
    float32_factor: float = 1.0
    """How many times as long a training takes on a processor without instructions for bfloat16."""
    evaluation_seconds: Mapping[str, float] = field(default_factory=dict)
    """Core-seconds, by benchmark."""

    @property
    def objectives(self) -> PretrainingConfig:
        """What BLIP is pre-trained with."""
        assert isinstance(self.pretrain.task, PretrainingConfig)  # as every preset has it
        return self.pretrain.task


def mini_preset() -> Preset:
    """Trainings of a few minutes, for emoji scenes."""
    pretrain, captioner, filter = mini.blip_mini(), mini.blip_mini_captioner(), mini.blip_mini_filter()
    assert pretrain.model is not None  # the recipe starts from random weights
    objectives = PretrainingConfig(contrastive=ContrastiveConfig(queue_size=2048, alpha_ramp_steps=MINI_STEPS // 3))
    data = replace(pretrain.data, num_workers=0)  # with one thread in all, workers would only add processes
    return Preset(
        name="mini",
        pretrain=replace(
            pretrain,
            model=replace(pretrain.model, text=replace(pretrain.model.text, num_layers=2)),
            vision_init="openblip-mini",
            data=data,
            task=objectives,
            training=mini.mini_training(steps=MINI_STEPS, warmup_steps=50),
        ),
        captioner=replace(captioner, data=data, training=replace(captioner.training, steps=500)),
        filter=replace(filter, data=data, training=replace(filter.training, steps=150, batch_size=128)),
        shared=replace(captioner, data=data, task=objectives, training=replace(captioner.training, steps=MINI_STEPS)),
        stage1=shortened(mini.blip2_mini_stage1(), STAGE1_STEPS),
        stage2={
            "opt": shortened(mini.blip2_mini_stage2_opt(), STAGE2_STEPS),
            "t5": shortened(mini.blip2_mini_stage2_t5(), STAGE2_STEPS),
        },
        languages={"opt": shortened(mini.blip2_mini_opt(), 650), "t5": shortened(mini.blip2_mini_t5(), 420)},
        test_limit=500,
        overhead=8.0,
        capfilt_seconds=70.0,
        seconds_per_step={
            "blip-mini": 0.46,
            "blip-mini-captioner": 0.4,
            "blip-mini-filter": 1.2,
            "blip2-mini-opt": 0.33,
            "blip2-mini-t5": 0.5,
            "blip2-mini-stage1": 0.65,
            "blip2-mini-stage2-opt": 0.42,
            "blip2-mini-stage2-t5": 0.5,
        },
        float32_factor=3.6,
        evaluation_seconds={"caption": 12.0, "retrieval": 6.0, "vqa": 12.0, "capfilt": 5.0},
    )


def shortened(run: SomeRun, steps: int) -> SomeRun:
    """A recipe with fewer steps, which reads its samples without further processes."""
    return replace(run, data=replace(run.data, num_workers=0), training=replace(run.training, steps=steps))


def base_preset() -> Preset:
    """The papers' own trainings, for whoever has their data and GPUs."""
    pretrain, captioner, filter = blip.blip_base(), blip.caption(), blip.filter_()
    objectives = PretrainingConfig(contrastive=blip.retrieval(blip.COCO_STEPS).contrastive)
    shared = replace(filter, task=objectives, data=captioner.data)
    return Preset(
        name="base",
        pretrain=pretrain,
        captioner=captioner,
        filter=filter,
        shared=shared,
        stage1=blip2.blip2_stage1(),
        stage2={"opt": blip2.blip2_stage2_opt(), "t5": blip2.blip2_stage2_t5()},
        fine_tunes=True,
    )


PRESETS: dict[str, Callable[[], Preset]] = {"mini": mini_preset, "base": base_preset}
