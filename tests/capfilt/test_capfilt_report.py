"""The report page: right numbers, inert whatever the captions say, the same for the same run."""

import base64
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import asdict, replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from capfilt_world import all_rows, picture, sample_members
from PIL import Image

from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.folder import NUM_STEPS, CapFiltFolder, itm_bins
from openblip.capfilt.local import run_capfilt
from openblip.capfilt.report import (
    ReportTable,
    ShardReports,
    ShownImage,
    choose_images,
    inspect_images,
    roc_charts,
    thumbnail,
    write_report,
)
from openblip.capfilt.selection import select
from openblip.data.captions import CaptionRow, write_captions, write_score
from openblip.data.decision import Decision
from openblip.data.sample import Sample
from openblip.metrics.ranking import auc
from shared_files import as_json, write_tar

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
        if tag not in ("meta", "img", "br", "input"):
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
    assert not {"link", "iframe", "object", "embed", "base"} & set(elements.tags)
    for name, value in elements.attributes:
        if name in ("src", "href"):
            assert (value or "").startswith(("data:image/jpeg;base64,", "#"))
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
    assert not {"b0", "u", "i"} & set(elements.tags)
    assert elements.tags.count("script") == 1
    assert not any(name.startswith("on") for name, _ in elements.attributes)
    assert html.escape(HOSTILE[0]) in text
    assert "\x00" not in text
    assert "default-src 'none'" in text


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_threshold_at_the_end_of_the_scale(run_copy: Path, threshold: float) -> None:
    select(run_copy, threshold)
    assert Elements((run_copy / "report.html").read_text("utf-8")).open == []


def test_only_the_page_itself_may_run_and_style(finished_run: Path) -> None:
    """The policy names the hashes of the one script and the one style, as a browser computes them."""
    text = (finished_run / "report.html").read_text("utf-8")
    policy = html.unescape(text.split('Content-Security-Policy" content="')[1].split('"')[0])
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in f"{policy};"
    assert "unsafe" not in policy
    assert "'none'" in policy.split(";")[0]
    names = {name for name, _ in Elements(text).attributes}
    assert not {"style", "srcdoc", "action", "formaction"} & names
    assert not [name for name in names if name.startswith("on")]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_runs_the_script_and_nothing_else(config: CapFiltConfig, tmp_path: Path) -> None:
    attack = "<script>document.title='owned'</script><img src=x onerror=document.title='owned'>"
    write_tar(tmp_path / "web.tar", [m for n in range(3) for m in sample_members(f"{n}", n, [attack])])
    run_capfilt(replace(config, source=str(tmp_path / "web.tar")), tmp_path / "run")
    page = (tmp_path / "run" / "report.html").resolve().as_uri()
    arguments = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    arguments += ["--virtual-time-budget=2000", "--enable-logging=stderr", "--dump-dom", page]
    found = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=True)
    assert "<title>CapFilt report</title>" in found.stdout
    assert "3 of 3 images" in found.stdout  # written by the script
    assert re.search(r'id="pairs"[^>]*>\d+ pairs of 6 texts', found.stdout)
    assert "Content Security Policy" not in found.stderr
    assert "Uncaught" not in found.stderr


def test_sliders_count_as_the_decision_does(finished_run: Path) -> None:
    """What the script computes from the bins of ITM is what a threshold would keep, to the text."""
    rows = all_rows(finished_run)
    attributes = dict(Elements((finished_run / "report.html").read_text("utf-8")).attributes)
    numbers = json.loads(attributes["data-numbers"] or "")
    steps = int(attributes["data-steps"] or "")
    for source in ("web", "synthetic"):
        itm = [row["itm"] for row in rows if row["source"] == source]
        for step in (0, 1, 300, 450, 500, 551, 999, 1000):
            expected = sum(bool(score > step / steps) for score in itm)
            assert sum(numbers[source]["texts"][step + 1 :]) == expected


