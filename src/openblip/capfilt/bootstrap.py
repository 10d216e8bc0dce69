"""The bootstrapping loop of BLIP (section 3.3, Figure 3), each stage resumable:

human + web -> pre-train -> fine-tune captioner and filter on human -> CapFilt over web
    -> pre-train anew on human + kept web + kept synthetic -> evaluate both

DIR/config.json               what was asked for
DIR/round_0/pretrain          the run on human and raw web pairs, D in the paper's Figure 3
DIR/round_K/{captioner,filter,capfilt,pretrain}
DIR/round_K/evaluation.json   of that round's pre-trained model
DIR/results.json              all of them, and CapFilt against the truth where it is known
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import openblip
from openblip.capfilt.bootstrap_config import BootstrapConfig
from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.local import run_capfilt
from openblip.data.sources import open_source
from openblip.errors import OpenBlipError
from openblip.evaluation.captioning import evaluate_captioning
from openblip.evaluation.filtering import has_ground_truth, measure_capfilt
from openblip.evaluation.retrieval import evaluate_retrieval
from openblip.files import write_json
from openblip.recipes.run import Run
from openblip.recipes.start import start
from openblip.training.run_folder import RunFolder

TEST_LIMIT = 1000


class StoppedError(OpenBlipError):
    """A signal stopped a stage after it had saved its state."""


def bootstrap(config: BootstrapConfig) -> dict[str, Any]:
    """Run or resume the loop; returns what results.json holds.

    Raises StoppedError when a signal stopped a training, ConfigError when `config.out` holds another
    bootstrap, and OpenBlipError when a shard of CapFilt could not be finished.
    """
    root = Path(config.out)
    RunFolder(root).start(asdict(config), resume=(root / "config.json").exists())
    open_source(config.pairs_for_test)  # a wrong name should not be found out hours later
    raw = f"{config.human_for_training},{config.web}"
    pretrained = [_train(config.recipe.pretrain, root / "round_0" / "pretrain", raw)]
    cleaned: list[Path] = []
    for number in range(1, config.rounds + 1):
        folder = root / f"round_{number}"
        capfilt = _clean(config, pretrained[-1], folder)
        cleaned.append(capfilt)
        bootstrapped = f"{config.human_for_training},capfilt:{capfilt}"
        pretrained.append(_train(config.recipe.pretrain, folder / "pretrain", bootstrapped))
    results = {
        "test": config.pairs_for_test,
        "models": [_evaluate(model, config.pairs_for_test) for model in pretrained],
        "capfilt": [measure_capfilt(folder) for folder in cleaned if has_ground_truth(folder)],
    }
    write_json(root / "results.json", results)
    return results


def _clean(config: BootstrapConfig, pretrained: Path, folder: Path) -> Path:
    """Captioner and filter from one model, separately, then CapFilt with them; the folder it wrote."""
    captioner = _train(
        config.recipe.captioner, folder / "captioner", config.human_for_training, init=pretrained
    )
    filter_ = _train(config.recipe.filter, folder / "filter", config.human_for_training, init=pretrained)
    settings = CapFiltConfig(
        source=config.web,
        captioner=str(captioner),
        filter=str(filter_),
        threshold=config.threshold,
        num_captions=config.num_captions,
        seed=config.seed,
    )
    summary = run_capfilt(settings, folder / "capfilt")
    if summary.failed:
        names = ", ".join(f"{shard} ({error})" for shard, error in summary.failed)
        raise OpenBlipError(f"CapFilt could not finish {names}; the same command tries again.")
    return folder / "capfilt"


def _train(recipe: Run, folder: Path, source: str, init: Path | None = None) -> Path:
    """Train a recipe on `source` in `folder`, or go on with it; the folder of its final weights."""
    run = replace(
        recipe,
        init=recipe.init if init is None else str(init),
        data=replace(recipe.data, source=source),
        out=str(folder),
    )
    if not start(run, resume=(folder / "config.json").exists()):
        raise StoppedError(f"stopped while training {folder}; resume with the same command")
    return RunFolder(folder).model


def _evaluate(model: Path, pairs: str) -> dict[str, Any]:
    """Captioning and retrieval of a pre-trained model, kept in evaluation.json beside its run."""
    file = model.parents[1] / "evaluation.json"
    if file.exists():
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return kept
    predictor = openblip.load(model)
    source = open_source(pairs)
    captioning = evaluate_captioning(predictor, source, limit=TEST_LIMIT)
    del captioning["predictions"]
    result = {
        "model": str(model),
        "captioning": captioning,
        "retrieval": evaluate_retrieval(predictor, source, limit=TEST_LIMIT),
    }
    write_json(file, result)
    return result
