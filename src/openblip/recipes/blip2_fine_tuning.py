"""The fine-tunings of BLIP-2's paper (arXiv 2301.12597), and training on instructions as InstructBLIP does it.

All of them: AdamW with betas 0.9 and 0.999, weight decay 0.05; 1k steps of warm-up to 1e-5, then a cosine to 0. An
image encoder that is trained is trained at the recipe's resolution; the language model stays frozen. Costs that the
paper does not give are for 16 GPUs of 40 GB.

Command, on each of 2 nodes with 8 GPUs; each recipe names what it STARTs from and its DATA:
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
        -m openblip train RECIPE --init START DATA

On one node of 8 GPUs add --training.accumulation 2; for retrieval, negatives then come from fewer pairs. A Q-Former
that reads questions or instructions needs the weights with which it reads text; stage 2 has dropped them, so they come
from stage 1, by --text-branch.

Where these recipes deviate from the released code: layer-wise decay works; bfloat16 autocast over float32 weights
instead of a float16 encoder, which turns to NaN when it is trained; biases and norms are not weight-decayed; the last
weights are kept.
"""

from typing import Any

from openblip.data.config import DataConfig
from openblip.recipes.blip2_pretraining import VIEWS
from openblip.recipes.blip2_run import Blip2Run
from openblip.recipes.blip_fine_tuning import QUESTIONS
from openblip.tasks import config as tasks
from openblip.training.config import TrainingConfig

_EPOCHS = 5
CAPTIONS = 566_747  # in COCO's Karpathy training split
PROMPT = "a photo of"


