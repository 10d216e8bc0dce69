"""The trainings of BLIP's paper (arXiv 2201.12086), and the same for videos. What a recipe does not name is a default.

Pre-training (section 4.1): 20 epochs; after every epoch the learning rate is multiplied by 0.85; alpha rises over the
first two. The queue, momentum, temperature and alpha are ALBEF's, read in the released code. The 14M images are COCO,
Visual Genome, SBU, CC3M and CC12M; 129M are these and LAION's 115M, a fifth of it in each epoch. The paper used two
nodes of 16 GPUs. Command, on each of 4 nodes with 8 GPUs:
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
        -m openblip train RECIPE --data.source DATA
On 8 GPUs add --training.accumulation 4, which mines ITM negatives among 720 pairs (blip-base) instead of 2880.

Fine-tuning (section 5, Table 14): weight decay 0.05 and a cosine to 0 without warm-up, at a joint batch of 256 where
nothing else is said, from a checkpoint whose position embeddings are interpolated to the new resolution once, at the
start. Crops keep half of the image or more, as in the released code. Command, on one node of 8 GPUs; each recipe names
its DATA, and what it starts from if that is not blip-base:
    torchrun --nproc-per-node 8 -m openblip train RECIPE --init runs/blip-base/model DATA
On 4 nodes of 8 GPUs add --training.batch-size 8; on one GPU --training.accumulation 8, with which ITM negatives are
mined among 32 pairs instead of 256.

The paper gives no costs. Where the released code deviates from it, in pre-training: decay of 0.9 per epoch, not 0.85;
75 pairs per GPU also with ViT-B, which is 2400 on 32 GPUs, not 2880; RandAugment's Brightness and Sharpness do nothing
at its magnitude of 5, which is kept here.

Where these recipes deviate from the released code: steps in bfloat16 instead of float32; biases, norms and the
temperature are not weight-decayed; the learning rate follows steps, not epochs; the momentum encoders run without
dropout and move after the optimizer step, not before the next forward pass. In pre-training and for Flickr30k: ITM
negatives come from all GPUs, not from the pair's own. In pre-training: 0.85 and 2880, as the paper; decay counts from
the end of the warm-up, not from step 0, and alpha follows steps; captions of the same image are positives in ITC and
never negatives in ITM; the queue starts empty, not with random vectors, and takes any batch size; texts are padded to
the longest of the batch, not to 30; a mixture of sources is drawn from by its weights, where the released code reads
one of five parts of LAION in turn, and everything else, each epoch. In fine-tuning: an image is drawn with one of its
captions at random where a source has several per image; the last weights are kept, where the released code keeps those
of the epoch that scored best on the validation split (--training.validate-every keeps these too, in best/).
"""

from dataclasses import replace
from typing import Any

from openblip.data.config import Augmentation, DataConfig
from openblip.models.config import BlipConfig
from openblip.nn.config import VisionConfig
from openblip.recipes.run import BlipRun
from openblip.tasks import config as tasks
from openblip.training.config import TrainingConfig

