"""Files are there whole or not at all; JSON lines resume; hashes are the same everywhere."""

import errno
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from openblip import files
from openblip.errors import ConfigError, OutputError


def test_a_file_appears_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    files.write_json(path, {"ü": 1})
    assert files.read_json(path) == {"ü": 1}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), files.atomic_file(path) as partial:
        partial.write_text(f"half {1 / 0}")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for name in ("first", "second"):
        with files.atomic_folder(folder) as partial:
            (partial / name).write_text(name)
    assert [p.name for p in folder.iterdir()] == ["second"]
    with pytest.raises(ZeroDivisionError), files.atomic_folder(folder) as partial:
        (partial / "third").write_text(f"half {1 / 0}")
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "second"]


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / f"a{files.PARTIAL}").write_text("half")
    (tmp_path / f"b{files.PARTIAL}").mkdir()
    (tmp_path / "c").write_text("whole")
    files.remove_partials(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    files.write_jsonl(path, [{"a": 1}, {"a": 2}])
    whole = path.stat().st_size
    with path.open("a") as file:
        file.write('{"a": 3')
    lines = list(files.read_jsonl(path))
    assert [(line.number, line.value) for line in lines] == [(1, {"a": 1}), (2, {"a": 2})]
    assert lines[-1].end == whole
    assert list(files.read_jsonl(tmp_path / "none.jsonl")) == []


@pytest.mark.parametrize("text", ["{", "[1]", None])
def test_a_damaged_object_is_named(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"a\.json"):
        files.read_json(path)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\nnot json\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 2"):
        list(files.read_jsonl(tmp_path / "a.jsonl"))


NOISE = torch.rand(500_000)  # 2 MB


def save_opened(path: Path) -> None:
    with path.open("wb") as file:
        torch.save({"noise": NOISE}, file)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond a megabyte, as on a disk that is full then."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(NOISE.numpy().tobytes()),
        save_opened,
        lambda path: save_file({"noise": NOISE}, path),
        lambda path: pq.write_table(pa.table({"noise": NOISE.numpy()}), path),
    ],
    ids=["bytes", "torch", "safetensors", "parquet"],
)
def test_a_full_disk_is_said_with_the_file(small_files: None, tmp_path: Path, write: Callable[[Path], object]) -> None:
    path = tmp_path / "a.bin"
    path.write_text("whole")
    with (
        pytest.raises(OutputError, match=r"a\.bin cannot be written: File too large"),
        files.atomic_file(path) as partial,
    ):
        write(partial)
    with pytest.raises(OutputError, match=r"model cannot"), files.atomic_folder(tmp_path / "model") as folder:
        write(folder / "weights")
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    assert path.read_text() == "whole"


def test_other_errors_of_a_writer_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="denied"), files.atomic_file(tmp_path / "a"):
        raise OSError(errno.EACCES, "denied")


def test_hashes_do_not_change() -> None:
    # Seeds of sampled captions and of training steps come from these: another value changes every run.
    assert files.hash_int("openblip") == 8478536649919149180
    assert files.hash_int(b"openblip") == files.hash_int("openblip")
    assert files.hash_int("openblip", 128).bit_length() <= 128
    assert files.hash_int("\ud800") >= 0
