"""The pre-training of BLIP's paper (arXiv 2201.12086, section 4.1), with ViT-B/16 and with ViT-L/16.

Both: 20 epochs; after every epoch the learning rate is multiplied by 0.85; alpha rises over the first two. The queue,
momentum, temperature and alpha are ALBEF's, read in the released code. The paper used two nodes of 16 GPUs and gives no
hours. Its 14M images are COCO, Visual Genome, SBU, CC3M and CC12M; 129M are these and LAION's 115M, a fifth of it in
each epoch.

Command, on each of 4 nodes with 8 GPUs:
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
        -m openblip train RECIPE --data.source DATA

On 8 GPUs add --training.accumulation 4, which mines ITM negatives among 720 pairs (blip-base) instead of 2880.

Where the released code deviates from the paper: decay of 0.9 per epoch, not 0.85; 75 pairs per GPU also with ViT-B,
which is 2400 on 32 GPUs, not 2880; RandAugment's Brightness and Sharpness do nothing at its magnitude of 5, which is
kept here.

Where these recipes deviate from the released code: 0.85 and 2880, as the paper; decay counts from the end of the
warm-up, not from step 0; alpha and decay follow steps, not epochs; bfloat16 autocast instead of float32; biases, norms
and the temperature are not weight-decayed; captions of the same image are positives in ITC and never negatives in ITM;
ITM negatives come from all GPUs, not from the pair's own; the queue starts empty, not with random vectors, and takes
any batch size; the momentum encoders run without dropout and move after the optimizer step, not before the next forward
pass; texts are padded to the longest of the batch, not to 30; a mixture of sources is drawn from by its weights, where
the released code reads one of five parts of LAION in turn, and everything else, each epoch.
"""

from dataclasses import replace

from openblip.data.config import Augmentation, DataConfig
from openblip.models.config import BlipConfig, VisionConfig
from openblip.recipes.blip_run import BlipRun
from openblip.tasks.config import ContrastiveConfig, PretrainingConfig
from openblip.training.config import TrainingConfig

_EPOCHS = 20
BASE_STEPS = 14_000_000 // 2880  # of one epoch
# 14M images of the sets that blip-base reads, and a fifth of LAION's 115M
LARGE_STEPS = (14_000_000 + 115_000_000 // 5) // 2400


def blip_base() -> BlipRun:
    """Pre-train BLIP with ViT-B/16 on 14M pairs (ITC + ITM + LM), as in the paper.

    Source: section 4.1. ViT from DeiT-B, text from bert-base-uncased, cross-attention random. An epoch at a joint batch
    of 2880 (90 * 32) is 14,000,000 // 2880 = 4,861 steps, 20 epochs are 97,220.

    DATA: 'web/*.tar,human/*.tar'. With LAION (129M) an epoch is 37M pairs: --training.steps 256940
    --training.decay-every 12847 --task.contrastive.alpha-ramp-steps 25694

    Cost: not in the paper; 252M parameters, 90 pairs per GPU. Expected (paper, Table 1, COCO TR@1/IR@1 fine-tuned,
    Flickr30K TR@1/IR@1 zero-shot, COCO CIDEr, NoCaps CIDEr): 78.4/60.7, 93.9/82.1, 127.8, 102.2 on the raw pairs;
    80.6/63.1, 94.8/84.9, 129.7, 105.1 on the bootstrapped. Losses itc/itm/lm of the authors on the bootstrapped 14M
    (BLIP issue 19): epoch 0 3.00/0.337/3.35, epoch 1 2.43/0.256/2.84, epoch 4 2.40/0.170/2.60, epoch 7 2.14/0.170/2.49.
    """
    return BlipRun(
        recipe="blip-base",
        model=BlipConfig(),
        tokenizer="bert-base-uncased",
        vision_init="facebook/deit-base-patch16-224",
        text_init="bert-base-uncased",
        data=DataConfig(augmentation=Augmentation(crop_scale=(0.2, 1.0)), num_workers=4),
        task=pretraining(BASE_STEPS),
        training=TrainingConfig(
            steps=_EPOCHS * BASE_STEPS,
            batch_size=90,
            learning_rate=3e-4,
            schedule="step_decay",
            decay_rate=0.85,
            decay_every=BASE_STEPS,
            min_learning_rate=1e-6,
            warmup_steps=3000,
            warmup_learning_rate=1e-6,
            weight_decay=0.05,
            checkpoint_every=1000,
        ),
        out="runs/blip-base",
    )


def blip_large() -> BlipRun:
    """Pre-train BLIP with ViT-L/16 on 129M pairs (ITC + ITM + LM), as in the paper.

    Source: section 4.1. ViT-L/16 from ImageNet-21k with drop path 0.1, Google's, where the released code takes timm's
    vit_large_patch16_224_in21k; the text side as in blip-base (768 wide). An epoch at a joint batch of 2400 (75 * 32)
    is 37,000,000 // 2400 = 15,416 steps, 20 epochs are 308,320.

    DATA: 'web/*.tar,human/*.tar,laion/*.tar'. On the 14M alone, which the paper has no ViT-L for: --training.steps
    116660 --training.decay-every 5833 --task.contrastive.alpha-ramp-steps 11666

    Cost: not in the paper; 75 pairs per GPU; short of memory, add --model.vision.activation-checkpointing True.
    Expected (paper, Table 1, COCO TR@1/IR@1 fine-tuned, COCO CIDEr, NoCaps CIDEr): 80.6/64.1, 135.5, 112.5 on the raw
    pairs; 82.4/65.1, 136.7, 113.2 on the bootstrapped, and 96.7/86.7 Flickr30K TR@1/IR@1 zero-shot.
    """
    base = blip_base()
    return base.derive(
        "blip-large",
        model=BlipConfig(
            vision=VisionConfig(hidden_dim=1024, num_layers=24, num_heads=16, mlp_dim=4096, drop_path=0.1)
        ),
        vision_init="google/vit-large-patch16-224-in21k",
        task=pretraining(LARGE_STEPS),
        training=replace(
            base.training, steps=_EPOCHS * LARGE_STEPS, decay_every=LARGE_STEPS, batch_size=75, learning_rate=2e-4
        ),
    )


def pretraining(steps_per_epoch: int) -> PretrainingConfig:
    """ITC, ITM and LM as in the paper; alpha rises over the first two epochs."""
    contrastive = ContrastiveConfig(queue_size=57600, momentum=0.995, alpha=0.4, alpha_ramp_steps=2 * steps_per_epoch)
    return PretrainingConfig(contrastive=contrastive, label_smoothing=0.1)
