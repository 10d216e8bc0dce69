"""Browsing and labelling of a CapFilt run over HTTP, on caption files that no model wrote."""

import json
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

import openblip.serve.capfilt
from openblip.capfilt.labels import read_labels
from openblip.data.captions import CaptionRow, write_captions
from openblip.errors import ConfigError, OpenBlipError
from openblip.serve.capfilt import CapFiltBrowser, GivenLabel, GivenLabels, capfilt_router

IMAGES = (5, 0, 7, 3)  # of each shard
LABELS_OF_EACH = 40  # that a server stores, one call for each
Browse = Callable[..., list[dict[str, Any]]]


def rows_of(shard: str, num_images: int) -> Iterator[CaptionRow]:
    """A web text and a synthetic one of each image; the third image of a shard has no text that is kept."""
    for number in range(num_images):
        for source in ("web", "synthetic"):
            itm = 0.1 if number == 2 or (source == "web" and number % 2) else 0.9
            text = f"{source} {shard} {number}"
            yield CaptionRow(key=f"{number}", shard=shard, index=0, source=source, caption=text, itm=itm, itc=0.3)  # type: ignore[arg-type]


@pytest.fixture
def written_run(tmp_path: Path) -> Path:
    """Four finished shards, one of them empty, and one that is not finished; their source is gone."""
    captions = tmp_path / "captions"
    captions.mkdir()
    manifest = {"source": str(tmp_path / "gone"), "threshold": 0.5, "models": {}, "num_shards": 5, "config": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for number, num_images in enumerate(IMAGES):
        write_captions(captions / f"s:{number}.parquet", rows_of(f"s:{number}", num_images))
        (captions / f"s:{number}.report.json").write_text("{}")
    write_captions(captions / "s:9.parquet", rows_of("s:9", 2))
    return tmp_path


@pytest.fixture
def client(written_run: Path) -> Iterator[TestClient]:
    app = FastAPI()
    app.include_router(capfilt_router(written_run))

    @app.exception_handler(OpenBlipError)
    def refuse(_: Any, error: OpenBlipError) -> JSONResponse:
        return JSONResponse(str(error), 422)

    with TestClient(app) as opened:
        yield opened


@pytest.fixture
def browse(client: TestClient) -> Browse:
    """All replies to a question, from the first to the one that says that there are no more."""

    def ask(**query: Any) -> list[dict[str, Any]]:
        replies = [client.get("/capfilt/images", params=query).raise_for_status().json()]
        while replies[-1]["next"] is not None:
            assert len(replies) < 100
            query["start"] = replies[-1]["next"]
            replies.append(client.get("/capfilt/images", params=query).raise_for_status().json())
        return replies

    return ask


def names(replies: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(image["shard"], image["key"]) for reply in replies for image in reply["images"]]


EVERY = [(f"s:{shard}", f"{number}") for shard, count in enumerate(IMAGES) for number in range(count)]


@pytest.mark.parametrize("limit", [1, 4, 5, 60])
def test_every_image_comes_once_and_in_order_across_shards(browse: Browse, limit: int) -> None:
    replies = browse(limit=limit)
    assert names(replies) == EVERY
    assert all(len(reply["images"]) <= limit for reply in replies)
    assert all(len(image["texts"]) == 2 for reply in replies for image in reply["images"])
    assert names(browse(limit=limit, shard="s:2")) == [each for each in EVERY if each[0] == "s:2"]


def test_filters_hold_across_shards(browse: Browse) -> None:
    assert names(browse(limit=2, show="neither")) == [each for each in EVERY if each[1] == "2"]
    odd = [each for each in EVERY if int(each[1]) % 2]
    assert names(browse(limit=2, show="only synthetic")) == odd
    assert names(browse(text=" SYNTHETIC s:3 1 ")) == [("s:3", "1")]
    assert names(browse(low=0.5, text="web")) == [each for each in EVERY if not (int(each[1]) % 2 or each[1] == "2")]


def test_a_request_reads_a_bounded_number_of_rows(browse: Browse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openblip.serve.capfilt, "SCANNED_ROWS", 6)
    replies = browse(text="s:3 2")
    assert [len(reply["images"]) for reply in replies] == [0, 0, 0, 0, 1]  # 15 images of two rows, three at a time
    assert names(replies) == [("s:3", "2")]


@pytest.mark.parametrize("start", ["x:s:0", "-1:s:0", "1.5:s:0", "²:s:0", "9" * 12 + ":s:0", "3", "0:s:9", "0:../x"])
def test_a_start_that_no_reply_gave_is_refused(client: TestClient, start: str) -> None:
    reply = client.get("/capfilt/images", params={"start": start})
    assert reply.status_code == 422
    assert "start is" in reply.text or "no finished shard" in reply.text


def test_a_run_that_has_just_begun_has_no_images_yet(client: TestClient, written_run: Path) -> None:
    for file in (written_run / "captions").glob("*.report.json"):
        file.unlink()
    assert client.get("/capfilt").raise_for_status().json()["num_images"] == 0
    assert client.get("/capfilt/images").raise_for_status().json() == {"images": [], "next": None}


def test_a_start_behind_the_end_goes_on_with_the_next_shard(browse: Browse) -> None:
    assert names(browse(start="999:s:2")) == EVERY[-3:]


def store(run: Path, label: str) -> None:
    """What one server does: an answer to each text in turn, or to every second one."""
    browser = CapFiltBrowser(run)
    for number in range(0 if label == "yes" else 1, LABELS_OF_EACH, 2):
        given = GivenLabel.model_validate({"number": number % 20, "label": label})
        browser.store_labels(GivenLabels(num_texts=20, by="itm", seed=1, labels=[given]))


def test_two_servers_append_labels_of_one_sample(written_run: Path) -> None:
    processes = [
        multiprocessing.get_context("fork").Process(target=store, args=(written_run, x)) for x in ("yes", "no")
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    file = written_run / "labels" / "itm-20-1.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["label"] for line in lines].count("yes") == LABELS_OF_EACH // 2 == len(lines) // 2
    assert sorted(str(label.is_true) for label in read_labels(file)) == ["False"] * 10 + ["True"] * 10


def test_labels_go_on_after_a_server_was_killed_in_a_line(client: TestClient, written_run: Path) -> None:
    body = {"num_texts": 20, "by": "itm", "seed": 0, "labels": [{"number": 3, "label": "yes"}]}
    assert client.post("/capfilt/labels", json=body).raise_for_status().json()["num_answered"] == 1
    file = written_run / "labels" / "itm-20-0.jsonl"
    with file.open("a") as stream:
        stream.write('{"shard": "s:0", "ke')
    body["labels"] = [{"number": 4, "label": "no"}, {"number": 3, "label": "unsure"}]
    assert client.post("/capfilt/labels", json=body).raise_for_status().json()["num_answered"] == 2
    assert client.get("/capfilt/labels", params={"num_texts": 20}).json()["first_open"] == 0
    body["labels"] = [{"number": number, "label": "yes"} for number in range(3)]
    assert client.post("/capfilt/labels", json=body).raise_for_status().json()["num_answered"] == 5
    assert client.get("/capfilt/labels", params={"num_texts": 20}).json()["first_open"] == 5
    reply = client.get("/capfilt/labels", params={"num_texts": 20, "start": 2, "limit": 3}).raise_for_status().json()
    assert [(text["number"], text["label"]) for text in reply["texts"]] == [(2, "yes"), (3, "unsure"), (4, "no")]
    beyond = client.get("/capfilt/labels", params={"num_texts": 20, "start": 999}).raise_for_status().json()
    assert (beyond["texts"], beyond["num_answered"]) == ([], 5)
    body["labels"] = [{"number": 4, "label": ""}]  # taken back
    assert client.post("/capfilt/labels", json=body).raise_for_status().json()["num_answered"] == 4


def test_labels_that_cannot_be_are_refused_and_none_of_the_call_is_kept(client: TestClient, written_run: Path) -> None:
    body: dict[str, Any] = {"num_texts": 5, "labels": [{"number": 1, "label": "yes"}, {"number": 5, "label": "yes"}]}
    reply = client.post("/capfilt/labels", json=body)
    assert (reply.status_code, "5 texts" in reply.text) == (422, True)
    assert client.post("/capfilt/labels", json=body | {"by": "../../x"}).status_code == 422
    assert client.post("/capfilt/labels", json=body | {"labels": [{"number": 0, "label": "maybe"}]}).status_code == 422
    assert not (written_run / "labels").exists()
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        capfilt_router(written_run / "captions")
