"""blip-mini: the whole of BLIP in 3.5 million parameters, for emoji scenes and for CPUs."""

from dataclasses import replace

from openblip.data.config import DataConfig
from openblip.data.transforms import Augmentation
from openblip.models.config import BlipConfig, TextConfig, VisionConfig
from openblip.recipes.run import Run
from openblip.tasks.config import (
    BlipTaskConfig,
    CaptioningConfig,
    ContrastiveConfig,
    PretrainingConfig,
    RetrievalConfig,
)
from openblip.training.config import TrainingConfig

# Left and right, big and small, one and two are said in the captions: no flips and hardly any crop.
AUGMENTATION = Augmentation(crop_scale=(0.85, 1.0), horizontal_flip=False, num_ops=0)


def blip_mini() -> Run:
    """Pre-train BLIP at the size of a laptop (ITC + ITM + LM from random weights).

    Source: BLIP section 3.2 with everything made smaller, and Muon beside AdamW. Cost: 26 minutes on one CPU
    core with AMX. Expected: docs/results.md.
    """
    return Run(
        recipe="blip-mini",
        init=None,
        model=BlipConfig(
            vision=VisionConfig(
                image_size=112, patch_size=16, hidden_dim=160, num_layers=5, num_heads=4, mlp_dim=640
            ),
            text=TextConfig(
                vocab_size=0,
                hidden_dim=160,
                num_layers=3,
                num_heads=4,
                mlp_dim=640,
                max_positions=48,
                dropout=0.0,
            ),
            embed_dim=128,
        ),
        vocab_size=1000,
        tokenizer=None,
        data=DataConfig(source="", augmentation=AUGMENTATION),
        task=PretrainingConfig(contrastive=ContrastiveConfig(queue_size=2048, alpha_ramp_steps=1000)),
        training=TrainingConfig(
            steps=2500,
            batch_size=64,
            learning_rate=1e-3,
            muon_learning_rate=4e-3,
            warmup_steps=200,
            min_learning_rate=1e-5,
            beta2=0.98,
            clip_norm=1.0,
            checkpoint_every=100,
        ),
        out="runs/blip-mini",
    )


def blip_mini_captioner() -> Run:
    """Fine-tune a pre-trained blip-mini into a captioner (LM alone, on clean pairs).

    Source: BLIP section 3.3 at small scale. Cost: 29 minutes on one CPU core with AMX.
    Expected: docs/results.md.
    """
    return fine_tune_mini("blip-mini-captioner", CaptioningConfig(label_smoothing=0.0), steps=5000)


def blip_mini_filter() -> Run:
    """Fine-tune a pre-trained blip-mini into a filter (ITC + ITM, on clean pairs).

    Source: BLIP section 3.3 at small scale. Cost: 17 minutes on one CPU core with AMX.
    Expected: docs/results.md.
    """
    contrastive = ContrastiveConfig(queue_size=2048, alpha_ramp_steps=100)
    # A larger batch has harder negatives: the filter must learn one wrong attribute, not one wrong scene.
    run = fine_tune_mini("blip-mini-filter", RetrievalConfig(contrastive=contrastive), steps=500)
    return replace(run, training=replace(run.training, batch_size=256))


def fine_tune_mini(name: str, task: BlipTaskConfig, *, steps: int) -> Run:
    """A fine-tuning of blip-mini by `steps` batches of 64."""
    return Run(
        recipe=name,
        init="",
        model=None,
        vocab_size=1000,
        tokenizer=None,
        data=DataConfig(source="", augmentation=AUGMENTATION),
        task=task,
        training=TrainingConfig(
            steps=steps,
            batch_size=64,
            learning_rate=5e-4,
            muon_learning_rate=2e-3,
            warmup_steps=50,
            min_learning_rate=1e-6,
            beta2=0.98,
            clip_norm=1.0,
            checkpoint_every=100,
        ),
        out=f"runs/{name}",
    )
