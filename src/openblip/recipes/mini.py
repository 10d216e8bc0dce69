"""blip-mini and blip2-mini: the whole of BLIP in 3.5 million parameters, and both stages of BLIP-2 around its ViT.

They are for emoji scenes and CPUs. Everything is the papers' made smaller, with Muon beside AdamW. The language models
of blip2-mini are trained here too, on text alone: a tiny OPT and a tiny T5. Fine-tunings start from the model that they
name, by --init. Costs are those of one CPU core, with AMX where a recipe says so.
"""

from dataclasses import replace
from typing import Any

from openblip.data.config import Augmentation, DataConfig
from openblip.models.config import BlipConfig
from openblip.nn.config import QFormerConfig, TextConfig, VisionConfig
from openblip.recipes.run import Blip2Run, BlipRun, ImageEncoderSource, LanguageModelSource, LanguageRun, LanguageShape
from openblip.tasks import config as tasks
from openblip.training.config import TrainingConfig

# Captions say left and right, big and small, one and two: no flips and hardly any crop.
DATA = DataConfig(augmentation=Augmentation(crop_scale=(0.85, 1.0), horizontal_flip=False, num_ops=0))
QUESTION_DATA = replace(DATA, max_text_length=35)
NUM_FRAMES = 4
RETRIEVAL_MINI = tasks.RetrievalConfig(contrastive=tasks.ContrastiveConfig(queue_size=2048, alpha_ramp_steps=100))
STAGE1_STEPS, STAGE2_STEPS = 600, 600
# A step of stage 1 takes 5.4 times as many operations as one of stage 2 (benchmarks/step_operations.py).
SCRATCH_STEPS = STAGE2_STEPS + round(5.4 * STAGE1_STEPS)


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
        data=DATA,
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
    return fine_tuning_mini("blip-mini-filter", RETRIEVAL_MINI, steps=500, batch_size=256)


def blip_mini_vqa() -> BlipRun:
    """Fine-tune a pre-trained blip-mini to answer questions about emoji scenes (`--kind questions`).

    Source: BLIP section 5.3. Cost: half an hour. Expected: docs/results.md.
    """
    return fine_tuning_mini(
        "blip-mini-vqa", tasks.QuestionAnsweringConfig(label_smoothing=0.0), QUESTION_DATA, steps=2500
    )


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
    data = replace(DATA, max_text_length=48)
    return fine_tuning_mini("blip-mini-visdial", tasks.VisdialConfig(num_negatives=3), data, steps=900)


def blip_mini_video_retrieval() -> BlipRun:
    """Fine-tune a pre-trained blip-mini to match emoji videos with their captions (`--kind clips`).

    Source: BLIP section 5.6, which does this without training. Cost: 20 minutes. Expected: docs/results.md.
    """
    data = replace(DATA, num_frames=NUM_FRAMES)
    return fine_tuning_mini("blip-mini-video-retrieval", RETRIEVAL_MINI, data, steps=500)


def blip_mini_video_qa() -> BlipRun:
    """Fine-tune `blip-mini-vqa` to answer questions about emoji videos (`--kind clip-questions`).

    Source: BLIP section 5.6, which evaluates a model fine-tuned on VQA. Cost: 20 minutes. Expected: docs/results.md.
    """
    task, data = tasks.QuestionAnsweringConfig(label_smoothing=0.0), replace(QUESTION_DATA, num_frames=NUM_FRAMES)
    return fine_tuning_mini("blip-mini-video-qa", task, data, steps=500)


def fine_tuning_mini(name: str, task: tasks.BlipTaskConfig, data: DataConfig = DATA, **training: Any) -> BlipRun:
    """A fine-tuning of blip-mini, at half the learning rates of its pre-training; `training` changes more."""
    slower = {"learning_rate": 5e-4, "muon_learning_rate": 2e-3, "warmup_steps": 50, "min_learning_rate": 1e-6}
    return blip_mini().derive(name, model=None, data=data, task=task, training=mini_training(**{**slower, **training}))


def blip2_mini_opt() -> LanguageRun:
    """Train a tiny OPT on documents of emoji scenes: captions, questions and answers, no images.

    Source: OPT; its lines end with a line break, as OPT's texts do in BLIP-2 (say so with --language.end-of-text).
    Cost: twenty minutes. Expected: docs/results.md.
    """
    return LanguageRun(
        recipe="blip2-mini-opt",
        shape=LanguageShape(architecture="opt"),
        vocab_size=800,
        data=DataConfig(),
        task=tasks.LanguagePretrainingConfig(),
        training=mini_training(steps=2000),
        out="runs/blip2-mini-opt",
    )


