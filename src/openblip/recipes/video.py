"""video-retrieval and video-qa: fine-tuning on clips, where the paper uses its image models as they are."""

from openblip.recipes.fine_tuning import fine_tuning
from openblip.recipes.run import Run
from openblip.tasks.config import ContrastiveConfig, QuestionAnsweringConfig, RetrievalConfig

RETRIEVAL_EPOCHS, CAPTIONS_PER_EPOCH = 5, 180_000 // 64  # MSRVTT 1k-A: 9,000 clips with 20 captions each
QA_EPOCHS, QUESTIONS_PER_EPOCH = 5, 158_581 // 64  # MSRVTT-QA


def video_retrieval() -> Run:
    """Fine-tune a BLIP that retrieves images to retrieve clips, 8 frames each, on MSRVTT.

    Source: BLIP (arXiv 2201.12086) section 5.6 for the frames, whose tokens are concatenated without any
    notion of their order; the paper evaluates its COCO retrieval model as it is. The settings are those of
    COCO retrieval (Table 14) at a joint batch of 64, and untried.

    Cost: unknown; hours on 8 GPUs.
    Expected without this fine-tuning (paper, Table 10, MSRVTT text to video R@1/5/10): 43.3/65.6/74.7:
        openblip evaluate video-retrieval --model MODEL --data msrvtt_test.jsonl --images videos --rerank 128

    Command, one node of 8 GPUs (8 * 8 = 64 clips a step):
        torchrun --nproc-per-node 8 -m openblip train video-retrieval --init runs/filter/model
            --data.source 'train_val_videodatainfo.json#train' --data.images videos --out runs/video-retrieval
    """
    contrastive = ContrastiveConfig(
        queue_size=57600, momentum=0.995, alpha=0.4, alpha_ramp_steps=CAPTIONS_PER_EPOCH
    )
    return fine_tuning(
        "video-retrieval",
        RetrievalConfig(contrastive=contrastive),
        image_size=384,
        steps=RETRIEVAL_EPOCHS * CAPTIONS_PER_EPOCH,
        batch_size=8,
        learning_rate=1e-5,
        num_frames=8,
    )


def video_qa() -> Run:
    """Fine-tune a BLIP that answers questions about images to answer them about clips, on MSRVTT-QA.

    Source: BLIP (arXiv 2201.12086) section 5.6: 16 frames. The paper evaluates its VQA model as it is; the
    settings are those of VQA (Table 14) at a joint batch of 64, and untried.

    Cost: unknown; hours on 8 GPUs.
    Expected without this fine-tuning (paper, Table 11): MSRVTT-QA 19.2, MSVD-QA 35.2:
        openblip evaluate video-qa --model MODEL --data test_qa.json --images videos

    Command, one node of 8 GPUs (8 * 8 = 64 clips a step):
        torchrun --nproc-per-node 8 -m openblip train video-qa --init runs/vqa/model
            --data.source train_qa.json --data.images videos --out runs/video-qa
    """
    return fine_tuning(
        "video-qa",
        QuestionAnsweringConfig(label_smoothing=0.1),
        image_size=384,
        steps=QA_EPOCHS * QUESTIONS_PER_EPOCH,
        batch_size=8,
        learning_rate=2e-5,
        num_frames=16,
        drop_path=0.1,
    )
