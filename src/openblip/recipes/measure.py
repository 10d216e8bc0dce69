"""What the variants of a table are measured by: benchmarks, what a model itself is, and what CapFilt did.

Every result is kept in a file of its own, so a model is measured once, however many tables show it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openblip.data.config import SourceOptions
from openblip.errors import UnsupportedTaskError
from openblip.files import read_json, read_jsonl, write_json


@dataclass(frozen=True, kw_only=True)
class Request:
    """One benchmark of one model, whose scores are kept in a file."""

    task: str
    """A benchmark of `openblip evaluate`; "model" for what the model itself is, "capfilt" for what CapFilt did."""
    model: str
    """Its folder."""
    data: str
    """The source, or the folder of CapFilt's run."""
    options: Mapping[str, Any]
    file: Path


def measure_requests(requests: Sequence[Request], reading: Mapping[str, Any]) -> None:
    """Measure one model, which is loaded once, and write the file of each request that has none yet."""
    import openblip
    from openblip.data.sources import open_source
    from openblip.data.sources.opening import reading_of
    from openblip.evaluation.catalog import BENCHMARKS
    from openblip.evaluation.run import without_lists

    missing = [request for request in requests if not request.file.exists()]
    model = requests[0].model
    predictor = openblip.load(model) if any(request.task in BENCHMARKS for request in missing) else None
    for request in missing:
        result: dict[str, Any]
        if request.task == "model":
            result = describe_model(model)
        elif request.task == "capfilt":
            result = describe_texts(request.data)
        else:
            assert predictor is not None  # it was loaded for a benchmark
            options = dict(request.options)
            if request.task == "vqa":
                options.setdefault("decoding", predictor.answer_decoding)
            source = open_source(request.data, **reading_of(request.data, SourceOptions(**reading)))
            try:
                result = BENCHMARKS[request.task].evaluate(predictor, source, **options)
            except UnsupportedTaskError as error:
                result = {"unsupported": str(error)}
            result = without_lists(result)
        facts = {"model": model, "task": request.task, "data": request.data, "options": dict(request.options)}
        write_json(request.file, {**facts, **result})


def describe_model(model: str) -> dict[str, Any]:
    """How many parameters a model has, how many of them its training changed, and what that training computed.

    The last two are known of a model in the folder of its run alone.
    """
    from openblip.checkpoints.loading import load_checkpoint

    counts = {name: part.numel() for name, part in load_checkpoint(model).model.named_parameters()}
    folder = trained_in(model)
    facts: dict[str, Any] = {"parameters": sum(counts.values())}
    if folder is None:
        return facts
    states = sorted(folder.glob("checkpoints/step_*/frozen.json"))
    frozen = {name.removeprefix("model.") for name in (read_json(states[-1]) if states else {})}
    facts["trained_parameters"] = sum(count for name, count in counts.items() if name not in frozen)
    if per_step := operations_per_step(folder):
        facts["operations"] = per_step * read_json(folder / "config.json")["training"]["steps"]
    return facts


def trained_in(model: str) -> Path | None:
    """The folder of the run that a model lies in; None for one that lies elsewhere, or whose run has logged nothing."""
    return next((place for place in Path(model).parents if (place / "metrics.jsonl").exists()), None)


def operations_per_step(folder: Path) -> float | None:
    """What a step of a run computes on average, as its metrics.jsonl says; None where nothing is logged."""
    lines = (line.value for line in read_jsonl(folder / "metrics.jsonl"))
    logged = [line["gflop_per_step"] for line in lines if "gflop_per_step" in line]
    return 1e9 * sum(logged) / len(logged) if logged else None


def describe_texts(capfilt: str) -> dict[str, Any]:
    """How many texts of a run of CapFilt there are and are kept, of each source; where it is known, how many are true.

    `rejected` is the share of the synthetic texts that the filter threw away, the noise ratio of BLIP's Table 2.
    """
    from openblip.capfilt.folder import SOURCES
    from openblip.data.captions import finished_shards, read_judged
    from openblip.data.decision import Decision
    from openblip.evaluation.filtering import has_ground_truth, measure_capfilt

    decision = Decision.of_manifest(read_json(f"{capfilt}/manifest.json"))
    counts: dict[str, Any] = {name: {"texts": 0, "kept": 0} for name in SOURCES}
    for shard in finished_shards(capfilt):
        for row in read_judged(capfilt, shard, decision, ["source"]).to_pylist():
            counts[row["source"]]["texts"] += 1
            counts[row["source"]]["kept"] += row["kept"]
    for count in counts.values():
        count["rejected"] = 1 - count["kept"] / count["texts"] if count["texts"] else None
    truth = measure_capfilt(capfilt) if has_ground_truth(capfilt) else None
    return {"counts": counts, "num_kept": sum(count["kept"] for count in counts.values()), "truth": truth}