def blip2_mini_t5() -> LanguageRun:
    """Train a tiny T5 on documents of emoji scenes, to continue a prefix: prefix language modelling.

    Source: BLIP-2 section 3.3, with T5 1.1. Cost: twenty minutes. Expected: docs/results.md.
    """
    return blip2_mini_opt().derive("blip2-mini-t5", shape=LanguageShape(architecture="t5", num_layers=3))


def blip2_mini_stage1() -> Blip2Run:
    """Stage 1 of BLIP-2 at the size of a laptop: ITC + ITM + ITG, a new Q-Former on a frozen ViT.

    Source: BLIP-2 section 3.2. Cost: six minutes. Expected: docs/results.md.
    """
    qformer = QFormerConfig(
        num_queries=8, hidden_dim=160, num_layers=4, num_heads=4, mlp_dim=640, max_positions=48, dropout=0.0
    )
    return Blip2Run(
        recipe="blip2-mini-stage1",
        vision=ImageEncoderSource(source="openblip-mini"),
        qformer=qformer,
        embed_dim=128,
        vocab_size=1000,
        data=DataConfig(),
        task=tasks.Blip2Stage1Config(),
        training=mini_training(steps=STAGE1_STEPS),
        out="runs/blip2-mini-stage1",
    )


def blip2_mini_stage2_opt() -> Blip2Run:
    """Stage 2 of BLIP-2 at the size of a laptop, from stage 1 to a tiny frozen OPT (`blip2-mini-opt`).

    Source: BLIP-2 section 3.3. Cost: three minutes. Expected: docs/results.md.
    """
    return Blip2Run(
        recipe="blip2-mini-stage2-opt",
        language=LanguageModelSource(end_of_text="\n"),
        vocab_size=1000,
        data=DataConfig(),
        task=tasks.Blip2Stage2Config(),
        training=mini_training(steps=STAGE2_STEPS),
        out="runs/blip2-mini-stage2-opt",
    )


def blip2_mini_stage2_t5() -> Blip2Run:
    """Stage 2 of BLIP-2 at the size of a laptop, from stage 1 to a tiny frozen T5 (`blip2-mini-t5`).

    Source: BLIP-2 section 3.3. Cost: three minutes. Expected: docs/results.md.
    """
    return blip2_mini_stage2_opt().derive(
        "blip2-mini-stage2-t5",
        language=LanguageModelSource(),
        prompt="",  # its decoder has learned to continue a prefix, or to write a whole line after none
        question_prompt="Question: {} Short answer:",
    )


def blip2_mini_scratch_opt() -> Blip2Run:
    """Stage 2 without stage 1, to a tiny frozen OPT: the comparison of the paper's Figure 5.

    Source: BLIP-2 section 4.1, effect of representation learning. It takes as many operations as both stages together.
    Cost: twenty minutes. Expected: docs/results.md.
    """
    return _scratch("blip2-mini-scratch-opt", blip2_mini_stage2_opt())


def blip2_mini_scratch_t5() -> Blip2Run:
    """Stage 2 without stage 1, to a tiny frozen T5: otherwise as `blip2-mini-scratch-opt`.

    Source: BLIP-2 section 4.1. Cost: twenty minutes. Expected: docs/results.md.
    """
    return _scratch("blip2-mini-scratch-t5", blip2_mini_stage2_t5())


def _scratch(name: str, stage2: Blip2Run) -> Blip2Run:
    stage1, training = blip2_mini_stage1(), replace(stage2.training, steps=SCRATCH_STEPS)
    return stage2.derive(name, vision=stage1.vision, qformer=stage1.qformer, training=training)


def mini_training(**changes: Any) -> TrainingConfig:
    """How all mini models are trained, language models included: batches of 64, AdamW and Muon."""
    rates = {"learning_rate": 1e-3, "muon_learning_rate": 4e-3, "warmup_steps": 100, "min_learning_rate": 1e-5}
    settings = {"batch_size": 64, **rates, **changes}
    return TrainingConfig(beta2=0.98, clip_norm=1.0, checkpoint_every=100, **settings)
