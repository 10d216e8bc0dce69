"""The bootstrapping loop of BLIP (section 3.3, Figure 3), each stage resumable:

human + web -> pre-train -> fine-tune filter on human, check it on other human pairs -> fine-tune captioner on human
    -> CapFilt over web -> pre-train anew on human + kept web + kept synthetic -> evaluate both

Human pairs are cut by the hash of their image: [:90%] trains, [90%:95%] checks the filter, [95%:] evaluates.

DIR/config.json               the settings
DIR/round_0/pretrain          the run on human and raw web pairs, D in the paper's Figure 3
DIR/round_K/{captioner,filter,capfilt,pretrain}
DIR/round_K/evaluation.json   of that round's pre-trained model
DIR/results.json              all of them, and CapFilt against the ground truth where it is known
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from openblip.capfilt.config import FilterCheckOptions
from openblip.data.config import SourceOptions
from openblip.errors import Condition, OpenBlipError
from openblip.files import read_json, write_json
from openblip.recipes import blip, mini
from openblip.recipes.run import BlipRun

TEST_LIMIT = 1000
EVALUATION_VERSION = 2  # of evaluation.json; before, CIDEr was a hundredth of it


@dataclass(frozen=True, kw_only=True)
class Family:
    """The three trainings of a bootstrap round."""

    pretrain: BlipRun
    captioner: BlipRun
    filter: BlipRun


FAMILIES: dict[str, Callable[[], Family]] = {
    "blip-mini": lambda: Family(
        pretrain=mini.blip_mini(), captioner=mini.blip_mini_captioner(), filter=mini.blip_mini_filter()
    ),
    "blip-base": lambda: Family(pretrain=blip.blip_base(), captioner=blip.caption(), filter=blip.filter_()),
    "blip-large": lambda: Family(
        pretrain=blip.blip_large(), captioner=blip.caption_large(), filter=blip.filter_large()
    ),
}


@dataclass(frozen=True, kw_only=True)
class BootstrapConfig(FilterCheckOptions, SourceOptions):
    """What `bootstrap` starts from and does; also the options of `openblip bootstrap`."""

    conditions: ClassVar = (
        Condition(
            " ".join(
                f"recipe.{run}.{name}"
                for run in ("pretrain", "captioner", "filter")
                for name in ("data.source", "data.images", "data.image-column", "data.caption-column", "out")
            ),
            lambda config: False,
            "the loop gives each training its pairs, --human and --web with their options, and its folder in --out",
        ),
        Condition(
            "recipe.captioner.init recipe.filter.init", lambda config: False, "they start from what was pre-trained"
        ),
        Condition("check-floor", lambda config: not config.no_check, "with --no-check the filter is used anyway"),
    )

    web: str
    """Noisy pairs: any data source."""
    human: str
    """Clean pairs: any data source; for fine-tuning and for every pre-training after the first."""
    out: str
    """Folder of the whole loop; the same command again continues where it was stopped."""
    test: str | None = None
    """Pairs to evaluate on; without, 5% of the human pairs are held out: those of images with the largest hashes."""
    check: str | None = None
    """Clean pairs to check each filter on before it is used, 100 images at least; without, another 5% of the human
    pairs are held out for it. AUC, precision and recall stand in results.json, and with the run of CapFilt."""
    rounds: int = 1
    """How often the web pairs are cleaned and a model is trained anew."""
    threshold: float = 0.5
    """Texts with an ITM probability above this are kept."""
    num_captions: int = 1
    """Captions written per image."""
    seed: int = 0
    """Seed of the sampled captions; the trainings have seeds of their own."""
    device: str | None = None
    """Where captions are written and models measured: "cpu", "cuda", "cuda:1"; the best there is when not given. A
    training takes a CUDA GPU where there is one."""
    dtype: Literal["float32", "bfloat16", "float16", "int8", "auto"] = "auto"
    """Precision of models while they clean and are measured; auto is the fastest at no loss that shows."""
    recipe: Family
    """The settings of the three trainings."""

    def cut_human(self) -> tuple[str, str | None, str]:
        """The pairs that train, check filters (None: they are not checked) and evaluate."""
        from openblip.data.sources.opening import split_spec

        test, check, cuts = self.test, self.check, []
        if check is None and not self.no_check:
            cuts.append(95 if test is not None else 90)
        if test is None:
            cuts.append(95)
        human, *held_out = split_spec(self.human, *cuts) if cuts else (self.human,)
        if test is None:
            test = held_out.pop()
        return human, held_out.pop() if held_out else check, test


class StoppedError(OpenBlipError):
    """A signal stopped a stage after it had saved its state."""


def bootstrap(config: BootstrapConfig) -> dict[str, Any]:
    """Run or resume the loop; returns what results.json holds.

    Raises StoppedError when a signal stopped a training, ConfigError when `config.out` holds another bootstrap or
    there are too few pairs to check a filter on, FilterCheckError for a filter that does not tell own captions from
    others, and OpenBlipError when a shard of CapFilt could not be finished.
    """
    from openblip.capfilt.check import require_pairs
    from openblip.data.sources import open_source
    from openblip.distributed import find_device
    from openblip.evaluation.catalog import BENCHMARKS
    from openblip.evaluation.filtering import has_ground_truth, measure_capfilt
    from openblip.training.run_folder import RunFolder

    find_device(config.device)  # raises for one that is not there
    root, recipe, run_folder = Path(config.out), config.recipe.pretrain, RunFolder(config.out)
    before = run_folder.read_config()
    if before and before.get("dtype") is None:
        before["dtype"] = "float32"  # which earlier versions took
    if before and "check" not in before:
        before |= {"check": None, "no_check": True}  # they trained on what is held out now, and checked nothing
    for settings in (before or {}, wanted := asdict(config)):
        settings.pop("check_floor", None)  # no training depends on it
    changes = run_folder.compare(before, wanted, resume=True)
    human, check, test = config.cut_human()
    # Both now, not hours later: CapFilt takes the web pairs without weights.
    open_source(config.web, **config.reading)
    BENCHMARKS["retrieval"].require_truth(open_source(test, **config.reading), TEST_LIMIT)
    if check is not None and not config.no_check:
        require_pairs(check, config)
    run_folder.begin(asdict(config), changes)
    _warn_of_repeats(config)
    pretrained = [_train(config, recipe, root / "round_0" / "pretrain", f"{human},{config.web}")]
    cleaned: list[Path] = []
    for number in range(1, config.rounds + 1):
        folder = root / f"round_{number}"
        cleaned.append(_clean(config, human, check, pretrained[-1], folder))
        pretrained.append(_train(config, recipe, folder / "pretrain", f"{human},capfilt:{cleaned[-1]}"))
    results = {
        "test": test,
        "models": [_evaluate(config, model, test) for model in pretrained],
        "filter_checks": [read_json(folder / "manifest.json").get("filter_check") for folder in cleaned],
        "capfilt": [measure_capfilt(folder) for folder in cleaned if has_ground_truth(folder)],
    }
    write_json(root / "results.json", results)
    return results


def _warn_of_repeats(config: BootstrapConfig) -> None:
    """Say on standard error which web texts stand on many images, before a training reads them."""
    from openblip.data.reader import texts_of_sources
    from openblip.data.repeats import MOST_TEXTS, count_repeats
    from openblip.data.sources import open_mixture

    web = open_mixture(config.web, **config.reading)
    if line := count_repeats(texts_of_sources(web, lambda sample: sample.captions, MOST_TEXTS)).line():
        print(
            f"{config.web}: {line}. They will drown what other texts teach; consider leaving them out", file=sys.stderr
        )


def _clean(config: BootstrapConfig, human: str, check: str | None, pretrained: Path, folder: Path) -> Path:
    """Captioner and filter from one model, separately, then CapFilt with them; the folder it wrote.

    The filter comes first and is checked, so that nothing else is trained when it is of no use.
    """
    from openblip.capfilt.check import check_filter, require_passed
    from openblip.capfilt.config import CapFiltConfig
    from openblip.capfilt.local import run_capfilt
    from openblip.data.sources.opening import reading_of

    filter_ = str(_train(config, config.recipe.filter, folder / "filter", human, init=pretrained))
    if check is not None and not (folder / "capfilt" / "manifest.json").exists():
        report = check_filter(
            check, filter_, folder / "capfilt",
            options=config, threshold=config.threshold, device=config.device, dtype=config.dtype,
        )  # fmt: skip
        require_passed(report, config)
    settings = CapFiltConfig(
        source=config.web,
        captioner=str(_train(config, config.recipe.captioner, folder / "captioner", human, init=pretrained)),
        filter=filter_,
        threshold=config.threshold,
        num_captions=config.num_captions,
        seed=config.seed,
        dtype=config.dtype,
        check=check,
        check_floor=config.check_floor,
        no_check=config.no_check,
        **{name: value for spec in (config.web, check) if spec for name, value in reading_of(spec, config).items()},
    )
    summary = run_capfilt(settings, folder / "capfilt", device=config.device)
    if summary.failed:
        names = ", ".join(f"{shard} ({error})" for shard, error in summary.failed)
        raise OpenBlipError(f"CapFilt could not finish {names}; the same command tries again.")
    return folder / "capfilt"


def _train(config: BootstrapConfig, recipe: BlipRun, folder: Path, source: str, init: Path | None = None) -> Path:
    """Train a recipe on `source` in `folder`, or resume it; the folder of its final weights."""
    from openblip.data.sources.opening import reading_of
    from openblip.training.run_folder import RunFolder

    if RunFolder(folder).is_finished:
        return folder / "model"
    start = recipe.init if init is None else str(init)
    data = replace(recipe.data, source=source, **reading_of(source, config))
    run = replace(recipe, init=start, data=data, out=str(folder))
    if not run.train(resume=True):
        raise StoppedError(f"stopped while training {folder}; resume with the same command")
    return folder / "model"


def _evaluate(config: BootstrapConfig, model: Path, pairs: str) -> dict[str, Any]:
    """Captioning and retrieval of a pre-trained model, kept in evaluation.json beside its run."""
    import openblip
    from openblip.data.sources import open_source
    from openblip.evaluation.captioning import evaluate_captioning
    from openblip.evaluation.retrieval import evaluate_retrieval

    file = model.parents[1] / "evaluation.json"
    if file.exists() and (earlier := read_json(file)).get("version") == EVALUATION_VERSION:
        return earlier
    predictor, source = openblip.load(model, config.device, config.dtype), open_source(pairs, **config.reading)
    captioning = evaluate_captioning(predictor, source, limit=TEST_LIMIT)
    del captioning["predictions"]
    retrieval = evaluate_retrieval(predictor, source, limit=TEST_LIMIT)
    facts = {"version": EVALUATION_VERSION, "model": str(model), "dtype": predictor.precision}
    result = {**facts, "captioning": captioning, "retrieval": retrieval}
    write_json(file, result)
    return result