def test_bins_of_itm_agree_with_thresholds_where_scores_lie_on_them() -> None:
    thresholds = np.arange(NUM_STEPS + 1) / NUM_STEPS
    near = np.float32(thresholds)
    itm = np.concatenate([near, np.nextafter(near, np.float32(2)), np.nextafter(near, np.float32(-2))])
    itm = itm[(itm >= 0) & (itm <= 1)]
    counts = np.bincount(itm_bins(itm), minlength=NUM_STEPS + 1)
    above = len(itm) - np.cumsum(counts)
    np.testing.assert_array_equal(above, [(itm.astype(np.float64) > threshold).sum() for threshold in thresholds])


def test_the_gallery_shows_each_fate_with_its_verdicts(run_copy: Path) -> None:
    threshold = 0.45
    scores = select(run_copy, threshold)
    folder = CapFiltFolder(run_copy)
    found = inspect_images(folder, folder.read_manifest())
    assert len(found.images) > 4
    rows = {(r["shard"], r["key"], r["source"], r["index"]): r for r in all_rows(run_copy)}
    shown = Counter(image.fate for image in found.images if not image.is_borderline)
    for fate, count in scores.combinations.items():
        assert shown[fate] <= min(count, 12)
        assert sum(image.fate == fate for image in found.images) >= min(count, 12)
    for image in found.images:
        assert image.thumbnail is not None
        assert len(image.rows) == sum(key[:2] == (image.shard, image.key) for key in rows)
        for row in image.rows:
            kept = {"kept": row["itm"] > threshold, "weight": float(row["itm"] > threshold), "is_true": None}
            assert row == rows[image.shard, image.key, row["source"], row["index"]] | kept


def test_borderline_images_have_the_closest_scores() -> None:
    rng = np.random.default_rng(0)
    itm = rng.random(500)
    images = [
        ShownImage("0", f"{n}", [{"source": "web", "itm": score, "kept": score > 0.7, "is_true": None}])
        for n, score in enumerate(itm)
    ]
    choose_images({"0": images}, {"web": 0.7, "synthetic": 0.1})
    closest = set(np.argsort(np.abs(itm - 0.7))[:24].tolist())
    assert {n for n, image in enumerate(images) if image.is_borderline} == closest
    assert sum(image.is_shown for image in images) <= 24 + 2 * 12


def test_known_truth_gives_curves_and_mistakes(config: CapFiltConfig, tmp_path: Path) -> None:
    members = []
    for number in range(40):
        noise = "wrong <b>object" if number % 3 == 0 else None
        info = as_json(captions=[f"a dog {number}"], noise=noise, references=[f"a dog {number}", "a cat"])
        members += [(f"{number}.jpg", picture(number)), (f"{number}.json", info)]
    for shard in range(2):
        write_tar(tmp_path / "web" / f"{shard}.tar", members[40 * shard :][:40])
    run = tmp_path / "run"
    run_capfilt(replace(config, source=str(tmp_path / "web")), run)
    num_rows = pq.read_metadata(run / "captions" / "0.parquet").num_rows
    write_score(run, "0", "clip", pa.array(np.linspace(0, 1, num_rows)))  # of one shard only
    (run / "scores" / "clip" / "0.report.json").write_text("{}")
    write_report(run)
    folder = CapFiltFolder(run)
    found = inspect_images(folder, folder.read_manifest())
    is_true = {int(row["key"]): row["is_true"] for row in found.judged_rows() if row["source"] == "web"}
    assert is_true == {number: number % 3 != 0 for number in range(40)}
    (((roc, precision), areas),) = roc_charts(found)  # synthetic texts of a random model are never true
    itm = [row["itm"] for row in all_rows(run) if row["source"] == "web"]
    expected = auc(itm, [number % 3 != 0 for number in range(40)])
    assert ("ITM probability", f"{expected:.3f}", "40") in [(row[0], row[1], row[3]) for row in areas.rows]
    assert {row[3] for row in areas.rows if row[0] == "clip"} == {"20"}
    assert len(roc.points) == 1
    assert len(precision.lines) == len(roc.lines) == len(areas.rows)
    text = (run / "report.html").read_text("utf-8")
    assert "How well scores tell true texts" in text
    assert "wrong &lt;b&gt;object" in text


