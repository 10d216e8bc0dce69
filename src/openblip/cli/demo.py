"""`openblip demo`: the main job on embedded data, offline: a noisy set, cleaned by the shipped models."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openblip.errors import ConfigError
from openblip.files import write_json

if TYPE_CHECKING:
    from openblip.capfilt.report import Section

SEED = 777_001  # trainings use small seeds; no training ever sees these scenes
NOISE = 0.4
CAPTIONER, FILTER = "openblip-mini-captioner", "openblip-mini-filter"


def command(
    *,
    out: Path = Path("runs/demo"),
    num_samples: int = 1000,
    num_workers: int = 2,
    device: str | None = None,
    dtype: str = "float32",
) -> int:
    """Cleans a small noisy set of emoji scenes with the shipped models; holds the result against the truth.

    Writes OUT/web (the noisy pairs), OUT/capfilt (captions and scores), OUT/report.html and OUT/results.json.
    Needs no network and opens nothing; the same command again goes on where it was stopped.

    Args:
        out: folder of everything that is written.
        num_samples: noisy pairs to make and clean.
        num_workers: processes that draw, threads that decode.
        device: "cpu", "cuda", "cuda:1" …; the best there is when not given.
        dtype: precision of the models: float32, bfloat16, float16, or auto for the fastest at no loss that shows.
    """
    if num_samples < 10:
        raise ConfigError("--num-samples must be at least 10")
    from openblip.capfilt.config import CapFiltConfig
    from openblip.capfilt.local import run_capfilt
    from openblip.capfilt.report import write_report
    from openblip.emoji_scenes.writer import write_emoji_scenes
    from openblip.evaluation.filtering import measure_capfilt

    started = time.monotonic()
    web = out / "web"
    write_emoji_scenes(
        web, split="web", num_samples=num_samples, seed=SEED, noise=NOISE, num_workers=num_workers,
        samples_per_shard=250,
    )  # fmt: skip
    config = CapFiltConfig(source=str(web), captioner=CAPTIONER, filter=FILTER, num_workers=num_workers, dtype=dtype)
    summary = run_capfilt(config, out / "capfilt", device=device)
    if summary.failed:
        raise ConfigError(f"{len(summary.failed)} shards could not be finished: {summary.failed[0][1]}")
    measured = measure_capfilt(out / "capfilt")
    write_report(out / "capfilt", extra_sections=[truth_section(measured)])
    (out / "capfilt" / "report.html").replace(out / "report.html")
    results = {
        **measured,
        "seed": SEED,
        "captioner": CAPTIONER,
        "filter": FILTER,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(out / "results.json", results)
    print_summary(measured, out, results["seconds"])
    return 0


def truth_rows(measured: dict[str, Any]) -> list[tuple[str, str]]:
    """What a person wants to know of a cleaned set whose truth is known: (name, value)."""
    web, synthetic = measured["web"], measured["synthetic"]

    def percent(value: float | None) -> str:
        return "nothing to count" if value is None else f"{value:.1%}"

    return [
        ("Noise before: web texts that are not true", percent(measured["noise_before"])),
        ("Noise after: kept texts, web and synthetic, that are not true", percent(measured["noise_after"])),
        ("Filter AUC on web texts", f"{web['auc']:.3f}"),
        ("Filter precision: kept web texts that are true", percent(web["precision"])),
        ("Filter recall: true web texts that are kept", percent(web["recall"])),
        ("Synthetic captions that are true", percent(synthetic["correct"])),
        ("Synthetic captions that are true, of those kept", percent(synthetic["correct_kept"])),
        ("Texts kept", f"{measured['num_kept']:,} of {measured['num_texts']:,}"),
    ]


def truth_section(measured: dict[str, Any]) -> "Section":
    """The truth as a section of the report page."""
    from openblip.capfilt.report import Section, table

    kinds = [(kind.replace("_", " "), f"{auc:.3f}") for kind, auc in measured["web"]["auc_by_kind"].items()]
    body = table(("", ""), truth_rows(measured), numbers=(1,)) + table(
        ("Kind of noise", "Filter AUC"), kinds, numbers=(1,)
    )
    return Section("Against the truth", body)


def print_summary(measured: dict[str, Any], out: Path, seconds: float) -> None:
    """The result on standard output."""
    rows = truth_rows(measured)
    width = max(len(name) for name, _ in rows) + 2
    print(f"\nCapFilt on {measured['num_images']:,} noisy pairs that no training has seen:\n")
    for name, value in rows:
        print(f"  {name:<{width}}{value:>16}")
    print(f"\nreport: {out / 'report.html'}\nnumbers: {out / 'results.json'}\n{seconds:.0f} seconds")
