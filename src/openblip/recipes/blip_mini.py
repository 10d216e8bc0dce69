"""blip-mini: the whole of BLIP in 3.5 million parameters, for emoji scenes and CPUs.

Everything is the paper's made smaller, with Muon beside AdamW. What to expect is in docs/results.md. Costs are those of
one CPU core. Fine-tunings start from the model that they name, by --init.
"""

from dataclasses import replace
from typing import Any

from openblip.data.config import Augmentation, DataConfig
from openblip.models.config import BlipConfig, TextConfig, VisionConfig
from openblip.recipes.blip_run import BlipRun
from openblip.tasks import config as tasks
from openblip.training.config import TrainingConfig

# Captions say left and right, big and small, one and two: no flips and hardly any crop.
AUGMENTATION = Augmentation(crop_scale=(0.85, 1.0), horizontal_flip=False, num_ops=0)
NUM_FRAMES = 4


def blip_mini() -> BlipRun:
    """Pre-train BLIP at the size of a laptop (ITC + ITM + LM from random weights).

    Source: BLIP section 3.2. Cost: 26 minutes with AMX. Expected: docs/results.md.
    """
    vision = VisionConfig(image_size=112, patch_size=16, hidden_dim=160, num_layers=5, num_heads=4, mlp_dim=640)
    text = TextConfig(
        vocab_size=0, hidden_dim=160, num_layers=3, num_heads=4, mlp_dim=640, max_positions=48, dropout=0.0
    )
    return BlipRun(
        recipe="blip-mini",
        model=BlipConfig(vision=vision, text=text, embed_dim=128),
        vocab_size=1000,
        data=DataConfig(augmentation=AUGMENTATION),
        task=tasks.PretrainingConfig(contrastive=tasks.ContrastiveConfig(queue_size=2048, alpha_ramp_steps=1000)),
        training=mini_training(steps=2500, warmup_steps=200),
        out="runs/blip-mini",
    )


def blip_mini_captioner() -> BlipRun:
    """Fine-tune a pre-trained blip-mini into a captioner (LM alone, on clean pairs).

    Source: BLIP section 3.3. Cost: 29 minutes with AMX. Expected: docs/results.md.
    """
    return fine_tuning_mini("blip-mini-captioner", tasks.CaptioningConfig(label_smoothing=0.0), steps=5000)


def blip_mini_filter() -> BlipRun:
    """Fine-tune a pre-trained blip-mini into a filter (ITC + ITM, on clean pairs).

    Source: BLIP section 3.3. Cost: 17 minutes with AMX. Expected: docs/results.md.
    """
    # A larger batch has harder negatives: the filter must learn one wrong attribute, not one wrong scene.
    return fine_tuning_mini("blip-mini-filter", retrieval_mini(), steps=500, batch_size=256)


def blip_mini_vqa() -> BlipRun:
    """Fine-tune a pre-trained blip-mini to answer questions about emoji scenes (`--kind questions`).

    Source: BLIP section 5.3. Cost: half an hour. Expected: docs/results.md.
    """
    return fine_tuning_mini("blip-mini-vqa", tasks.QuestionAnsweringConfig(label_smoothing=0.0), steps=2500)


def blip_mini_nlvr() -> BlipRun:
    """Fine-tune a blip-mini filter to judge statements about two emoji scenes (`--kind statements`).

    Source: BLIP section 5.4. It uses AdamW alone, and slowly: at first the answers are coin tosses, and Muon, whose
    updates are as large without a signal, would forget the pre-training meanwhile.
    Cost: half an hour. Expected: docs/results.md.
    """
    return fine_tuning_mini(
        "blip-mini-nlvr", tasks.NlvrConfig(), steps=4500, batch_size=32, learning_rate=1.5e-4, muon_learning_rate=None
    )


def blip_mini_visdial() -> BlipRun:
    """Fine-tune a pre-trained blip-mini to rank answers in dialogs about emoji scenes (`--kind dialogs`).

    Source: BLIP section 5.5. The model has 48 positions: it reads the end of a longer dialog.
    Cost: 20 minutes. Expected: docs/results.md.
    """
    run = fine_tuning_mini("blip-mini-visdial", tasks.VisdialConfig(num_negatives=3), steps=900)
    return replace(run, data=replace(run.data, max_text_length=48))


def blip_mini_video_retrieval() -> BlipRun:
    """Fine-tune a pre-trained blip-mini to match emoji videos with their captions (`--kind clips`).

    Source: BLIP section 5.6, which does this without training. Cost: 20 minutes. Expected: docs/results.md.
    """
    run = fine_tuning_mini("blip-mini-video-retrieval", retrieval_mini(), steps=500)
    return replace(run, data=replace(run.data, num_frames=NUM_FRAMES))


def blip_mini_video_qa() -> BlipRun:
    """Fine-tune `blip-mini-vqa` to answer questions about emoji videos (`--kind clip-questions`).

    Source: BLIP section 5.6, which evaluates a model fine-tuned on VQA. Cost: 20 minutes. Expected: docs/results.md.
    """
    run = fine_tuning_mini("blip-mini-video-qa", tasks.QuestionAnsweringConfig(label_smoothing=0.0), steps=500)
    return replace(run, data=replace(run.data, num_frames=NUM_FRAMES))


def retrieval_mini() -> tasks.RetrievalConfig:
    """ITC and ITM with a queue that is small enough for emoji scenes."""
    return tasks.RetrievalConfig(contrastive=tasks.ContrastiveConfig(queue_size=2048, alpha_ramp_steps=100))


def fine_tuning_mini(name: str, task: tasks.BlipTaskConfig, **training: Any) -> BlipRun:
    """A fine-tuning of blip-mini, at half the learning rates of its pre-training; `training` changes more."""
    slower = {"learning_rate": 5e-4, "muon_learning_rate": 2e-3, "warmup_steps": 50, "min_learning_rate": 1e-6}
    return BlipRun(
        recipe=name,
        vocab_size=1000,
        data=DataConfig(augmentation=AUGMENTATION),
        task=task,
        training=mini_training(**{**slower, **training}),
        out=f"runs/{name}",
    )


def mini_training(*, steps: int, **changes: Any) -> TrainingConfig:
    """How all mini models are trained, language models included: batches of 64, AdamW and Muon."""
    settings: dict[str, Any] = {
        "batch_size": 64,
        "learning_rate": 1e-3,
        "muon_learning_rate": 4e-3,
        "warmup_steps": 100,
        "min_learning_rate": 1e-5,
        "beta2": 0.98,
        "clip_norm": 1.0,
        "checkpoint_every": 100,
    }
    return TrainingConfig(steps=steps, **{**settings, **changes})
