"""Comparisons of trainings as data: a table names its variants, and a plan what must be trained and measured for them.

Nothing here trains. A table is a Python function that asks a `Plan` for models; the plan answers with the folders where
they will be, and keeps the jobs that make them. Equal settings are one job, whoever asks for it, and a job depends on
every other whose folder its settings name.

OUT/data/...                     the embedded world, where no data was named
OUT/runs/RECIPE-HASH/            a training; log.txt is what it said, job.json what it took
OUT/runs/capfilt-HASH/           a run of CapFilt; kept-HASH/ is one with another decision about its texts
OUT/scores/HASH.json             one benchmark of one model
OUT/TABLE/                       table.md, results.json and plot.svg
"""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from openblip.capfilt.config import CapFiltConfig
from openblip.data.config import SourceOptions
from openblip.data.decision import Decision
from openblip.errors import ConfigError, OpenBlipError
from openblip.files import hash_bytes, read_json, write_json
from openblip.generation.decoding import Decoding, Nucleus
from openblip.recipes.measure import Request, measure_requests, operations_per_step, trained_in
from openblip.recipes.run import Blip2Run, BlipRun, Run, with_settings

if TYPE_CHECKING:
    from openblip.recipes.presets import LanguageKind, Preset

Need = Literal["source", "human", "test", "captions", "questions", "documents"]


@dataclass(frozen=True, kw_only=True)
class AblationData(SourceOptions):
    """The samples of all tables; without a source they are emoji scenes."""

    source: str | None = None
    """Image-text pairs that are trained on, noisy as the web is."""
    human: str | None = None
    """Clean pairs, on which captioner and filter are fine-tuned and BLIP-2 is trained."""
    test: str | None = None
    """Clean pairs that nothing is trained on: captioning and retrieval are measured on them."""
    captions: str | None = None
    """Clean pairs with several captions for each image, for measures of several right answers; --data.test when not
    given."""
    questions: str | None = None
    """Questions about other images, with answers, that nothing is trained on."""
    documents: str | None = None
    """Texts on which small language models are trained before BLIP-2 freezes them; for --preset mini."""

    def need(self, name: Need) -> str:
        """The source of that name; ConfigError where there is none."""
        source = getattr(self, name)
        if source is None and name == "captions":
            return self.need("test")
        if source is None:
            raise ConfigError(f"This table needs more data: name it with --data.{name}.")
        return str(source)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A number by which variants are compared."""

    name: str
    """The heading of its column."""
    task: str
    """A benchmark of `openblip evaluate`; "model" for what the model itself is, "capfilt" for what CapFilt did."""
    path: tuple[str, ...]
    """Where the number stands in what the benchmark returns."""
    alternatives: tuple[tuple[str, ...], ...] = ()
    """Where it stands for models that do not have it there; the first that is there counts."""
    data: Need = "test"
    """The samples that it is measured on."""
    scale: float = 1.0
    """What the number is multiplied by, as papers print it."""
    digits: int = 1
    higher_is_better: bool | None = True
    """None for a fact that is neither good nor bad, such as a number of parameters."""

    def read(self, result: Mapping[str, Any]) -> float | None:
        """The number in what a benchmark returned; None where it has none."""
        for path in (self.path, *self.alternatives):
            value: Any = result
            for name in path:
                value = value.get(name) if isinstance(value, Mapping) else None
            if value is not None:
                return self.scale * float(value)
        return None


def _recall(name: str, score: str) -> Measure:
    """R@1 by ITC, re-ranked by ITM; of a model without ITM by ITC, and of one that only writes by log-probability."""
    path, *alternatives = ((kind, score) for kind in ("itm", "itc", "lm"))
    return Measure(name=name, task="retrieval", path=path, alternatives=tuple(alternatives), scale=100)


CIDER = Measure(name="CIDEr", task="caption", path=("cider",))
EXACT = Measure(name="true captions, %", task="caption", path=("exact_match",), scale=100)
TEXT_RECALL, IMAGE_RECALL = _recall("TR@1", "tr_r1"), _recall("IR@1", "ir_r1")
TEXT_MAP = replace(_recall("TR mAP@R", "tr_map_at_r"), data="captions")
TEXT_R_PRECISION = replace(_recall("TR R-Precision", "tr_r_precision"), data="captions")
FALSE_CAPTIONS, *FALSE_CLAIMS = (
    Measure(name=f"false {name}, %", task="caption", path=("hallucination", rate), scale=100, higher_is_better=False)
    for name, rate in {
        "captions": "captions",
        "objects": "chair_i",
        "attributes": "attributes",
        "counts": "counts",
        "relations": "relations",
    }.items()
)
VQA_ACCURACY = Measure(name="VQA accuracy", task="vqa", path=("vqa_accuracy",), data="questions", scale=100)
PARAMETERS = Measure(
    name="parameters, M", task="model", path=("parameters",), scale=1e-6, digits=2, higher_is_better=None
)
TRAINED_PARAMETERS = replace(PARAMETERS, name="trained, M", path=("trained_parameters",))
TRAINING_OPERATIONS = replace(PARAMETERS, name="TFLOP of the training", path=("operations",), scale=1e-12, digits=0)


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A model along a training."""

    steps: int
    model: str
    after: str | None = None
    """The model that the training started from, whose own training counts among the operations."""

    def operations(self) -> float | None:
        """Of all trainings that lead to the model, floating-point; None before they have logged them."""
        folder = trained_in(self.model)
        per_step = None if folder is None else operations_per_step(folder)
        before = 0.0
        if self.after is not None and (earlier := trained_in(self.after)) is not None:
            steps = read_json(earlier / "config.json")["training"]["steps"]
            before = steps * (operations_per_step(earlier) or 0.0)
        return None if per_step is None else before + self.steps * per_step


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a table: what is measured in it."""

    model: str
    """Folder of a trained model."""
    tuned: Mapping[str, str] = field(default_factory=dict)
    """Folders of the models that were made of it for single benchmarks, by the name of the task."""
    capfilt: str | None = None
    """Folder of the run of CapFilt whose texts it was trained on, for measures of these."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options of benchmarks, by the name of the task."""
    curve: tuple[CurvePoint, ...] = ()
    """Models on the way, which the plot shows as a curve."""


