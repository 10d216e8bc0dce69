"""blip-large: the paper's ViT-L/16 pre-training."""

from dataclasses import replace

from openblip.models.config import BlipConfig, VisionConfig
from openblip.recipes.blip_base import EPOCHS, blip_base
from openblip.recipes.run import Run
from openblip.tasks.config import ContrastiveConfig, PretrainingConfig

# 14M images of the base recipe's sets, and a fifth of LAION's 115M
STEPS_PER_EPOCH = (14_000_000 + 115_000_000 // 5) // 2400


def blip_large() -> Run:
    """Pre-train BLIP with ViT-L/16 on 129M pairs (ITC + ITM + LM), as in the paper.

    Source: BLIP (arXiv 2201.12086) section 4.1; what is not said here is as in blip-base. ViT-L/16 from
    ImageNet-21k with drop path 0.1, the text side as in blip-base (768 wide).

    Data: the 14M of blip-base and LAION's 115M, a fifth of it per epoch: 37M pairs. One epoch at a joint
    batch of 2400 is 37,000,000 // 2400 = 15,416 steps, 20 epochs are 308,320 steps; the learning rate is
    multiplied by 0.85 after every epoch, alpha rises over the first two (30,832 steps).
    On the 14M alone, which the paper has no ViT-L for: --training.steps 116660 --training.decay-every 5833
    --task.contrastive.alpha-ramp-steps 11666.

    Cost: the paper used two nodes of 16 GPUs and gives no hours. 75 pairs per GPU; short of memory, add
    --model.vision.activation-checkpointing True.
    Expected (paper, Table 1, COCO TR@1/IR@1 fine-tuned, COCO CIDEr, NoCaps CIDEr): 80.6/64.1, 135.5, 112.5 on
    the raw pairs; 82.4/65.1, 136.7, 113.2 on the bootstrapped, and 96.7/86.7 Flickr30K TR@1/IR@1 zero-shot.

    Command, on each of 4 nodes with 8 GPUs (75 * 32 = 2400 pairs a step):
        torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
            -m openblip train blip-large --data.source 'web/*.tar,human/*.tar,laion/*.tar' --out
            runs/blip-large

    Where the released code deviates from the paper: decay of 0.9 per epoch, not 0.85; RandAugment as in
    blip-base. Its batch of 75 per GPU is the paper's 2400.

    Where this recipe deviates from the released code: as blip-base; the ViT-L is Google's of ImageNet-21k,
    where the released code takes timm's vit_large_patch16_224_in21k; a mixture of sources is drawn from by
    its weights, where the released code reads one of five parts of LAION in turn, and everything else, each
    epoch.
    """
    base = blip_base()
    return replace(
        base,
        recipe="blip-large",
        model=BlipConfig(
            vision=VisionConfig(hidden_dim=1024, num_layers=24, num_heads=16, mlp_dim=4096, drop_path=0.1)
        ),
        vision_init="google/vit-large-patch16-224-in21k",
        task=PretrainingConfig(contrastive=ContrastiveConfig(alpha_ramp_steps=2 * STEPS_PER_EPOCH)),
        training=replace(
            base.training,
            steps=EPOCHS * STEPS_PER_EPOCH,
            decay_every=STEPS_PER_EPOCH,
            batch_size=75,
            learning_rate=2e-4,
        ),
        out="runs/blip-large",
    )
