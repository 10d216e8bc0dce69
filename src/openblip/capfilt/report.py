"""`report.html` of a run, made anew from the run's folder and the original images."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from openblip.capfilt import page
from openblip.capfilt.folder import CapFiltFolder, read_json, write_text
from openblip.capfilt.gallery import build_gallery
from openblip.capfilt.scores import RunScores, read_run_scores

MAX_REJECTS = 50
MAX_FAILURES = 50


def write_report(directory: str | Path, *, extra_sections: Sequence[page.Section] = ()) -> RunScores:
    """Writes `DIR/report.html` from what is in `directory` and returns the scores it shows.

    Args:
        directory: output of a CapFilt run, finished or not.
        extra_sections: shown after the keep rates, for callers that know more (the truth about the noise,
        say).
            Their bodies are HTML; `page.table` and `page.escape` make some out of data.

    Raises:
        ConfigError: the folder is no CapFilt run.
    """
    folder = CapFiltFolder(Path(directory))
    manifest = folder.read_manifest()
    shards = folder.done_shards()
    reports = [read_json(folder.report(shard)) for shard in shards]
    scores = read_run_scores((folder.captions(shard) for shard in shards), manifest["threshold"])
    failures = folder.failures()
    sections = [
        page.Section("Kept by source", page.keep_rates(scores)),
        *extra_sections,
        page.Section(
            "Scores",
            '<p class="quiet">The probability that a text matches its image, by the ITM head of the filter; '
            "bars show the share of the texts.</p>" + page.histograms(scores, manifest["threshold"]),
        ),
        page.Section("Accepted and rejected", page.gallery(build_gallery(folder, manifest), scores)),
        page.Section("Samples that could not be read", _rejects(reports)),
        *([page.Section("Shards that are not finished", _failures(failures))] if failures else []),
        page.Section("How it was made", _provenance(manifest, reports)),
    ]
    write_text(
        folder.report_page,
        page.render(
            "CapFilt report", _lead(manifest, scores, reports, failures), sections, _footer(manifest)
        ),
    )
    return scores


def _lead(
    manifest: Mapping[str, Any],
    scores: RunScores,
    reports: Sequence[Mapping[str, Any]],
    failures: Sequence[Mapping[str, Any]],
) -> str:
    web, synthetic = scores.sources["web"], scores.sources["synthetic"]
    rejected = sum(len(report["rejects"]) for report in reports)
    total = manifest["num_shards"]
    state = (
        f"{len(reports):,} of {page.counted(total, 'shard')}"
        if len(reports) < total
        else page.counted(total, "shard")
    )
    warning = (
        f'<p class="warning">{page.counted(len(failures), "shard")} could not be finished and '
        "not counted here. The same command again tries to.</p>"
        if failures
        else ""
    )
    return f'<p class="quiet">{page.escape(manifest["source"])} · {state}</p>{warning}' + page.tiles(
        [
            ("Images", f"{scores.images:,}", f"{rejected:,} more could not be read"),
            ("Web texts", f"{web.texts:,}", f"{web.kept:,} kept, {page.share(web.kept, web.texts)}"),
            (
                "Synthetic texts",
                f"{synthetic.texts:,}",
                f"{synthetic.kept:,} kept, {page.share(synthetic.kept, synthetic.texts)}",
            ),
            ("Bootstrapped pairs", f"{scores.kept:,}", f"of {scores.texts:,} texts"),
        ]
    )


def _rejects(reports: Sequence[Mapping[str, Any]]) -> str:
    rejects = [(report["shard"], reject) for report in reports for reject in report["rejects"]]
    if not rejects:
        return '<p class="quiet">Every sample could be read.</p>'
    shown = [(shard, reject["key"], reject["reason"]) for shard, reject in rejects[:MAX_REJECTS]]
    more = len(rejects) - len(shown)
    note = f'<p class="note">and {more:,} more, in <code>captions/*.rejects.jsonl</code></p>' if more else ""
    return page.table(("Shard", "Sample", "Reason"), shown) + note


def _failures(failures: Sequence[Mapping[str, Any]]) -> str:
    rows = [(failure["shard"], failure["error"]) for failure in islice(failures, MAX_FAILURES)]
    return page.table(("Shard", "Error"), rows)


def _provenance(manifest: Mapping[str, Any], reports: Sequence[Mapping[str, Any]]) -> str:
    models = [
        (
            role,
            manifest[role]["checkpoint"],
            f"{manifest[role]['parameters']:,}",
            manifest[role]["sha256"][:16],
        )
        for role in ("captioner", "filter")
    ]
    settings = page.definition_rows({**manifest["config"], "threshold": manifest["threshold"]})
    return (
        page.table(("Model", "Checkpoint", "Parameters", "SHA-256"), models, numbers=(2,))
        + "<h3>Settings</h3>"
        + page.table((), settings)
        + "<h3>Time</h3>"
        + page.table(("Stage", "Seconds", "Share"), list(_timing(reports)), numbers=(1, 2))
    )


def _timing(reports: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    seconds: Counter[str] = Counter()
    for report in reports:
        seconds.update(report["seconds"])
    total = seconds.pop("total", 0.0)
    images = sum(report["images"] for report in reports)
    for stage, spent in seconds.items():
        yield stage, f"{spent:,.1f}", f"{100 * spent / total:.0f}%" if total else page.NOTHING
    rate = f"{images / total:,.1f} images/s" if total else page.NOTHING
    yield "all", f"{total:,.1f}", rate


def _footer(manifest: Mapping[str, Any]) -> str:
    return f"Made by OpenBLIP {manifest['openblip']}. BLIP: Li et al., 2022, section 3.3."
