"""How fast this machine is, as `Machine` says it: what `openblip estimate --measure` runs, in about a minute.

A BLIP with random weights is loaded as users load models, so precision and kernels are those of every command. Its
speeds are operations per second: what `models.flops` counts, over the time.

B images, S image size.
"""

import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import openblip
from openblip.checkpoints.checkpoint import BlipCheckpoint
from openblip.checkpoints.loading import load_checkpoint, save_checkpoint
from openblip.cost.machines import Machine
from openblip.data.batch import ImageTextBatch
from openblip.data.config import Augmentation, Preprocessing
from openblip.data.images import read_image
from openblip.data.tokenizer import Tokens
from openblip.distributed import find_device, has_bfloat16
from openblip.generation.decoding import Nucleus
from openblip.models import flops
from openblip.models.blip import Blip
from openblip.models.config import BlipConfig
from openblip.nn.config import VisionConfig
from openblip.predictor import BlipPredictor
from openblip.recipes import RECIPES
from openblip.training.optimizer import make_optimizers
from openblip.training.trainer import bfloat16_weights
from openblip.training.utilisation import keep_freed_memory

PHOTOGRAPHS = ((640, 480), (4000, 3000))  # width and height of the images that are decoded
CAPTION_TOKENS, TEXT_WORDS = 12, 14


BASE = BlipConfig(vision=VisionConfig(image_size=384))


