"""blip2-stage1 and blip2-stage2: the two stages in which BLIP-2's paper (arXiv 2301.12597) pre-trains a Q-Former.

Both: AdamW with betas 0.9 and 0.98, weight decay 0.05; 2k steps of warm-up to 1e-4, then a cosine (its author, LAVIS
issue 243); 224 pixels, random crops and flips, no RandAugment.

Data: the 129M images of BLIP, each with its web text and, of ten captions that BLIP-L has written, the two that CLIP-L
finds most similar; one text is drawn at each step. docs/tasks.md says how `openblip capfilt` makes such captions.

Command, on each of 2 nodes with 8 GPUs; stage 2 starts from stage 1:
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
        -m openblip train RECIPE --data.source 'pairs/*.tar' [--init runs/blip2-stage1/model]

In stage 2, short of memory, add --training.shard-frozen, which divides the language model among the GPUs.

Where the released code deviates from the paper: it trains on COCO and Visual Genome alone, ten epochs of batches of 100
a GPU (stage 2: 64), with 5,000 steps of warm-up and beta2 0.999.

Where these recipes deviate from the released code: as the paper in these points; bfloat16 autocast instead of float16
with loss scaling; biases, norms and the temperature are not weight-decayed; texts are padded to the longest of the
batch.
"""

from dataclasses import replace

from openblip.data.config import Augmentation, DataConfig
from openblip.models.config import QFormerConfig
from openblip.recipes.blip2_run import Blip2Run, ImageEncoderSource, LanguageModelSource
from openblip.tasks.config import Blip2Stage1Config, Blip2Stage2Config
from openblip.training.config import TrainingConfig

# Pre-training's crops are the released code's: the paper names no scale, and no RandAugment.
VIEWS = Augmentation(crop_scale=(0.5, 1.0), num_ops=0)
EVA_G = "Salesforce/blip2-itm-vit-g"  # only its image encoder is read, without the last block
CLIP_L = "openai/clip-vit-large-patch14"


def blip2_stage1() -> Blip2Run:
    """Pre-train a Q-Former around a frozen EVA-CLIP ViT-g/14 on 129M images with ITC, ITM and ITG, as the paper.

    Source: sections 3.2 and 3.4. 250k steps at a joint batch of 1680 (105 * 16); a cosine to 1e-5. The Q-Former's
    self-attention, both feed-forwards and word embeddings start from bert-base-uncased, queries and cross-attention
    from random weights. The encoder is frozen in float16 and read at its second-last layer.

    Cost: in the paper under six days on 16 A100 of 40 GB, both stages with the largest models under nine. Expected
    (paper, Tables 1 and 5): Flickr30K zero-shot TR@1/IR@1 97.6/89.7, after fine-tuning on COCO (`blip2-retrieval`)
    85.4/68.3 there.

    Where this recipe deviates from the released code: captions of the same image are positives in ITC and never
    negatives in ITM; gradients of ITC reach the keys of all processes; the temperature is learned as its logarithm.
    """
    return Blip2Run(
        recipe="blip2-stage1",
        vision=ImageEncoderSource(source=EVA_G, dtype="float16"),
        qformer=QFormerConfig(),
        tokenizer="bert-base-uncased",
        text_init="bert-base-uncased",
        data=DataConfig(augmentation=VIEWS, num_workers=4, max_text_length=32),
        task=Blip2Stage1Config(),
        training=paper_training(steps=250_000, batch_size=105, min_learning_rate=1e-5),
        out="runs/blip2-stage1",
    )


def blip2_stage1_vit_l() -> Blip2Run:
    """`blip2-stage1` around a frozen CLIP ViT-L/14, with a joint batch of 2320 (145 * 16).

    Source: section 3.4. Cost: less than `blip2-stage1`; the paper does not say. Expected (paper, Table 5, after
    `blip2-retrieval`): COCO TR@1/IR@1 83.5/66.3, Flickr30K zero-shot 96.9/88.6.
    """
    run = blip2_stage1()
    return run.derive(
        "blip2-stage1-vit-l",
        vision=ImageEncoderSource(source=CLIP_L, dtype="float16"),
        training=replace(run.training, batch_size=145),
    )


def blip2_stage2_opt() -> Blip2Run:
    """Pre-train the Q-Former of stage 1 to be read by a frozen OPT-2.7B, as in the paper.

    Source: sections 3.3 and 3.4. 80k steps at a joint batch of 1920 (120 * 16); a cosine to 5e-5. The Q-Former loses
    its text side and ITC, ITM and ITG; a new linear layer takes the queries to the width of the language model, which
    writes the caption and a line break. For OPT-6.7B: --language.source facebook/opt-6.7b.

    Cost: in the paper under three days on 16 A100 of 40 GB with the largest models. Expected (paper, Tables 2 and 3,
    zero-shot VQAv2 test-dev; after `blip2-caption` NoCaps and COCO CIDEr): 52.3; 119.7 and 145.8. With OPT-6.7B 52.6;
    121.0 and 145.2. On ViT-L with OPT-2.7B VQAv2 49.7.

    Where this recipe deviates from the released code: OPT computes in bfloat16; a caption that is too long keeps its
    line break; what OPT begins every text with is not predicted.
    """
    language = LanguageModelSource(source="facebook/opt-2.7b", end_of_text="\n", dtype="bfloat16")
    return _stage2("blip2-stage2-opt", language, batch_size=120, question_prompt="Question: {} Answer:")


def blip2_stage2_t5() -> Blip2Run:
    """Pre-train the Q-Former of stage 1 to be read by a frozen FlanT5-XL, as in the paper.

    Source: sections 3.3 and 3.4. As `blip2-stage2-opt` with a joint batch of 1520 (95 * 16) and prefix language
    modelling, of which the released code leaves out the data side: the encoder reads the queries and the first words of
    a caption, the decoder writes the others; the caption is cut at random in its first half (its author, LAVIS issue
    139). For FlanT5-XXL: --language.source google/flan-t5-xxl.

    Cost: in the paper under three days on 16 A100 of 40 GB with FlanT5-XXL. Expected (paper, Tables 2 and 3, zero-shot
    VQAv2 test-dev; after `blip2-caption` NoCaps and COCO CIDEr): 63.0; 121.6 and 144.5. With FlanT5-XXL VQAv2 65.0. On
    ViT-L with FlanT5-XL 62.3.

    Where this recipe deviates from the released code: FlanT5 keeps its own activation, which the released code
    exchanges for an exact GELU.
    """
    language = LanguageModelSource(source="google/flan-t5-xl", dtype="bfloat16")
    return _stage2("blip2-stage2-t5", language, batch_size=95, question_prompt="Question: {} Short answer:")


def _stage2(name: str, language: LanguageModelSource, *, batch_size: int, question_prompt: str) -> Blip2Run:
    return Blip2Run(
        recipe=name,
        frozen_dtype="float16",
        language=language,
        data=DataConfig(augmentation=VIEWS, num_workers=4),
        task=Blip2Stage2Config(),
        training=paper_training(steps=80_000, batch_size=batch_size, min_learning_rate=5e-5),
        question_prompt=question_prompt,
        out=f"runs/{name}",
    )


def paper_training(*, steps: int, batch_size: int, min_learning_rate: float) -> TrainingConfig:
    """AdamW and schedule of both stages (BLIP-2 section 3.4). `batch_size` is for one of 16 processes."""
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
