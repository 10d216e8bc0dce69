import io
import json
import tarfile

import pytest
from PIL import Image

from openblip.cli.main import main


@pytest.fixture
def shard(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, "PNG")
    members = {
        "a.png": buffer.getvalue(),
        "a.json": json.dumps({"captions": ["a dog", "one two three"]}).encode(),
        "b.png": b"broken",
        "b.txt": b"a cat",
        "c.txt": b"no picture",
    }
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name, payload in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return tmp_path / "shard.tar"


def test_json(shard, capsys):
    assert main(["data", "inspect", str(shard), "--as-json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["shards"], facts["samples"], facts["samples read"], facts["rejects"]) == (1, 2, 2, 2)
    assert facts["captions per image"] == {"2": 1}
    assert facts["words per caption"] == {"least": 2, "median": 2.5, "most": 3}
    assert facts["image sizes"] == ["20x10"]
    assert facts["reasons"] == {
        "not an image in a known format": 1,
        "no image (jpg, jpeg, png or webp) with this key": 1,
    }


def test_tables_name_examples_and_rejects(shard, capsys):
    assert main(["data", "inspect", str(shard)]) == 0
    shown = capsys.readouterr().out
    for text in ("shard/a  a dog | one two three", "20x10", "Rejects (2)", "shard/b", "shard/c"):
        assert text in shown


@pytest.mark.parametrize(
    "arguments", [["nowhere.tar"], ["{shard}", "--samples", "-1"], ["{shard}@1,{shard}"]]
)
def test_bad_input_is_one_line_and_exit_code_2(shard, capsys, arguments):
    assert main(["data", "inspect", *(word.format(shard=shard) for word in arguments)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