def measure_machine(
    *,
    device: str | None = None,
    batch_size: int | None = None,
    repeats: int = 3,
    model: BlipConfig = BASE,
    trained: BlipConfig = BlipConfig(),  # noqa: B008 (frozen)
    photographs: Sequence[tuple[int, int]] = PHOTOGRAPHS,
) -> Machine:
    """The speeds of this machine. batch_size: images at a time, by default 64 on a GPU and 8 on a CPU; a training step
    has half as many. model: what captions and scores; trained: what is pre-trained. photographs: width and height of a
    small and a large image.
    """
    where = find_device(device)
    on_cpu = where.type == "cpu"
    size = batch_size or (8 if on_cpu else 64)

    def seconds(call: Callable[[], object]) -> float:
        """The median time of a call, after one that is not counted."""
        times = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            call()
            if where.type == "cuda":
                torch.cuda.synchronize(where)
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    speeds = _model_speeds(model, where, size, seconds)
    small, large = (_decode_seconds(*shape, seconds) for shape in photographs)
    megapixels = [width * height / 1e6 for width, height in photographs]
    slope = (large - small) / (megapixels[1] - megapixels[0])
    name = _processor_name() if on_cpu else torch.cuda.get_device_name(where)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        name=name,
        source=f"measured by openblip estimate --measure, {datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}",
        cores=cores,
        accelerators=0 if on_cpu else torch.cuda.device_count(),
        **speeds,
        train_flops=_train_speed(trained, where, max(1, size // 2), seconds),
        decode_seconds=max(0.0, small - slope * megapixels[0]),
        decode_seconds_per_megapixel=slope,
        augment_seconds=_augment_seconds(seconds),
    )


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _model_speeds(
    config: BlipConfig, device: torch.device, size: int, seconds: Callable[[Callable[[], object]], float]
) -> dict[str, float]:
    """Operations per second of encoding, writing and scoring."""
    predictor = _random_predictor(config, device)
    image_size = config.vision.image_size
    pixels = torch.randint(0, 256, (size, 3, image_size, image_size), dtype=torch.uint8)
    encoded = predictor.encode(pixels, batch_size=size)
    decoding = Nucleus(max_new_tokens=CAPTION_TOKENS, min_new_tokens=CAPTION_TOKENS, seed=0)
    texts = ["dog " * TEXT_WORDS] * 2  # of each image, as many as CapFilt scores
    num_tokens = int(predictor.tokenizer.encode(texts[:1], max_length=100).mask.sum())
    prompt_tokens = len(predictor.tokenizer.prompt(predictor.prompt))

    @torch.inference_mode()
    def project() -> object:
        return predictor.model.image_kv(encoded.tokens, "decode")

    def without_projecting(call: Callable[[], object]) -> float:
        """Of a call that begins with the keys and values of the image, the rest; never nothing."""
        whole = seconds(call)
        return max(whole - projecting, whole / 10)

    projecting = seconds(project)
    encoding = seconds(lambda: predictor.encode(pixels, batch_size=size)) + projecting
    writing = without_projecting(lambda: predictor.caption(encoded, decoding=decoding, batch_size=size))
    scoring = without_projecting(lambda: predictor.score_texts(encoded, texts, batch_size=size))
    image = flops.image_flops(config)
    write = flops.caption_flops(config, 1, CAPTION_TOKENS, prompt_tokens=prompt_tokens) - image
    score = flops.score_flops(config, [num_tokens] * len(texts)) - image
    return {
        "encode_flops": size * image / encoding,
        "write_flops": size * write / writing,
        "score_flops": size * score / scoring,
    }


def _random_predictor(config: BlipConfig, device: torch.device) -> BlipPredictor:
    """A BLIP with random weights, through a file and `openblip.load`, in the precision that "auto" chooses."""
    shipped = load_checkpoint("openblip-mini-captioner")
    assert isinstance(shipped, BlipCheckpoint)
    torch.manual_seed(0)
    checkpoint = BlipCheckpoint(Blip(config), shipped.tokenizer, Preprocessing(image_size=config.vision.image_size))
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(checkpoint._replace(prompt="a picture of "), Path(folder) / "model")
        del checkpoint
        predictor = openblip.load(Path(folder) / "model", device=device, dtype="auto")
    assert isinstance(predictor, BlipPredictor)
    return predictor


def _train_speed(
    config: BlipConfig, device: torch.device, size: int, seconds: Callable[[Callable[[], object]], float]
) -> float:
    """Operations per second of pre-training steps."""
    keep_freed_memory()  # as the trainer
    run = RECIPES["blip-base"]()
    shipped = load_checkpoint("openblip-mini-captioner")
    tokens, image_size = run.data.max_text_length, config.vision.image_size
    preprocessing = Preprocessing(image_size=image_size)
    task = run.task_class.build(run.task, run.data, Blip(config), shipped.tokenizer, preprocessing)
    task.to(device).train()
    optimizers, generator = make_optimizers(task, run.training), torch.Generator().manual_seed(0)
    ids = torch.randint(5, 100, (size, tokens), generator=generator)
    names = [str(number) for number in range(size)]
    batch = ImageTextBatch(
        pixels=torch.randint(0, 256, (size, 3, image_size, image_size), dtype=torch.uint8, generator=generator),
        tokens=Tokens(ids, torch.ones_like(ids, dtype=torch.bool)),
        captions=names,
        image_ids=torch.arange(size),
        keys=names,
        shards=names,
    ).to(device)

    def step() -> None:
        task.zero_grad()
        with bfloat16_weights(task) if has_bfloat16(device) else nullcontext():  # as the trainer
            losses = task(batch, 0, generator)
            torch.stack(list(losses.values())).sum().backward()
        optimizers.step()
        task.after_step()

    return flops.contrastive_step_flops(config, size, tokens, 0) / seconds(step)


def _photograph(width: int, height: int) -> bytes:
    """A JPEG file that takes as long to decode as a photograph: large shapes, edges, and some noise."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = (pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=85)
    return file.getvalue()


def _decode_seconds(width: int, height: int, seconds: Callable[[Callable[[], object]], float]) -> float:
    """Of one core for an image file of this size."""
    file, preprocessing = _photograph(width, height), Preprocessing(image_size=384)
    count = min(30, 1 + 8_000_000 // (width * height))
    return seconds(lambda: [preprocessing(read_image(file)) for _ in range(count)]) / count


def _augment_seconds(seconds: Callable[[Callable[[], object]], float]) -> float:
    """Of one core for a random view in place of a resized image."""
    image, rng = read_image(_photograph(640, 480)), np.random.default_rng(0)
    views, plain = Augmentation(crop_scale=(0.2, 1.0)), Preprocessing(image_size=384)
    drawn = seconds(lambda: [views(image, rng, 224) for _ in range(30)]) / 30
    return max(0.0, drawn - seconds(lambda: [plain(image) for _ in range(30)]) / 30)
