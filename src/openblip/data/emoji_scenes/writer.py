"""Writes emoji scenes as standard tar shards: same request, same bytes, however many processes work."""

import io
import json
import multiprocessing
import os
import signal
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openblip.data.emoji_scenes.kinds import SAMPLE_KINDS, draw_distinct, sample_members
from openblip.data.emoji_scenes.request import Kind, SceneRequest
from openblip.data.emoji_scenes.sprites import ATTRIBUTION
from openblip.data.emoji_scenes.vocabulary import Split
from openblip.errors import ConfigError
from openblip.progress import Progress

LICENSE_FILE = "LICENSE.txt"
REQUEST_FILE = ".request.json"


def write_emoji_scenes(
    out: str | os.PathLike[str],
    *,
    split: Split,
    num_samples: int,
    kind: Kind = "captions",
    seed: int = 0,
    noise: float = 0.4,
    samples_per_shard: int = 1000,
    num_workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write `num_samples` samples of `split` to OUT/0000.tar, OUT/0001.tar, ..., and beside them the sprites'
    licence and what samples of that kind need (the list of answers).

    `noise` is the share of noisy captions of kind captions, split web; all else has none. The same request
    writes the same bytes for any `num_workers` (None: one for each processor). Samples of val and of test are
    distinct: no two of one split share a true caption, or show the same with the same question.

    An interrupted request goes on where it stopped when it is made again; `overwrite` starts anew.

    Raises ConfigError for an impossible request or a folder that holds anything else (`overwrite` replaces
    scenes of another request, but nothing that is not ours), MissingExtraError without the packages that the
    kind needs.
    """
    request = SceneRequest(
        kind=kind,
        split=split,
        num_samples=num_samples,
        seed=seed,
        noise=noise if kind == "captions" and split == "web" else 0.0,
        samples_per_shard=samples_per_shard,
    )
    if num_workers is not None and num_workers < 1:
        raise ConfigError("num_workers must be at least 1")
    SAMPLE_KINDS[kind].require_packages()
    plans = draw_distinct(request) if split in ("val", "test") else None
    folder = _open_folder(Path(out), request, overwrite)
    jobs = [
        _ShardJob(
            path=folder / f"{start // samples_per_shard:04d}.tar",
            request=request,
            start=start,
            stop=min(start + samples_per_shard, num_samples),
            plans=None if plans is None else plans[start : start + samples_per_shard],
        )
        for start in range(0, num_samples, samples_per_shard)
    ]
    missing = [job for job in jobs if not job.path.exists()]
    done = num_samples - sum(map(len, missing))
    with Progress("emoji scenes", total=num_samples, unit="scenes", done=done, visible=progress) as bar:
        for written in _written(missing, min(num_workers or os.cpu_count() or 1, len(missing))):
            bar.advance(written)
    return folder


def _open_folder(folder: Path, request: SceneRequest, overwrite: bool) -> Path:
    """Make `folder` ready for `request`: what it holds comes from the same request or is removed."""
    record = folder / REQUEST_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = any(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"{folder} cannot hold the shards: {error.strerror}") from error
    if found and overwrite:
        _earlier_request(record)  # refuses a folder that is not ours
        for stale in _written_before(folder):
            stale.unlink()
    elif found:
        _check_same(folder, _earlier_request(record), asdict(request))
    _write_whole(record, json.dumps(asdict(request)) + "\n")
    for name, content in SAMPLE_KINDS[request.kind].companions().items():
        _write_whole(folder / name, json.dumps(content) + "\n")
    (folder / LICENSE_FILE).write_text(ATTRIBUTION, encoding="utf-8")
    return folder


def _written_before(folder: Path) -> Iterator[Path]:
    """The shards of any earlier request, and the files that belong beside them."""
    yield from (*folder.glob("*.tar"), *folder.glob("*.tar.partial"))
    names = {name for kind in SAMPLE_KINDS.values() for name in kind.companions()}
    yield from (folder / name for name in sorted(names) if (folder / name).exists())


def _write_whole(path: Path, text: str) -> None:
    """Under a temporary name first: a file that is there is whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _earlier_request(record: Path) -> dict[str, Any]:
    try:
        earlier: dict[str, Any] = dict(json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{record.parent} is not empty and not of emoji scenes; name another folder"
        ) from error
    return {"kind": "captions"} | earlier  # a record from before there were other kinds names none


def _check_same(folder: Path, earlier: dict[str, Any], wanted: dict[str, Any]) -> None:
    changed = [name for name in wanted if earlier.get(name) != wanted[name]]
    if changed:
        changes = ", ".join(f"{name} {earlier.get(name)} -> {wanted[name]}" for name in changed)
        raise ConfigError(
            f"{folder} holds scenes of another request ({changes}); name another folder, or replace them "
            "with --overwrite"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _ShardJob:
    path: Path
    request: SceneRequest
    start: int
    stop: int
    plans: list[Any] | None

    def __len__(self) -> int:
        return self.stop - self.start

    def write(self) -> int:
        """Write the shard under a temporary name, then rename it: a shard that is there is whole."""
        partial = self.path.with_name(self.path.name + ".partial")
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(self.start, self.stop):
                plan = None if self.plans is None else self.plans[index - self.start]
                for suffix, content in sample_members(self.request, index, plan):
                    _add(tar, f"{index:09d}.{suffix}", content)
        partial.replace(self.path)
        return len(self)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # its defaults are fixed: owner 0, time 0, mode 644
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _written(jobs: list[_ShardJob], num_workers: int) -> Iterable[int]:
    if num_workers <= 1:
        yield from (job.write() for job in jobs)
        return
    # Spawned, not forked: the caller may hold threads (a progress bar, torch).
    context = multiprocessing.get_context("spawn")
    ignore_interrupt = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process; workers end their shard
    with ProcessPoolExecutor(num_workers, context, signal.signal, ignore_interrupt) as pool:
        try:
            for future in as_completed([pool.submit(job.write) for job in jobs]):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # an error or Ctrl-C: start no further shard
            raise
