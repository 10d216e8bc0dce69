"""blip-mini on the downstream tasks of BLIP, each on its kind of emoji scenes, from the pre-trained model.

Their scores stand in docs/results.md.
"""

from dataclasses import replace

from openblip.recipes.blip_mini import fine_tune_mini
from openblip.recipes.run import Run
from openblip.tasks.config import (
    ContrastiveConfig,
    NlvrConfig,
    QuestionAnsweringConfig,
    RetrievalConfig,
    VisdialConfig,
)

NUM_FRAMES = 4


def blip_mini_vqa() -> Run:
    """Fine-tune a pre-trained blip-mini to answer questions about emoji scenes (`--kind questions`).

    Source: BLIP section 5.3 at small scale. Cost: half an hour on one CPU core. Expected: docs/results.md.
    """
    return fine_tune_mini("blip-mini-vqa", QuestionAnsweringConfig(label_smoothing=0.0), steps=2500)


def blip_mini_nlvr() -> Run:
    """Fine-tune a blip-mini filter to judge statements about two emoji scenes (`--kind statements`).

    Source: BLIP section 5.4 at small scale. AdamW alone, and slowly: at first statements are coin tosses, and
    Muon, whose updates are as large without a signal, forgets the pre-training meanwhile.

    Cost: half an hour on one CPU core. Expected: docs/results.md.
    """
    run = fine_tune_mini("blip-mini-nlvr", NlvrConfig(), steps=4500)
    training = replace(run.training, batch_size=32, learning_rate=1.5e-4, muon_learning_rate=None)
    return replace(run, training=training)


def blip_mini_visdial() -> Run:
    """Fine-tune a pre-trained blip-mini to rank answers in dialogs about emoji scenes (`--kind dialogs`).

    Source: BLIP section 5.5 at small scale. The model has 48 positions: of a longer dialog it reads the end.
    Cost: 20 minutes on one CPU core. Expected: docs/results.md.
    """
    run = fine_tune_mini("blip-mini-visdial", VisdialConfig(num_negatives=3), steps=900)
    return replace(run, data=replace(run.data, max_text_length=48))


def blip_mini_video_retrieval() -> Run:
    """Fine-tune a pre-trained blip-mini to match emoji clips with their captions (`--kind clips`).

    Source: BLIP section 5.6, which does this without training, at small scale. Cost: 20 minutes on one
    CPU core. Expected: docs/results.md.
    """
    task = RetrievalConfig(contrastive=ContrastiveConfig(queue_size=2048, alpha_ramp_steps=100))
    run = fine_tune_mini("blip-mini-video-retrieval", task, steps=500)
    return replace(run, data=replace(run.data, num_frames=NUM_FRAMES))


def blip_mini_video_qa() -> Run:
    """Fine-tune `blip-mini-vqa` to answer questions about emoji clips (`--kind clip-questions`).

    Source: BLIP section 5.6, which asks a model fine-tuned on VQA, at small scale. Cost: 20 minutes on one
    CPU core. Expected: docs/results.md.
    """
    run = fine_tune_mini("blip-mini-video-qa", QuestionAnsweringConfig(label_smoothing=0.0), steps=500)
    return replace(run, data=replace(run.data, num_frames=NUM_FRAMES))