def test_the_check_of_the_filter_is_shown(run_copy: Path) -> None:
    rng = np.random.default_rng(0)
    scores = [{"own": own, "random": own - 0.3, "hard": None if own < 0.2 else own - 0.1} for own in rng.random(200)]
    names = {"key": "", "shard": "", "caption": "", "random_caption": None, "hard_caption": None}
    (run_copy / "filter_check.json").write_text(json.dumps({"scores": [{**names, **each} for each in scores]}))
    value = {"value": 0.912, "low": 0.884, "high": 0.94}
    kinds = {"random": {"auc": value, "precision": None}, "hard": {"auc": None, "precision": value}}
    check = {"num_pairs": 200, "threshold": 0.5, "recall": value, "pairs": "<b>pairs.csv", **kinds}
    manifest = json.loads((run_copy / "manifest.json").read_text())
    (run_copy / "manifest.json").write_text(json.dumps({**manifest, "filter_check": check}))
    write_report(run_copy)
    text = (run_copy / "report.html").read_text("utf-8")
    assert "200 clean pairs" in text
    assert text.count("0.912 (0.884 to 0.940)") == 4
    assert "&lt;b&gt;pairs.csv" in text
    figures = [part.split("</figure>")[0] for part in text.split("<figcaption><b>Filter check")[1:]]
    assert len(figures) == 2  # ROC, and precision by recall
    assert all("captions of the most similar other images" in figure for figure in figures)


def test_a_title_on_many_images_is_a_warning(config: CapFiltConfig, tmp_path: Path) -> None:
    members = [m for n in range(24) for m in sample_members(f"{n}", n, ["<b>Free shipping" if n % 6 else f"a dog {n}"])]
    write_tar(tmp_path / "web.tar", members)
    run_capfilt(replace(config, source=str(tmp_path / "web.tar"), batch_size=24), tmp_path / "run")
    text = (tmp_path / "run" / "report.html").read_text("utf-8")
    warning = text.split('class="warning">')[1].split("</p>")[0]
    assert "20 of 24 images (83%)" in warning
    assert "&lt;b&gt;Free shipping" in warning
    times = text.split("Texts that occur most often")[1].split("</table>")[0]
    assert "&lt;b&gt;Free shipping" in times


def test_later_scores_and_other_decisions_are_shown(run_copy: Path) -> None:
    for shard in ("00000", "00001"):  # not of all shards
        num_rows = pq.read_metadata(run_copy / "captions" / f"{shard}.parquet").num_rows
        columns = {"clip": pa.array(np.linspace(-0.1, 0.4, num_rows)), "language": pa.array(["<i>en", "de"] * num_rows)}
        columns |= {"width": pa.array(range(1000, 1000 + num_rows))}
        for name, values in columns.items():
            write_score(run_copy, shard, name, values.slice(0, num_rows))
            (run_copy / "scores" / name / f"{shard}.report.json").write_text("{}")
    write_report(run_copy)
    text = (run_copy / "report.html").read_text("utf-8")
    assert "texts by clip" in text
    assert "clip by ITM probability" in text
    assert re.search(r"clip -?0\.\d+ · width 1,0\d\d<", text)
    assert "&lt;i&gt;en" in text.split("Flags and names")[1].split("</table>")[0]
    assert "other conditions" not in text
    decision = Decision(threshold=0.45, threshold_web=0.6, where="itc > 0 and caption <> '<b>'")
    manifest = json.loads((run_copy / "manifest.json").read_text())
    (run_copy / "manifest.json").write_text(json.dumps({**manifest, "decision": asdict(decision)}))
    scores = write_report(run_copy)
    rows = all_rows(run_copy)
    assert scores.kept == sum(r["itm"] > (0.6 if r["source"] == "web" else 0.45) and r["itc"] > 0 for r in rows)
    text = (run_copy / "report.html").read_text("utf-8")
    assert "itc &gt; 0 and caption" in text
    assert "<b>'" not in text
    assert "other conditions" in text
    assert "threshold 0.6<" in text
    assert "threshold 0.45<" in text