COCO_CAPTIONS = 566_747  # of the Karpathy split
QUESTIONS = 443_757 + 214_354 + 1_445_322  # VQAv2 train and val, Visual Genome 1.2
QUESTION_ANSWERING: dict[str, Any] = {"learning_rate": 2e-5, "drop_path": 0.1, "max_text_length": 35}
# Steps of one epoch: samples of the training split over the joint batch.
BASE_STEPS = 14_000_000 // 2880
LARGE_STEPS = (14_000_000 + 115_000_000 // 5) // 2400
COCO_STEPS = COCO_CAPTIONS // 256
FLICKR_STEPS = 145_000 // 256  # captions
MSRVTT_STEPS = 180_000 // 64  # MSRVTT 1k-A: 9,000 videos with 20 captions each


def blip_base() -> BlipRun:
    """Pre-train BLIP with ViT-B/16 on 14M pairs (ITC + ITM + LM), as in the paper.

    Source: section 4.1. ViT from DeiT-B, text from bert-base-uncased, cross-attention random. An epoch at a joint batch
    of 2880 (90 * 32) is 4,861 steps, 20 epochs are 97,220. DATA: 'web/*.tar,human/*.tar'. With LAION (129M) an epoch is
    37M pairs: --training.steps 256940 --training.decay-every 12847 --task.contrastive.alpha-ramp-steps 25694
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
        task=tasks.PretrainingConfig(contrastive=tasks.ContrastiveConfig(alpha_ramp_steps=2 * BASE_STEPS)),
        training=TrainingConfig(
            steps=20 * BASE_STEPS,
            batch_size=90,
            learning_rate=3e-4,
            schedule="step_decay",
            decay_rate=0.85,
            decay_every=BASE_STEPS,
            min_learning_rate=1e-6,
            warmup_steps=3000,
            checkpoint_every=1000,
        ),
        out="runs/blip-base",
    )


def blip_large() -> BlipRun:
    """Pre-train BLIP with ViT-L/16 on 129M pairs (ITC + ITM + LM), as in the paper.

    Source: section 4.1. ViT-L/16 from ImageNet-21k with drop path 0.1, Google's, where the released code takes timm's
    vit_large_patch16_224_in21k; the text side as in blip-base. An epoch at a joint batch of 2400 (75 * 32) is 15,416
    steps, 20 epochs are 308,320. DATA: 'web/*.tar,human/*.tar,laion/*.tar'. On the 14M alone, which the paper has no
    ViT-L for: --training.steps 116660 --training.decay-every 5833 --task.contrastive.alpha-ramp-steps 11666
    Cost: not in the paper; 75 pairs per GPU; short of memory, add --model.vision.activation-checkpointing True.
    Expected (paper, Table 1, COCO TR@1/IR@1 fine-tuned, COCO CIDEr, NoCaps CIDEr): 80.6/64.1, 135.5, 112.5 on the raw
    pairs; 82.4/65.1, 136.7, 113.2 on the bootstrapped, and 96.7/86.7 Flickr30K TR@1/IR@1 zero-shot.
    """
    base, epoch = blip_base(), LARGE_STEPS
    vision = VisionConfig(hidden_dim=1024, num_layers=24, num_heads=16, mlp_dim=4096, drop_path=0.1)
    return base.derive(
        "blip-large",
        model=BlipConfig(vision=vision),
        vision_init="google/vit-large-patch16-224-in21k",
        task=tasks.PretrainingConfig(contrastive=tasks.ContrastiveConfig(alpha_ramp_steps=2 * epoch)),
        training=replace(base.training, steps=20 * epoch, decay_every=epoch, batch_size=75, learning_rate=2e-4),
    )


def caption() -> BlipRun:
    """Fine-tune a pre-trained BLIP to caption (LM alone), at 384 pixels on COCO, as in the paper.

    Source: sections 3.3 and 5.2. 5 epochs over 566,747 captions, 2,213 steps each. Cost: hours on 8 GPUs. Expected
    (paper, Table 1, COCO / NoCaps CIDEr): 127.8 / 102.2 from blip-base on 14M raw pairs, 129.7 / 105.1 on the
    bootstrapped; decode with a beam of 3, at most 20 and at least 5 tokens.
    DATA: --data.source captions_train.json --data.images coco
    Where this recipe deviates from the released code: a caption is cut so that prompt and caption together have 40
    tokens, and the last token kept is always [SEP].
    """
    task, length = tasks.CaptioningConfig(prompt="a picture of "), 40 - 3  # the prompt has three tokens
    return fine_tuning("caption", task, steps=5 * COCO_STEPS, learning_rate=1e-5, max_text_length=length)


def caption_large() -> BlipRun:
    """`caption` for ViT-L: the same with a learning rate of 2e-6 (Table 14).

    Source: section 5.2. Cost: about three times that of `caption`. Expected (paper, Table 1, COCO / NoCaps CIDEr):
    135.5 / 112.5 from blip-large on 129M raw pairs, 136.7 / 113.2 on the bootstrapped.
    """
    run = caption()
    return run.derive("caption-large", training=replace(run.training, learning_rate=2e-6))


def filter_() -> BlipRun:
    """Fine-tune a pre-trained BLIP to match (ITC + ITM), at 384 pixels on COCO, as in the paper.

    Source: sections 3.3 and 5.1. 6 epochs over 566,747 captions, 2,213 steps each. Cost: hours on 8 GPUs. Expected
    (paper, Table 1, COCO TR@1/IR@1, ITC candidates re-ranked by ITM with k=256): 78.4/60.7 from blip-base on 14M raw
    pairs, 80.6/63.1 on the bootstrapped.
    DATA: --data.source captions_train.json --data.images coco
    Where this recipe deviates from the released code: the momentum encoders start as copies of the model and the queue
    empty, where the released code continues with those of the pre-training; ITM weights have a small constant added, so
    that drawing a negative cannot fail.
    """
    return fine_tuning("filter", retrieval(COCO_STEPS), steps=6 * COCO_STEPS, learning_rate=1e-5, max_text_length=35)


def filter_large() -> BlipRun:
    """`filter` for ViT-L: the same with a learning rate of 5e-6 (Table 14).

    Source: section 5.1. Cost: about three times that of `filter`. Expected (paper, Table 1, COCO TR@1/IR@1): 80.6/64.1
    from blip-large on 129M raw pairs, 82.4/65.1 on the bootstrapped.
    """
    run = filter_()
    return run.derive("filter-large", training=replace(run.training, learning_rate=5e-6))


def retrieval_flickr() -> BlipRun:
    """Fine-tune a pre-trained BLIP to retrieve, at 384 pixels on Flickr30k: `filter` with fewer steps.

    Source: section 5.1: 6 epochs over 145,000 captions, 566 steps each. Cost: about an hour on 8 GPUs. Expected (LAVIS,
    from 129M bootstrapped pairs, TR@1/IR@1, re-ranked with k=128): 96.9/87.5.
    DATA: --data.source 'dataset_flickr30k.json#train' --data.images flickr30k
    """
    run = filter_()
    training = replace(run.training, steps=6 * FLICKR_STEPS)
    return run.derive("retrieval-flickr", task=retrieval(FLICKR_STEPS), training=training)


def vqa() -> BlipRun:
    """Fine-tune a pre-trained BLIP to answer questions, at 480 pixels on VQAv2 and Visual Genome.

    Source: section 5.3. 10 epochs; an answer's loss is weighted by the share of annotators who gave it, that of Visual
    Genome's by 0.2. Encoder and decoder start from the same weights and are trained apart, as in the released code.
    Cost: about a day on 8 GPUs. Expected (paper, Table 8, VQAv2 test-dev/test-std, answers ranked): 77.54/77.62 from
    blip-base on 14M bootstrapped pairs, 78.24/78.17 on 129M.
    DATA: --data.source vqa_train.json,vqa_val.json,vg_qa.json --data.images images
    Evaluate by ranking the 3,128 answers that the authors distribute, or by writing:
        openblip evaluate vqa --model runs/vqa/model --data vqa_test.json --images images
            --answers answer_list.json --results submission.json
    For OK-VQA and A-OKVQA start from this model, with the questions of that data set as the source; LAVIS does so with
    a learning rate of 1e-5 for a few epochs.
    """
    task, steps = tasks.QuestionAnsweringConfig(), 10 * (QUESTIONS // 256)
    return fine_tuning("vqa", task, image_size=480, steps=steps, **QUESTION_ANSWERING)


def nlvr() -> BlipRun:
    """Fine-tune a pre-trained BLIP to judge statements about two images, at 384 pixels on NLVR2.

    Source: section 5.4. 15 epochs; the two images change places in a random half of the samples, and so do the words
    left and right. Cost: hours on 8 GPUs. Expected (paper, Table 8, dev/test-P): 82.67/82.30 from blip-base on 14M
    bootstrapped pairs, 82.48/83.08 on 129M.
    DATA: --data.source train.json --data.images nlvr2
    Where this recipe deviates from the released code: the layer that merges both images starts as their mean, not from
    random weights.
    """
    steps = 15 * (86_373 // 256)  # statements
    return fine_tuning("nlvr", tasks.NlvrConfig(), steps=steps, learning_rate=3e-5, drop_path=0.1)


def visdial() -> BlipRun:
    """Fine-tune a pre-trained BLIP to rank the answers of dialogs, at 384 pixels on VisDial v1.0.

    Source: section 5.5, Figure 5c. 20 epochs at a joint batch of 240 (30 * 8). The authors released no code for this
    task: how a dialog becomes a text (`openblip.data.texts`), how many wrong answers accompany the right one (3), and
    that an epoch is one round of each dialog are choices of this recipe. Cost: hours on 8 GPUs. Expected (paper, Table
    9, val): MRR 69.41, R@1 56.44.
    DATA: --data.source visdial_1.0_train.json --data.images coco
    """
    task, steps = tasks.VisdialConfig(num_negatives=3), 20 * (123_287 // 240)  # dialogs; a step sees a round of each
    # Ten rounds have about 150 tokens.
    return fine_tuning("visdial", task, steps=steps, batch_size=30, learning_rate=2e-5, max_text_length=256)


def video_retrieval() -> BlipRun:
    """Fine-tune a BLIP that retrieves images to retrieve videos, 8 frames each, on MSRVTT.

    Source: section 5.6 for the frames, whose tokens are concatenated without regard to their order; the paper evaluates
    its COCO retrieval model as it is. The settings are those of COCO retrieval at a joint batch of 64 (8 * 8), and
    untried. Cost: unknown; hours on 8 GPUs. Expected without this fine-tuning (paper, Table 10, MSRVTT text to video
    R@1/5/10): 43.3/65.6/74.7:
        openblip evaluate video-retrieval --model MODEL --data msrvtt_test.jsonl --images videos --rerank 128
    It starts from runs/filter/model. DATA: --data.source 'train_val_videodatainfo.json#train' --data.images videos
    """
    task, steps = retrieval(MSRVTT_STEPS), 5 * MSRVTT_STEPS
    return fine_tuning("video-retrieval", task, steps=steps, batch_size=8, learning_rate=1e-5, num_frames=8)


def video_qa() -> BlipRun:
    """Fine-tune a BLIP that answers questions about images to answer them about videos, on MSRVTT-QA.

    Source: section 5.6: 16 frames. The paper evaluates its VQA model as it is; the settings are those of VQA at a joint
    batch of 64 (8 * 8), and untried. Cost: unknown; hours on 8 GPUs. Expected without this fine-tuning (paper, Table
    11): MSRVTT-QA 19.2, MSVD-QA 35.2:
        openblip evaluate video-qa --model MODEL --data test_qa.json --images videos
    It starts from runs/vqa/model. DATA: --data.source train_qa.json --data.images videos
    """
    task, steps = tasks.QuestionAnsweringConfig(), 5 * (158_581 // 64)  # questions
    return fine_tuning("video-qa", task, batch_size=8, num_frames=16, steps=steps, **QUESTION_ANSWERING)


def retrieval(steps_per_epoch: int) -> tasks.RetrievalConfig:
    """ITC and ITM; alpha rises over the first epoch."""
    return tasks.RetrievalConfig(contrastive=tasks.ContrastiveConfig(alpha_ramp_steps=steps_per_epoch))


def fine_tuning(
    name: str,
    task: tasks.BlipTaskConfig,
    *,
    image_size: int = 384,
    drop_path: float | None = None,
    max_text_length: int = 40,
    num_frames: int | None = None,
    batch_size: int = 32,
    **training: Any,
) -> BlipRun:
    """What all fine-tunings share. `batch_size` is that of one of 8 processes."""
    views = Augmentation(crop_scale=(0.5, 1.0))
    return BlipRun(
        recipe=name,
        image_size=image_size,
        drop_path=drop_path,
        data=DataConfig(augmentation=views, num_workers=4, max_text_length=max_text_length, num_frames=num_frames),
        task=task,
        training=TrainingConfig(batch_size=batch_size, **training),
        out=f"runs/{name}",
    )
