"""Jobs side by side, each in a process of its own: one for each core or GPU, in the order of what depends on what.

A job that fails does not end the others; those that depend on it are not started. A driver that is killed takes its
children with it: each watches its parent, saves its state and ends. A child holds a lock on its job's folder, so that
two drivers of the same tables wait for each other's jobs instead of doing them twice.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from filelock import FileLock

from openblip.files import read_json, write_json
from openblip.progress import Progress
from openblip.recipes.ablation import AblationJob

STOPPED = 130
LOOK_EVERY = 1.0  # seconds


class Failure(NamedTuple):
    """A job that could not be finished, and why."""

    job: str
    reason: str


class _Stop(Exception):
    """A signal asked the driver to stop."""


def run_jobs(
    jobs: Sequence[tuple[AblationJob, Sequence[AblationJob]]],
    environments: Sequence[Mapping[str, str]],
    *,
    label: str,
    after_each: Callable[[], None] = lambda: None,
) -> list[Failure]:
    """Do all jobs that are not done, each after those it depends on, and return the failures.

    jobs: with what they depend on, in an order in which this comes first. environments: one for each of the jobs that
    are done side by side, as `child_environments` makes them. after_each: called whenever a job has ended. Raises
    KeyboardInterrupt after Ctrl-C or SIGTERM, when all children have saved their state.
    """
    waiting = [(job, needs) for job, needs in jobs if not job.is_done]
    failures: dict[str, Failure] = {}
    running: dict[int, tuple[AblationJob, BaseProcess]] = {}
    with Progress(label, total=len(jobs), unit="jobs", done=len(jobs) - len(waiting)) as bar, _stop_on_sigterm():
        try:
            while waiting or running:
                for job, needs in list(waiting):
                    if failed := next((need for need in needs if need.name in failures), None):
                        failures[job.name] = Failure(job.name, f"it needs {failed.name}")
                        bar.note(f"{job.name} is not started: it needs {failed.name}")
                    elif not all(need.is_done for need in needs):
                        continue
                    elif job.is_light:
                        job.work()
                        bar.advance(1)
                    elif len(running) < len(environments):
                        slot = next(number for number in range(len(environments)) if number not in running)
                        running[slot] = (job, _start(job, environments[slot]))
                        bar.show(", ".join(job.name for job, _ in running.values()))
                    else:
                        continue
                    waiting.remove((job, needs))
                connection.wait([child.sentinel for _, child in running.values()], timeout=LOOK_EVERY)
                for slot, (job, child) in list(running.items()):
                    if child.exitcode is not None:
                        del running[slot]
                        bar.advance(1)
                        if child.exitcode or not job.is_done:
                            failures[job.name] = Failure(job.name, _reason(job, child.exitcode))
                            bar.note(f"{job.name} failed: {failures[job.name].reason}; see {job.log}")
                        after_each()
        except (KeyboardInterrupt, _Stop):
            raise KeyboardInterrupt from None
        finally:
            _end([child for _, child in running.values()])
    return list(failures.values())


def _start(job: AblationJob, environment: Mapping[str, str]) -> BaseProcess:
    child = multiprocessing.get_context("spawn").Process(target=_work, args=(job, environment), name=job.name)
    child.start()
    return child


def _work(job: AblationJob, environment: Mapping[str, str]) -> None:
    """What a child does."""
    if sys.platform != "win32":
        os.setsid()  # Ctrl-C is for the driver, which tells its children once
    os.environ.update(environment)
    job.folder.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab", buffering=0) as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with FileLock(job.folder / ".lock"):
        if job.is_done:
            return
        spent = job.folder / "spent.json"  # by all tries that came to an end
        before = float(read_json(spent)["core_seconds"]) if spent.exists() else 0.0
        started = time.process_time()
        try:
            finished = job.work()
        except Exception as error:
            traceback.print_exc()
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            sys.exit(1)
        finally:
            write_json(spent, {"core_seconds": round(before + time.process_time() - started, 1)})
        if not finished:
            sys.exit(STOPPED)
        spent.replace(job.folder / "job.json")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a child
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _reason(job: AblationJob, exit_code: int) -> str:
    """Why a child failed: the last line that it wrote, or how it ended."""
    lines = job.log.read_text(encoding="utf-8", errors="replace").split("\n") if job.log.exists() else []
    last = next((line for line in reversed(lines) if line.strip()), "")
    if exit_code == 1 and last:
        return last.strip()
    return f"its process ended with {exit_code}" if exit_code else "its process left nothing"


def _end(children: Sequence[BaseProcess]) -> None:
    """Let children save their state and end."""
    for child in children:
        child.terminate()
    for child in children:
        child.join()


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """Within, SIGTERM stops the driver as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _Stop

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def child_environments(parallel: int | None) -> list[dict[str, str]]:
    """For each job side by side a GPU of its own where there are any, else one thread; as many as GPUs or cores."""
    import torch

    from openblip.data.reader import num_cores

    if not (count := torch.cuda.device_count()):
        return [{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}] * (parallel or num_cores())
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return [{"CUDA_VISIBLE_DEVICES": names[number % count]} for number in range(parallel or count)]
