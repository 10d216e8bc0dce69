"""blip2-stage2: the paper's generative learning, from stage 1 to a frozen language model."""

from openblip.data.config import DataConfig
from openblip.recipes.blip2_run import Blip2Run, LanguageModelSource
from openblip.recipes.blip2_stage1 import VIEWS, paper_training
from openblip.tasks.config import Blip2Stage2Config


def blip2_stage2_opt() -> Blip2Run:
    """Pre-train the Q-Former of stage 1 to be read by a frozen OPT-2.7B, as in the paper.

    Source: BLIP-2 (arXiv 2301.12597) sections 3.3 and 3.4. 80k steps at a joint batch of 1920; otherwise as
    `blip2-stage1`, with a cosine to 5e-5. The Q-Former loses its text side and ITC, ITM and ITG; a new linear
    layer takes the queries to the width of the language model, which writes the caption and a line break.

    Data: that of `blip2-stage1`. For OPT-6.7B: --language.source facebook/opt-6.7b.

    Cost: in the paper under three days on 16 A100 of 40 GB with the largest models.
    Expected (paper, Tables 2 and 3, zero-shot VQAv2 test-dev; after `blip2-caption` NoCaps and COCO CIDEr):
    52.3; 119.7 and 145.8. With OPT-6.7B 52.6; 121.0 and 145.2. On ViT-L with OPT-2.7B VQAv2 49.7.

    Command, on each of 2 nodes with 8 GPUs (120 * 16 = 1920 pairs a step):
        torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
            -m openblip train blip2-stage2-opt --init runs/blip2-stage1/model
            --data.source 'pairs/*.tar' --out runs/blip2-stage2-opt
    Short of memory, add --training.shard-frozen, which divides the language model among the GPUs.

    Where the released code deviates from the paper: as `blip2-stage1`; 64 pairs a GPU.

    Where this recipe deviates from the released code: as the paper there; OPT computes in bfloat16 instead of
    float16 with loss scaling; a caption that is too long keeps its line break; what OPT begins every text
    with is not predicted.
    """
    language = LanguageModelSource(source="facebook/opt-2.7b", end_of_text="\n", dtype="bfloat16")
    return _stage2("blip2-stage2-opt", language, batch_size=120, question_prompt="Question: {} Answer:")


def blip2_stage2_t5() -> Blip2Run:
    """Pre-train the Q-Former of stage 1 to be read by a frozen FlanT5-XL, as in the paper.

    Source: BLIP-2 (arXiv 2301.12597) sections 3.3 and 3.4. As `blip2-stage2-opt` with a joint batch of 1520
    and prefix language modelling: the encoder reads the queries and the first words of a caption, the decoder
    writes the others; the caption is cut at random in its first half (its author, LAVIS issue 139).

    Data: that of `blip2-stage1`. For FlanT5-XXL: --language.source google/flan-t5-xxl.

    Cost: in the paper under three days on 16 A100 of 40 GB with FlanT5-XXL.
    Expected (paper, Tables 2 and 3, zero-shot VQAv2 test-dev; after `blip2-caption` NoCaps and COCO CIDEr):
    63.0; 121.6 and 144.5. With FlanT5-XXL VQAv2 65.0. On ViT-L with FlanT5-XL 62.3.

    Command, on each of 2 nodes with 8 GPUs (95 * 16 = 1520 pairs a step):
        torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
            -m openblip train blip2-stage2-t5 --init runs/blip2-stage1/model
            --data.source 'pairs/*.tar' --out runs/blip2-stage2-t5

    Where the released code deviates from the paper: as `blip2-stage1`; it leaves out the data side of prefix
    language modelling.

    Where this recipe deviates from the released code: as the paper there; FlanT5 keeps its own activation,
    which the released code exchanges for an exact GELU.
    """
    language = LanguageModelSource(source="google/flan-t5-xl", dtype="bfloat16")
    return _stage2("blip2-stage2-t5", language, batch_size=95, question_prompt="Question: {} Short answer:")


def _stage2(name: str, language: LanguageModelSource, *, batch_size: int, question_prompt: str) -> Blip2Run:
    return Blip2Run(
        recipe=name,
        init="",
        vision=None,
        frozen_dtype="float16",
        language=language,
        qformer=None,
        vocab_size=30524,
        tokenizer=None,
        data=DataConfig(source="", augmentation=VIEWS, num_workers=4),
        task=Blip2Stage2Config(),
        training=paper_training(steps=80_000, batch_size=batch_size, min_learning_rate=5e-5),
        question_prompt=question_prompt,
        out=f"runs/{name}",
    )
