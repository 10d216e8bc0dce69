"""The training loop. It knows a task, a loader and a run folder, and no concrete model."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from openblip.data.loader import STOPPING, LoadedBatch, Loader
from openblip.data.sample import Reject, unused_line
from openblip.distributed import Process, all_reduce_sum, all_true, barrier
from openblip.errors import ConfigError, OpenBlipError
from openblip.files import hash_int
from openblip.progress import Progress
from openblip.tasks.base import Task
from openblip.text_counts import TextCounts, count_texts
from openblip.training.config import TrainingConfig
from openblip.training.optimizer import learning_rate_at, make_optimizers
from openblip.training.run_folder import REJECTS, RunFolder, Trackers
from openblip.training.sharding import gather_frozen, recompute_activations, shard_frozen
from openblip.training.state import RunState
from openblip.training.utilisation import StepOperations, keep_freed_memory, matmul_ceiling, peak_memory

NOT_LOSSES = ("step", "gradient_norm", "learning_rate", "rejects", "cut_texts", "unknown_tokens")
SPEED = ("samples_per_second", "flop_utilisation", "peak_memory_gb", "gflop_per_step")
"""What a record has beside the losses: of a step, and of how fast the steps since the last record were."""
TOO_MANY_UNKNOWN = 0.9  # share of the tokens of the first step


class NonFiniteError(OpenBlipError):
    """A loss or gradient that is not a number; that step did not change the weights."""


class Trainer:
    """Trains a task to its last step, from the newest checkpoint in the run folder if there is one.

    Args:
        task: what is trained; it is moved to the process's device.
        loader_at: makes the loader of this process's batches from a `cursor`; None is the beginning.
        save_model: writes the model to a folder, for `config.model_every` and the best model.
        validate: measures the model, for `config.validate_every`; of its scores `score` decides which model is the
            best, higher is better. Every process calls it, with the task in eval mode.
    """

    def __init__(
        self,
        task: Task,
        loader_at: Callable[..., Loader],
        config: TrainingConfig,
        folder: RunFolder,
        process: Process,
        save_model: Callable[[Path], None] | None = None,
        validate: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        self.task, self.config, self.folder, self.process = task, config, folder, process
        self.save_model, self.validate = save_model, validate
        self.samples_per_step = config.batch_size * config.accumulation * process.world_size
        self.state = RunState(task, self.samples_per_step, process)
        if config.activation_checkpointing:
            recompute_activations(task)
        if config.shard_frozen:
            shard_frozen(task.frozen_parts(), process)
        task.to(process.device)
        frozen = (weight for part in task.frozen_parts() for weight in part.parameters())
        self._frozen = [weight for weight in frozen if not weight.requires_grad]
        self.optimizers = make_optimizers(task, config, task.layers_above())
        self.step = 0
        self.operations = StepOperations()
        self.texts = TextCounts()  # of all steps of this process, without those that were cut
        self._said: set[str] = set()
        self._cursor: dict[str, Any] | None = None
        if last := folder.last_checkpoint():
            self.step, checkpoint = last
            self._cursor = self.state.load(checkpoint, self.optimizers)
        self.loader = loader_at(cursor=self._cursor)
        self.num_rejects = folder.forget_after(self.step) if process.is_main else 0
        barrier()  # metrics.jsonl ends at this step now
        self.best_score = None if validate is None else folder.best_score()
        self.forward: nn.Module = task
        if process.world_size > 1:
            # Frozen weights are not broadcast: every process has loaded them from their source. Nor are buffers: they
            # are the queue, which every process fills with the same values.
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(task, sorted(self.state.frozen_names))
            self.forward = DistributedDataParallel(task, broadcast_buffers=False)

    def run(self) -> bool:
        """Train to the last step. False when a signal (Ctrl-C, SIGTERM) stopped it after a checkpoint.

        Afterwards the main process has all weights of the task, also those that were divided. Raises NonFiniteError
        before an update with a loss or gradient that is not a number, and OpenBlipError when a worker has died.
        """
        first = self.step
        try:
            return self._run()
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):  # torch raises it wherever the training is
                raise
            failure = OpenBlipError(
                f"After step {self.step} a process that reads samples ended: {str(error).split('. ')[0]}. If memory "
                f"was short, use fewer --data.num-workers; `openblip train --resume {self.folder.path}` goes on."
            )
            failure.exit_code = 1
            raise failure from error
        except OpenBlipError as error:
            if self.step > first:
                error.exit_code = 1
            raise

    def _run(self) -> bool:
        config, is_main = self.config, self.process.is_main
        trackers = Trackers(config, self.folder.path) if is_main else None
        self.task.train()
        progress = Progress("training", total=config.steps, unit="steps", done=self.step, visible=is_main)
        with progress as bar, closing(iter(self.loader)) as batches, stop_signals(self.loader) as stop:
            keep_freed_memory()  # from here on: the loader's workers have begun without
            self._mark()
            while self.step < config.steps:
                record = self._train_step(batches, bar.note)
                bar.advance(1)
                if self.step % config.log_every == 0 or self.step == config.steps:
                    speed = self._speed()
                    losses = " ".join(f"{name} {value:.3f}" for name, value in record.items() if name not in NOT_LOSSES)
                    rate, utilisation, memory, _ = (speed[name] for name in SPEED)
                    bar.note(f"{losses} | {rate:.0f} samples/s, MFU {utilisation:.0%}, {memory:.1f} GB")
                    self._log({**record, **speed}, trackers)
                # Before the checkpoint of the same step: a run resumed there does not validate it again.
                every = config.validate_every
                if self.validate and every and (self.step % every == 0 or self.step == config.steps):
                    scores = self._measure(self.validate)
                    bar.note(f"validation/score {scores['score']:.4g}")
                    self._log({"step": self.step, **{f"validation/{n}": v for n, v in scores.items()}}, trackers)
                    self._mark()
                stopped = not all_true(not stop.is_set(), self.process.device)
                if stopped or self.step % config.checkpoint_every == 0 or self.step == config.steps:
                    self._save()
                if config.model_every is not None and self.step % config.model_every == 0:
                    self.write_model(self.folder.path / "models" / f"step_{self.step:08d}")
                if stopped:
                    break
            if self.num_rejects:
                bar.note(
                    f"{self.num_rejects} draws met a sample that was skipped; {self.folder.path / REJECTS} has them"
                )
            if unused := unused_line([self.loader.count_unused()]):
                bar.note(unused)
        if trackers is not None:
            trackers.close()
        finished = self.step == config.steps
        if finished and config.shard_frozen:
            gather_frozen(self.task.frozen_parts(), self.process)
        return finished

    def _mark(self) -> None:
        """The next `_speed` is that of the steps from here."""
        self._marked = time.perf_counter(), self.step, self.operations.total

    def _speed(self) -> dict[str, float]:
        """How fast the steps since `_mark` were, by `SPEED`; marks anew.

        flop_utilisation: the share of a large matrix product's speed on this device in the same precision (model FLOP
        utilisation). peak_memory_gb: the most that this process has used, of its GPU or else of the machine.
        gflop_per_step: what a step of this process has computed, billions of floating-point operations.
        """
        device, (started, step, operations) = self.process.device, self._marked
        seconds = time.perf_counter() - started
        ceiling = matmul_ceiling(device, getattr(torch, self.config.dtype))
        rate = (self.step - step) * self.samples_per_step / seconds
        computed = self.operations.total - operations
        memory, per_step = round(peak_memory(device), 2), round(computed / (self.step - step) / 1e9, 4)
        self._mark()
        speed = (round(rate, 2), round(computed / seconds / ceiling, 5), memory, per_step)
        return dict(zip(SPEED, speed, strict=True))

    def _train_step(self, batches: Iterator[LoadedBatch], note: Callable[[str], None]) -> dict[str, float]:
        """One optimizer update over `accumulation` micro-batches; the record for metrics.jsonl."""
        with count_texts(apart=True) as texts:
            losses, rejects = self._backward(batches)
        self._note_texts(texts, note)
        rate = learning_rate_at(self.step, self.config)
        self.optimizers.set_learning_rate(rate / self.config.learning_rate)
        sums, norm = self._clip_gradients(losses)
        self.optimizers.step()
        self.task.after_step()
        self.step += 1
        for reject in rejects:
            self.folder.log({"step": self.step, **asdict(reject)}, REJECTS)
        counts = [len(rejects), len(texts.cut), texts.tokens, texts.unknown]
        num_rejects, num_cut, num_tokens, num_unknown, *totals = all_reduce_sum(
            [*counts, *sums.values()], self.process.device
        )
        self.num_rejects += int(num_rejects)
        means = {name: total / self.process.world_size for name, total in zip(sums, totals, strict=True)}
        overall = {"loss": sum(means.values()), "gradient_norm": norm, "learning_rate": rate}
        unread = {"cut_texts": int(num_cut), "unknown_tokens": round(num_unknown / max(1, num_tokens), 4)}
        return {"step": self.step, **means, **overall, "rejects": self.num_rejects, **unread}

    def _backward(self, batches: Iterator[LoadedBatch]) -> tuple[list[dict[str, Tensor]], list[Reject]]:
        """Gradients of `accumulation` micro-batches; their losses, and what was skipped while they were loaded."""
        config, device = self.config, self.process.device
        self.task.zero_grad()
        losses: list[dict[str, Tensor]] = []  # of each micro-batch, on the device
        rejects: list[Reject] = []
        in_bfloat16, mixes = config.dtype == "bfloat16", self.task.needs_autocast
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16 and mixes)
        with bfloat16_weights(self.task, self._frozen) if in_bfloat16 and not mixes else nullcontext():
            for micro in range(config.accumulation):
                loaded = next(batches)
                self._cursor = loaded.cursor
                rejects += loaded.rejects
                torch.manual_seed(derive_seed(config.seed, self.step, micro, self.process.rank))
                generator = torch.Generator().manual_seed(derive_seed(config.seed, self.step, micro))
                # DDP averages gradients in the backward pass of the last micro-batch only.
                last, forward = micro == config.accumulation - 1, self.forward
                alone = (
                    forward.no_sync() if isinstance(forward, DistributedDataParallel) and not last else nullcontext()
                )
                with self.operations.of(loaded.batch), alone:
                    with autocast:
                        named = forward(loaded.batch.to(device), self.step, generator)
                    total = torch.stack(list(named.values())).sum() / config.accumulation
                    total.backward()
                losses.append({name: loss.detach().float() for name, loss in named.items()})
        return losses, rejects

    def _note_texts(self, texts: TextCounts, note: Callable[[str], None]) -> None:
        """Say once per run that texts were cut, and that tokens are unknown.

        Raises ConfigError when nearly all tokens of the first step are unknown: nothing can be learned from them.
        """
        if not self.texts.texts:
            tokens, unknown = all_reduce_sum([texts.tokens, texts.unknown], self.process.device)
            if tokens and unknown / tokens >= TOO_MANY_UNKNOWN:
                raise ConfigError(
                    f"{unknown / tokens:.0%} of the tokens of the first {texts.texts} texts are unknown to the model's "
                    "vocabulary, so it cannot learn from them: give one of their language with "
                    f"{self.task.vocabulary_option}."
                )
        self.texts.add(texts)
        self.texts.cut.clear()  # in a long training they would be many
        lines = {f"the limit is {self.task.text_limit}": texts.cut_line()}
        lines[f"another vocabulary comes from {self.task.vocabulary_option}"] = self.texts.unknown_line()
        for hint, line in lines.items():
            if line and hint not in self._said and self.process.is_main:
                note(f"step {self.step + 1}: {line} ({hint}; metrics.jsonl counts on)")
                self._said.add(hint)

    def _clip_gradients(self, losses: list[dict[str, Tensor]]) -> tuple[dict[str, float], float]:
        """Clip as configured; returns the step's losses and the gradient norm before clipping.

        Both are fetched from the device at once. NonFiniteError is raised on every process.
        """
        gradients = [p.grad for p in self.task.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        fetched = torch.stack([*(loss for micro in losses for loss in micro.values()), norm]).tolist()
        sums: dict[str, float] = {}
        for name, value in zip((name for micro in losses for name in micro), fetched[:-1], strict=True):
            sums[name] = sums.get(name, 0.0) + value / self.config.accumulation
        if not all_true(all(map(math.isfinite, fetched)), self.process.device):
            raise NonFiniteError(
                f"Step {self.step + 1}: losses {sums}, gradient norm {fetched[-1]}. The weights are those "
                f"of step {self.step}. Go on from the last checkpoint with a lower rate or clipped gradients: openblip "
                f"train --resume {self.folder.path} --training.learning-rate {self.config.learning_rate / 2:g}, or "
                "--training.clip-norm 1."
            )
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.task.parameters(), self.config.clip_norm, norm)
        return sums, fetched[-1]

    def _measure(self, validate: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The scores of the model, which is kept in best/ when no earlier one was better.

        Every process takes part and gets the same scores. Training mode and random state are restored.
        """
        self.task.eval()
        with torch.random.fork_rng():
            scores = validate()
        self.task.train()
        if self.best_score is None or scores["score"] > self.best_score:
            self.best_score = scores["score"]
            self.write_model(self.folder.best)
        return scores

    def _log(self, record: dict[str, float], trackers: Trackers | None) -> None:
        if trackers is not None:  # the main process
            self.folder.log(record)
            trackers.log(record)

    def write_model(self, folder: Path) -> None:
        """Write the model with its present weights; every process calls this."""
        if self.process.is_main and self.save_model is not None:
            self.save_model(folder)
        barrier()

    def _save(self) -> None:
        target = self.folder.checkpoint(self.step)
        if self._cursor is not None and not target.exists():
            self.state.save(target, self.optimizers, self._cursor)
        if self.process.is_main:
            self.folder.keep_last(self.config.keep_checkpoints)


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from integers, the same on every machine."""
    return hash_int(",".join(map(str, parts)))


@contextmanager
def stop_signals(loader: Loader) -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that a run stops between steps; a second signal interrupts.

    The loader's workers, which may have got the signal too, are needed until then.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def request_stop(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        loader.state.value = STOPPING
        event.set()

    previous = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def bfloat16_weights(module: nn.Module, kept: Iterable[Tensor] = ()) -> Iterator[None]:
    """Within this context, in which losses and gradients are computed, a module has its float32 weights in bfloat16.

    They are cast once, and gradients reach the float32 weights. Activations are bfloat16 as well, where autocast casts
    at many places and, on a GPU, computes norms in float32. Single numbers, such as a temperature, stay as they are,
    and so do the weights `kept`. Backward passes belong into the context: activation checkpointing computes forward
    passes again there.
    """
    left_alone = {id(weight) for weight in kept}
    casts: dict[int, Tensor] = {}
    changed: list[tuple[nn.Module, str, nn.Parameter]] = []
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is None or not weight.ndim or weight.dtype != torch.float32 or id(weight) in left_alone:
                continue
            changed.append((part, name, weight))
            if id(weight) not in casts:
                casts[id(weight)] = weight.bfloat16()
    try:
        for part, name, weight in changed:
            part._parameters[name] = cast(nn.Parameter, casts[id(weight)])
        yield
    finally:
        for part, name, weight in changed:
            part._parameters[name] = weight
