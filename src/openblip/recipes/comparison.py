"""What the numbers of a table say: means and spreads over seeds, beside the paper's, as Markdown, JSON and a plot.

Two rows differ *beyond the spread* when every seed of one is above every seed of the other. Of three seeds, rows that
are equal in truth do so in 2 of the 20 orders of six values. With a single seed that cannot be known.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

from openblip.errors import MissingExtraError
from openblip.files import atomic_file, read_json, write_json, write_text
from openblip.recipes.ablation import (
    AblationJob,
    AblationTable,
    EvaluationJob,
    Measure,
    Plan,
    TrainingJob,
    Variant,
    in_order,
)
from openblip.recipes.measure import Request

SeedValues = Mapping[str, Sequence[float]]  # by label: one value for each seed
Spread = Literal["beyond", "within", "one seed"]


class CurveValues(NamedTuple):
    """What is measured at a point of a curve: of each measure a value for each seed."""

    steps: int
    operations: float | None
    values: Mapping[str, Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two rows of a table, compared by one measure."""

    first: str
    second: str
    ours: float
    """The mean of the second less that of the first."""
    spread: Spread
    paper: float | None
    """The paper's difference; None where it gives no numbers."""
    agrees: bool | None
    """Whether the better row is better in the paper too; None where the paper does not say, or has both equal."""


def compare_rows(first: str, second: str, values: SeedValues, table: AblationTable, measure: Measure) -> Difference:
    """The difference of two rows that both have values."""
    ours = statistics.fmean(values[second]) - statistics.fmean(values[first])
    spread: Spread = "one seed"
    if len(values[first]) > 1 and len(values[second]) > 1:
        low, high = sorted((values[first], values[second]), key=statistics.fmean)
        spread = "beyond" if max(low) < min(high) else "within"
    before, after = (table.paper.get(label, {}).get(measure.name) for label in (first, second))
    paper = None if before is None or after is None else after - before
    sign = paper or _stated_sign(first, second, table, measure)
    agrees = None if not sign else (ours > 0) == (sign > 0) and ours != 0
    return Difference(first=first, second=second, ours=ours, spread=spread, paper=paper, agrees=agrees)


def _stated_sign(first: str, second: str, table: AblationTable, measure: Measure) -> int:
    """The sign of the second row less the first, where the paper says without numbers which is better; 0 elsewhere."""
    upwards = 1 if measure.higher_is_better else -1
    return upwards * (((second, first) in table.better) - ((first, second) in table.better))


def judge_measures(
    table: AblationTable, results: Mapping[str, SeedValues]
) -> Iterator[tuple[Measure, list[Difference]]]:
    """For each measure by which rows are better or worse, all pairs of rows."""
    for measure in table.measures:
        values = results.get(measure.name, {})
        if measure.higher_is_better is not None and len(values) > 1:
            pairs = combinations(values, 2)
            yield measure, [compare_rows(first, second, values, table, measure) for first, second in pairs]


def to_markdown(table: AblationTable, results: Mapping[str, SeedValues], facts: Mapping[str, Any]) -> str:
    """The page of a table. results: by measure, then by label. facts: how it was made."""
    labels = list(dict.fromkeys(label for values in results.values() for label in values))
    shown = [measure for measure in table.measures if results.get(measure.name)]
    lines = [f"# {table.title}", "", table.claim, "", f"{table.differs} {table.remarks}".strip(), ""]
    made = str(facts["made"])
    if minutes := facts.get("core_minutes"):
        precision = f" in {' and '.join(facts['precisions'])}" if facts.get("precisions") else ""
        made += f" {minutes:.0f} core-minutes of training{precision}, shared ones included."
    lines += [f"`{facts['command']}`", "", made, ""]
    head, rule = [""], ["---"]
    for measure in shown:
        has_paper = any(measure.name in row for row in table.paper.values())
        head += [measure.name, *(["paper"] if has_paper else [])]
        rule += ["---:"] * (2 if has_paper else 1)
    lines += [_row(head), _row(rule, "|", "")]
    for label in labels:
        cells = [label]
        for measure in shown:
            cells.append(_cell(results[measure.name].get(label, ()), measure))
            if any(measure.name in row for row in table.paper.values()):
                number = table.paper.get(label, {}).get(measure.name)
                cells.append("" if number is None else f"{number:g}")
        lines.append(_row(cells))
    if table.paper_source:
        lines += ["", f"Paper: {table.paper_source}."]
    lines += ["", "Mean ± standard deviation of the seeds.", ""]
    if incomplete := _incomplete_cells(results, facts.get("seeds", 1)):
        lines += [f"Not all seeds have a value: {'; '.join(incomplete)}.", ""]
    first = labels[0] if labels else ""
    for measure, differences in judge_measures(table, results):
        lines += [f"**{measure.name}.** {_verdict(measure, results[measure.name], differences)}", ""]
        against_first = [each for each in differences if each.first == first]
        known = [_sentence(each, measure) for each in against_first if each.agrees is not None]
        others = [each for each in against_first if each.agrees is None]
        for kind, heading in (("beyond", "beyond the spread"), ("within", "within the spread"), ("one seed", "")):
            if rows := [f"{each.second} {_signed(each.ours, measure)}" for each in others if each.spread == kind]:
                known.append(f"against {first}{f', {heading}' if heading else ''}: {'; '.join(rows)}")
        lines += [*(f"- {line}" for line in known), ""]
    return "\n".join(lines).rstrip() + "\n"


