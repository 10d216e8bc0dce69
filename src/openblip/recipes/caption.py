"""caption: the paper's COCO caption fine-tuning, which is also how CapFilt's captioner is made."""

from dataclasses import replace

from openblip.data.config import DataConfig
from openblip.data.transforms import Augmentation
from openblip.recipes.run import Run
from openblip.tasks.config import CaptioningConfig
from openblip.training.config import TrainingConfig

EPOCHS = 5
STEPS_PER_EPOCH = 566_747 // 256  # captions of COCO's Karpathy training split
PROMPT_TOKENS = 3  # "a picture of"


def caption() -> Run:
    """Fine-tune a pre-trained BLIP to caption (LM alone), at 384 pixels on COCO, as in the paper.

    Source: BLIP (arXiv 2201.12086) sections 3.3 and 5.2, Table 14. 5 epochs over 566,747 captions at a joint
    batch of 256: 566,747 // 256 = 2,213 steps each, 11,065 together; cosine from 1e-5 to 0, no warm-up.
    Position embeddings are interpolated from the checkpoint's resolution once, at the start.

    Cost: not in the paper; hours on 8 GPUs.
    Expected (paper, Table 1, COCO / NoCaps CIDEr): 127.8 / 102.2 from blip-base on 14M raw pairs, 129.7 /
    105.1 on the bootstrapped; decode with a beam of 3, at most 20 and at least 5 tokens.

    Command, one node of 8 GPUs (32 * 8 = 256 pairs a step):
        torchrun --nproc-per-node 8 -m openblip train caption --init runs/blip-base/model
            --data.source captions_train.json --data.images coco --out runs/caption
    On 4 nodes of 8 GPUs, as for blip-base, add --training.batch-size 8; on one GPU --training.accumulation 8.

    Where the released code deviates from the paper: nowhere that is known.

    Where this recipe deviates from the released code: the learning rate falls every step, not every epoch;
    bfloat16 autocast instead of float32; biases and norms are not weight-decayed; an image is drawn with one
    of its captions at random where a source has several per image; a caption is cut so that prompt and
    caption together have 40 tokens, and the last token kept is always [SEP]; the last weights are kept, where
    the released code keeps those of the epoch that scored best on the validation split.
    """
    return Run(
        recipe="caption",
        init="",
        model=None,
        vocab_size=30524,
        tokenizer=None,
        image_size=384,
        data=DataConfig(
            source="",
            augmentation=Augmentation(crop_scale=(0.5, 1.0)),
            num_workers=4,
            max_text_length=40 - PROMPT_TOKENS,
        ),
        task=CaptioningConfig(prompt="a picture of ", label_smoothing=0.1),
        training=TrainingConfig(
            steps=EPOCHS * STEPS_PER_EPOCH,
            batch_size=32,
            learning_rate=1e-5,
            schedule="cosine",
            min_learning_rate=0.0,
            weight_decay=0.05,
        ),
        out="runs/caption",
    )


def caption_large() -> Run:
    """`caption` for ViT-L: the same with a learning rate of 2e-6 (Table 14).

    Source: BLIP (arXiv 2201.12086) section 5.2. Cost: not in the paper; about three times that of `caption`.
    Expected (paper, Table 1, COCO / NoCaps CIDEr): 135.5 / 112.5 from blip-large on 129M raw pairs,
    136.7 / 113.2 on the bootstrapped.
    """
    run = caption()
    training = replace(run.training, learning_rate=2e-6)
    return replace(run, recipe="caption-large", training=training, out="runs/caption-large")
