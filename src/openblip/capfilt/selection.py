"""A new threshold for a finished run: a decision about stored scores, never a model run."""

from pathlib import Path

from openblip.capfilt.config import check_threshold
from openblip.capfilt.folder import CapFiltFolder, write_json
from openblip.capfilt.report import write_report
from openblip.capfilt.scores import RunScores


def select(directory: str | Path, threshold: float) -> RunScores:
    """Gives the run in `directory` another threshold and a new report page, and returns what is kept now.

    `capfilt:DIR` and `capfilt-export` read the manifest's threshold, so they follow at once. Raises
    `ConfigError` when the threshold is no probability or the folder no CapFilt run.
    """
    check_threshold(threshold)
    folder = CapFiltFolder(Path(directory))
    manifest = folder.read_manifest()
    write_json(folder.manifest, {**manifest, "threshold": threshold})
    return write_report(folder.root)