def _incomplete_cells(results: Mapping[str, SeedValues], num_seeds: int) -> list[str]:
    """The cells that have values of some seeds only, since others failed or are not done."""
    return [
        f"{label}, {measure} has {len(values)} of {num_seeds}"
        for measure, rows in results.items()
        for label, values in rows.items()
        if len(values) < num_seeds
    ]


def _row(cells: Sequence[str], edge: str = "|", space: str = " ") -> str:
    return f"{edge}{space}{f'{space}{edge}{space}'.join(cells)}{space}{edge}"


def _cell(values: Sequence[float], measure: Measure) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):,.{measure.digits}f}"
    if len(values) == 1:
        return mean
    spread = f"{statistics.stdev(values):.{measure.digits}f}"
    return mean if measure.higher_is_better is None and float(spread) == 0 else f"{mean} ± {spread}"


def _verdict(measure: Measure, values: SeedValues, differences: Sequence[Difference]) -> str:
    """The order of the rows, and how much of the paper's is in it."""
    sign = 1 if measure.higher_is_better else -1
    ranked = sorted(values, key=lambda label: sign * statistics.fmean(values[label]))
    text = f"From the worst to the best: {'; '.join(ranked)}."
    known = [each for each in differences if each.agrees is not None]
    if not known:
        return text
    agree, beyond = sum(each.agrees is True for each in known), [each for each in known if each.spread == "beyond"]
    stand = f"{agree} of {len(known)} pairs of rows stand as in the paper"
    if any(each.spread == "one seed" for each in known):
        return f"{text} {stand}; with one seed the spread is not known."
    clear = sum(each.agrees is True for each in beyond)
    if agree == len(differences):
        return f"{text} That is the paper's order, beyond the spread in {clear} of {agree} pairs."
    text = f"{text} {stand}, {clear} of them beyond the spread"
    if others := len(known) - agree:
        text += f"; of those that do not, {len(beyond) - clear} of {others}"
    return f"{text}."


def _sentence(difference: Difference, measure: Measure) -> str:
    """A difference of which the paper says something too."""
    text = f"{difference.second} against {difference.first}: {_signed(difference.ours, measure)}"
    if difference.spread != "one seed":
        text += f", {difference.spread} the spread"
    text += ", as in the paper" if difference.agrees else ", unlike the paper"
    return text if difference.paper is None else f"{text} (paper: {_signed(difference.paper, measure)})"


def _signed(number: float, measure: Measure) -> str:
    return f"{number:+.{measure.digits}f}"


