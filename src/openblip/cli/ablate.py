"""`openblip ablate`: a table of the papers, from its trainings to its numbers, in one command."""

import importlib.util
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from openblip.cli.options import check_output, parse
from openblip.errors import ConfigError
from openblip.recipes.ablation import AblationData, AblationJob, AblationTable, Plan, in_order, raise_on_changes
from openblip.recipes.comparison import PlannedTable, plan_tables, write_table
from openblip.recipes.presets import PRESETS, Preset
from openblip.recipes.tables import TABLES

WEB, HUMAN, EVALUATED, DOCUMENTS = 7000, 7000, 500, 6000  # emoji scenes of each kind


@dataclass(frozen=True, kw_only=True)
class AblateOptions:
    """The options of `openblip ablate`."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TABLE|FILE.py|all")]
    """The table; `all` makes every one, and a file with a `TABLE` is one of your own."""
    out: Path
    """Folder of all tables, which share their trainings; the same command again goes on."""
    seeds: int = 3
    """How many times each training is repeated, with seeds from 0."""
    preset: Literal["mini", "base"] = "mini"
    """The size of the trainings: a laptop's or the papers'."""
    parallel: int | None = None
    """Trainings side by side; as many as there are GPUs or cores when not given."""
    dry_run: bool = False
    """Print the trainings and what they will take, and start none."""
    split: Literal["val", "test"] = "test"
    """Emoji scenes: the split that is measured on. Settings are chosen on val, so that test is seen once."""
    steps_factor: float = 1.0
    """All trainings take so many times their steps; other settings that count steps stay as they are."""
    data: AblationData = field(default_factory=AblationData)

    def __post_init__(self) -> None:
        if self.name not in ("all", *TABLES) and not self.name.endswith(".py"):
            raise ConfigError(f"there is no table {self.name}; choose one of {', '.join(TABLES)}, a FILE.py, or all")
        if self.seeds < 1 or (self.parallel is not None and self.parallel < 1):
            raise ConfigError("--seeds and --parallel must be at least 1")
        if self.steps_factor <= 0:
            raise ConfigError("--steps-factor must be above 0")
        if self.data.source is None and self.data != AblationData():
            raise ConfigError("--data.source must be named beside other sources; without any, emoji scenes are taken")


def command(argv: Sequence[str]) -> int:
    """Trains what a table needs and is not there yet, measures it, and writes OUT/TABLE/."""
    options = parse(AblateOptions, argv, prog="openblip ablate", description=_description())
    check_output("--out", options.out, is_folder=True)
    root = options.out.resolve()
    preset = replace(PRESETS[options.preset](), steps_factor=options.steps_factor)
    data = options.data if options.data.source is not None else _scenes(root / "data", options.split)
    jobs: dict[str, AblationJob] = {}
    plans = [Plan(root=root, preset=preset, data=data, seed=seed, jobs=jobs) for seed in range(options.seeds)]
    planned = plan_tables(_tables(options.name), plans)
    raise_on_changes(jobs.values())
    if options.dry_run:
        _print_plan(jobs, planned, preset, options.seeds)
        return 0
    from openblip.recipes.side_by_side import child_environments, run_jobs

    if options.data.source is None:
        _write_scenes(data, options.split, jobs)
    unwritten, without_plot = dict(planned), set[str]()

    def write(names: Iterable[str]) -> None:
        for name in names:
            if reason := write_table(name, unwritten.pop(name), plans, _facts(argv, options, data)):
                without_plot.add(reason)

    def write_measured() -> None:
        write([name for name, each in unwritten.items() if each.is_measured(plans)])

    failures = run_jobs(in_order(jobs), child_environments(options.parallel), label="ablate", after_each=write_measured)
    write(list(unwritten))
    for name in planned:
        print(root / name / "table.md")
    for reason in without_plot:
        print(f"no plots: {reason}", file=sys.stderr)
    for failure in failures:
        print(f"failed: {failure.job}: {failure.reason}", file=sys.stderr)
    return 1 if failures else 0


def _tables(name: str) -> dict[str, AblationTable]:
    """The tables that a command names; ConfigError for a file that has none."""
    if name == "all":
        return TABLES
    if name in TABLES:
        return {name: TABLES[name]}
    path = Path(name)
    spec = importlib.util.spec_from_file_location(f"openblip_table_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"there is no file {name}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table = getattr(module, "TABLE", None)
    if not isinstance(table, AblationTable):
        raise ConfigError(f"{name} has no TABLE that is an AblationTable")
    return {path.stem.replace("_", "-"): table}


def _description() -> str:
    tables = "\n".join(f"  {name:<20}{table.title}" for name, table in TABLES.items())
    return (
        "Make a table of the papers: train what is missing, several trainings side by side, measure it on held-out "
        f"data, and write OUT/TABLE/table.md, results.json and plot.svg.\n\ntables:\n{tables}"
    )


def _scenes(folder: Path, split: str) -> AblationData:
    """The embedded world, which is written where it is not there yet."""
    return AblationData(
        source=str(folder / "web"),
        human=str(folder / "human"),
        test=str(folder / split),
        captions=str(folder / f"{split}-captions"),
        questions=str(folder / f"{split}-questions"),
        documents=str(folder / "documents"),
    )


def _write_scenes(data: AblationData, split: Literal["val", "test"], jobs: dict[str, AblationJob]) -> None:
    """Write those scenes that a job reads."""
    from openblip.emoji_scenes.writer import write_emoji_scenes

    named = {place for job in jobs.values() for place in job.mentions()}
    requests: dict[str | None, dict[str, Any]] = {
        data.source: {"split": "web", "num_samples": WEB, "noise": 0.4},
        data.human: {"split": "human", "num_samples": HUMAN, "seed": 3},
        data.test: {"split": split, "num_samples": EVALUATED},
        data.captions: {"split": split, "kind": "paraphrases", "num_samples": EVALUATED},
        data.questions: {"split": split, "kind": "questions", "num_samples": EVALUATED},
        data.documents: {"split": "human", "kind": "documents", "num_samples": DOCUMENTS, "seed": 5},
    }
    for folder, request in requests.items():
        if folder in named:
            write_emoji_scenes(folder, **request)


def _print_plan(jobs: dict[str, AblationJob], planned: dict[str, PlannedTable], preset: Preset, seeds: int) -> None:
    """Every job with what it takes, or took, and the sum."""
    users: dict[str, list[str]] = {}
    for table, each in planned.items():
        for variants in each.variants:
            for label, variant in variants.items():
                users.setdefault(Path(variant.model).parent.name, []).append(f"{table}: {label}")
    missing = done = 0.0
    for job, needs in in_order(jobs):
        if job.is_light:
            continue
        seconds = job.seconds if job.is_done and job.seconds is not None else job.estimate(preset)
        missing, done = (missing, done + seconds) if job.is_done else (missing + seconds, done)
        state = "done" if job.is_done else "    "
        rows = list(dict.fromkeys(users.get(job.name, [])))
        after = f" after {', '.join(need.name for need in needs)}" if needs else ""
        print(f"{state} {seconds / 60:6.1f} min  {job.name}{after}{'  = ' + '; '.join(rows) if rows else ''}")
    shared = sum(len(set(rows)) > 1 for rows in users.values())
    heavy = [job for job in jobs.values() if not job.is_light]
    print(
        f"{len(planned)} tables, {seeds} seeds: {len(heavy)} jobs, {shared} of their models in several rows; "
        f"{missing / 60:.0f} core-minutes to do, {done / 60:.0f} done; {missing / 7200:.1f} hours on two cores"
    )


def _facts(argv: Sequence[str], options: AblateOptions, data: AblationData) -> dict[str, object]:
    from openblip import __version__

    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    date = datetime.now(UTC).date().isoformat()
    seeds = "one seed" if options.seeds == 1 else f"{options.seeds} seeds"
    measured_on = data.test if options.data.source is not None else f"emoji scenes of split {options.split}"
    how = f"{seeds}, preset {options.preset}, measured on {measured_on}"
    return {
        "command": shlex.join(["openblip", "ablate", *argv]),
        "made": f"{how}; openblip {__version__}, {machine}, {date}.",
        "seeds": options.seeds,
        "preset": options.preset,
        "test": measured_on,
        "date": date,
    }