# For tables with models that rank by the log-probability of every text for every image.
FEWER_PAIRS: Mapping[str, Mapping[str, Any]] = {"retrieval": {"limit": 200}}


@dataclass(frozen=True, kw_only=True)
class AblationTable:
    """A comparison: its variants, what is measured of them, and what the paper says."""

    title: str
    claim: str
    """What the paper concludes from its numbers."""
    differs: str
    """What the rows differ in; in everything else they are equal."""
    variants: Callable[["Plan"], dict[str, Variant]]
    """Called once for each seed; the first variant is the one that others are compared with."""
    measures: tuple[Measure, ...]
    paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The paper's numbers: by label, then by the name of the measure."""
    paper_source: str = ""
    """Where they stand, and what they were measured on."""
    better: tuple[tuple[str, str], ...] = ()
    """What the paper says without a number: pairs of labels, the better one first, for all measures."""
    remarks: str = ""
    """What is different at the size of a laptop."""


# The jobs.


@dataclass(frozen=True, kw_only=True)
class AblationJob(ABC):
    """A piece of work that a process of its own does in a folder of its own, and goes on with after a kill."""

    folder: Path

    @property
    @abstractmethod
    def settings(self) -> Any:
        """All that decides the result; folders of other jobs in it are what this one depends on."""

    @property
    @abstractmethod
    def is_done(self) -> bool: ...

    @abstractmethod
    def work(self) -> bool:
        """Do the work, or go on with it; False when a signal stopped it."""

    @abstractmethod
    def estimate(self, preset: "Preset") -> float:
        """Core-seconds that it takes."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def is_light(self) -> bool:
        """Whether it takes no more than a moment, so that no process is needed."""
        return False

    def changes(self) -> list[str]:
        """The settings of what lies in the folder that are others now. A folder is named by what is not a default, so
        there are some where a default has changed since.
        """
        return []

    def mentions(self) -> set[str]:
        """Every folder that the settings name, and those above it."""
        return {str(place) for text in strings_of(self.settings) for place in (Path(text), *Path(text).parents)}

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def seconds(self) -> float | None:
        """Core-seconds that it took; None before it is done."""
        file = self.folder / "job.json"
        return float(read_json(file)["core_seconds"]) if file.exists() else None


@dataclass(frozen=True, kw_only=True)
class TrainingJob(AblationJob):
    """A training of a recipe."""

    run: Run

    @property
    def settings(self) -> Any:
        return {name: value for name, value in stated_settings(self.run).items() if name != "out"}

    @property
    def is_done(self) -> bool:
        return (self.folder / "model" / "config.json").is_file()

    def work(self) -> bool:
        return self.run.train(resume=True)

    def changes(self) -> list[str]:
        from openblip.training.run_folder import RunFolder, differences

        if (saved := RunFolder(self.folder).read_config()) is None:
            return []
        earlier = with_settings(self.run, saved).in_precision()
        before = asdict(earlier)
        root_then, root_now = (str(Path(out).parents[1]) for out in (before["out"], self.folder))
        moved = json.loads(json.dumps(before).replace(root_then, root_now))
        return [str(change) for change in differences(moved, asdict(self.run.in_precision(earlier)))]

    def estimate(self, preset: "Preset") -> float:
        in_float32 = self.run.in_precision().training.dtype == "float32"
        seconds = preset.seconds_per_step.get(self.run.recipe, 0.0) * (preset.float32_factor if in_float32 else 1.0)
        return preset.overhead + self.run.training.steps * seconds


@dataclass(frozen=True, kw_only=True)
class CapFiltJob(AblationJob):
    """A run of CapFilt; CapFiltConfig has no folder, so the job's own is the output."""

    config: CapFiltConfig

    @property
    def settings(self) -> Any:
        decoding = {"decoding": type(self.config.decoding).__name__, **asdict(self.config.decoding)}
        return {**stated_settings(self.config), "decoding": decoding}

    @property
    def is_done(self) -> bool:
        return (self.folder / "job.json").exists()

    def work(self) -> bool:
        from openblip.capfilt.local import run_capfilt

        summary = run_capfilt(self.config, self.folder)
        if summary.failed:
            raise OpenBlipError(f"shards could not be finished: {summary.failed}")
        return True

    def estimate(self, preset: "Preset") -> float:
        return preset.overhead + preset.capfilt_seconds


