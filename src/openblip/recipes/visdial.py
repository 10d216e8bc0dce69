"""visdial: the paper's fine-tuning for visual dialog, on VisDial v1.0."""

from openblip.data.prompts import MAX_DIALOG_TOKENS
from openblip.recipes.fine_tuning import fine_tuning
from openblip.recipes.run import Run
from openblip.tasks.config import VisdialConfig

EPOCHS = 20
STEPS_PER_EPOCH = 123_287 // 240  # dialogs of the training split; a step sees one round of each


def visdial() -> Run:
    """Fine-tune a pre-trained BLIP to rank the answers of dialogs, at 384 pixels on VisDial v1.0.

    Source: BLIP (arXiv 2201.12086) section 5.5, Figure 5c, Table 14. 20 epochs at a joint batch of 240;
    cosine from 2e-5 to 0, no warm-up. The authors released no code for this task: how a dialog becomes a text
    (`openblip.data.prompts`), how many wrong answers stand beside the right one (3), and that an epoch is one
    round of each dialog are choices of this recipe.

    Cost: not in the paper; hours on 8 GPUs.
    Expected (paper, Table 9, val): MRR 69.41, R@1 56.44.

    Command, one node of 8 GPUs (30 * 8 = 240 dialogs a step):
        torchrun --nproc-per-node 8 -m openblip train visdial --init runs/blip-base/model
            --data.source visdial_1.0_train.json --data.images coco --out runs/visdial
    """
    return fine_tuning(
        "visdial",
        VisdialConfig(num_negatives=3),
        image_size=384,
        steps=EPOCHS * STEPS_PER_EPOCH,
        batch_size=30,
        learning_rate=2e-5,
        max_text_length=MAX_DIALOG_TOKENS,
    )
