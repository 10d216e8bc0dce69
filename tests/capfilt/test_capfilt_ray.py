"""CapFilt on a Ray cluster of several nodes on this machine: rows are those of the local engine, whoever dies."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from capfilt_world import all_rows, sample_members

from openblip.capfilt.config import CapFiltConfig, ScoreConfig
from openblip.capfilt.local import run_capfilt
from openblip.capfilt.ray import RayEngine, RayScoreEngine
from openblip.capfilt.scores import score_run
from openblip.cluster import EngineOptions
from openblip.data.captions import finished_shards, read_texts, text_columns
from shared_files import write_tar
from tiny_similarity import save_model

cluster_utils = pytest.importorskip("ray.cluster_utils")
pytestmark = pytest.mark.slow
NUM_SHARDS = 14


@pytest.fixture(scope="module")
def cluster() -> Iterator[cluster_utils.Cluster]:
    """A head that does no work and two nodes with logical GPUs, one of which has other instructions than the other."""
    memory = {"object_store_memory": 80 * 2**20}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **memory})
    cluster.add_node(num_cpus=4, num_gpus=1, node_name="plain", **memory)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, captioner: str, filter_model: str) -> CapFiltConfig:
    web = tmp_path_factory.mktemp("web_of_many")
    for shard in range(NUM_SHARDS):
        members = [m for n in range(5) for m in sample_members(f"{n}", 10 * shard + n, ["red dog", "a cat"][: n % 3])]
        write_tar(web / f"{shard:03d}.tar", [*members, ("notes.md", b"no part of a sample")])
    models = {"captioner": captioner, "filter": filter_model, "dtype": "float32"}
    return CapFiltConfig(source=str(web), **models, batch_size=2, num_workers=1)


@pytest.fixture(scope="module")
def local_rows(tmp_path_factory: pytest.TempPathFactory, config: CapFiltConfig) -> list[dict[str, object]]:
    out = tmp_path_factory.mktemp("local")
    run_capfilt(config, out)
    return all_rows(out)


def when_done(out: Path, count: int, act: Callable[[], None]) -> threading.Thread:
    """Do something once so many shards are done."""

    def wait() -> None:
        while len(list(out.glob("captions/*.report.json"))) < count:
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def kill_process(name: str) -> None:
    """SIGKILL the first process of Ray that has this name."""
    for entry in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            title = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if title.startswith(f"ray::{name}"):
            os.kill(int(entry.name), signal.SIGKILL)
            return
    raise AssertionError(f"there is no process {name}")


def test_workers_a_decoder_and_a_node_die(
    cluster: cluster_utils.Cluster,
    config: CapFiltConfig,
    local_rows: list[dict[str, object]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    node = cluster.add_node(num_cpus=4, num_gpus=1, object_store_memory=80 * 2**20)
    options = EngineOptions(engine="ray", address=cluster.address, gpus_per_worker=1)
    deeds = [
        when_done(tmp_path, 1, lambda: kill_process("_ModelActor")),
        when_done(tmp_path, 3, lambda: kill_process("_Decoder")),
        when_done(tmp_path, 5, lambda: cluster.remove_node(node, allow_graceful=False)),
    ]
    summary = run_capfilt(config, tmp_path, engine=RayEngine(options))
    for deed in deeds:
        deed.join(timeout=60)
    assert all_rows(tmp_path) == local_rows
    assert (len(summary.done), summary.failed) == (NUM_SHARDS, [])
    assert summary.unused == {".md": NUM_SHARDS}
    assert not list(tmp_path.rglob("*.partial"))
    assert "a worker died" in capsys.readouterr().err


def test_the_driver_dies_and_the_same_command_goes_on(
    cluster: cluster_utils.Cluster, config: CapFiltConfig, local_rows: list[dict[str, object]], tmp_path: Path
) -> None:
    program = "import sys; from openblip.cli.main import main; sys.exit(main(sys.argv[1:]))"
    words = ["capfilt", config.source, "--captioner", config.captioner, "--filter", config.filter, "--batch-size", "2"]
    words += ["--num-workers", "1", "--dtype", "float32", "--engine", "ray", "--address", cluster.address]
    process = subprocess.Popen([sys.executable, "-c", program, *words, "--out", str(tmp_path)])
    when_done(tmp_path, 2, process.kill).join(timeout=60)
    assert process.wait() == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("captions/*.report.json")}
    assert len(finished) < NUM_SHARDS
    summary = run_capfilt(config, tmp_path)  # by the other engine
    assert all_rows(tmp_path) == local_rows
    assert len(summary.skipped) >= len(finished)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    deadline = time.monotonic() + 30  # Ray takes a moment to kill the workers of a dead driver, in the middle of a file
    while list(tmp_path.rglob("*.partial")):
        assert time.monotonic() < deadline
        time.sleep(1)
        run_capfilt(config, tmp_path)  # which removes what killed writers left


def test_a_worker_with_other_instructions_is_refused_by_name(
    cluster: cluster_utils.Cluster, config: CapFiltConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = 80 * 2**20
    other = cluster.add_node(
        num_cpus=4,
        num_gpus=1,
        node_name="other",
        object_store_memory=memory,
        env_vars={"ATEN_CPU_CAPABILITY": "default"},
    )
    options = EngineOptions(engine="ray", address=cluster.address, gpus_per_worker=1)
    summary = run_capfilt(replace(config, dtype="bfloat16"), tmp_path, engine=RayEngine(options))
    cluster.remove_node(other)
    assert (len(summary.done), summary.failed) == (NUM_SHARDS, [])
    refusal = next(line for line in capsys.readouterr().err.splitlines() if "is refused" in line)
    assert "instruction_set" in refusal
    assert "other" in refusal or "plain" in refusal  # the second of the two to start


def test_later_scores_are_those_of_the_local_engine_although_a_worker_dies(
    cluster: cluster_utils.Cluster, config: CapFiltConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of texts, of images, of models and of all shards, and of a function that kills the first worker that calls it."""
    save_model("clip", tmp_path / "clip")
    (tmp_path / "mine.py").write_text(
        "import os\nfrom pathlib import Path\n\ndef red(rows, images):\n"
        f"    died = Path({str(tmp_path)!r}, 'died')\n"
        "    if os.environ.get('RAY_JOB_ID') and rows[0]['shard'] == '003' and not died.exists():\n"
        "        died.touch()\n        os._exit(1)\n"
        "    return [image.getpixel((0, 0))[0] for image in images]\n"
    )
    run_capfilt(replace(config, keep_embeddings=True), tmp_path / "local")
    shutil.copytree(tmp_path / "local", tmp_path / "ray")
    names = ("num_words", "width", "token_logprob", "sieve", "image_group", "text_repeat", "lemon", "clip")
    scores = ScoreConfig(
        scores=(*names, f"{tmp_path / 'mine.py'}:red"), clip=str(tmp_path / "clip"), batch_size=2, num_workers=1
    )
    options = EngineOptions(engine="ray", address=cluster.address, gpus_per_worker=1)
    score_run(tmp_path / "local", scores, dtype="float32")
    summary = score_run(tmp_path / "ray", scores, dtype="float32", engine=RayScoreEngine(options))
    assert summary.failed == []
    assert summary.done == dict.fromkeys([*summary.done], NUM_SHARDS)
    assert (tmp_path / "died").exists()
    assert "a worker died" in capsys.readouterr().err
    for shard in finished_shards(tmp_path / "local"):
        columns = text_columns(tmp_path / "local", shard)
        assert {*names, "red"} <= {*columns} == {*text_columns(tmp_path / "ray", shard)}
        expected, found = (read_texts(tmp_path / side, shard, [*columns]) for side in ("local", "ray"))
        for name in columns:
            assert found[name].to_pylist() == pytest.approx(expected[name].to_pylist(), abs=1e-5), name
    assert not list((tmp_path / "ray").rglob("*.partial"))