@dataclass(frozen=True, kw_only=True)
class SelectionJob(AblationJob):
    """The texts of a run of CapFilt under another decision: its caption files, and a manifest of its own."""

    capfilt: str
    decision: Decision

    @property
    def settings(self) -> Any:
        return {"capfilt": self.capfilt, **asdict(self.decision)}

    @property
    def is_done(self) -> bool:
        return (self.folder / "manifest.json").exists()

    @property
    def is_light(self) -> bool:
        return True

    def work(self) -> bool:
        captions = self.folder / "captions"
        captions.parent.mkdir(parents=True, exist_ok=True)
        if not captions.is_symlink():
            captions.symlink_to(os.path.relpath(Path(self.capfilt) / "captions", captions.parent))
        manifest = read_json(Path(self.capfilt) / "manifest.json") | {"decision": asdict(self.decision)}
        write_json(self.folder / "manifest.json", manifest)
        return True

    def estimate(self, preset: "Preset") -> float:
        return 0.0


@dataclass(frozen=True, kw_only=True)
class EvaluationJob(AblationJob):
    """All benchmarks of one model, which is loaded once."""

    requests: tuple[Request, ...]
    reading: Mapping[str, Any]

    @property
    def settings(self) -> Any:
        return [{"model": request.model, "data": request.data} for request in self.requests]

    @property
    def is_done(self) -> bool:
        return all(request.file.exists() for request in self.requests)

    def work(self) -> bool:
        measure_requests(self.requests, self.reading)
        return True

    def estimate(self, preset: "Preset") -> float:
        missing = [request for request in self.requests if not request.file.exists()]
        return preset.overhead + sum(preset.evaluation_seconds.get(request.task, 0.0) for request in missing)


# The plan.


