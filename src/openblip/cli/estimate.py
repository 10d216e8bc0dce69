"""`openblip estimate`: hours, machines and cost of CapFilt and of the papers' pre-trainings, before they are begun."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from openblip.cli.options import check_output, only_with
from openblip.cost.formula import (
    CapFiltWork,
    Cluster,
    Estimate,
    PairsOptions,
    estimate_capfilt,
    estimate_training,
    machines_within,
)
from openblip.cost.machines import Machine, load_machine
from openblip.cost.simulation import simulate_capfilt
from openblip.cost.trainings import paper_trainings
from openblip.errors import Condition, ConfigError
from openblip.files import read_json
from openblip.models.config import BlipConfig
from openblip.nn.config import VisionConfig

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
LARGE = VisionConfig(image_size=384, hidden_dim=1024, num_layers=24, num_heads=16, mlp_dim=4096)


@only_with(
    Condition("save device", lambda o: o.measure, "it belongs to --measure"),
    Condition("machine", lambda o: not o.measure, "--measure takes the machine that it runs on"),
    Condition("days", lambda o: o.machines is None, "--machines says how many work; the days follow"),
)
def command(
    *,
    pairs: tuple[str, ...] = ("14M", "129M", "1B", "5B"),
    model: str = "base",
    machine: str = "h100x8",
    measure: bool = False,
    save: Path | None = None,
    device: str | None = None,
    machines: int | None = None,
    days: float = 7.0,
    price: float | None = None,
    storage_gigabytes: float = 10.0,
    data: PairsOptions,
    num_captions: int = 1,
    caption_tokens: int = 12,
    pairs_per_shard: int = 10_000,
    simulate: bool = False,
    trainings: bool = True,
    as_json: bool = False,
) -> int:
    """Says how long CapFilt over so many pairs and the papers' pre-trainings take, on how many machines, for how much.

    docs/cost.md has the formula and what it was compared with.

    Args:
        pairs: numbers of pairs that CapFilt cleans, such as 250k, 14M or 5B.
        model: shape of captioner and filter: base or large (BLIP with ViT-B or ViT-L, at 384 pixels), or the folder of
            a BLIP in OpenBLIP's format.
        machine: a machine that comes with the package, or a file that describes one (option "measure" writes it).
        measure: measure the speeds of this machine first, for about a minute, and estimate for machines like it.
        save: file for what was measured.
        device: what is measured: "cpu", "cuda", "cuda:1" …; the best there is when not given.
        machines: number of machines; when not given, the fewest with which CapFilt ends in time, and as many
            accelerators as in the paper for each pre-training.
        days: the time for CapFilt.
        price: of a machine for an hour, in any currency; without it there are only hours.
        storage_gigabytes: that the storage sends to all machines together, per second.
        num_captions: captions that CapFilt writes for each image.
        caption_tokens: tokens of a caption, its end included.
        pairs_per_shard: pairs of a shard, the unit of work that a failure loses.
        simulate: also simulate each CapFilt run, event by event; it takes seconds.
        trainings: also estimate the pre-trainings.
        as_json: print one json object instead of tables.
    """
    counts = [parse_count(text) for text in pairs]
    if (machines is not None and machines < 1) or days <= 0 or storage_gigabytes <= 0:
        raise ConfigError("--machines, --days and --storage-gigabytes must be above 0")
    config = _model_config(model)
    if save is not None:
        check_output("--save", save)
    found = _measured(device, save) if measure else load_machine(machine)
    cluster = Cluster(machine=found, storage_bytes=storage_gigabytes * 1e9, price=price)
    works = [
        CapFiltWork(
            pairs=count,
            model=config,
            data=data,
            num_captions=num_captions,
            caption_tokens=caption_tokens,
            pairs_per_shard=pairs_per_shard,
        )
        for count in counts
    ]
    cleaned: list[dict[str, Any]] = []
    for name, work in zip(pairs, works, strict=True):
        number = machines or machines_within(work, cluster, 24 * days)
        if number is None:
            raise ConfigError(
                f"{name} pairs cannot be cleaned in {days:g} days, however many machines work: they share "
                f"{storage_gigabytes:g} GB/s of storage, and each has a shard to do; change --days, "
                "--storage-gigabytes or --pairs-per-shard"
            )
        own = replace(cluster, num_machines=number)
        row: dict[str, Any] = {"pairs": name, **_facts(estimate_capfilt(work, own))}
        if simulate:
            row["simulated_hours"] = simulate_capfilt(work, own).hours
        cleaned.append(row)
    trained: list[dict[str, Any]] = []
    for training, accelerators in paper_trainings(data) if trainings else ():
        number = machines or math.ceil(accelerators / max(1, found.accelerators))
        trained.append(
            {"training": training.name, **_facts(estimate_training(training, replace(cluster, num_machines=number)))}
        )
    if as_json:
        print(json.dumps({"machine": asdict(found), "capfilt": cleaned, "trainings": trained}))
        return 0
    print(f"{found.name}: {found.source}")
    _print_table(f"CapFilt with {model}", cleaned)
    if trained:
        _print_table("Pre-training", trained)
    return 0


def parse_count(text: str) -> int:
    """The number that a text such as 250k, 14M or 1.5B means; ConfigError for other texts."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb]?)", text.replace(",", "").replace("_", "").lower())
    count = round(float(match[1]) * UNITS[match[2]]) if match else 0
    if count < 1:
        raise ConfigError(f"--pairs {text} is no number of pairs: write 250k, 14M or 5B")
    return count


