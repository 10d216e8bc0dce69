"""The bootstrapping loop of BLIP (section 3.3, Figure 3), each stage resumable:

human + web -> pre-train -> fine-tune captioner and filter on human -> CapFilt over web
    -> pre-train anew on human + kept web + kept synthetic -> evaluate both

DIR/config.json               the settings
DIR/round_0/pretrain          the run on human and raw web pairs, D in the paper's Figure 3
DIR/round_K/{captioner,filter,capfilt,pretrain}
DIR/round_K/evaluation.json   of that round's pre-trained model
DIR/results.json              all of them, and CapFilt against the ground truth where it is known
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

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
class BootstrapConfig(SourceOptions):
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
    )

    web: str
    """Noisy pairs: any data source."""
    human: str
    """Clean pairs: any data source; for fine-tuning and for every pre-training after the first."""
    out: str
    """Folder of the whole loop; the same command again continues where it was stopped."""
    test: str | None = None
    """Pairs to evaluate on; without, the last 5% of every shard of the human pairs are held out."""
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


class StoppedError(OpenBlipError):
    """A signal stopped a stage after it had saved its state."""


def bootstrap(config: BootstrapConfig) -> dict[str, Any]:
    """Run or resume the loop; returns what results.json holds.

    Raises StoppedError when a signal stopped a training, ConfigError when `config.out` holds another bootstrap, and
    OpenBlipError when a shard of CapFilt could not be finished.
    """
    from openblip.data.sources import open_source
    from openblip.data.sources.opening import split_spec
    from openblip.distributed import find_device
    from openblip.evaluation.catalog import BENCHMARKS
    from openblip.evaluation.filtering import has_ground_truth, measure_capfilt
    from openblip.training.run_folder import RunFolder

    find_device(config.device)  # raises for one that is not there
    root, recipe, run_folder = Path(config.out), config.recipe.pretrain, RunFolder(config.out)
    before = run_folder.read_config()
    if before and before.get("dtype") is None:
        before["dtype"] = "float32"  # which earlier versions took
    changes = run_folder.compare(before, asdict(config), resume=True)
    human, test = config.human, config.test
    if test is None:
        human, test = split_spec(human, 95)
    # Both now, not hours later: CapFilt takes the web pairs without weights.
    open_source(config.web, **config.reading)
    BENCHMARKS["retrieval"].require_truth(open_source(test, **config.reading), TEST_LIMIT)
    run_folder.begin(asdict(config), changes)
    pretrained = [_train(config, recipe, root / "round_0" / "pretrain", f"{human},{config.web}")]
    cleaned: list[Path] = []
    for number in range(1, config.rounds + 1):
        folder = root / f"round_{number}"
        cleaned.append(_clean(config, human, pretrained[-1], folder))
        pretrained.append(_train(config, recipe, folder / "pretrain", f"{human},capfilt:{cleaned[-1]}"))
    results = {
        "test": test,
        "models": [_evaluate(config, model, test) for model in pretrained],
        "capfilt": [measure_capfilt(folder) for folder in cleaned if has_ground_truth(folder)],
    }
    write_json(root / "results.json", results)
    return results


def _clean(config: BootstrapConfig, human: str, pretrained: Path, folder: Path) -> Path:
    """Captioner and filter from one model, separately, then CapFilt with them; the folder it wrote."""
    from openblip.capfilt.config import CapFiltConfig
    from openblip.capfilt.local import run_capfilt

    settings = CapFiltConfig(
        source=config.web,
        captioner=str(_train(config, config.recipe.captioner, folder / "captioner", human, init=pretrained)),
        filter=str(_train(config, config.recipe.filter, folder / "filter", human, init=pretrained)),
        threshold=config.threshold,
        num_captions=config.num_captions,
        seed=config.seed,
        dtype=config.dtype,
        **sources_reading(config, config.web),
    )
    summary = run_capfilt(settings, folder / "capfilt", device=config.device)
    if summary.failed:
        names = ", ".join(f"{shard} ({error})" for shard, error in summary.failed)
        raise OpenBlipError(f"CapFilt could not finish {names}; the same command tries again.")
    return folder / "capfilt"


def sources_reading(config: BootstrapConfig, spec: str) -> dict[str, Any]:
    """The options that matter for these sources: human pairs may be tar shards, and web pairs a table."""
    from openblip.data.sources import open_mixture

    used = {name for source in open_mixture(spec, **config.reading).sources for name in source.option_names}
    return {name: value for name, value in config.reading.items() if name == "images" or name in used}


def _train(config: BootstrapConfig, recipe: BlipRun, folder: Path, source: str, init: Path | None = None) -> Path:
    """Train a recipe on `source` in `folder`, or resume it; the folder of its final weights."""
    from openblip.training.run_folder import RunFolder

    if RunFolder(folder).is_finished:
        return folder / "model"
    start = recipe.init if init is None else str(init)
    data = replace(recipe.data, source=source, **sources_reading(config, source))
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
