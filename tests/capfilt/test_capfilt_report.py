"""The report page: right numbers, inert whatever the captions say, the same for the same run."""

import html
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from capfilt_world import all_rows, sample_members

from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.folder import CapFiltFolder
from openblip.capfilt.local import run_capfilt
from openblip.capfilt.report import ReportTable, choose_images, write_report
from openblip.capfilt.selection import select
from shared_files import write_tar

HOSTILE = [
    "<script>alert(1)</script>",
    "</li></ul></article><img src=x onerror=alert(2)>",
    '" onload="alert(3)',
    "&lt;b&gt; \u202e reversed \u0000\u0007 \u2028",
    "{{7*7}} ${7*7} 犬",
]


class Elements(HTMLParser):
    """Every tag and attribute of a page, and whether what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone(finished_run: Path) -> None:
    text = (finished_run / "report.html").read_text("utf-8")
    elements = Elements(text)
    assert elements.open == []
    assert not {"script", "link", "iframe", "object"} & set(elements.tags)
    for name, value in elements.attributes:
        if name in ("src", "href"):
            assert (value or "").startswith("data:image/jpeg;base64,")
    assert "http://" not in text
    assert "https://" not in text
    assert elements.tags.count("img") > 3


def test_hostile_captions_are_only_text(config: CapFiltConfig, tmp_path: Path) -> None:
    members = [m for n, text in enumerate(HOSTILE) for m in sample_members(f"<b>{n}", n, [text])]
    members += [("<i>bad.jpg", b"nothing"), ("<i>bad.txt", b"x")]
    write_tar(tmp_path / "web" / "<u>evil&.tar", members)
    run_capfilt(replace(config, source=str(tmp_path / "web")), tmp_path / "run")
    text = (tmp_path / "run" / "report.html").read_text("utf-8")
    elements = Elements(text)
    assert elements.open == []
    assert not {"script", "b0", "u", "i"} & set(elements.tags)
    assert not any(name.startswith("on") for name, _ in elements.attributes)
    assert html.escape(HOSTILE[0]) in text
    assert "\x00" not in text
    assert "default-src 'none'" in text


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_threshold_at_the_end_of_the_scale(run_copy: Path, threshold: float) -> None:
    select(run_copy, threshold)
    assert Elements((run_copy / "report.html").read_text("utf-8")).open == []


def test_the_gallery_shows_each_fate_with_its_verdicts(run_copy: Path) -> None:
    threshold = 0.45
    scores = select(run_copy, threshold)
    folder = CapFiltFolder(run_copy)
    gallery = choose_images(folder, folder.read_manifest())
    assert sum(map(len, gallery.values())) > 4
    rows = {(r["shard"], r["key"], r["source"], r["index"]): r for r in all_rows(run_copy)}
    for (web, synthetic), images in gallery.items():
        assert len(images) == min(scores.combinations[web, synthetic], 8)
        for image in images:
            assert image.thumbnail is not None
            assert len(image.rows) == sum(key[:2] == (image.shard, image.key) for key in rows)
            first = {row["source"]: row["kept"] for row in reversed(image.rows)}
            assert first == {"web": web, "synthetic": synthetic}
            for source in ("web", "synthetic"):
                shown = [row for row in image.rows if row["source"] == source]
                for index, row in enumerate(shown):
                    kept = {"kept": row["itm"] > threshold, "weight": float(row["itm"] > threshold)}
                    assert row == rows[image.shard, image.key, source, index] | kept


def test_headline_numbers(finished_run: Path) -> None:
    rows = all_rows(finished_run)
    text = re.sub(r"<[^>]+>", " ", (finished_run / "report.html").read_text("utf-8"))
    words = " ".join(text.split())
    web = [row for row in rows if row["source"] == "web"]
    kept = sum(row["itm"] > 0.5 for row in web)
    assert f"Web texts {len(web)} {kept} kept, {100 * kept / len(web):.1f}%" in words
    assert f"Bootstrapped pairs {sum(row['itm'] > 0.5 for row in rows)} of {len(rows)} texts" in words


def test_the_same_run_gives_the_same_page_and_tables_of_others(run_copy: Path) -> None:
    write_report(run_copy)
    first = (run_copy / "report.html").read_bytes()
    write_report(run_copy)
    assert (run_copy / "report.html").read_bytes() == first
    table = ReportTable(("Measure", "Value"), [("AUC <filter>", 0.98)], numbers=(1,))
    write_report(run_copy, extra_tables={"Against the truth": [table]})
    text = (run_copy / "report.html").read_text("utf-8")
    assert "Against the truth" in text
    assert "AUC &lt;filter&gt;" in text


def test_a_run_of_nothing_still_has_a_page(config: CapFiltConfig, tmp_path: Path) -> None:
    write_tar(tmp_path / "bad.tar", [("a.jpg", b"nothing"), ("a.txt", b"a dog")])
    summary = run_capfilt(replace(config, source=str(tmp_path / "bad.tar")), tmp_path / "run")
    assert [shard for shard, _ in summary.failed] == ["bad"], "a shard of which nothing can be read is not done"
    assert "No image has both" in (tmp_path / "run" / "report.html").read_text("utf-8")
