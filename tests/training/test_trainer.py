"""The loop around a small real task: accumulation, clipping, non-finite steps, signals, resuming."""

import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from generated_loader import GeneratedLoader
from marks import slow
from openblip.data.config import Preprocessing
from openblip.data.loader import LoadedBatch
from openblip.data.sample import Reject
from openblip.distributed import Process
from openblip.errors import CheckpointError, ConfigError
from openblip.models.blip import Blip
from openblip.tasks.captioning import Captioning
from openblip.tasks.config import CaptioningConfig
from openblip.training.config import TrainingConfig
from openblip.training.run_folder import RunFolder
from openblip.training.trainer import SPEED, NonFiniteError, Trainer
from shared_files import read_lines
from tiny_blip import SIZE, TINY, random_batch, randomise, tiny_tokenizer

PROCESS = Process(0, 1, torch.device("cpu"))
TOKENIZER = tiny_tokenizer()


class Counting(Captioning):
    """Captioning that counts its steps, and can be made to fail or be stopped at one."""

    def __init__(self, at: int = -1, then: Callable[[Tensor], Tensor] | None = None) -> None:
        config = replace(TINY.text, vocab_size=TOKENIZER.vocab_size)
        model = Blip(replace(TINY, text=config, heads=("lm",)))
        randomise(model, seed=0)
        super().__init__(CaptioningConfig(prompt=""), model, TOKENIZER, Preprocessing(image_size=SIZE))
        self.at, self.then = at, then
        self.forwards: list[int] = []
        self.steps_followed = 0

    def forward(self, batch: Any, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        self.forwards.append(step)
        loss = super().forward(batch, step, generator)["lm"]
        return {"lm": self.then(loss) if self.then is not None and step == self.at else loss}

    def after_step(self) -> None:
        self.steps_followed += 1


def loader_of(
    batch_size: int, rejects_at: int = -1, texts: Sequence[str] = (), max_text_length: int = 30
) -> Callable[..., GeneratedLoader]:
    """Batches over an endless row of samples of equal length; the cursor is the number of the next sample. Tokens are
    made of `texts` while they are loaded.
    """

    def at(cursor: dict[str, Any] | None) -> Iterator[LoadedBatch]:
        start = 0 if cursor is None else int(cursor["next"])
        while True:
            samples = [random_batch([6], [100 + i], seed=i) for i in range(start, start + batch_size)]
            TOKENIZER.encode(texts[start : start + batch_size], max_text_length)
            start += batch_size
            ids, mask = (torch.cat([getattr(s.tokens, name) for s in samples]) for name in ("ids", "mask"))
            pixels, image_ids = (torch.cat([getattr(s, name) for s in samples]) for name in ("pixels", "image_ids"))
            lists = {name: [getattr(s, name)[0] for s in samples] for name in ("captions", "keys")}
            tokens = replace(samples[0].tokens, ids=ids, mask=mask)
            batch = replace(samples[0], pixels=pixels, tokens=tokens, image_ids=image_ids, **lists)
            rejects = [Reject("0007", "bad", "no image")] if start - batch_size == rejects_at else []
            yield LoadedBatch(batch, {"next": start, "positions": {}}, rejects)

    return lambda cursor: GeneratedLoader(at(cursor))


def config(**changes: Any) -> TrainingConfig:
    settings = {"steps": 4, "batch_size": 4, "dtype": "float32", "log_every": 1, "learning_rate": 1e-2}
    return TrainingConfig(**{**settings, **changes})


def trainer(path: Path, task: nn.Module, settings: TrainingConfig, **loader: int) -> Trainer:
    path.mkdir(exist_ok=True)
    return Trainer(task, loader_of(settings.batch_size, **loader), settings, RunFolder(path), PROCESS)


def metrics(path: Path, *names: str) -> list[Any]:
    lines = read_lines(path / "metrics.jsonl")
    return [tuple(line[name] for name in names) if len(names) > 1 else line[names[0]] for line in lines]


def assert_equal_weights(task: nn.Module, other: nn.Module) -> None:
    for name, value in task.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_accumulated_micro_batches_train_as_one_batch(tmp_path: Path) -> None:
    whole, parts = Counting(), Counting()
    trainer(tmp_path / "whole", whole, config()).run()
    trainer(tmp_path / "parts", parts, config(batch_size=1, accumulation=4)).run()
    assert parts.forwards == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert whole.steps_followed == parts.steps_followed == 4
    assert metrics(tmp_path / "parts", "lm") == pytest.approx(metrics(tmp_path / "whole", "lm"), abs=1e-4)
    norms = [metrics(tmp_path / name, "gradient_norm") for name in ("parts", "whole")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize(
    "spoil",
    [lambda loss: loss * float("nan"), lambda loss: loss * float("inf"), lambda loss: loss + (0 * loss).sqrt()],
    ids=["loss nan", "loss inf", "gradient nan"],
)
@pytest.mark.parametrize("accumulation", [2, *slow(1)])
def test_a_non_finite_step_stops_before_the_update(
    tmp_path: Path, spoil: Callable[[Tensor], Tensor], accumulation: int
) -> None:
    healthy, spoiled = Counting(), Counting(at=2, then=spoil)
    trainer(tmp_path / "healthy", healthy, config(steps=2, schedule="constant", accumulation=accumulation)).run()
    settings = config(steps=4, schedule="constant", accumulation=accumulation)
    with pytest.raises(NonFiniteError, match=r"Step 3.*weights are those of step 2"):
        trainer(tmp_path / "spoiled", spoiled, settings).run()
    assert spoiled.steps_followed == 2
    assert_equal_weights(healthy, spoiled)
    assert metrics(tmp_path / "spoiled", "step") == [1, 2]


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_logged(tmp_path: Path) -> None:
    task = Counting()
    run = trainer(tmp_path, task, config(steps=1, clip_norm=0.01))
    run.run()
    assert metrics(tmp_path, "gradient_norm")[0] > 0.02
    left = torch.nn.utils.get_total_norm([p.grad for p in task.parameters() if p.grad is not None])
    assert left.item() == pytest.approx(0.01, rel=1e-3)


def test_logged_learning_rates_are_the_schedules(tmp_path: Path) -> None:
    settings = config(steps=4, warmup_steps=2, warmup_learning_rate=0.0, schedule="constant")
    trainer(tmp_path, Counting(), settings).run()
    assert metrics(tmp_path, "step", "learning_rate") == [(1, 0.0), (2, 0.005), (3, 0.01), (4, 0.01)]


@pytest.mark.parametrize("muon", [None, 1e-2])
@pytest.mark.parametrize("number", [signal.SIGTERM, *slow(signal.SIGINT)])
def test_a_signal_stops_after_the_step_and_leaves_a_checkpoint(tmp_path: Path, number: int, muon: float | None) -> None:
    settings = config(muon_learning_rate=muon)

    def interrupt(loss: Tensor) -> Tensor:
        os.kill(os.getpid(), number)
        return loss

    caught = signal.signal(number, lambda *_: pytest.fail("the trainer did not take the signal"))
    try:
        stopped, whole = Counting(at=1, then=interrupt), Counting()
        assert trainer(tmp_path / "run", stopped, settings).run() is False
        assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
        resumed = Counting()
        assert trainer(tmp_path / "run", resumed, settings).run() is True
    finally:
        signal.signal(number, caught)
    assert resumed.forwards == [2, 3]
    trainer(tmp_path / "whole", whole, settings).run()
    assert metrics(tmp_path / "run", "step", "lm") == metrics(tmp_path / "whole", "step", "lm")
    assert_equal_weights(whole, resumed)


def test_a_finished_run_trains_no_further(tmp_path: Path) -> None:
    trainer(tmp_path, Counting(), config()).run()
    again = Counting()
    assert trainer(tmp_path, again, config()).run() is True
    assert again.forwards == []


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000099.partial").mkdir(parents=True)  # of a killed write
    trainer(tmp_path, Counting(), config(steps=5, checkpoint_every=1, keep_checkpoints=2)).run()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000004", "step_00000005"]


def test_the_model_is_also_written_along_the_way(tmp_path: Path) -> None:
    written: dict[str, dict[str, Tensor]] = {}
    task, settings, folder = Counting(), config(model_every=2), RunFolder(tmp_path)

    def save(to: Path) -> None:
        written[str(to)] = {name: value.clone() for name, value in task.state_dict().items()}

    Trainer(task, loader_of(settings.batch_size), settings, folder, PROCESS, save).run()
    assert list(written) == [str(tmp_path / "models" / f"step_0000000{step}") for step in (2, 4)]
    first, last = (list(of_step.values()) for of_step in written.values())
    assert not all(torch.equal(a, b) for a, b in zip(first, last, strict=True))


def test_cut_and_unknown_texts_are_said_once_and_counted_at_every_step(tmp_path: Path, capsys: Any) -> None:
    texts = ["a dog"] * 2 + ["a dog beside a cat", "a dog 狗"] * 2  # two for each step
    load, settings = loader_of(2, texts=texts, max_text_length=5), config(steps=3, batch_size=2, log_every=1)
    assert Trainer(Counting(), load, settings, RunFolder(tmp_path), PROCESS).run()
    assert metrics(tmp_path, "cut_texts", "unknown_tokens") == [(0, 0.0), (1, 0.1667), (1, 0.1667)]
    printed = capsys.readouterr().err
    assert "step 2: 1 text was longer than 5 tokens and cut (the limit is --data.max-text-length;" in printed
    assert "step 2: 10% of the tokens of the texts are unknown" in printed
    assert (printed.count("and cut"), printed.count("unknown to")) == (1, 1)


def test_texts_that_the_vocabulary_cannot_say_are_refused(tmp_path: Path) -> None:
    task, load = Counting(), loader_of(2, texts=["一只狗坐在草地上", "两只猫在桌子上 a"])
    with pytest.raises(ConfigError, match=r"94% of the tokens of the first 2 texts are unknown"):
        Trainer(task, load, config(steps=3, batch_size=2), RunFolder(tmp_path), PROCESS).run()
    assert task.steps_followed == 0


def test_skipped_samples_are_counted_and_named_also_over_a_resume(tmp_path: Path) -> None:
    settings = config(checkpoint_every=2)
    trainer(tmp_path, Counting(), replace(settings, steps=3), rejects_at=4).run()
    assert metrics(tmp_path, "rejects") == [0, 1, 1]
    trainer(tmp_path, Counting(), settings, rejects_at=4).run()
    assert metrics(tmp_path, "rejects") == [0, 1, 1, 1]
    lines = (tmp_path / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 2, "shard": "0007", "key": "bad", "reason": "no image"}]


class Exploit:
    """Unpickled carelessly, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("file", ["task.pt", "optimizer.pt", "cursor.json"])
@pytest.mark.parametrize("damage", ["truncated", "malicious", "missing", "empty"])
def test_a_damaged_state_is_named_and_runs_no_code(tmp_path: Path, file: str, damage: str) -> None:
    trainer(tmp_path, Counting(), config(steps=1)).run()
    path = tmp_path / "checkpoints" / "step_00000001" / file
    if damage == "malicious":
        torch.save(Exploit(tmp_path / "exploited"), path)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "truncated" else 0])
    with pytest.raises(CheckpointError, match="step_00000001"):
        trainer(tmp_path, Counting(), config())
    assert not (tmp_path / "exploited").exists()


def test_a_state_of_another_model_optimizer_or_number_of_samples_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, Counting(), config(steps=1)).run()
    other = Counting()
    other.model.itm_head = nn.Linear(3, 2)
    for task, changes, message in (
        (other, {}, r"(?s)step_00000001 does not fit this run.*itm_head"),
        (Counting(), {"muon_learning_rate": 1e-2}, "step_00000001 does not fit this run"),
        (Counting(), {"accumulation": 2}, "of 4 samples a step, this one has 8"),
    ):
        with pytest.raises(CheckpointError, match=message):
            trainer(tmp_path, task, config(**changes))


def validated(folder: RunFolder, scores: list[float], steps: int, saved: list[int]) -> Counting:
    """Train with a score given for each validation, every second step; `saved` receives the best steps."""
    task, settings = Counting(), config(steps=steps, checkpoint_every=2, validate_every=2)
    folder.path.mkdir(exist_ok=True)

    def validate() -> dict[str, float]:
        assert not task.training
        torch.rand(3)  # must not change what is drawn afterwards
        return {"score": scores[current.step // 2 - 1], "other": float(current.step)}

    def save(to: Path) -> None:
        saved.append(current.step)
        to.mkdir(exist_ok=True)

    current = Trainer(task, loader_of(settings.batch_size), settings, folder, PROCESS, save, validate)
    current.run()
    return task


def test_the_best_model_is_kept_also_over_a_resume(tmp_path: Path) -> None:
    folder, saved = RunFolder(tmp_path), list[int]()
    validated(folder, [0.2, 0.5, 0.4, 0.6], 4, saved)
    assert saved == [2, 4]
    assert folder.best.is_dir()
    task = validated(folder, [0.2, 0.5, 0.4, 0.6], 8, saved)  # 0.4 is no best, though the run began anew
    assert saved == [2, 4, 8]
    assert task.training
    lines = read_lines(tmp_path / "metrics.jsonl")
    scores = [(line["step"], line["validation/score"]) for line in lines if "validation/score" in line]
    assert scores == [(2, 0.2), (4, 0.5), (6, 0.4), (8, 0.6)]


def test_validation_changes_nothing_of_the_training(tmp_path: Path) -> None:
    with_it = validated(RunFolder(tmp_path / "a"), [0.1, 0.2], 4, [])
    without, settings = Counting(), config(steps=4, checkpoint_every=2)
    trainer(tmp_path / "b", without, settings).run()
    assert_equal_weights(without, with_it)


def test_every_record_says_how_fast_the_steps_were(tmp_path: Path, capsys: Any) -> None:
    trainer(tmp_path, Counting(), config(steps=4, log_every=2)).run()
    for rate, utilisation, memory, gflop in metrics(tmp_path, *SPEED):
        assert rate > 0
        assert 0 < utilisation < 1
        assert 0.05 < memory < 100
        assert gflop > 0
    assert re.search(r"lm \d\.\d{3} loss .* samples/s, MFU \d+%, \d\.\d GB", capsys.readouterr().err)
