"""The training loop. It knows a task, a loader and a run folder, and no concrete model."""

import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from openblip.data.loader import LoadedBatch, Loader
from openblip.data.sample import Reject
from openblip.distributed import Process, all_reduce_sum, all_true, barrier
from openblip.errors import OpenBlipError
from openblip.progress import Progress
from openblip.tasks.protocol import TrainingTask
from openblip.training.blocks import recompute_activations
from openblip.training.config import TrainingConfig
from openblip.training.frozen import FrozenParts
from openblip.training.optimizer import learning_rate_at, make_optimizers
from openblip.training.run_folder import RunFolder
from openblip.training.sharding import gather_frozen, replicate, shard_frozen
from openblip.training.state import load_state, save_state
from openblip.training.tracking import Trackers


class NonFiniteError(OpenBlipError):
    """A loss or gradient that is no number; the weights were not touched by that step."""


class Trainer:
    """Runs a task to its last step, from wherever the run folder's newest checkpoint stands.

    Args:
        task: what is trained; it is moved to the process's device.
        loader_at: makes the loader of this process's batches from a cursor; None is the beginning.
        config: how to optimise.
        folder: where the run writes.
        process: this process of the run.
        save_model: writes the model to a folder, for `config.model_every`.
    """

    def __init__(
        self,
        task: TrainingTask,
        loader_at: Callable[[dict[str, Any] | None], Loader],
        config: TrainingConfig,
        folder: RunFolder,
        process: Process,
        save_model: Callable[[Path], None] | None = None,
    ) -> None:
        self.save_model = save_model
        self.task = task
        self.config = config
        self.folder = folder
        self.process = process
        self.frozen = FrozenParts(task)
        self.frozen.check_equal_everywhere(process)
        if config.activation_checkpointing:
            recompute_activations(task)
        if config.shard_frozen:
            shard_frozen(task.frozen_parts(), process)
        task.to(process.device)
        self.optimizers = make_optimizers(task, config, task.layers_above())
        self.step = 0
        self.num_rejects = 0
        self._cursor: dict[str, Any] | None = None
        last = folder.last_checkpoint()
        if last is not None:
            self.step, checkpoint = last
            self._cursor = load_state(checkpoint, task, self.frozen, self.optimizers, process)
        self.loader = loader_at(self._cursor)
        if process.is_main:
            self.num_rejects = folder.forget_after(self.step)
        self.forward = replicate(task, self.frozen, process)

    def run(self) -> bool:
        """Train to the last step. False when a signal (Ctrl-C, SIGTERM) stopped it after a checkpoint.

        Afterwards the main process has all weights of the task, also those that were divided.

        Raises NonFiniteError before an update with a loss or gradient that is no number.
        """
        config = self.config
        trackers = Trackers(config, self.folder.path) if self.process.is_main else None
        self.task.train()
        visible = self.process.is_main
        progress = Progress("training", total=config.steps, unit="steps", done=self.step, visible=visible)
        with stop_signals() as stop, progress as bar:
            batches = iter(self.loader)
            started, since = time.perf_counter(), self.step
            while self.step < config.steps:
                record = self._train_step(batches)
                bar.advance(1)
                if self.step % config.log_every == 0 or self.step == config.steps:
                    samples = (self.step - since) * self._samples_per_step()
                    record["samples_per_second"] = round(samples / (time.perf_counter() - started), 2)
                    started, since = time.perf_counter(), self.step
                    bar.note(describe(record))
                    if trackers is not None:
                        self.folder.log(record)
                        trackers.log(record)
                stopped = not all_true(not stop.is_set(), self.process.device)
                if stopped or self.step % config.checkpoint_every == 0 or self.step == config.steps:
                    self._save()
                if config.model_every is not None and self.step % config.model_every == 0:
                    self._write_model()
                if stopped:
                    break
        if trackers is not None:
            trackers.close()
        finished = self.step == config.steps
        if finished and config.shard_frozen:
            gather_frozen(self.task.frozen_parts(), self.process)
        return finished

    def _train_step(self, batches: Iterator[LoadedBatch]) -> dict[str, float]:
        """One optimizer update over `accumulation` micro-batches; the record for metrics.jsonl."""
        config, device = self.config, self.process.device
        rate = learning_rate_at(self.step, config)
        self.optimizers.set_learning_rate(rate / config.learning_rate)
        self.optimizers.zero_grad()
        sums: dict[str, float] = {}
        rejects: list[Reject] = []
        for micro in range(config.accumulation):
            loaded = next(batches)
            self._cursor = loaded.cursor
            rejects += loaded.rejects
            torch.manual_seed(derive_seed(config.seed, self.step, micro, self.process.rank))
            generator = torch.Generator().manual_seed(derive_seed(config.seed, self.step, micro))
            with self._sync_only_if(micro == config.accumulation - 1):
                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    losses = self.forward(loaded.batch.to(device), self.step, generator)
                total = torch.stack(list(losses.values())).sum() / config.accumulation
                total.backward()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + float(loss.detach()) / config.accumulation
        norm = self._clip_gradients(sums)
        self.optimizers.step()
        self.task.after_step()
        self.step += 1
        self.folder.log_rejects(self.step, rejects)
        num_rejects, *totals = all_reduce_sum([len(rejects), *sums.values()], self.process.device)
        self.num_rejects += int(num_rejects)
        means = {name: total / self.process.world_size for name, total in zip(sums, totals, strict=True)}
        return {
            "step": self.step,
            **means,
            "loss": sum(means.values()),
            "gradient_norm": norm,
            "learning_rate": rate,
            "rejects": self.num_rejects,
        }

    def _clip_gradients(self, losses: dict[str, float]) -> float:
        """Clip as configured and return the norm before it; NonFiniteError stops every process alike."""
        gradients = [p.grad for p in self.task.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        loss_is_finite = bool(torch.isfinite(torch.tensor(list(losses.values()))).all())
        if not all_true(loss_is_finite and bool(torch.isfinite(norm)), self.process.device):
            raise NonFiniteError(
                f"Step {self.step + 1}: losses {losses}, gradient norm {float(norm)}. The weights are those "
                f"of step {self.step}; lower the learning rate or clip, then resume from the last checkpoint."
            )
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.task.parameters(), self.config.clip_norm, norm)
        return float(norm)

    @contextmanager
    def _sync_only_if(self, last: bool) -> Iterator[None]:
        """DDP averages gradients in the backward pass of the last micro-batch only."""
        forward = self.forward
        with (
            forward.no_sync() if isinstance(forward, DistributedDataParallel) and not last else nullcontext()
        ):
            yield

    def _samples_per_step(self) -> int:
        return self.config.batch_size * self.config.accumulation * self.process.world_size

    def _write_model(self) -> None:
        if self.process.is_main and self.save_model is not None:
            self.save_model(self.folder.model_at(self.step))
        barrier()

    def _save(self) -> None:
        target = self.folder.checkpoint(self.step)
        if self._cursor is not None and not target.exists():
            save_state(target, self.task, self.frozen, self.optimizers, self._cursor, self.process)
        if self.process.is_main:
            self.folder.keep_last(self.config.keep_checkpoints)


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from integers, the same on every machine."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def describe(record: dict[str, float]) -> str:
    """The losses of a record, for the progress line."""
    hidden = {"step", "gradient_norm", "learning_rate", "rejects", "samples_per_second"}
    losses = " ".join(f"{name} {value:.3f}" for name, value in record.items() if name not in hidden)
    return f"{losses} | {record['samples_per_second']:.0f} samples/s"


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that a run stops between steps. A second Ctrl-C interrupts."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def request_stop(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
