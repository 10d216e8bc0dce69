"""vqa: the paper's fine-tuning for visual question answering, on VQAv2 and Visual Genome."""

from openblip.recipes.fine_tuning import fine_tuning
from openblip.recipes.run import Run
from openblip.tasks.config import QuestionAnsweringConfig

EPOCHS = 10
QUESTIONS = 443_757 + 214_354 + 1_445_322  # VQAv2 train and val, Visual Genome 1.2
STEPS_PER_EPOCH = QUESTIONS // 256


def vqa() -> Run:
    """Fine-tune a pre-trained BLIP to answer questions, at 480 pixels on VQAv2 and Visual Genome.

    Source: BLIP (arXiv 2201.12086) section 5.3, Table 14. 10 epochs at a joint batch of 256; cosine from 2e-5
    to 0, no warm-up; stochastic depth 0.1 in the image encoder; an answer's loss is weighted by the share of
    annotators who gave it, that of Visual Genome's by 0.2. Encoder and decoder start from the same weights
    and are trained apart, as in the released code.

    Cost: not in the paper; about a day on 8 GPUs.
    Expected (paper, Table 8, VQAv2 test-dev/test-std, answers ranked): 77.54/77.62 from blip-base on 14M
    bootstrapped pairs, 78.24/78.17 on 129M.

    Command, one node of 8 GPUs (32 * 8 = 256 questions a step):
        torchrun --nproc-per-node 8 -m openblip train vqa --init runs/blip-base/model
            --data.source vqa_train.json,vqa_val.json,vg_qa.json --data.images images --out runs/vqa
    Evaluate by ranking the 3,128 answers that the authors distribute, or by writing:
        openblip evaluate vqa --model runs/vqa/model --data vqa_test.json --images images
            --answers answer_list.json --results submission.json

    For OK-VQA and A-OKVQA start from this model, with their own questions as the source; LAVIS does so with a
    learning rate of 1e-5 for a few epochs.

    Where this recipe deviates from the released code: the learning rate falls every step, not every epoch;
    bfloat16 autocast instead of float32; biases and norms are not weight-decayed; the last weights are kept.
    """
    return fine_tuning(
        "vqa",
        QuestionAnsweringConfig(label_smoothing=0.1),
        image_size=480,
        steps=EPOCHS * STEPS_PER_EPOCH,
        batch_size=32,
        learning_rate=2e-5,
        drop_path=0.1,
    )