def draw_plot(
    path: Path, table: AblationTable, results: Mapping[str, SeedValues], curves: Mapping[str, Sequence[CurveValues]]
) -> None:
    """Bars with the seeds as points; of trainings with curves, each measure over steps and over operations, with the
    range of the seeds.

    Raises `MissingExtraError` without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError('plots need matplotlib; run: pip install "openblip[ablate]"') from error
    measures = [
        measure for measure in table.measures if measure.higher_is_better is not None and results.get(measure.name)
    ]
    labels = list(dict.fromkeys(label for measure in measures for label in results[measure.name]))
    heights = [0.6 + 0.28 * len(labels), *([3.2, 3.2] if curves else [])]  # inches
    with matplotlib.rc_context({"svg.hashsalt": "openblip", "font.size": 9}):
        figure = Figure(figsize=(1.5 + max(2.5, 2.8 * len(measures)), 0.5 + sum(heights)), layout="constrained")
        axes = figure.subplots(len(heights), max(1, len(measures)), squeeze=False, height_ratios=heights)
        for column, measure in enumerate(measures):
            values, axis = results[measure.name], axes[0][column]
            for label, seeds in values.items():
                axis.barh(labels.index(label), statistics.fmean(seeds), color="#9ab7d9")
                axis.plot(seeds, [labels.index(label)] * len(seeds), "k.", markersize=4)
            lowest, highest = min(map(min, values.values())), max(map(max, values.values()))
            margin = (highest - lowest) or abs(highest) or 1.0
            axis.set_xlim(max(0.0, lowest - margin) if lowest >= 0 else lowest - margin, highest + 0.1 * margin)
            axis.set_yticks(range(len(labels)), labels if column == 0 else [""] * len(labels))
            axis.set_ylim(len(labels) - 0.5, -0.5)
            axis.set_title(measure.name)
            for row, unit in ((1, "steps of the last training"), (2, "TFLOP of all trainings")) if curves else ():
                for label, points in curves.items():
                    known = [
                        point for point in points if point.values.get(measure.name) and point.operations is not None
                    ]
                    xs = [point.steps if row == 1 else 1e-12 * (point.operations or 0.0) for point in known]
                    of_seeds = [point.values[measure.name] for point in known]
                    axes[row][column].plot(xs, [*map(statistics.fmean, of_seeds)], marker="o", label=label)
                    axes[row][column].fill_between(xs, [*map(min, of_seeds)], [*map(max, of_seeds)], alpha=0.15)
                axes[row][column].set_xlabel(unit)
                axes[row][column].legend(fontsize=7)
        figure.suptitle(table.title)
        with atomic_file(path) as partial:
            figure.savefig(partial, format="svg", metadata={"Date": None})


# The driver.


@dataclass(frozen=True, kw_only=True)
class PlannedTable:
    """A table with its variants, of each seed."""

    table: AblationTable
    variants: Sequence[Mapping[str, Variant]]

    def requests(self, plans: Sequence[Plan]) -> Iterator[Request]:
        """All that is measured."""
        for plan, variants in zip(plans, self.variants, strict=True):
            for variant in variants.values():
                for measure in self.table.measures:
                    for model in (None, *(point.model for point in variant.curve)):
                        if (request := plan.request(variant, measure, model)) is not None:
                            yield request

    def is_measured(self, plans: Sequence[Plan]) -> bool:
        """Whether nothing is missing any more."""
        return all(request.file.exists() for request in self.requests(plans))

    def _behind(self, plans: Sequence[Plan]) -> list[AblationJob]:
        """Its trainings and runs of CapFilt, those that other tables share included."""
        jobs, files = plans[0].jobs, {request.file for request in self.requests(plans)}
        wanted = [
            name
            for name, job in jobs.items()
            if isinstance(job, EvaluationJob) and any(request.file in files for request in job.requests)
        ]
        return [job for job, _ in in_order(jobs, wanted) if not isinstance(job, EvaluationJob)]

    def core_minutes(self, plans: Sequence[Plan]) -> float:
        """What the trainings and runs of CapFilt behind it took, as far as they are done."""
        return sum(job.seconds or 0.0 for job in self._behind(plans)) / 60

    def precisions(self, plans: Sequence[Plan]) -> list[str]:
        """Those of the trainings behind it that are done; machines may differ in it."""
        trainings = (job for job in self._behind(plans) if isinstance(job, TrainingJob) and job.is_done)
        return sorted({str(read_json(job.folder / "config.json")["training"]["dtype"]) for job in trainings})

    def results(self, plans: Sequence[Plan]) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[CurveValues]]]:
        """The values of each measure by label, and the curves; what is not measured yet is left out."""
        values: dict[str, dict[str, list[float]]] = {measure.name: {} for measure in self.table.measures}
        curves: dict[str, list[CurveValues]] = {}

        def read(label: str, measure: Measure, number: int | None = None) -> list[float]:
            """Those of all seeds that are there; number: of a point of the curve."""
            of_seeds = []
            for plan, variants in zip(plans, self.variants, strict=True):
                variant = variants[label]
                model = None if number is None else variant.curve[number].model
                request = plan.request(variant, measure, model)
                if request is not None and request.file.exists():
                    of_seeds.append(measure.read(read_json(request.file)))
            return [value for value in of_seeds if value is not None]

        for label, variant in self.variants[0].items():
            for measure in self.table.measures:
                if seeds := read(label, measure):
                    values[measure.name][label] = seeds
            for number, point in enumerate(variant.curve):
                of_point = {measure.name: read(label, measure, number) for measure in self.table.measures}
                curves.setdefault(label, []).append(CurveValues(point.steps, point.operations(), of_point))
        return values, curves


def plan_tables(tables: Mapping[str, AblationTable], plans: Sequence[Plan]) -> dict[str, PlannedTable]:
    """All jobs of these tables, in `jobs` of the plans, which have them in common: one plan for each seed."""
    planned = {
        name: PlannedTable(table=table, variants=[table.variants(plan) for plan in plans])
        for name, table in tables.items()
    }
    plans[0].measure(request for each in planned.values() for request in each.requests(plans))
    return planned


def write_table(name: str, planned: PlannedTable, plans: Sequence[Plan], facts: Mapping[str, Any]) -> str | None:
    """Write OUT/NAME/ with what is measured by now; returns why there is no plot, if there is none."""
    folder, table = plans[0].root / name, planned.table
    took = {"core_minutes": round(planned.core_minutes(plans), 1), "precisions": planned.precisions(plans)}
    facts = {**facts, **took}
    values, curves = planned.results(plans)
    differences = {
        measure.name: [asdict(difference) for difference in pairs] for measure, pairs in judge_measures(table, values)
    }
    write_text(folder / "table.md", to_markdown(table, values, facts))
    write_json(
        folder / "results.json",
        {
            "table": name,
            "title": table.title,
            **facts,
            "values": values,
            "paper": table.paper,
            "differences": differences,
            "curves": {
                label: [
                    {"steps": steps, "operations": operations, "values": seen} for steps, operations, seen in points
                ]
                for label, points in curves.items()
            },
            "models": [{label: variant.model for label, variant in variants.items()} for variants in planned.variants],
        },
    )
    try:
        draw_plot(folder / "plot.svg", table, values, curves)
    except MissingExtraError as error:
        return str(error)
    return None
