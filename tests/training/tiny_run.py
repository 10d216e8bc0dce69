"""A pre-training of seconds, as a run; as a script it is killed at a chosen moment.

python tiny_run.py SOURCE OUT NUM_WORKERS PRECISION after-step|in-checkpoint STEP
"""

import os
import signal
import sys
from typing import Any

from openblip.data.config import Augmentation, DataConfig
from openblip.models.config import BlipConfig, TextConfig, VisionConfig
from openblip.recipes.run import BlipRun
from openblip.tasks.config import ContrastiveConfig, PretrainingConfig
from openblip.training import run_folder, state
from openblip.training.config import TrainingConfig

STEPS, CHECKPOINT_EVERY = 9, 3


def tiny_run(source: str, out: str, num_workers: int, precision: str) -> BlipRun:
    """All that is random or kept in a run: shuffling, augmentation, dropout, drop path, negatives, queue."""
    return BlipRun(
        recipe="tiny",
        init=None,
        model=BlipConfig(
            vision=VisionConfig(
                image_size=32, patch_size=16, hidden_dim=16, num_layers=2, num_heads=2, mlp_dim=32, drop_path=0.2
            ),
            text=TextConfig(hidden_dim=16, num_layers=1, num_heads=2, mlp_dim=32, max_positions=40, dropout=0.1),
            embed_dim=8,
        ),
        vocab_size=160,
        tokenizer=None,
        data=DataConfig(source=source, num_workers=num_workers, augmentation=Augmentation()),
        task=PretrainingConfig(contrastive=ContrastiveConfig(queue_size=10, alpha_ramp_steps=5)),
        training=TrainingConfig(
            steps=STEPS,
            batch_size=4,
            accumulation=2,
            learning_rate=1e-2,
            muon_learning_rate=1e-2,
            clip_norm=1.0,
            precision=precision,  # type: ignore[arg-type]
            log_every=1,
            checkpoint_every=CHECKPOINT_EVERY,
            num_threads=1,
        ),
        out=out,
    )


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_step(step: int) -> None:
    """Once the metrics of a step are written."""
    log = run_folder.RunFolder.log

    def log_and_die(folder: run_folder.RunFolder, record: dict[str, Any]) -> None:
        log(folder, record)
        if record["step"] == step:
            die()

    run_folder.RunFolder.log = log_and_die  # type: ignore[method-assign]


def die_in_checkpoint(step: int) -> None:
    """With the weights of a checkpoint written and its optimizer not."""
    save = state.torch.save

    def save_and_die(content: Any, file: Any) -> None:
        save(content, file)
        if file.name == state.TASK and file.parent.name.startswith(f"step_{step:08d}"):
            die()

    state.torch.save = save_and_die


if __name__ == "__main__":
    source, out, num_workers, precision, moment, step = sys.argv[1:]
    {"after-step": die_after_step, "in-checkpoint": die_in_checkpoint}[moment](int(step))
    tiny_run(source, out, int(num_workers), precision).train()
