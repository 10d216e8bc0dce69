"""A training step is at least 1.5 times as fast as a plain implementation of it, and near the matmul ceiling.

Peer: the same step of BLIP-base's pre-training (ITC, ITM and LM, momentum model and queue of 57,600, AdamW) as one
writes it after the released code: every pass of the text transformer projects its own image keys and values, texts are
padded to 30 tokens, negatives are drawn row by row, the momentum model follows parameter by parameter, torch's AdamW
has its default settings. Attention is by matrix products on CPUs, where they are the faster choice, and by
scaled_dot_product_attention on GPUs. Both sides train the same float32 weights and compute in bfloat16, the peer by
autocast; their losses and gradients are compared first.
Method: a round is two steps of each side that are not timed and one that is, of the same batch at 224 pixels. Ceiling:
a product of two large bfloat16 matrices in the same process. The operations of a step are those that it must compute
(`openblip.models.flops`), without the peer's surplus. Peak memory is that of child processes which take three steps
with one side alone, or on a GPU of the steps themselves.

    python -m benchmarks.training_step [--part speed|memory|stage1] [--batch-size 8]

`stage1` is a step of BLIP-2's stage 1 around a ViT-g with random weights, for GPUs: its share of the ceiling alone.
"""

import argparse
import ctypes
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Report, matmul_ceiling, parser, run_child, timed
from openblip.data.batch import ImageTextBatch
from openblip.data.config import Preprocessing
from openblip.data.loader import LoadedBatch
from openblip.data.tokenizer import Tokens
from openblip.distributed import Process
from openblip.models.blip import Blip
from openblip.models.blip2 import Blip2
from openblip.models.config import Blip2Config, BlipConfig
from openblip.models.flops import contrastive_step_flops, stage1_step_flops
from openblip.nn.config import TextConfig, VisionConfig
from openblip.objectives import MAX_TEMPERATURE, MIN_TEMPERATURE
from openblip.tasks.base import Task
from openblip.tasks.config import Blip2Stage1Config, ContrastiveConfig, PretrainingConfig
from openblip.tasks.contrastive import Blip2Stage1, Pretraining
from openblip.training.config import TrainingConfig
from openblip.training.run_folder import RunFolder
from openblip.training.trainer import Trainer
from openblip.training.utilisation import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, keep_freed_memory, peak_memory

LONGEST, PADDED = 24, 30  # tokens of the longest text; to which the plain step pads
QUEUE_SIZE, MOMENTUM, ALPHA, SMOOTHING = 57600, 0.995, 0.4, 0.1
SMALL = BlipConfig(
    vision=VisionConfig(image_size=32, hidden_dim=64, num_layers=2, num_heads=2, mlp_dim=96),
    text=TextConfig(vocab_size=200, hidden_dim=64, num_layers=2, num_heads=2, mlp_dim=96),
    embed_dim=32,
)


# --- What is trained


def pretraining(config: BlipConfig, queue_size: int, device: str) -> Pretraining:
    """The task over random weights, with a full queue."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Blip(config)
        settings = ContrastiveConfig(queue_size=queue_size, momentum=MOMENTUM, alpha=ALPHA)
        tokenizer = SimpleNamespace(dec_id=config.text.vocab_size - 2, enc_id=config.text.vocab_size - 1)
        preprocessing = Preprocessing(image_size=config.vision.image_size)
        task = Pretraining(PretrainingConfig(contrastive=settings), model, tokenizer, preprocessing)
        embeddings = [F.normalize(torch.randn(queue_size, config.embed_dim), dim=-1) for _ in range(2)]
        task.queue.put(*embeddings, torch.arange(10**6, 10**6 + queue_size))
    return task.to(device)


def pairs(batch_size: int, image_size: int, vocab_size: int) -> ImageTextBatch:
    """Random pairs whose texts have 8 to `LONGEST` tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, LONGEST + 1, (batch_size,), generator=generator)
    lengths[0] = LONGEST
    mask = torch.arange(LONGEST) < lengths[:, None]
    ids = torch.randint(110, vocab_size - 2, mask.shape, generator=generator).masked_fill(~mask, 0)
    ids[:, 0] = 101
    shape = (batch_size, 3, image_size, image_size)
    return ImageTextBatch(
        pixels=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        keys=[str(number) for number in range(batch_size)],
        shards=["0000"] * batch_size,
        tokens=Tokens(ids, mask),
        captions=[""] * batch_size,
        image_ids=torch.arange(batch_size),
    )


class SameBatch:
    """Stands for a loader: the same batch for ever."""

    def __init__(self, batch: ImageTextBatch) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[LoadedBatch]:
        while True:
            yield LoadedBatch(self.batch, {}, [])


