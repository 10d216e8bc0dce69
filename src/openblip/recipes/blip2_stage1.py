"""blip2-stage1: the paper's representation learning, a Q-Former around a frozen image encoder."""

from dataclasses import replace

from openblip.data.config import DataConfig
from openblip.data.transforms import Augmentation
from openblip.models.config import QFormerConfig
from openblip.recipes.blip2_run import Blip2Run, ImageEncoderSource
from openblip.tasks.config import Blip2Stage1Config
from openblip.training.config import TrainingConfig

# Pre-training's crops are the released code's: the paper names no scale, and no RandAugment.
VIEWS = Augmentation(crop_scale=(0.5, 1.0), num_ops=0)
EVA_G = "Salesforce/blip2-itm-vit-g"  # of which only the image encoder is read, without its last block
CLIP_L = "openai/clip-vit-large-patch14"


def blip2_stage1() -> Blip2Run:
    """Pre-train a Q-Former around a frozen EVA-CLIP ViT-g/14 on 129M images (ITC + ITM + ITG), as the paper.

    Source: BLIP-2 (arXiv 2301.12597) sections 3.2 and 3.4. 250k steps at a joint batch of 1680; AdamW with
    betas 0.9 and 0.98, weight decay 0.05; 2k steps of warm-up to 1e-4, then a cosine to 1e-5 (its author,
    LAVIS issue 243); 224 pixels, random crops and flips, no RandAugment. The Q-Former's self-attention, both
    feed-forwards and words start from bert-base-uncased, queries and cross-attention from random weights. The
    encoder is frozen in float16 and read at its second-last layer.

    Data: the 129M images of BLIP, each with its web text and ten captions that BLIP-L has written, of which
    the two that CLIP-L finds most similar are kept; one is drawn at each step. docs/tasks.md says how
    `openblip capfilt` makes such captions.

    Cost: in the paper under six days on 16 A100 of 40 GB, both stages with the largest models under nine.
    Expected (paper, Tables 1 and 5): Flickr30K zero-shot TR@1/IR@1 97.6/89.7, after fine-tuning on COCO
    (`blip2-retrieval`) 85.4/68.3 there.

    Command, on each of 2 nodes with 8 GPUs (105 * 16 = 1680 pairs a step):
        torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
            -m openblip train blip2-stage1 --data.source 'pairs/*.tar' --out runs/blip2-stage1

    Where the released code deviates from the paper: it trains on COCO and Visual Genome alone, ten epochs of
    batches of 100 a GPU, with 5,000 steps of warm-up and beta2 0.999.

    Where this recipe deviates from the released code: as the paper there; captions of the same image are
    positives in ITC and never negatives in ITM; gradients of ITC reach the keys of all processes;
    the temperature is learned as its logarithm; bfloat16 autocast instead of float16 with loss scaling;
    biases, norms and the temperature are not weight-decayed; texts are padded to the longest of the batch.
    """
    return Blip2Run(
        recipe="blip2-stage1",
        init=None,
        vision=ImageEncoderSource(source=EVA_G, dtype="float16"),
        language=None,
        qformer=QFormerConfig(),
        vocab_size=30524,
        tokenizer="bert-base-uncased",
        text_init="bert-base-uncased",
        data=DataConfig(source="", augmentation=VIEWS, num_workers=4, max_text_length=32),
        task=Blip2Stage1Config(),
        training=paper_training(steps=250_000, batch_size=105, min_learning_rate=1e-5),
        out="runs/blip2-stage1",
    )


def blip2_stage1_vit_l() -> Blip2Run:
    """`blip2-stage1` around a frozen CLIP ViT-L/14, with a joint batch of 2320.

    Source: BLIP-2 section 3.4. Cost: less than `blip2-stage1`; the paper does not say.
    Expected (paper, Table 5, after `blip2-retrieval`): COCO TR@1/IR@1 83.5/66.3, Flickr30K zero-shot
    96.9/88.6.

    Command, on each of 2 nodes with 8 GPUs (145 * 16 = 2320 pairs a step): that of `blip2-stage1`, by this
    name.
    """
    run = blip2_stage1()
    return replace(
        run,
        recipe="blip2-stage1-vit-l",
        vision=ImageEncoderSource(source=CLIP_L, dtype="float16"),
        training=replace(run.training, batch_size=145),
        out="runs/blip2-stage1-vit-l",
    )


def paper_training(*, steps: int, batch_size: int, min_learning_rate: float) -> TrainingConfig:
    """AdamW and schedule of both stages (BLIP-2 section 3.4). batch_size: of each of 16 processes."""
    return TrainingConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=1e-4,
        schedule="cosine",
        min_learning_rate=min_learning_rate,
        warmup_steps=2000,
        weight_decay=0.05,
        beta1=0.9,
        beta2=0.98,
    )
