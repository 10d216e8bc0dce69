"""The trainings of BLIP-2's paper (arXiv 2301.12597), and training on instructions as InstructBLIP does it.

All of them: AdamW with weight decay 0.05, a warm-up and a cosine; 224 pixels where nothing else is said, random crops
and flips, no RandAugment (the crops' scale is the released code's). Costs that the paper does not give are for 16 GPUs
of 40 GB. Command, on each of 2 nodes with 8 GPUs; where nothing else is said, stage 2 STARTs from stage 1:
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
        -m openblip train RECIPE [--init START] DATA

Pre-training: betas 0.9 and 0.98; 2k steps of warm-up to 1e-4 (the schedule is its author's, LAVIS issue 243). DATA is
--data.source 'pairs/*.tar', the 129M images of BLIP, each with its web text and, of ten captions that BLIP-L has
written, the two that CLIP-L finds most similar; one text is drawn at each step. docs/blip2.md says how
`openblip capfilt` makes such captions. In stage 2, short of memory, add --training.shard-frozen, which divides the
language model among the GPUs.

Fine-tuning: betas 0.9 and 0.999; 1k steps of warm-up to 1e-5, then a cosine to 0. An image encoder that is trained is
trained at the recipe's resolution; the language model stays frozen. On 8 GPUs add --training.accumulation 2;
for retrieval, negatives then come from fewer pairs. A Q-Former that reads questions or instructions needs the weights
with which it reads text; stage 2 has dropped them, so they come from stage 1, by --text-branch.

Where the released code deviates from the paper: it pre-trains on COCO and Visual Genome alone, ten epochs of batches of
100 a GPU (stage 2: 64), with 5,000 steps of warm-up and beta2 0.999.

Where these recipes deviate from the released code: as the paper in these points; layer-wise decay works; bfloat16
instead of float16 autocast with loss scaling, over float32 weights also of an encoder that is trained, which turns to
NaN in float16; language models read and learn texts as they are written, not in lower case without punctuation; biases,
norms and the temperature are not weight-decayed; texts are padded to the longest of the batch; the last weights are
kept.
"""

from dataclasses import replace
from typing import Any

from openblip.data.config import Augmentation, DataConfig
from openblip.nn.config import QFormerConfig
from openblip.recipes.blip import COCO_CAPTIONS, QUESTIONS
from openblip.recipes.run import Blip2Run, ImageEncoderSource, LanguageModelSource
from openblip.tasks import config as tasks
from openblip.training.config import TrainingConfig

VIEWS = Augmentation(crop_scale=(0.5, 1.0), num_ops=0)
PROMPT = "a photo of"


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
        vision=ImageEncoderSource(source="Salesforce/blip2-itm-vit-g", dtype="float16"),  # the rest of it is not read
        qformer=QFormerConfig(),
        tokenizer="bert-base-uncased",
        text_init="bert-base-uncased",
        data=DataConfig(augmentation=VIEWS, num_workers=4, max_text_length=32),
        task=tasks.Blip2Stage1Config(),
        training=_pretraining(steps=250_000, batch_size=105, min_learning_rate=1e-5),
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
        vision=ImageEncoderSource(source="openai/clip-vit-large-patch14", dtype="float16"),
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
    return Blip2Run(
        recipe="blip2-stage2-opt",
        frozen_dtype="float16",
        language=LanguageModelSource(source="facebook/opt-2.7b", end_of_text="\n", dtype="bfloat16"),
        data=DataConfig(augmentation=VIEWS, num_workers=4),
        task=tasks.Blip2Stage2Config(),
        training=_pretraining(steps=80_000, batch_size=120, min_learning_rate=5e-5),
        question_prompt="Question: {} Answer:",
        out="runs/blip2-stage2-opt",
    )


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
    run = blip2_stage2_opt()
    return run.derive(
        "blip2-stage2-t5",
        language=LanguageModelSource(source="google/flan-t5-xl", dtype="bfloat16"),
        training=replace(run.training, batch_size=95),
        question_prompt="Question: {} Short answer:",
    )


