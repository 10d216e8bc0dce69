"""What the paper's fine-tunings of downstream tasks share (BLIP appendix, Table 14)."""

from openblip.data.config import DataConfig
from openblip.data.transforms import Augmentation
from openblip.recipes.run import Run
from openblip.tasks.config import BlipTaskConfig
from openblip.training.config import TrainingConfig


def fine_tuning(
    name: str,
    task: BlipTaskConfig,
    *,
    image_size: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    max_text_length: int = 40,
    num_frames: int | None = None,
    drop_path: float | None = None,
) -> Run:
    """AdamW with weight decay 0.05, a cosine from `learning_rate` to 0 without warm-up, from a checkpoint.

    batch_size: pairs of one process. Crops keep half of the picture or more, as in the released code.
    """
    return Run(
        recipe=name,
        init="",
        model=None,
        vocab_size=30524,
        tokenizer=None,
        image_size=image_size,
        drop_path=drop_path,
        data=DataConfig(
            source="",
            augmentation=Augmentation(crop_scale=(0.5, 1.0)),
            num_workers=4,
            max_text_length=max_text_length,
            num_frames=num_frames,
        ),
        task=task,
        training=TrainingConfig(
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            schedule="cosine",
            min_learning_rate=0.0,
            weight_decay=0.05,
        ),
        out=f"runs/{name}",
    )
