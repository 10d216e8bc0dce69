"""Sampling of texts to label, the page that asks about them, and the answers that come back."""

import base64
import hashlib
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from capfilt_world import all_rows

from openblip.capfilt.labels import Label, draw_texts, label_weights, read_labels, sample_texts, stratify
from openblip.cli.main import main
from openblip.errors import ConfigError, SourceError

KEYS = ("shard", "key", "source", "index")


def label(number: int, stratum: int, share: float, is_true: bool | None) -> Label:
    return Label(shard="s", key=f"{number}", source="web", index=0, stratum=stratum, share=share, is_true=is_true)


def test_strata_are_narrow_where_the_filter_is_undecided() -> None:
    scores = np.concatenate([np.full(4500, 0.001), np.linspace(0, 1, 1000), np.full(4500, 0.999)])
    strata = stratify(scores, is_probability=True, num_strata=20)
    sizes = np.bincount(strata)
    assert len(sizes) == 20
    assert np.all(np.diff(strata[np.argsort(scores, kind="stable")]) >= 0)
    undecided = set(strata[(scores > 0.3) & (scores < 0.7)].tolist())
    assert sizes[sorted(undecided)].min() < 0.85 * sizes.max()
    even = np.bincount(stratify(scores * 100, is_probability=False, num_strata=20))
    assert even.max() - even.min() <= 2


def test_weighted_answers_give_the_share_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    scores = rng.beta(0.3, 0.3, 20_000)
    truth = rng.random(20_000) < scores
    strata = stratify(scores, is_probability=True)
    shares = np.bincount(strata) / len(strata)
    found = []
    for _ in range(50):
        chosen = np.concatenate([rng.choice(np.flatnonzero(strata == each), 5) for each in range(40)])
        labels = [label(row, strata[row], shares[strata[row]], bool(truth[row])) for row in chosen]
        weights = label_weights(labels)
        found.append(float(weights @ truth[chosen]))
        assert weights.sum() == pytest.approx(1)
    assert np.mean(found) == pytest.approx(truth.mean(), abs=0.01)
    assert np.std(found) < 0.03  # simple random samples of 200 have 0.035


def test_texts_without_an_answer_count_as_others_of_their_stratum_or_of_the_nearest() -> None:
    labels = [label(0, 0, 0.5, True), label(1, 0, 0.5, None), label(2, 1, 0.2, None), label(3, 2, 0.3, False)]
    assert label_weights(labels).tolist() == pytest.approx([0.7, 0, 0, 0.3])


@pytest.mark.slow
def test_the_same_seed_draws_the_same_texts_from_all_strata(finished_run: Path) -> None:
    texts = {tuple(row[name] for name in KEYS) for row in all_rows(finished_run)}
    labels = sample_texts(finished_run, 20, seed=1)
    names = [tuple(asdict(each)[name] for name in KEYS) for each in labels]
    assert len(set(names)) == 20
    assert set(names) <= texts
    assert sample_texts(finished_run, 20, seed=1) == labels != sample_texts(finished_run, 20, seed=2)
    assert sum({each.stratum: each.share for each in labels}.values()) == pytest.approx(1)
    drawn = draw_texts(finished_run, ["itm"], limit=7)
    assert drawn.num_rows == 7
    with pytest.raises(SourceError, match="no column nothing; there are"):
        sample_texts(finished_run, 20, by="nothing")


@pytest.mark.slow
def test_the_page_holds_its_texts_inert_and_runs_only_its_own_script(run_copy: Path, tmp_path: Path) -> None:
    assert main(["capfilt-sample", str(run_copy), "--num-texts", "12", "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    [script] = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in page or f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=[\"']?http", page)
    data = page_data(page)
    assert len(data["items"]) == 12
    assert all(image.startswith("data:image/jpeg;base64,") for image in data["images"])
    texts = {tuple(row[name] for name in KEYS): row["caption"] for row in all_rows(run_copy)}
    assert all(texts[tuple(item[name] for name in KEYS)] == item["caption"] for item in data["items"])
    assert "itm" not in data["items"][0]  # nobody is influenced by a score


def page_data(page: str) -> dict[str, Any]:
    [block] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    content: dict[str, Any] = json.loads(block)
    return content


@pytest.mark.slow
def test_images_that_are_gone_are_left_out(run_copy: Path, web: Path, tmp_path: Path, capsys: Any) -> None:
    manifest = json.loads((run_copy / "manifest.json").read_text())
    copied = shutil.copytree(web, tmp_path / "web")
    (run_copy / "manifest.json").write_text(json.dumps({**manifest, "source": str(copied)}))
    (copied / "00001.tar").unlink()
    (copied / "00001.tar").write_bytes(b"")
    assert main(["capfilt-sample", str(run_copy), "--num-texts", "36"]) == 1
    assert "left out, because their images can no longer be read" in capsys.readouterr().err
    items = page_data((run_copy / "labels.html").read_text())["items"]
    assert {item["shard"] for item in items} == {"00000", "00002"}


def test_answers_come_back_as_json_or_csv(tmp_path: Path) -> None:
    labels = [label(0, 3, 0.25, True), label(1, 4, 0.75, False), label(2, 4, 0.75, None)]
    answers = ["yes", "no", "unsure"]
    rows = [
        {**{name: value for name, value in asdict(each).items() if name != "is_true"}, "label": answer}
        for each, answer in zip(labels, answers, strict=True)
    ]
    (tmp_path / "labels.json").write_text(json.dumps({"by": "itm", "labels": rows}))
    assert read_labels(tmp_path / "labels.json") == labels
    lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
    (tmp_path / "labels.csv").write_text("\ufeff" + "\r\n".join(lines))
    assert read_labels(tmp_path / "labels.csv") == labels
    (tmp_path / "own.csv").write_text("shard,key,source,index,label\ns,0,web,0,TRUE\ns,0,web,0,no\n")
    assert read_labels(tmp_path / "own.csv") == [replace(labels[0], stratum=0, share=1.0, is_true=False)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "shard,key,source,index\ns,0,web,0\n", "label 1: cannot be understood"),
        ("a.csv", "shard,key,source,index,label\ns,0,web,0,yes\ns,0,web,x,yes\n", "label 2: cannot be understood"),
        ("a.csv", "shard,key,source,index,label\ns,0,web,0,maybe\n", "which is yes, no, unsure or empty"),
        ("a.csv", "shard,key,source,index,label,share\ns,0,web,0,yes,2\n", "share is 2.0"),
        ("a.json", "{", "not a file of labels"),
        ("a.json", '{"labels": 3}', "must be a list"),
        ("a.json", '{"labels": [3]}', "label 1"),
        ("none.csv", None, "cannot be read"),
    ],
)
def test_answers_that_cannot_be_understood_are_named(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_labels(tmp_path / name)
