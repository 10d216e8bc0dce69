"""`openblip demo`: the main job on embedded data, offline: a noisy set, cleaned by the shipped models."""

import time
from pathlib import Path

from openblip.cli.options import DeviceOptions
from openblip.errors import ConfigError
from openblip.files import write_json

SEED = 777_001  # trainings use small seeds; no training ever sees these scenes
CAPTIONER, FILTER = "openblip-mini-captioner", "openblip-mini-filter"


def command(
    *, out: Path = Path("runs/demo"), num_samples: int = 1000, num_workers: int = 2, device: DeviceOptions
) -> int:
    """Cleans a small noisy set of emoji scenes with the shipped models; holds the result against the truth.

    Writes OUT/web (the noisy pairs), OUT/capfilt (captions and scores), OUT/report.html and OUT/results.json.
    Needs no network and opens nothing; the same command again goes on where it was stopped.

    Args:
        out: folder of everything that is written.
        num_samples: noisy pairs to make and clean.
        num_workers: processes that draw, threads that decode.
    """
    if num_samples < 10:
        raise ConfigError("--num-samples must be at least 10")
    from openblip.capfilt.config import CapFiltConfig
    from openblip.capfilt.local import run_capfilt
    from openblip.capfilt.report import ReportTable, write_report
    from openblip.emoji_scenes.writer import write_emoji_scenes
    from openblip.evaluation.filtering import measure_capfilt

    started = time.monotonic()
    web, cleaned = out / "web", out / "capfilt"
    write_emoji_scenes(
        web, split="web", num_samples=num_samples, seed=SEED, noise=0.4, num_workers=num_workers, samples_per_shard=250
    )
    config = CapFiltConfig(
        source=str(web), captioner=CAPTIONER, filter=FILTER, num_workers=num_workers, dtype=device.dtype
    )
    summary = run_capfilt(config, cleaned, device=device.device)
    if summary.failed:
        raise ConfigError(f"{len(summary.failed)} shards could not be finished: {summary.failed[0][1]}")
    measured = measure_capfilt(cleaned)
    of_web, synthetic = measured["web"], measured["synthetic"]

    def percent(value: float | None) -> str:
        return "nothing to count" if value is None else f"{value:.1%}"

    rows = [
        ("Noise before: web texts that are not true", percent(measured["noise_before"])),
        ("Noise after: kept texts, web and synthetic, that are not true", percent(measured["noise_after"])),
        ("Filter AUC on web texts", f"{of_web['auc']:.3f}"),
        ("Filter precision: kept web texts that are true", percent(of_web["precision"])),
        ("Filter recall: true web texts that are kept", percent(of_web["recall"])),
        ("Synthetic captions that are true", percent(synthetic["correct"])),
        ("Synthetic captions that are true, of those kept", percent(synthetic["correct_kept"])),
        ("Texts kept", f"{measured['num_kept']:,} of {measured['num_texts']:,}"),
    ]
    kinds = [(kind.replace("_", " "), f"{auc:.3f}") for kind, auc in of_web["auc_by_kind"].items()]
    tables = [
        ReportTable(("", ""), rows, numbers=(1,)),
        ReportTable(("Kind of noise", "Filter AUC"), kinds, numbers=(1,)),
    ]
    write_report(cleaned, extra_tables={"Against the ground truth": tables})
    (cleaned / "report.html").replace(out / "report.html")
    seconds = round(time.monotonic() - started, 1)
    facts = {"seed": SEED, "captioner": CAPTIONER, "filter": FILTER, "seconds": seconds}
    write_json(out / "results.json", {**measured, **facts})
    width = max(len(name) for name, _ in rows) + 2
    print(f"\nCapFilt on {measured['num_images']:,} noisy pairs that no training has seen:\n")
    for name, value in rows:
        print(f"  {name:<{width}}{value:>16}")
    print(f"\nreport: {out / 'report.html'}\nnumbers: {out / 'results.json'}\n{seconds:.0f} seconds")
    return 0