def _pretraining(**training: Any) -> TrainingConfig:
    """What both stages share (section 3.4). A batch size is for one of 16 processes."""
    return TrainingConfig(learning_rate=1e-4, warmup_steps=2000, beta2=0.98, **training)


def blip2_caption() -> Blip2Run:
    """Fine-tune a BLIP-2 of stage 2 to caption, at 364 pixels on COCO, its image encoder too.

    Source: section 4.2 and appendix. 5 epochs over 566,747 captions at a joint batch of 256 (16 * 16), 2,213 steps
    each; every block of the image encoder at 0.95 of the learning rate of the block above (without effect in the
    released code, whose schedule overwrites it). The prompt is "a photo of".
    Cost: about a day. Expected (paper, Table 3, NoCaps CIDEr / COCO BLEU@4 and CIDEr): OPT-2.7B 119.7 / 43.7 and 145.8,
    OPT-6.7B 121.0 / 43.5 and 145.2, FlanT5-XL 121.6 / 42.4 and 144.5; decode with a beam of 5, 8 to 30 tokens.
    START: runs/blip2-stage2-opt/model. DATA: --data.source 'dataset_coco.json#train' --data.images coco
    """
    task, steps = tasks.Blip2Stage2Config(prompt=PROMPT), 5 * (COCO_CAPTIONS // 256)
    return _fine_tuning("blip2-caption", task, image_size=364, steps=steps, batch_size=16, layer_decay=0.95)


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
    task, steps = tasks.PromptedAnsweringConfig(), 5 * (QUESTIONS // 128)
    return _fine_tuning(
        "blip2-vqa", task, image_size=490, steps=steps, batch_size=8, layer_decay=0.95, max_text_length=35
    )


def blip2_retrieval() -> Blip2Run:
    """Fine-tune a BLIP-2 of stage 1 to retrieve (ITC + ITM + ITG), at 364 pixels on COCO, its encoder too.

    Source: section 4.4 and appendix. 5 epochs over 566,747 captions at a joint batch of 224 (14 * 16), 2,530 steps
    each; for ViT-L the learning rate rises to 5e-6 (--training.learning-rate 5e-6). There is no layer-wise decay, which
    the paper does not mention here. Otherwise as `blip2-stage1`.
    Cost: about a day. Expected (paper, Table 5, COCO TR@1/IR@1 and Flickr30K zero-shot, 128 candidates re-ranked by
    ITM): ViT-g 85.4/68.3 and 97.6/89.7, ViT-L 83.5/66.3 and 96.9/88.6; without ITG 84.5/67.2 on COCO (Table 6), which
    is --task.no-itg.
    START: runs/blip2-stage1/model. DATA: --data.source 'dataset_coco.json#train' --data.images coco
        openblip evaluate retrieval --model runs/blip2-retrieval/model --data 'dataset_coco.json#test'
            --images coco --rerank 128
    """
    task = tasks.Blip2Stage1Config()
    return _fine_tuning("blip2-retrieval", task, image_size=364, steps=5 * (COCO_CAPTIONS // 224), batch_size=14)


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
    run = _fine_tuning("blip2-instruct", tasks.InstructionConfig(), steps=60_000, batch_size=12, max_text_length=128)
    return replace(run, max_text_tokens=256, training=replace(run.training, warmup_learning_rate=1e-8))


def _fine_tuning(
    name: str, task: tasks.Blip2TaskConfig, *, image_size: int | None = None, max_text_length: int = 32, **training: Any
) -> Blip2Run:
    """With an image size the encoder is trained at it. A batch size in `training` is that of each of 16 processes."""
    trains_vision = image_size is not None
    settings = {"learning_rate": 1e-5, "warmup_steps": 1000, "activation_checkpointing": trains_vision, **training}
    return Blip2Run(
        recipe=name,
        train_vision=trains_vision,
        frozen_dtype="bfloat16",
        image_size=image_size,
        data=DataConfig(augmentation=VIEWS, num_workers=4, max_text_length=max_text_length),
        task=task,
        training=TrainingConfig(**settings),
        prompt=PROMPT,
        out=f"runs/{name}",
    )