@dataclass(kw_only=True)
class Plan:
    """What one seed of a table needs: the jobs, and where their results will be."""

    root: Path
    """Absolute."""
    preset: "Preset"
    data: AblationData
    seed: int
    jobs: dict[str, AblationJob] = field(default_factory=dict)
    """By name; shared by all seeds and tables."""

    def train(self, run: Run, source: str | None = None, *, is_shared: bool = False) -> str:
        """Plan a training, on --data.source unless another source is named, and return the folder of its model.

        Its seed is the plan's; that of a training which is shared by all seeds, such as a captioner's, is 0.
        """
        source = self.data.need("source") if source is None else source
        reading = {} if source.startswith("capfilt:") else self._reading()
        steps = self.steps(run)
        warmup = min(run.training.warmup_steps, steps // 5)
        training = replace(run.training, seed=0 if is_shared else self.seed, steps=steps, warmup_steps=warmup)
        run = replace(run, data=replace(run.data, source=source, **reading), training=training)
        folder = self._folder(run.recipe, TrainingJob(folder=self.root, run=run))
        self._add(TrainingJob(folder=folder, run=replace(run, out=str(folder))))
        return str(folder / "model")

    def steps(self, run: Run) -> int:
        """How many steps a run takes here."""
        return max(1, round(run.training.steps * self.preset.steps_factor))

    def train_curve(self, run: Run, source: str, num_points: int, *, after: str | None) -> Variant:
        """Plan a training that also keeps models on its way. after: the model whose training counts with it."""
        every = max(1, self.steps(run) // num_points)
        model = self.train(replace(run, training=replace(run.training, model_every=every)), source)
        on_the_way = Path(model).parent / "models"
        models = {n: str(on_the_way / f"step_{n:08d}") for n in range(every, self.steps(run) + 1, every)}
        models[self.steps(run)] = model  # which is measured anyway
        points = (CurvePoint(steps=n, model=path, after=after) for n, path in models.items())
        return Variant(model=model, curve=tuple(points))

    def capfilt(self, config: CapFiltConfig) -> str:
        """Plan a run of CapFilt, which all seeds share, and return its folder."""
        config = replace(config, no_check=True, **self._reading())
        folder = self._folder("capfilt", CapFiltJob(folder=self.root, config=config))
        self._add(CapFiltJob(folder=folder, config=config))
        return str(folder)

    def select(self, capfilt: str, decision: Decision) -> str:
        """Plan another decision about the texts of a run of CapFilt, and return the folder of the result."""
        folder = self._folder("kept", SelectionJob(folder=self.root, capfilt=capfilt, decision=decision))
        self._add(SelectionJob(folder=folder, capfilt=capfilt, decision=decision))
        return str(folder)

    def from_start(self, run: BlipRun) -> BlipRun:
        """A fine-tuning of CapFilt, from the model that was pre-trained on the noisy pairs."""
        return replace(run, init=self.train(self.preset.pretrain, is_shared=True))

    def captioner(self) -> str:
        """The captioner of CapFilt: fine-tuned on clean pairs, apart from the filter."""
        return self.train(self.from_start(self.preset.captioner), self.data.need("human"), is_shared=True)

    def filter(self) -> str:
        """The filter of CapFilt: fine-tuned on clean pairs, apart from the captioner."""
        return self.train(self.from_start(self.preset.filter), self.data.need("human"), is_shared=True)

    def clean(
        self,
        captioner: str | None = None,
        filter: str | None = None,
        decoding: Decoding = Nucleus(),  # noqa: B008
    ) -> str:
        """The noisy pairs after CapFilt; without others, with the captioner and the filter above."""
        captioner, filter = captioner or self.captioner(), filter or self.filter()
        config = CapFiltConfig(source=self.data.need("source"), captioner=captioner, filter=filter, decoding=decoding)
        return self.capfilt(config)

    def pretrain(
        self, capfilt: str | None = None, *, source: str | None = None, fine_tunes: bool = True, **changes: Any
    ) -> Variant:
        """BLIP, pre-trained on the noisy pairs, on those of a run of CapFilt, or on other ones; `changes` are fields
        of the run.

        Where the preset fine-tunes before it measures, so is this model, unless `fine_tunes` is False.
        """
        source = source if capfilt is None else f"capfilt:{capfilt}"
        model = self.train(replace(self.preset.pretrain, **changes), source)
        tuned: dict[str, str] = {}
        if self.preset.fine_tunes and fine_tunes:
            human = self.data.need("human")
            tuned["caption"] = self.train(replace(self.preset.captioner, init=model), human)
            tuned["retrieval"] = self.train(replace(self.preset.filter, init=model), human)
        return Variant(model=model, tuned=tuned, capfilt=capfilt)

    def stage1(self, **changes: Any) -> str:
        """Stage 1 of BLIP-2, on clean pairs; `changes` are fields of the run."""
        return self.train(replace(self.preset.stage1, **changes), self.data.need("human"))

    def stage2(self, kind: "LanguageKind", init: str | None, **changes: Any) -> Blip2Run:
        """Stage 2 of BLIP-2 around a language model of one kind, from a model of stage 1 or, without one, from a new
        Q-Former.
        """
        start: dict[str, Any] = {"init": init}
        if init is None:
            stage1 = self.preset.stage1
            start |= {name: getattr(stage1, name) for name in ("vision", "qformer", "tokenizer", "text_init")}
        run = replace(self.preset.stage2[kind], **{**start, **changes})
        if kind not in self.preset.languages:
            return run
        assert run.language is not None  # the recipe has the settings of one
        return replace(run, language=replace(run.language, source=self.language_model(kind)))

    def language_model(self, kind: "LanguageKind") -> str:
        """A small language model, trained on documents alone, which all seeds share."""
        return self.train(self.preset.languages[kind], self.data.need("documents"), is_shared=True)

    def request(self, variant: Variant, measure: Measure, model: str | None = None) -> Request | None:
        """What must be measured of a variant, or of a model on its way; None where it has nothing of the kind."""
        options = dict(variant.options.get(measure.task, {}))
        if measure.task == "capfilt":
            if variant.capfilt is None:
                return None
            data = variant.capfilt
        elif measure.task == "model":
            data = ""
        else:
            data, options = self.data.need(measure.data), {"limit": self.preset.test_limit, **options}
        model = model or variant.tuned.get(measure.task, variant.model)
        settings = {"model": model, "task": measure.task, "data": data, "options": options}
        file = self.root / "scores" / f"{self._hash(settings)}.json"
        return Request(task=measure.task, model=model, data=data, options=options, file=file)

    def measure(self, requests: Iterable[Request]) -> None:
        """Plan the benchmarks, with one job for each model."""
        by_model: dict[str, dict[Path, Request]] = {}
        for request in requests:
            by_model.setdefault(request.model, {})[request.file] = request
        for model, wanted in by_model.items():
            folder = self.root / "scores" / f"of-{self._hash({'model': model, 'files': sorted(map(str, wanted))})}"
            self._add(EvaluationJob(folder=folder, requests=tuple(wanted.values()), reading=self._reading()))

    def _reading(self) -> dict[str, Any]:
        return self.data.reading

    def _folder(self, name: str, job: AblationJob) -> Path:
        return self.root / "runs" / f"{name}-{self._hash(job.settings)}"

    def _hash(self, settings: Any) -> str:
        """A hash that is the same wherever the folder of the tables lies."""
        text = json.dumps(settings, sort_keys=True, default=str).replace(str(self.root), "OUT")
        return hash_bytes(text, 5).hex()

    def _add(self, job: AblationJob) -> None:
        self.jobs.setdefault(job.name, job)


def stated_settings(value: Any) -> Any:
    """The settings of a dataclass, those within included, that are not the defaults of their fields.

    So a setting that a later version adds leaves hashes, and with them finished runs, as they are.
    """
    if is_dataclass(value) and not isinstance(value, type):
        stated = {"": type(value).__name__}
        for each in fields(value):
            default = each.default if each.default_factory is MISSING else each.default_factory()
            if (setting := getattr(value, each.name)) != default:
                stated[each.name] = stated_settings(setting)
        return stated
    if isinstance(value, Mapping):
        return {str(name): stated_settings(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [stated_settings(each) for each in value]
    return value


def raise_on_changes(jobs: Iterable[AblationJob]) -> None:
    """Raise ConfigError where a result is there already that other settings have made."""
    if changed := [f"{job.folder}: {', '.join(changes)}" for job in jobs if (changes := job.changes())]:
        raise ConfigError(
            "Earlier trainings in --out had other defaults. Remove their folders, or choose another --out.\n"
            + "\n".join(changed)
        )


def strings_of(value: Any) -> Iterator[str]:
    """All texts among nested settings, also those of a mixture of sources one by one."""
    if isinstance(value, str):
        yield from (part.removeprefix("capfilt:").partition("[")[0] for part in value.split(","))
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from strings_of(each)
    elif isinstance(value, Sequence):
        for each in value:
            yield from strings_of(each)


def in_order(
    jobs: Mapping[str, AblationJob], wanted: Iterable[str] | None = None
) -> list[tuple[AblationJob, list[AblationJob]]]:
    """All jobs, each with those it depends on, which come before it; or only `wanted` jobs and what they need.

    What a job needs comes directly before it. So the trainings and evaluations of a table are not mixed with those of
    the next one.
    """
    by_folder = {str(job.folder): job for job in jobs.values()}
    needs = {
        name: [by_folder[place] for place in job.mentions() if place in by_folder and by_folder[place] is not job]
        for name, job in jobs.items()
    }
    ordered: dict[str, tuple[AblationJob, list[AblationJob]]] = {}

    def add(name: str) -> None:
        if name not in ordered:
            for need in needs[name]:
                add(need.name)
            ordered[name] = (jobs[name], needs[name])

    needed = {need.name for each in needs.values() for need in each}
    for name in (name for name in jobs if name not in needed) if wanted is None else wanted:
        add(name)
    return list(ordered.values())