def test_what_a_run_was_made_with(finished_run: Path) -> None:
    manifest = json.loads((finished_run / "manifest.json").read_text())
    assert {"python", "torch", "transformers", "pillow"} <= manifest["versions"].keys()
    text = (finished_run / "report.html").read_text("utf-8")
    for value in (manifest["versions"]["torch"], manifest["models"]["filter"]["sha256"], "seed", "top_p"):
        assert str(value) in text


def test_rejects_are_counted_by_reason(config: CapFiltConfig, tmp_path: Path) -> None:
    members = [(f"{n}.{end}", payload) for n in range(5) for end, payload in (("jpg", b"no"), ("txt", b"a dog"))]
    members += [("5.txt", b"alone"), *sample_members("6", 6, ["a dog"])]
    write_tar(tmp_path / "web.tar", members)
    run_capfilt(replace(config, source=str(tmp_path / "web.tar")), tmp_path / "run")
    work = ShardReports.read(CapFiltFolder(tmp_path / "run"), ["web"])
    assert sorted(found.count for found in work.reasons.values()) == [1, 5]
    assert work.num_rejects == 6
    assert all(1 <= len(found.examples) <= 3 for found in work.reasons.values())
    assert "6 samples, by reason" in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_huge_texts_and_images_of_noise_stay_a_small_page(config: CapFiltConfig, tmp_path: Path) -> None:
    noise = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(noise, "PNG")
    members = []
    for number in range(60):
        members += [(f"{number}.png", noise.getvalue()), (f"{number}.txt", b"a dog")]
    write_tar(tmp_path / "web.tar", members)
    run_capfilt(replace(config, source=str(tmp_path / "web.tar"), batch_size=16), tmp_path / "run")
    path = tmp_path / "run" / "captions" / "web.parquet"
    rows = [
        CaptionRow(**{**row, "caption": "& <word> " * 4_000, "index": index, "source": "web"})
        for row in pq.read_table(path).to_pylist()
        for index in range(9)
    ]
    write_captions(path, rows)
    write_report(tmp_path / "run")
    size = (tmp_path / "run" / "report.html").stat().st_size
    assert size < 10_000_000
    assert len(thumbnail(Sample("0", "0", noise.getvalue(), (), "0", {}))) < 60_000


def test_colours_can_be_told_apart() -> None:
    """Text has a contrast of 4.5, and what is drawn one of 3, in both themes (WCAG 2.2, AA)."""
    css = resources.files("openblip.capfilt").joinpath("page.css").read_text("utf-8")
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in css.split("@media", 2)[:2])
    assert light.keys() == dark.keys()

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    drawn = [("kept", "card"), ("dropped", "card"), ("edge", "card"), ("kept", "dropped-soft"), ("web", "plate")]
    drawn += [("focus", "ground"), ("synthetic", "card"), *((f"series-{n}", "card") for n in range(8))]
    written = [("ink", name) for name in ("ground", "card", "plate", "kept-soft", "dropped-soft")]
    written += [("quiet", "ground"), ("quiet", "card"), ("quiet", "plate"), ("web", "ground")]
    written += [("kept", "kept-soft"), ("dropped", "dropped-soft"), ("quiet", "dropped-soft")]
    for theme in (light, dark):
        for pairs, least in ((drawn, 3.0), (written, 4.5)):
            for front, back in pairs:
                brighter, darker = sorted((luminance(theme[front]), luminance(theme[back])), reverse=True)
                assert (brighter + 0.05) / (darker + 0.05) >= least, (front, back)


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
