"""The fine-tunings of BLIP-2's paper, and training on instructions as InstructBLIP does it."""

from openblip.data.config import DataConfig
from openblip.recipes.blip2_pretraining import VIEWS
from openblip.recipes.blip2_run import Blip2Run
from openblip.recipes.blip_fine_tuning import QUESTIONS
from openblip.tasks.config import (
    Blip2Stage1Config,
    Blip2Stage2Config,
    Blip2TaskConfig,
    InstructionConfig,
    PromptedAnsweringConfig,
)
from openblip.training.config import TrainingConfig

_EPOCHS = 5
CAPTIONS = 566_747  # in COCO's Karpathy training split
PROMPT = "a photo of"


def blip2_caption() -> Blip2Run:
    """Fine-tune a BLIP-2 of stage 2 to caption, at 364 pixels on COCO, its image encoder too.

    Source: BLIP-2 (arXiv 2301.12597) section 4.2 and appendix. 5 epochs over 566,747 captions at a joint
    batch of 256: 566,747 // 256 = 2,213 steps each, 11,065 together; AdamW with betas 0.9 and 0.999, weight
    decay 0.05; 1k steps of warm-up to 1e-5, then a cosine to 0; every block of the image encoder at 0.95 of
    the learning rate of the block above. The prompt is "a photo of"; the language model stays frozen.

    Cost: not in the paper; about a day on 16 GPUs of 40 GB. Expected (paper, Table 3, NoCaps CIDEr / COCO
    BLEU@4 and CIDEr): OPT-2.7B 119.7 / 43.7 and 145.8, OPT-6.7B 121.0 / 43.5 and 145.2, FlanT5-XL 121.6 /
    42.4 and 144.5; decode with a beam of 5, 8 to 30 tokens.

    Command, on each of 2 nodes with 8 GPUs (16 * 16 = 256 pairs a step):
        torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
            -m openblip train blip2-caption --init runs/blip2-stage2-opt/model
            --data.source 'dataset_coco.json#train' --data.images coco --out runs/blip2-caption
    On one node of 8 GPUs --training.accumulation 2.

    Where the released code deviates from the paper: its layer-wise decay has no effect, since the schedule
    overwrites it.

    Where this recipe deviates from the released code: the decay works; bfloat16 autocast over float32 weights
    instead of a float16 encoder, which turns to NaN when it is trained; biases and norms are not weight-
    decayed; the last weights are kept.
    """
    return _fine_tuning(
        "blip2-caption",
        Blip2Stage2Config(prompt=PROMPT),
        image_size=364,
        steps=_EPOCHS * (CAPTIONS // 256),
        batch_size=16,
        layer_decay=0.95,
    )


def blip2_vqa() -> Blip2Run:
    """Fine-tune a BLIP-2 of stage 2 to answer questions, at 490 pixels, on VQAv2 and Visual Genome.

    Source: BLIP-2 (arXiv 2301.12597) section 4.3 and appendix. 5 epochs at a joint batch of 128, 1k steps of
    warm-up to 1e-5, layer-wise decay 0.95 (0.9 with OPT-6.7B: --training.layer-decay 0.9), otherwise as
    `blip2-caption`. The Q-Former reads the question beside its queries; stage 2 has dropped the weights
    with which it reads text, so they come from stage 1, by --text-branch.

    Cost: not in the paper; days on 16 GPUs of 40 GB. Expected (paper, Table 4, VQAv2 test-dev/test-std):
    FlanT5-XL 81.55/81.66, OPT-2.7B 81.59/81.74, OPT-6.7B 82.19/82.30; decode with a beam of 5 and length
    penalty -1. People who tried with the released code report less (LAVIS issue 460: 76.58).

    Command, on each of 2 nodes with 8 GPUs (8 * 16 = 128 questions a step):
        torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
            -m openblip train blip2-vqa --init runs/blip2-stage2-t5/model --text-branch
            runs/blip2-stage1/model --data.source vqa_train.json,vqa_val.json,vg_qa.json --data.images images
            --out runs/blip2-vqa

    The released code has nothing for this task. What the paper leaves open is done as in BLIP: all answers of
    a question are trained on, each weighted by the share of annotators who gave it, Visual Genome's by 0.2.
    """
    return _fine_tuning(
        "blip2-vqa",
        PromptedAnsweringConfig(),
        image_size=490,
        steps=_EPOCHS * (QUESTIONS // 128),
        batch_size=8,
        layer_decay=0.95,
        max_text_length=35,
    )


def blip2_retrieval() -> Blip2Run:
    """Fine-tune a BLIP-2 of stage 1 to retrieve (ITC + ITM + ITG), at 364 pixels on COCO, its encoder too.

    Source: BLIP-2 (arXiv 2301.12597) section 4.4 and appendix. 5 epochs over 566,747 captions at a joint
    batch of 224: 566,747 // 224 = 2,530 steps each, 12,650 together; 1k steps of warm-up to 1e-5 (5e-6 for
    ViT-L: --training.learning-rate 5e-6), then a cosine to 0. Captions of the same image are all positive.

    Cost: not in the paper; about a day on 16 GPUs of 40 GB. Expected (paper, Table 5, COCO TR@1/IR@1 and
    Flickr30K zero-shot, 128 candidates re-ranked by ITM): ViT-g 85.4/68.3 and 97.6/89.7, ViT-L 83.5/66.3 and
    96.9/88.6; without ITG 84.5/67.2 on COCO (Table 6), which is --task.no-itg.

    Command, on each of 2 nodes with 8 GPUs (14 * 16 = 224 pairs a step):
        torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
            -m openblip train blip2-retrieval --init runs/blip2-stage1/model
            --data.source 'dataset_coco.json#train' --data.images coco --out runs/blip2-retrieval
        openblip evaluate retrieval --model runs/blip2-retrieval/model --data 'dataset_coco.json#test'
            --images coco --rerank 128
    With --training.accumulation the negatives come from fewer pairs.

    Where this recipe deviates from the released code: as `blip2-stage1` and `blip2-caption`; no layer-wise
    decay, which the paper does not mention here.
    """
    return _fine_tuning(
        "blip2-retrieval", Blip2Stage1Config(), image_size=364, steps=_EPOCHS * (CAPTIONS // 224), batch_size=14
    )


def blip2_instruct() -> Blip2Run:
    """Train a BLIP-2 of stage 2 on instructions and conversations, its Q-Former reading them too.

    Source: InstructBLIP (arXiv 2305.06500) sections 2.2 to 2.6: 60k steps at a joint batch of 192, 1k steps
    of warm-up from 1e-8 to 1e-5, then a cosine to 0, AdamW with betas 0.9 and 0.999 and weight decay 0.05;
    image encoder and language model frozen, 224 pixels. As in `blip2-vqa`, --text-branch names the
    checkpoint of stage 1.

    Data: samples with an instruction and its answer, several turns, or LLaVA's conversations (docs/data.md).
    InstructBLIP mixes public sets with probabilities in proportion to the square roots of their sizes, and
    turns them into instructions by hand-written templates. Neither is part of this recipe: --data.source
    gives the weights of the mixture and the texts.

    Cost: InstructBLIP took a day and a half on 16 A100 of 40 GB. Expected (InstructBLIP, Table 1, zero-shot,
    FlanT5-XL): NoCaps CIDEr 119.9, Flickr30K CIDEr 84.5, GQA accuracy 48.4.

    Command, on each of 2 nodes with 8 GPUs (12 * 16 = 192 images a step):
        torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
            -m openblip train blip2-instruct --init runs/blip2-stage2-t5/model --text-branch
            runs/blip2-stage1/model --data.source llava_instruct_150k.json --data.images train2017 --out
            runs/blip2-instruct

    The paper leaves open how several turns are trained on. Here each answer follows all turns before it,
    joined as `chat` joins them, and the Q-Former reads the instruction of its turn. An instruction is put as
    a question, "Question: {} Answer:", as stage 2 is used; InstructBLIP puts it without a frame, which is
    --question-prompt "{}". Texts longer than 256 tokens, prompt included, are cut.
    """
    return _fine_tuning(
        "blip2-instruct",
        InstructionConfig(),
        steps=60_000,
        batch_size=12,
        max_text_length=128,
        max_text_tokens=256,
        warmup_learning_rate=1e-8,
    )


def _fine_tuning(
    name: str,
    task: Blip2TaskConfig,
    *,
    steps: int,
    batch_size: int,
    image_size: int | None = None,
    layer_decay: float | None = None,
    max_text_length: int = 32,
    max_text_tokens: int | None = None,
    warmup_learning_rate: float = 1e-6,
) -> Blip2Run:
    """AdamW, 1k steps of warm-up to 1e-5, a cosine to 0. With an image size the encoder is trained at it.

    `batch_size` is that of each of 16 processes.
    """
    trains_vision = image_size is not None
    return Blip2Run(
        recipe=name,
        train_vision=trains_vision,
        frozen_dtype="bfloat16",
        image_size=image_size,
        data=DataConfig(augmentation=VIEWS, num_workers=4, max_text_length=max_text_length),
        task=task,
        training=TrainingConfig(
            steps=steps,
            batch_size=batch_size,
            learning_rate=1e-5,
            schedule="cosine",
            min_learning_rate=0.0,
            warmup_steps=1000,
            warmup_learning_rate=warmup_learning_rate,
            weight_decay=0.05,
            layer_decay=layer_decay,
            activation_checkpointing=trains_vision,
        ),
        prompt=PROMPT,
        max_text_tokens=max_text_tokens,
        out=f"runs/{name}",
    )
