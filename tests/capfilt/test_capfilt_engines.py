"""Several processes on this machine give the rows of one, and outlive each other."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from capfilt_world import all_rows, sample_members

from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.local import LocalEngine, run_capfilt
from openblip.capfilt.process import ShardWorker
from openblip.errors import ConfigError
from openblip.files import read_json, write_json
from shared_files import write_tar


@pytest.mark.slow
def test_processes_write_the_rows_of_one_and_a_killed_one_is_replaced(
    config: CapFiltConfig, finished_run: Path, tmp_path: Path
) -> None:

    class Killing(LocalEngine):
        def load(self, *arguments: object) -> object:  # type: ignore[override]
            facts = super().load(*arguments)  # type: ignore[arg-type]
            os.kill(self.processes[0].process.pid or 0, signal.SIGKILL)
            return facts

    summary = run_capfilt(config, tmp_path, device="cpu,cpu", engine=Killing())
    assert (sorted(summary.done), summary.failed) == (["00000", "00001", "00002"], [])
    assert all_rows(tmp_path) == all_rows(finished_run)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_worker_that_cannot_comply_is_refused_by_name(config: CapFiltConfig, run_copy: Path) -> None:
    other = ShardWorker.load(replace(config, dtype="bfloat16"), run_copy)
    with pytest.raises(ConfigError, match=r"cannot take part in the run: the .* of its captioner is .*, not"):
        other.work("00000")
    manifest = read_json(run_copy / "manifest.json")
    facts = other.facts
    assert set(facts.execution) == {"batch_size", "num_threads", "instruction_set"}
    settings = {**manifest["config"], **facts.execution, "instruction_set": "of another machine", "dtype": "bfloat16"}
    write_json(run_copy / "manifest.json", {**manifest, "models": facts.models, "config": settings})
    worker = ShardWorker.load(replace(config, dtype="bfloat16"), run_copy)
    with pytest.raises(ConfigError, match=r"its instruction_set is .*, not of another machine"):
        worker.work("00000")


def test_a_run_in_lower_precision_names_what_rounding_depends_on(config: CapFiltConfig, tmp_path: Path) -> None:
    """The same batch size is needed to resume, and the earlier number of threads is taken."""
    config = replace(config, dtype="bfloat16")
    run_capfilt(config, tmp_path)
    settings = read_json(tmp_path / "manifest.json")["config"]
    assert (settings["batch_size"], settings["num_threads"]) == (4, torch.get_num_threads())
    with pytest.raises(ConfigError, match="batch_size was 4, is now 5"):
        run_capfilt(replace(config, batch_size=5), tmp_path)
    rows = all_rows(tmp_path)
    (tmp_path / "captions" / "00001.report.json").unlink()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert run_capfilt(config, tmp_path).done == ["00001"]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)
    assert all_rows(tmp_path) == rows


@pytest.mark.slow
def test_sigterm_leaves_what_the_same_command_finishes(tmp_path: Path, config: CapFiltConfig) -> None:
    web, out = tmp_path / "web", tmp_path / "run"
    for shard in range(20):
        write_tar(web / f"{shard:03d}.tar", sample_members("0", shard, ["a dog", "a cat"]))
    program = "import sys; from openblip.cli.main import main; sys.exit(main(sys.argv[1:]))"
    words = ["capfilt", str(web), "--captioner", config.captioner, "--filter", config.filter, "--out", str(out)]
    command = [sys.executable, "-c", program, *words, "--dtype", "float32", "--batch-size", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(out.glob("captions/*.report.json"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 143
    assert "Traceback" not in errors
    assert not list(out.rglob("*.partial"))
    config = replace(config, source=str(web), batch_size=1)
    summary = run_capfilt(config, out)
    assert 0 < len(summary.done) < 20
    run_capfilt(config, tmp_path / "whole")
    assert all_rows(out) == all_rows(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the run is a forked process")
@pytest.mark.parametrize("seed", range(3))
def test_sigkill_at_a_random_rename(seed: int, config: CapFiltConfig, finished_run: Path, tmp_path: Path) -> None:
    """A part of benchmarks/kill_matrix.py: SIGKILL before or after a file appears, or with half of it written."""
    draw = random.Random(seed)
    number, how = draw.randrange(9), draw.choice(["before", "after", "halved"])
    rename, count = os.replace, iter(range(10**6))

    def killing_rename(partial: Path, path: Path) -> None:
        is_it = next(count) == number
        if is_it and how == "halved":
            os.truncate(partial, os.path.getsize(partial) // 2)
        if not is_it or how == "after":
            rename(partial, path)
        if is_it:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            signal.alarm(120)
            os.replace = killing_rename
            run_capfilt(config, tmp_path / "run")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.report.json")}
    summary = run_capfilt(config, tmp_path / "run")
    assert len(summary.skipped) == len(finished)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert all_rows(tmp_path / "run") == all_rows(finished_run)
    names = sorted(path.name for path in (tmp_path / "run" / "captions").iterdir())
    assert names == sorted(path.name for path in (finished_run / "captions").iterdir())
