"""Tables: which trainings they share, how jobs run side by side and go on, and what is said of the numbers."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from job_steps import steps
from small_runs import write_scenes

from openblip import distributed
from openblip.cli import ablate
from openblip.cli.main import main
from openblip.data.decision import Decision
from openblip.errors import ConfigError
from openblip.files import read_json, write_json
from openblip.generation.decoding import Beam
from openblip.metrics import captioning
from openblip.recipes import side_by_side
from openblip.recipes.ablation import (
    AblationData,
    AblationJob,
    AblationTable,
    EvaluationJob,
    Measure,
    Plan,
    TrainingJob,
    Variant,
    in_order,
    raise_on_changes,
    stated_settings,
)
from openblip.recipes.comparison import compare_rows, draw_plot, plan_tables, to_markdown, write_table
from openblip.recipes.presets import PRESETS, mini_preset
from openblip.recipes.side_by_side import Failure, run_jobs
from openblip.recipes.tables import TABLES
from openblip.recipes.tables.blip_capfilt import NUM_TEXTS

SLOTS: list[dict[str, str]] = [{}, {}]  # two jobs side by side
SCORE = Measure(name="score", task="caption", path=("cider",))
SOURCES = {"source": "web", "human": "human", "test": "test", "questions": "questions", "documents": "documents"}


def plans(root: Path, seeds: int = 3) -> list[Plan]:
    jobs: dict[str, AblationJob] = {}
    data = AblationData(**SOURCES)
    return [Plan(root=root, preset=mini_preset(), data=data, seed=seed, jobs=jobs) for seed in range(seeds)]


# What is trained.


def test_equal_trainings_are_one_and_their_names_depend_on_no_place(tmp_path: Path) -> None:
    here, there = plans(tmp_path / "a"), plans(tmp_path / "b")
    assert here[0].pretrain() == here[0].pretrain()
    assert here[0].pretrain().model != here[1].pretrain().model  # another seed
    assert here[0].clean() == here[1].clean()  # which all seeds share
    assert here[0].clean() != here[0].clean(decoding=Beam())
    for plan in (there[1], there[0]):
        plan.pretrain()
        plan.clean()
        plan.clean(decoding=Beam())
    assert set(here[0].jobs) == set(there[0].jobs)


def test_a_setting_that_is_added_later_leaves_hashes_as_they_are() -> None:
    @dataclass(frozen=True)
    class Before:
        steps: int = 3
        rates: dict[str, float] = field(default_factory=dict)

    @dataclass(frozen=True)
    class After(Before):
        more: int = 1

    After.__name__ = "Before"
    assert stated_settings(Before(steps=4)) == stated_settings(After(steps=4)) == {"": "Before", "steps": 4}
    assert stated_settings(After(more=2)) == {"": "Before", "more": 2}


def test_trainings_with_other_defaults_are_not_taken_for_those_of_today(tmp_path: Path) -> None:
    (plan, *_) = plans(tmp_path / "out", seeds=1)
    folder = Path(plan.pretrain().model).parent
    job = plan.jobs[folder.name]
    assert isinstance(job, TrainingJob)
    saved = json.loads(json.dumps(asdict(job.run)))
    write_json(folder / "model" / "config.json", {})
    write_json(folder / "config.json", saved)
    assert job.changes() == []
    (there,) = plans(tmp_path / "moved", seeds=1)
    (tmp_path / "out").rename(tmp_path / "moved")
    there.pretrain()
    raise_on_changes(there.jobs.values())  # the folder may move
    write_json(tmp_path / "moved/runs" / folder.name / "config.json", saved | {"embed_dim": 3, "drop_path": 0.5})
    with pytest.raises(ConfigError, match=r"other defaults.*\n.*drop_path was 0.5, is now null$"):
        raise_on_changes(there.jobs.values())


def test_several_captions_are_those_of_the_test_pairs_where_no_others_are_named() -> None:
    assert AblationData(test="t").need("captions") == "t"
    assert AblationData(test="t", captions="c").need("captions") == "c"
    with pytest.raises(ConfigError, match=r"--data\.test"):
        AblationData().need("captions")


def test_stage_2_without_stage_1_takes_the_changes_that_are_asked_for(tmp_path: Path) -> None:
    (plan, *_) = plans(tmp_path)
    shape = plan.preset.stage1.qformer
    assert shape is not None
    assert plan.stage2("opt", None).qformer == shape
    wide = replace(shape, num_queries=32)
    assert plan.stage2("opt", None, qformer=wide).qformer == wide


def test_a_job_comes_after_what_its_settings_name(tmp_path: Path) -> None:
    (plan, *_) = plans(tmp_path)
    cleaned = plan.clean()
    kept = plan.select(cleaned, Decision(where="source = 'web'"))
    model = plan.pretrain(kept).model
    needs = {job.name: {need.name for need in needs} for job, needs in in_order(plan.jobs)}
    of = {name: Path(place).name for name, place in (("cleaned", cleaned), ("kept", kept))}
    assert needs[Path(model).parent.name] == {of["kept"]}
    assert needs[of["kept"]] == {of["cleaned"]}
    assert needs[of["cleaned"]] == {Path(place).parent.name for place in (plan.captioner(), plan.filter())}
    names = [job.name for job, _ in in_order(dict(reversed(plan.jobs.items())))]
    assert names.index(of["cleaned"]) < names.index(of["kept"]) < names.index(Path(model).parent.name)


def test_a_table_is_done_before_the_next_one_begins(tmp_path: Path) -> None:
    names = ("blip-negatives", "blip-queue")
    seeds = plans(tmp_path, seeds=2)
    planned = plan_tables({name: TABLES[name] for name in names}, seeds)
    place = {job.folder: number for number, (job, _) in enumerate(in_order(seeds[0].jobs))}
    first = {Path(variant.model).parent for of_seed in planned[names[0]].variants for variant in of_seed.values()}
    second = {Path(variant.model).parent for of_seed in planned[names[1]].variants for variant in of_seed.values()}
    measured = [number for folder, number in place.items() if folder.parent.name == "scores"]
    assert len(measured) == len(first | second)
    assert sum(number < min(place[folder] for folder in second - first) for number in measured) == len(first)
    assert [job.folder for job, _ in in_order(seeds[0].jobs, [next(iter(first)).name])] == [next(iter(first))]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_table_plans_its_variants(preset: str, tmp_path: Path) -> None:
    jobs: dict[str, AblationJob] = {}
    plan = Plan(root=tmp_path, preset=PRESETS[preset](), data=AblationData(**SOURCES), seed=0, jobs=jobs)
    planned = plan_tables(TABLES, [plan])
    for name, table in TABLES.items():
        labels = list(planned[name].variants[0])
        assert len(labels) > 1, name
        assert set(table.paper) <= set(labels), name
        assert {label for pair in table.better for label in pair} <= set(labels), name
        names = [measure.name for measure in table.measures]
        assert {measure for row in table.paper.values() for measure in row} <= set(names), name
    for job in jobs.values():
        if isinstance(job, TrainingJob):
            job.run.check()


@pytest.mark.parametrize(("has_bfloat16", "most_hours", "most_minutes"), [(True, 10, 4), (False, 20, 20)])
def test_all_mini_tables_take_at_most_ten_hours_on_two_cores(
    has_bfloat16: bool, most_hours: int, most_minutes: int,
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whose instructions include bfloat16; the estimate says that others take longer."""
    monkeypatch.setattr(distributed, "has_bfloat16", lambda device: has_bfloat16)
    assert main(["ablate", "all", "--dry-run", "--out", str(tmp_path)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert (hours := re.search(r"([\d.]+) hours on two cores", last))
    assert most_hours / 4 < float(hours[1]) <= most_hours
    minutes = [float(found[1]) for line in lines if (found := re.match(r" *([\d.]+) min", line))]
    assert most_minutes / 2 < max(minutes) <= most_minutes
    assert list(tmp_path.iterdir()) == []


# Jobs side by side.


def test_a_job_that_fails_stops_only_what_needs_it(tmp_path: Path) -> None:
    failures = run_jobs(steps(tmp_path, b="fails"), SLOTS, label="test")
    assert [(failure.job, failure.reason) for failure in failures] == [
        ("b", "ValueError: not this time"),
        ("d", "it needs b"),
    ]
    assert (tmp_path / "c" / "result").exists()
    assert "Traceback" in (tmp_path / "b" / "log.txt").read_text()
    assert run_jobs(steps(tmp_path, b="fails"), SLOTS, label="test") == []  # the second try
    assert read_json(tmp_path / "b" / "job.json")["core_seconds"] >= 0.3  # of both
    assert (tmp_path / "d" / "result").exists()


def test_the_driver_is_told_whenever_a_job_has_ended(tmp_path: Path) -> None:
    seen: list[int] = []
    run_jobs(
        steps(tmp_path, d="fails"),
        SLOTS,
        label="test",
        after_each=lambda: seen.append(len([*tmp_path.glob("*/result")])),
    )
    assert seen[0] == 1
    assert seen[-1] == 3
    assert len(seen) == 4  # the failure too


def test_a_child_that_is_killed_is_a_failure_and_goes_on_the_next_time(tmp_path: Path) -> None:
    (failure,) = run_jobs(steps(tmp_path, d="dies"), SLOTS, label="test")
    assert failure == ("d", "its process ended with -9")
    assert run_jobs(steps(tmp_path, d="dies"), SLOTS, label="test") == []


DRIVER = """
import sys
from pathlib import Path
sys.path[:0] = {paths}
from job_steps import steps
from openblip.recipes.side_by_side import run_jobs
if __name__ == "__main__":
    run_jobs(steps(Path(sys.argv[1]), b="waits"), [{{}}, {{}}], label="test")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_driver_that_is_stopped_takes_its_children_with_it(number: int, tmp_path: Path) -> None:
    script, out = tmp_path / "driver.py", tmp_path / "out"
    script.write_text(DRIVER.format(paths=[*sys.path]))
    driver = subprocess.Popen([sys.executable, str(script), str(out)], stderr=subprocess.DEVNULL)
    started = out / "b" / "tried"
    wait_until(lambda: started.exists() and started.read_text() != "")
    child = int(started.read_text())
    driver.send_signal(number)
    assert driver.wait(60) != 0
    wait_until(lambda: not is_alive(child))
    assert run_jobs(steps(out, b="waits"), SLOTS, label="test") == []
    assert (out / "d" / "result").exists()


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


# What the numbers say.

TABLE = AblationTable(
    title="A table",
    claim="More is better.",
    differs="How much.",
    variants=lambda plan: {},
    measures=(SCORE,),
    paper={"none": {"score": 10.0}, "some": {"score": 11.0}},
    better=(("all", "some"),),
)
VALUES = {"none": [1.0, 2.0, 3.0], "some": [4.0, 5.0, 6.0], "all": [4.5, 4.6, 4.7]}


def test_differences_are_held_against_the_spread_and_the_paper() -> None:
    clear = compare_rows("none", "some", VALUES, TABLE, SCORE)
    assert (clear.ours, clear.spread, clear.paper, clear.agrees) == (3.0, "beyond", 1.0, True)
    unclear = compare_rows("some", "all", VALUES, TABLE, SCORE)  # the paper says which, and gives no number
    assert (unclear.ours, unclear.spread, unclear.paper, unclear.agrees) == (pytest.approx(-0.4), "within", None, False)
    unknown = compare_rows("none", "all", VALUES, TABLE, SCORE)
    assert (unknown.spread, unknown.agrees) == ("beyond", None)
    single = compare_rows("none", "some", {"none": [1.0], "some": [2.0]}, TABLE, SCORE)
    assert (single.spread, single.agrees) == ("one seed", True)
    error = replace(SCORE, higher_is_better=False)
    assert compare_rows("some", "all", VALUES, TABLE, error).agrees is True  # the better one is the lower one


def test_the_page_of_a_table_has_both_rows_and_a_verdict() -> None:
    page = to_markdown(TABLE, {"score": VALUES}, {"command": "openblip ablate x", "made": "Here."})
    assert "| none | 2.0 ± 1.0 | 10 |" in page
    assert "| all | 4.6 ± 0.1 |  |" in page
    assert "From the worst to the best: none; all; some. 1 of 2 pairs of rows stand as in the paper" in page
    assert "- some against none: +3.0, beyond the spread, as in the paper (paper: +1.0)" in page
    assert "- against none, beyond the spread: all +2.6\n" in page


def test_a_fact_that_hardly_differs_between_seeds_has_no_spread() -> None:
    fact = replace(SCORE, higher_is_better=None)
    values = {"none": [1.01, 1.02, 1.03], "some": [4.0, 5.0, 6.0]}
    page = to_markdown(replace(TABLE, measures=(fact,), paper={}), {"score": values}, {"command": "x", "made": "Here."})
    assert "| none | 1.0 |" in page
    assert "| some | 5.0 ± 1.0 |" in page


def test_a_page_says_no_more_than_is_known() -> None:
    facts = {"command": "openblip ablate x", "made": "Here.", "seeds": 3}
    page = to_markdown(TABLE, {"score": {**VALUES, "all": [7.0]}}, facts)
    assert "Not all seeds have a value: all, score has 1 of 3." in page
    assert "2 of 2 pairs of rows stand as in the paper; with one seed the spread is not known." in page
    two = {label: VALUES[label] for label in ("none", "some")}
    assert "That is the paper's order, beyond the spread in 1 of 1 pairs." in to_markdown(TABLE, {"score": two}, facts)
    error = replace(SCORE, higher_is_better=False)
    table = replace(TABLE, measures=(error,), paper={})
    assert (
        "From the worst to the best: some; all; none. 1 of 1 pairs of rows stand as in the paper, 0 of them"
        in to_markdown(table, {"score": VALUES}, facts)
    )


def test_a_plot_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw_plot(tmp_path / name, TABLE, {"score": VALUES}, {})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert b"some" in (tmp_path / "a").read_bytes()


@pytest.mark.slow
def test_a_table_is_trained_measured_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioning, "java_runs", lambda: False)
    write_scenes(tmp_path / "scenes", "captions", 12)
    preset = mini_preset()
    training = replace(preset.pretrain.training, steps=2, batch_size=4, warmup_steps=0)
    assert preset.pretrain.model is not None
    model = replace(preset.pretrain.model, text=replace(preset.pretrain.model.text, num_layers=1))
    preset = replace(preset, pretrain=replace(preset.pretrain, training=training, model=model), test_limit=6)

    def variants(plan: Plan) -> dict[str, Variant]:
        capfilt = plan.clean(captioner="openblip-mini-captioner", filter="openblip-mini-filter")
        return {"raw": plan.pretrain(), "kept": plan.pretrain(plan.select(capfilt, Decision(where="itm >= 0")))}

    measures = (SCORE, NUM_TEXTS)
    table = replace(
        TABLE, variants=variants, measures=measures, paper={"raw": {"score": 1.0}, "kept": {"score": 2.0}}, better=()
    )
    source = str(tmp_path / "scenes")
    data, jobs, out = AblationData(source=source, test=source), dict[str, AblationJob](), tmp_path / "out"
    plan = Plan(root=out, preset=preset, data=data, seed=0, jobs=jobs)
    planned = plan_tables({"small": table}, [plan])["small"]
    for job, _ in in_order(jobs):
        assert not job.is_done
        assert job.work()
    assert write_table("small", planned, [plan], {"command": "openblip ablate small", "made": "Here."}) is None
    results = json.loads((out / "small" / "results.json").read_text())
    assert {label: len(values) for label, values in results["values"]["score"].items()} == {"raw": 1, "kept": 1}
    assert results["values"]["texts"] == {"kept": [24.0]}
    assert (out / "small" / "plot.svg").exists()


def test_a_table_is_there_as_soon_as_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("blip-negatives", "blip-queue")
    monkeypatch.setattr(ablate, "TABLES", {name: TABLES[name] for name in names})
    there: list[int] = []

    def measure(jobs: Sequence[tuple[AblationJob, Sequence[AblationJob]]], *_: Any, **options: Any) -> list[Failure]:
        for job, _needs in jobs:
            if isinstance(job, EvaluationJob):
                for request in job.requests:
                    write_json(request.file, {"cider": 1.0, "itc": {"tr_r1": 0.5, "ir_r1": 0.5}})
            elif isinstance(job, TrainingJob):
                write_json(job.folder / "job.json", {"core_seconds": 60})
                write_json(job.folder / "config.json", {"training": {"dtype": "float32"}})
                write_json(job.folder / "model" / "config.json", {})
            options["after_each"]()
            there.append(len([*tmp_path.glob("*/table.md")]))
        return []

    monkeypatch.setattr(side_by_side, "run_jobs", measure)
    (tmp_path / "web").mkdir()
    sources = ["--data.source", str(tmp_path / "web"), "--data.test", str(tmp_path / "web")]
    assert main(["ablate", "all", "--seeds", "2", "--out", str(tmp_path), *sources]) == 0
    assert there[-1] == 2
    assert there.index(1) < there.index(2)
    took = [read_json(tmp_path / name / "results.json")["core_minutes"] for name in names]
    assert took == [4.0, 6.0]  # two rows, and three of which the first table has one too
    shown = (tmp_path / names[1] / "table.md").read_text()
    assert "6 core-minutes of training in float32, shared ones included." in shown


def test_the_guide_shows_tables_and_systems_as_they_are() -> None:
    root = Path(__file__).parents[2]
    guide = (root / "docs/ablations.md").read_text()
    shown = re.findall(r"^\+\+\+ (\S+)\n((?:\+(?!\+\+).*\n)+)", guide, re.M)
    files = {name: "".join(f"{line[1:]}\n" for line in lines.splitlines()) for name, lines in shown}
    assert len(files) == 3
    for name, lines in files.items():
        assert lines in (root / name).read_text()
    smallest = "src/openblip/recipes/tables/blip_negatives.py"
    assert files[smallest] == (root / smallest).read_text()


def test_a_file_of_ones_own_is_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "my_table.py", tmp_path / "out"
    file.write_text("")
    assert main(["ablate", str(file), "--out", str(out), "--dry-run"]) == 2
    file.write_text((Path(__file__).parents[2] / "src/openblip/recipes/tables/blip_negatives.py").read_text())
    assert main(["ablate", str(file), "--out", str(out), "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "has no TABLE" in said.err
    assert "my-table: random" in said.out


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "benchmarks/causes").glob("*.py")), ids=str)
def test_the_tables_that_look_for_causes_can_be_planned(file: Path, tmp_path: Path) -> None:
    assert main(["ablate", str(file), "--out", str(tmp_path), "--dry-run"]) == 0


def test_settings_that_cannot_be_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["tabel"], ["all", "--seeds", "0"], ["blip-sharing", "--data.test", "x"]):
        assert main(["ablate", *words, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "there is no table tabel; choose one of" in said
    assert "--data.source must be named beside other sources" in said