def our_step(task: Task, batch: ImageTextBatch, device: str) -> Callable[[], dict[str, float]]:
    """A step of the trainer as it is; it gives the record for metrics.jsonl."""
    config = TrainingConfig(steps=10**6, batch_size=len(batch), schedule="constant", learning_rate=1e-5)
    folder = RunFolder(tempfile.mkdtemp(prefix="training-step"))
    loader = SameBatch(batch)
    trainer = Trainer(task, lambda cursor: cast(Any, loader), config, folder, Process(0, 1, torch.device(device)))
    task.train()
    batches = iter(loader)
    return lambda: trainer._train_step(batches, lambda line: None)


# --- The plain implementation


def plain_attention(
    heads: int, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, dropout: float
) -> Tensor:
    """(B, T, D) over (B, S, D) -> (B, T, D)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    if query.device.type == "cuda":
        mixed = F.scaled_dot_product_attention(q, k, v, allowed, dropout)
    else:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        mixed = F.dropout(scores.softmax(dim=-1), dropout) @ v
    return mixed.transpose(1, 2).flatten(2)


def plain_image(model: Any, pixels: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, N, D)."""
    vision = model.vision
    x = vision.patch_embedding(pixels).flatten(2).transpose(1, 2)
    x = torch.cat([vision.class_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
    x = x + vision.position_embedding.to(x.dtype)
    for block in vision.blocks:
        q, k, v = block.attention.qkv(block.attention_norm(x)).chunk(3, dim=-1)
        x = x + block.attention.out(plain_attention(block.attention.num_heads, q, k, v, None, 0.0))
        x = x + block.mlp(block.mlp_norm(x))
    return cast(Tensor, vision.norm(x))


def plain_text(model: Any, ids: Tensor, mask: Tensor, mode: str, image: Tensor | None, dropout: float) -> Tensor:
    """ids and mask (R, T), image tokens (R, N, D) or None -> states (R, T, D)."""
    text = model.text
    embeddings = text.embeddings[mode]
    x = embeddings.word(ids) + embeddings.position(torch.arange(ids.shape[1], device=ids.device))
    x = F.dropout(embeddings.norm(x), dropout)
    allowed = mask[:, None, None, :]
    if mode == "decode":
        allowed = allowed & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    for layer in text.layers:
        part = layer.self_attention[mode]
        q, k, v = part.branch.qkv(x).chunk(3, dim=-1)
        mixed = plain_attention(part.branch.num_heads, q, k, v, allowed, dropout)
        x = part.norm(x + F.dropout(part.branch.out(mixed), dropout))
        if image is not None:
            part = layer.cross_attention[mode]
            k, v = part.branch.key_value(image).chunk(2, dim=-1)
            mixed = plain_attention(part.branch.num_heads, part.branch.query(x), k, v, None, dropout)
            x = part.norm(x + F.dropout(part.branch.out(mixed), dropout))
        part = layer.feed_forward[mode]
        x = part.norm(x + F.dropout(part.branch(x), dropout))
    return cast(Tensor, x)


def plain_negatives(similarity: Tensor, ids: Tensor, generator: torch.Generator) -> list[int]:
    """One hard negative for each row of (B, B), drawn row by row."""
    uniform, drawn = torch.rand(len(ids), generator=generator, dtype=torch.float64), []
    for row in range(len(ids)):
        weights = F.softmax(similarity[row].float(), dim=0) + 1e-4
        weights[ids == ids[row]] = 0.0
        cumulative = weights.double().cumsum(dim=0)
        drawn.append(int(torch.searchsorted(cumulative, uniform[row].item() * cumulative[-1], right=True).item()))
    return drawn


def plain_losses(task: Pretraining, batch: ImageTextBatch, generator: torch.Generator) -> dict[str, Tensor]:
    """The losses itc, itm and lm."""
    model, average, queue = task.model, task.momentum_model, task.queue
    dropout = model.config.text.dropout if task.training else 0.0
    pixels, ids = task.preprocessing.normalize(batch.pixels), F.pad(batch.tokens.ids, (0, PADDED - LONGEST))
    mask, size = F.pad(batch.tokens.mask, (0, PADDED - LONGEST)), len(batch)
    image = plain_image(model, pixels)
    image_embedding = F.normalize(model.vision_proj(image[:, 0]).float(), dim=-1)
    state = plain_text(model, ids, mask, "encode", None, dropout)[:, 0]
    text_embedding = F.normalize(model.text_proj(state).float(), dim=-1)
    temperature = model.log_temperature.exp()
    with torch.no_grad():
        momentum_image = F.normalize(average.vision_proj(plain_image(average, pixels)[:, 0]).float(), dim=-1)
        state = plain_text(average, ids, mask, "encode", None, 0.0)[:, 0]
        momentum_text = F.normalize(average.text_proj(state).float(), dim=-1)
        keys = [
            torch.cat([momentum, queued])
            for momentum, queued in ((momentum_image, queue.images), (momentum_text, queue.texts))
        ]
        same = (batch.image_ids[:, None] == torch.cat([batch.image_ids, queue.ids])).float()
        hard = same / same.sum(dim=1, keepdim=True)
    itc = torch.zeros((), device=image.device)
    with torch.autocast(image.device.type, enabled=False):
        for query, momentum, of_keys in (
            (image_embedding, momentum_image, keys[1]),
            (text_embedding, momentum_text, keys[0]),
        ):
            with torch.no_grad():
                targets = ALPHA * F.softmax(momentum @ of_keys.T / temperature, dim=1) + (1 - ALPHA) * hard
            itc = itc - (targets * F.log_softmax(query @ of_keys.T / temperature, dim=1)).sum(dim=1).mean() / 2
    with torch.no_grad():
        to_texts = image_embedding @ momentum_text.T / temperature
        to_images = text_embedding @ momentum_image.T / temperature
    negative_texts = plain_negatives(to_texts, batch.image_ids, generator)
    negative_images = plain_negatives(to_images, batch.image_ids, generator)

    encoder_ids = ids.clone()
    encoder_ids[:, 0] = task.tokenizer.enc_id
    positive = plain_text(model, encoder_ids, mask, "encode", image, dropout)[:, 0]
    all_ids = torch.cat([encoder_ids, torch.stack([encoder_ids[row] for row in negative_texts])])
    all_masks = torch.cat([mask, torch.stack([mask[row] for row in negative_texts])])
    all_images = torch.cat([torch.stack([image[row] for row in negative_images]), image])
    negative = plain_text(model, all_ids, all_masks, "encode", all_images, dropout)[:, 0]
    logits = model.itm_head(torch.cat([positive, negative])).float()
    labels = torch.cat([torch.ones(size), torch.zeros(2 * size)]).long().to(ids.device)

    decoder_ids = ids.clone()
    decoder_ids[:, 0] = task.tokenizer.dec_id
    words = model.text.predict_words(plain_text(model, decoder_ids, mask, "decode", image, dropout))
    targets = decoder_ids.masked_fill(~mask, -100)[:, 1:]
    lm = F.cross_entropy(words[:, :-1].flatten(0, 1).float(), targets.flatten(), label_smoothing=SMOOTHING)
    task._pending.append((momentum_image, momentum_text, batch.image_ids))
    return {"itc": itc, "itm": F.cross_entropy(logits, labels), "lm": lm}


def plain_step(task: Pretraining, batch: ImageTextBatch, device: str) -> Callable[[], dict[str, float]]:
    """A step that is written without care for speed; it gives the losses."""
    trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-5)
    generator = torch.Generator()
    task.train()

    def step() -> dict[str, float]:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            losses = plain_losses(task, batch.to(device), generator)
        total = losses["itc"] + losses["itm"] + losses["lm"]
        total.backward()
        values = {name: loss.item() for name, loss in losses.items()}
        optimizer.step()
        with torch.no_grad():
            task.model.log_temperature.clamp_(
                torch.tensor(MIN_TEMPERATURE).log().item(), torch.tensor(MAX_TEMPERATURE).log().item()
            )
            model = dict(task.model.named_parameters())
            for name, average in task.momentum_model.named_parameters():
                average.copy_(average * MOMENTUM + model[name] * (1 - MOMENTUM))
            queue, (images, texts, ids) = task.queue, task._pending.pop()
            start = int(queue.pointer.item())
            slots = torch.arange(start, start + len(ids), device=ids.device) % queue.capacity
            queue.images[slots], queue.texts[slots], queue.ids[slots] = images, texts, ids
            queue.pointer.fill_((start + len(ids)) % queue.capacity)
        return values

    return step


def check_equal_losses(device: str) -> float:
    """The largest difference of losses and gradients, relative to the largest of a tensor, in float32 and without
    dropout. A small model: every part is there.
    """
    task, results = pretraining(SMALL, 64, device).eval(), []
    batch = pairs(4, SMALL.vision.image_size, SMALL.text.vocab_size).to(device)
    for losses in (plain_losses(task, batch, torch.Generator().manual_seed(3)), None):
        named = task(batch, 0, torch.Generator().manual_seed(3)) if losses is None else losses
        task.zero_grad()
        torch.stack(list(named.values())).sum().backward()
        gradients = [p.grad.clone() for p in task.parameters() if p.grad is not None]
        results.append([*(loss.detach() for loss in named.values()), *gradients])
        task._pending.clear()
    # A bias of keys changes no attention: its gradient is rounding, far below the others.
    scale = max(float(x.abs().max()) for x in results[0][3:]) * 1e-3
    largest = [(a - b).abs().max() / a.abs().max().clamp_min(scale) for a, b in zip(*results, strict=True)]
    return float(torch.stack(largest).max())


# --- What is measured


def use_default_memory() -> None:
    """Undo `keep_freed_memory`, with the thresholds that glibc's own adjustment comes to."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)


STEPS: dict[str, Callable[..., Callable[[], dict[str, float]]]] = {"plain": plain_step, "openblip": our_step}
MEMORY = {"plain": use_default_memory, "openblip": keep_freed_memory}


def measure_rounds(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every round's timed step. The two steps before it leave memory as that side leaves it."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats):
        for name in list(sides) if number % 2 else list(sides)[::-1]:
            MEMORY[name]()
            sides[name]()
            sides[name]()
            seconds[name].append(timed(sides[name]))
    return seconds


def peak_gigabytes(side: str, batch_size: int) -> float:
    """That of this process after three steps of one side, on the CPU; the queue is filled as in training."""
    config = BlipConfig()
    MEMORY[side]()
    step = STEPS[side](pretraining(config, QUEUE_SIZE, "cpu"), pairs(batch_size, 224, config.text.vocab_size), "cpu")
    for _ in range(3):
        step()
    return peak_memory(torch.device("cpu"))


def measure_speed(report: Report, options: argparse.Namespace) -> None:
    device, size = options.device, options.batch_size
    difference = check_equal_losses(device)
    assert difference < 1e-3, f"the two steps differ by {difference:.1e}"
    report.facts["largest relative difference of losses and gradients, float32"] = difference
    config = BlipConfig()
    task, batch = pretraining(config, QUEUE_SIZE, device), pairs(size, 224, config.text.vocab_size)
    sides: dict[str, Callable[[], object]] = {name: make(task, batch, device) for name, make in STEPS.items()}
    ceilings = [matmul_ceiling(torch.bfloat16, device)]
    times = measure_rounds(sides, options.repeats)
    ceilings.append(matmul_ceiling(torch.bfloat16, device))
    report.timings(f"pre-training of BLIP-base, batch {size}", times)
    report.ratio("pre-training step, beside the plain implementation", times["plain"], times["openblip"], target=1.5)
    operations = contrastive_step_flops(config, size, LONGEST, QUEUE_SIZE)
    add_share(report, "pre-training step", operations, times["openblip"], ceilings, 0.45 if device == "cuda" else 0.5)
    if device == "cuda":
        for name, step in sides.items():
            torch.cuda.reset_peak_memory_stats()
            step()
            report.add(f"peak memory, {name}", torch.cuda.max_memory_allocated() / 1e9, unit="GB")


def measure_stage1(report: Report, options: argparse.Namespace) -> None:
    device, size, config = options.device, options.batch_size, Blip2Config()
    torch.manual_seed(0)
    with torch.device(device):
        model = Blip2(config)
    model.vision.to(torch.bfloat16)
    tokenizer = SimpleNamespace(dec_id=config.qformer.vocab_size - 1)
    task = Blip2Stage1(Blip2Stage1Config(), model.freeze("vision"), tokenizer, Preprocessing(image_size=224))
    step = our_step(task, pairs(size, 224, config.qformer.vocab_size), device)
    step()
    seconds = [timed(step) for _ in range(1 + options.repeats)][1:]
    report.timings(f"stage 1 around a ViT-g, batch {size}", {"openblip": seconds})
    operations = stage1_step_flops(config, size, LONGEST)
    add_share(report, "stage 1 step", operations, seconds, [matmul_ceiling(torch.bfloat16, device)], 0.45)


def add_share(
    report: Report, name: str, operations: int, seconds: Sequence[float], ceilings: Sequence[float], target: float
) -> None:
    ceiling = statistics.mean(ceilings)
    shares = [operations / taken / ceiling for taken in seconds]
    note = f"{operations / 1e12:.2f} TFLOP a step; ceiling {ceiling / 1e12:.2f} TFLOP/s"
    report.add(
        f"{name}, share of the ceiling",
        statistics.median(shares),
        min(shares),
        max(shares),
        unit="of the ceiling",
        target=target,
        note=note,
    )


def measure_memory(report: Report, options: argparse.Namespace) -> None:
    for side in STEPS:
        report.add(f"peak memory, {side}", run_child(peak_gigabytes, side, options.batch_size).value, unit="GB")


PARTS = {"speed": measure_speed, "memory": measure_memory, "stage1": measure_stage1}
NAMES = {"speed": "training_step", "memory": "training_memory", "stage1": "training_stage1"}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--part", choices=list(PARTS), default="speed")
    options.add_argument("--batch-size", type=int, default=8)
    run(options.parse_args())


def run(options: argparse.Namespace) -> None:
    report = Report(NAMES[options.part], __doc__, options)
    PARTS[options.part](report, options)
    report.save()


if __name__ == "__main__":
    main()