def blip2_caption() -> Blip2Run:
    """Fine-tune a BLIP-2 of stage 2 to caption, at 364 pixels on COCO, its image encoder too.

    Source: section 4.2 and appendix. 5 epochs over 566,747 captions at a joint batch of 256 (16 * 16): 566,747 // 256 =
    2,213 steps each, 11,065 together; every block of the image encoder at 0.95 of the learning rate of the block above
    (without effect in the released code, whose schedule overwrites it). The prompt is "a photo of".

    Cost: about a day. Expected (paper, Table 3, NoCaps CIDEr / COCO BLEU@4 and CIDEr): OPT-2.7B 119.7 / 43.7 and 145.8,
    OPT-6.7B 121.0 / 43.5 and 145.2, FlanT5-XL 121.6 / 42.4 and 144.5; decode with a beam of 5, 8 to 30 tokens.

    START: runs/blip2-stage2-opt/model. DATA: --data.source 'dataset_coco.json#train' --data.images coco
    """
    return _fine_tuning(
        "blip2-caption",
        tasks.Blip2Stage2Config(prompt=PROMPT),
        image_size=364,
        steps=_EPOCHS * (CAPTIONS // 256),
        batch_size=16,
        layer_decay=0.95,
    )


def blip2_vqa() -> Blip2Run:
    """Fine-tune a BLIP-2 of stage 2 to answer questions, at 490 pixels, on VQAv2 and Visual Genome.

    Source: section 4.3 and appendix. 5 epochs at a joint batch of 128 (8 * 16), layer-wise decay 0.95 (0.9 with
    OPT-6.7B: --training.layer-decay 0.9). The Q-Former reads the question beside its queries. The released code has
    nothing for this task. What the paper leaves open is done as in BLIP: all answers of a question are trained on, each
    weighted by the share of annotators who gave it, Visual Genome's by 0.2.

    Cost: days. Expected (paper, Table 4, VQAv2 test-dev/test-std): FlanT5-XL 81.55/81.66, OPT-2.7B 81.59/81.74,
    OPT-6.7B 82.19/82.30; decode with a beam of 5 and length penalty -1. People who tried with the released code report
    less (LAVIS issue 460: 76.58).

    START: runs/blip2-stage2-t5/model --text-branch runs/blip2-stage1/model
    DATA: --data.source vqa_train.json,vqa_val.json,vg_qa.json --data.images images
    """
    return _fine_tuning(
        "blip2-vqa",
        tasks.PromptedAnsweringConfig(),
        image_size=490,
        steps=_EPOCHS * (QUESTIONS // 128),
        batch_size=8,
        layer_decay=0.95,
        max_text_length=35,
    )


def blip2_retrieval() -> Blip2Run:
    """Fine-tune a BLIP-2 of stage 1 to retrieve (ITC + ITM + ITG), at 364 pixels on COCO, its encoder too.

    Source: section 4.4 and appendix. 5 epochs over 566,747 captions at a joint batch of 224 (14 * 16): 566,747 // 224 =
    2,530 steps each, 12,650 together; for ViT-L the learning rate rises to 5e-6 (--training.learning-rate 5e-6). There
    is no layer-wise decay, which the paper does not mention here. Otherwise as `blip2-stage1`.

    Cost: about a day. Expected (paper, Table 5, COCO TR@1/IR@1 and Flickr30K zero-shot, 128 candidates re-ranked by
    ITM): ViT-g 85.4/68.3 and 97.6/89.7, ViT-L 83.5/66.3 and 96.9/88.6; without ITG 84.5/67.2 on COCO (Table 6), which
    is --task.no-itg.

    START: runs/blip2-stage1/model. DATA: --data.source 'dataset_coco.json#train' --data.images coco
        openblip evaluate retrieval --model runs/blip2-retrieval/model --data 'dataset_coco.json#test'
            --images coco --rerank 128
    """
    return _fine_tuning(
        "blip2-retrieval", tasks.Blip2Stage1Config(), image_size=364, steps=_EPOCHS * (CAPTIONS // 224), batch_size=14
    )


def blip2_instruct() -> Blip2Run:
    """Train a BLIP-2 of stage 2 on instructions and conversations, its Q-Former reading them too.

    Source: InstructBLIP (arXiv 2305.06500) sections 2.2 to 2.6: 60k steps at a joint batch of 192 (12 * 16), warm-up
    from 1e-8; image encoder and language model frozen, 224 pixels.

    Data: samples with an instruction and its answer, several turns, or LLaVA's conversations (docs/data.md).
    InstructBLIP mixes public sets with probabilities in proportion to the square roots of their sizes, and turns them
    into instructions by hand-written templates. Neither is part of this recipe: --data.source gives the weights of the
    mixture and the texts.

    Cost: InstructBLIP took a day and a half on 16 A100 of 40 GB. Expected (InstructBLIP, Table 1, zero-shot,
    FlanT5-XL): NoCaps CIDEr 119.9, Flickr30K CIDEr 84.5, GQA accuracy 48.4.

    START: runs/blip2-stage2-t5/model --text-branch runs/blip2-stage1/model
    DATA: --data.source llava_instruct_150k.json --data.images train2017

    The paper leaves open how several turns are trained on. Here each answer follows all turns before it, joined as
    `chat` joins them, and the Q-Former reads the instruction of its turn. An instruction is put as a question,
    "Question: {} Answer:", as stage 2 is used; InstructBLIP puts it without a frame, which is --question-prompt "{}".
    Texts longer than 256 tokens, prompt included, are cut.
    """
    return _fine_tuning(
        "blip2-instruct",
        tasks.InstructionConfig(),
        steps=60_000,
        batch_size=12,
        max_text_length=128,
        max_text_tokens=256,
        warmup_learning_rate=1e-8,
    )


def _fine_tuning(
    name: str,
    task: tasks.Blip2TaskConfig,
    *,
    image_size: int | None = None,
    max_text_length: int = 32,
    max_text_tokens: int | None = None,
    **training: Any,
) -> Blip2Run:
    """With an image size the encoder is trained at it. A batch size in `training` is that of each of 16 processes."""
    trains_vision = image_size is not None
    return Blip2Run(
        recipe=name,
        train_vision=trains_vision,
        frozen_dtype="bfloat16",
        image_size=image_size,
        data=DataConfig(augmentation=VIEWS, num_workers=4, max_text_length=max_text_length),
        task=task,
        training=TrainingConfig(
            **{
                "learning_rate": 1e-5,
                "schedule": "cosine",
                "min_learning_rate": 0.0,
                "warmup_steps": 1000,
                "warmup_learning_rate": 1e-6,
                "weight_decay": 0.05,
                "activation_checkpointing": trains_vision,
                **training,
            }
        ),
        prompt=PROMPT,
        max_text_tokens=max_text_tokens,
        out=f"runs/{name}",
    )
