"""Every command that writes files says before its work where it cannot write."""

from pathlib import Path
from typing import Any

import pytest

CAPFILT = ["--captioner", "MODEL", "--filter", "MODEL"]


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["caption", "IMAGES", "--model", "MODEL"], "--out"),
        (["answer", "IMAGES", "what is it?", "--model", "MODEL"], "--out"),
        (["match", "IMAGES", "a dog", "--model", "MODEL"], "--out"),
        (["evaluate", "caption", "--data", "IMAGES", "--model", "MODEL"], "--out"),
        (["evaluate", "caption", "--data", "IMAGES", "--model", "MODEL"], "--results"),
        (["capfilt", "IMAGES", *CAPFILT], "--out"),
        (["capfilt-export", "IMAGES"], "--out"),
        (["demo"], "--out"),
        (["train", "blip-mini", "--data.source", "IMAGES"], "--out"),
        (["train", "blip-mini", "--data.source", "IMAGES", "--resume"], "--out"),
        (["bootstrap", "blip-mini", "--web", "IMAGES", "--human", "IMAGES"], "--out"),
        (["convert", "MODEL", "--format", "openblip"], "OUT"),
        (["data", "emoji-scenes", "--split", "val", "--num-samples", "5"], "OUT"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_place_that_cannot_be_written_is_refused_and_nothing_is_made(
    refusal: Any, checkpoint: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    command: list[str], option: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.jsonl").mkdir()
    before = sorted(tmp_path.rglob("*"))
    words = [{"IMAGES": image_folder, "MODEL": checkpoint}.get(word, word) for word in command]
    wants_file = command[0] in ("caption", "answer", "match", "evaluate")
    for place, message in {
        **(
            {"nowhere://bucket/out": "nowhere://bucket/out"}  # of what is written to object stores
            if command[0] in ("capfilt", "capfilt-export")
            else {"s3://bucket/out.jsonl": "s3:/bucket/out.jsonl: files are written on this machine"}
        ),
        "file/out.jsonl": "file is no folder",
        **({"folder.jsonl": "is a folder; name a file"} if wants_file else {"file": ""}),
    }.items():
        named = [place] if option == "OUT" else [option, place]
        assert message in refusal(*words, *named)
        assert sorted(tmp_path.rglob("*")) == before