def _measured(device: str | None, save: Path | None) -> Machine:
    from openblip.cost.measure import measure_machine

    found = measure_machine(device=device)
    if save is not None:
        found.save(save)
    return found


def _model_config(model: str) -> BlipConfig:
    if model in ("base", "large"):
        return BlipConfig(vision=LARGE if model == "large" else VisionConfig(image_size=384))
    path = Path(model) / "config.json"
    if not path.is_file():
        raise ConfigError(f"--model {model}: say base, large, or a folder with the config.json of a BLIP")
    settings = read_json(path)
    if not isinstance(settings, dict) or settings.get("model_type") != "blip" or "model" not in settings:
        raise ConfigError(f"--model {model}: its config.json is not that of a BLIP in OpenBLIP's format")
    config = BlipConfig.from_dict(settings["model"])
    return replace(config, vision=replace(config.vision, image_size=settings["preprocessing"]["image_size"]))


def _facts(estimate: Estimate) -> dict[str, Any]:
    return {**estimate._asdict(), "machine_hours": estimate.machine_hours}


def _print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def second(row: dict[str, Any]) -> str:
        others = {stage: share for stage, share in row["stage_shares"].items() if stage != row["bottleneck"]}
        stage = max(others, key=others.__getitem__)
        return f"{stage} {others[stage]:.0%}"

    first = next(iter(rows[0]))
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        first: lambda row: row[first],
        "machines": lambda row: f"{row['num_machines']:,}",
        "hours": lambda row: f"{row['hours']:,.1f}",
        "simulated": lambda row: f"{row['simulated_hours']:,.1f}",
        "cost": lambda row: f"{row['cost']:,.0f}",
        "slowest": lambda row: row["bottleneck"],
        "then": second,
        "lost": lambda row: f"{row['lost']:.1%}",
        "TB read": lambda row: f"{row['read_bytes'] / 1e12:,.1f}",
    }
    absent = {"simulated" if "simulated_hours" not in rows[0] else "", "cost" if rows[0]["cost"] is None else ""}
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in columns:
        if name not in absent:
            left = name in (first, "slowest", "then")
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(text(row) for name, text in columns.items() if name not in absent))
    Console(width=max(Console().width, 104)).print(table)  # lines of a narrow terminal wrap
