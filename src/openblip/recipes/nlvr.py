"""nlvr: the paper's fine-tuning for natural language visual reasoning, on NLVR2."""

from openblip.recipes.fine_tuning import fine_tuning
from openblip.recipes.run import Run
from openblip.tasks.config import NlvrConfig

EPOCHS = 15
STEPS_PER_EPOCH = 86_373 // 256  # statements of the training split


def nlvr() -> Run:
    """Fine-tune a pre-trained BLIP to judge statements about two images, at 384 pixels on NLVR2.

    Source: BLIP (arXiv 2201.12086) section 5.4, Table 14. 15 epochs at a joint batch of 256; cosine from 3e-5
    to 0, no warm-up; stochastic depth 0.1; pictures change sides every other time, and so do the words left
    and right.

    Cost: not in the paper; hours on 8 GPUs.
    Expected (paper, Table 8, dev/test-P): 82.67/82.30 from blip-base on 14M bootstrapped pairs, 82.48/83.08
    on 129M.

    Command, one node of 8 GPUs (32 * 8 = 256 statements a step):
        torchrun --nproc-per-node 8 -m openblip train nlvr --init runs/blip-base/model
            --data.source train.json --data.images nlvr2 --out runs/nlvr

    Where this recipe deviates from the released code: the layer that merges both images starts as their mean,
    not from random weights; the learning rate falls every step, not every epoch; bfloat16 autocast instead of
    float32; biases and norms are not weight-decayed; the last weights are kept.
    """
    return fine_tuning(
        "nlvr",
        NlvrConfig(),
        image_size=384,
        steps=EPOCHS * STEPS_PER_EPOCH,
        batch_size=32,
        learning_rate=3e-5,
        drop_path=0.1,
    )
