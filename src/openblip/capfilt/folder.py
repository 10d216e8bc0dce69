"""The folder of a CapFilt run: its files, what the run was made with, whether a command continues it, and its scores.

```
DIR/manifest.json                  what was run; written first
DIR/filter_check.json              the scores of the filter's check on clean pairs, where --check asked for it
DIR/captions/<shard>.parquet       one row per text
DIR/captions/<shard>.rejects.jsonl samples that could not be read
DIR/captions/<shard>.report.json   written last: the shard is done
DIR/captions/<shard>.failure.json  why the shard could not be finished; removed once it is
DIR/embeddings/<shard>.parquet     the filter's embeddings, where --keep-embeddings asked for them
DIR/scores/<name>/<shard>.parquet  a score that was computed later, one value per text
DIR/scores/<name>/<shard>.report.json  written last: this score of the shard is finished
DIR/labels/<score>-<texts>-<seed>.jsonl  a person's answers, a line each, that the server's page stored
DIR/report.html
```

R rows (texts) of a shard, I images of a shard.
"""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from openblip.capfilt.config import CapFiltConfig
from openblip.data.captions import finished_shards, read_texts
from openblip.data.decision import Decision
from openblip.data.repeats import count_repeats
from openblip.data.sources import Source, absolute_spec, storage
from openblip.errors import ConfigError
from openblip.files import changed_settings, hash_int, is_local, locate, read_json, remove_partials, write_json

SOURCES = ("web", "synthetic")
ROLES = ("captioner", "filter")
_PACKAGES = ("torch", "transformers", "tokenizers", "pyarrow", "pillow", "numpy")
"""Those whose versions the manifest states, as they may change how images are read and what models compute."""
NUM_STEPS = 1000
"""Thresholds from 0 to 1 at which kept texts are counted are so many steps apart."""
NUM_REPEATS = 100  # repeated texts that the manifest names
UNNAMED = {
    "dtype": "float32",
    "quantization": None,
    "no_repeat_ngram_size": 0,
    "top_k": 0,
    "jpeg": "exact",
    "keep_embeddings": False,
    "keep_best": None,
    "rank_by": None,
}
"""The settings of runs that do not name them."""
SCORED = ("key", "index", "source", "itm")
"""The columns of texts that `RunScores` counts."""
STATES_AT_ONCE = 16  # files whose size and time are asked for
EXECUTION = ("batch_size", "num_threads", "instruction_set")
"""The settings that decide how sums are rounded; in float32 a manifest has none of them."""
COMBINATIONS = ((False, True), (True, True), (True, False), (False, False))  # (web, synthetic) first text is kept


class CapFiltFolder:
    """Paths of a run's files, and what they say about its state."""

    def __init__(self, root: str | Path) -> None:
        self.root = locate(root)
        self.manifest = self.root / "manifest.json"
        self.report_page = self.root / "report.html"

    def file(self, shard: str, suffix: str) -> Path:
        """`captions/<shard>.<suffix>`; see above for what there is."""
        return self.root / "captions" / f"{shard}.{suffix}"

    def is_done(self, shard: str) -> bool:
        """Whether a shard is done: its report is written last. A caption file removed by hand is made again."""
        return all(self.file(shard, suffix).is_file() for suffix in ("report.json", "parquet"))

    def done_shards(self) -> list[str]:
        """Names of the finished shards, sorted; the folder is listed once."""
        names = {path.name for path in (self.root / "captions").glob("*")}
        ends = (".report.json", ".parquet")
        shards = {name.removesuffix(ends[0]) for name in names if name.endswith(ends[0])}
        return sorted(shard for shard in shards if f"{shard}{ends[1]}" in names)

    def failures(self) -> list[dict[str, Any]]:
        """The records of shards that could not be finished, by shard."""
        return [read_json(path) for path in sorted((self.root / "captions").glob("*.failure.json"))]

    def read_manifest(self) -> dict[str, Any]:
        """The manifest, one of an earlier version too, which had no `models`.

        Raises `ConfigError` when the folder is not the output of a CapFilt run.
        """
        if not self.manifest.is_file():
            raise ConfigError(
                f"{self.root} has no manifest.json, so it is not the output of a CapFilt run; "
                "give the folder that was --out of `openblip capfilt`"
            )
        manifest = read_json(self.manifest)
        if "models" not in manifest:
            manifest["models"] = {role: manifest.pop(role) for role in ROLES if role in manifest}
        return manifest

    def read_report(self, shard: str) -> dict[str, Any]:
        """The report of a finished shard; in earlier versions the counts stood beside the rest."""
        report = read_json(self.file(shard, "report.json"))
        return report if "counts" in report else {**report, "counts": {"images": report["images"]}}

    @property
    def decision(self) -> Decision:
        """What is kept of the run. Raises `ConfigError` as `read_manifest`, and for one of a later version."""
        return Decision.of_manifest(self.read_manifest())

    def start_or_resume(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest of a new run, or check that the folder holds the same run; remove leftovers.

        Raises `ConfigError` with the difference, field by field, when the folder holds another run.
        """
        remove_partials(self.root)
        remove_partials(self.root / "captions")
        if not self.manifest.exists():
            if finished_shards(self.root):
                raise ConfigError(
                    f"{self.root} holds caption files but no manifest.json that says how they were made; "
                    "restore it or choose another --out"
                )
            if is_local(self.root):
                (self.root / "captions").mkdir(parents=True, exist_ok=True)
            write_json(self.manifest, manifest)
            return
        earlier = self.read_manifest()
        before = _identity(earlier) | {"threshold": earlier.get("threshold")}
        now = _identity(manifest) | {"threshold": manifest["threshold"]}
        for name in EXECUTION:
            if name == "num_threads" or name not in before:  # workers take the earlier number; old runs state nothing
                before.pop(name, None)
                now.pop(name, None)
        if changed := changed_settings(before, now):
            advice = "Repeat the earlier settings to resume it, or choose another --out"
            if list(changed) == ["threshold"]:
                command = f"openblip capfilt-select {self.root} --threshold {manifest['threshold']}"
                advice = f"To change the threshold run `{command}`, which needs no model"
            raise ConfigError(
                f"{self.root} holds a CapFilt run with other settings: {'; '.join(changed.values())}. {advice}.",
                page="capfilt.md#stopping-and-resuming",
            )
        if earlier.get("num_shards") != manifest["num_shards"]:  # the source has grown by new shards
            write_json(self.manifest, {**earlier, "num_shards": manifest["num_shards"]})

    def note_repeats(self) -> str:
        """Count web texts that stand on many images, in shards taken in the order of their hashes, and keep the counts
        in the manifest, as `repeated_texts`. What is worth saying of them; empty where there is nothing.
        """

        def web_texts() -> Iterator[str]:
            for shard in sorted(self.done_shards(), key=hash_int):
                texts = read_texts(self.root, shard, ["source", "caption"])
                yield from texts.filter(pc.field("source") == "web")["caption"].to_pylist()

        repeats = count_repeats(web_texts())
        facts = {"num_texts": repeats.num_texts, "texts": repeats.texts[:NUM_REPEATS], "line": repeats.line()}
        write_json(self.manifest, {**self.read_manifest(), "repeated_texts": facts})
        return repeats.line()


def build_manifest(
    config: CapFiltConfig,
    models: Mapping[str, Mapping[str, Any]],
    num_shards: int,
    execution: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """The content of manifest.json.

    Paths are absolute, so that `capfilt:DIR` finds the original shards from any working directory. execution: the
    `EXECUTION` that every worker has to keep to, where the precision makes it matter.
    """
    return {
        "openblip": version("openblip"),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "source": absolute_spec(config.source),
        "images": config.images and storage.absolute(config.images),
        "image_column": config.image_column,
        "caption_column": config.caption_column,
        "num_shards": num_shards,
        "threshold": config.threshold,
        "decision": asdict(config.decision),
        "models": models,
        "config": {**config.row_settings(), **execution},
    }


def check_sources_unchanged(folder: CapFiltFolder, source: Source, shards: Sequence[str]) -> None:
    """Raise `ConfigError` where the file of a finished shard is another than the one that was captioned, or is gone."""

    def changes(shard: str) -> str:
        before = folder.read_report(shard).get("source_file", {})
        try:
            return storage.changes_of_file(before, source.file_state(shard)) if before else ""
        except OSError as error:
            return f"it cannot be looked at: {error}"

    with ThreadPoolExecutor(STATES_AT_ONCE) as threads:
        changed = [(shard, what) for shard, what in zip(shards, threads.map(changes, shards), strict=True) if what]
    if changed:
        shard, what = changed[0]
        more = f", and {len(changed) - 1:,} more shards" if len(changed) > 1 else ""
        raise ConfigError(
            f"{source.name} has changed since {folder.root} was begun: {shard}: {what}{more}. Bring the earlier files "
            f"back, choose another --out, or remove the files of these shards in {folder.root}/captions to do them "
            "anew",
            page="capfilt.md#stopping-and-resuming",
        )


def config_hash(manifest: Mapping[str, Any]) -> str:
    """A short hash of everything that decides the rows."""
    # without what earlier versions did not have, where it says that things are as they were: their hashes stay
    identity = {name: value for name, value in _identity(manifest).items() if UNNAMED.get(name, ...) != value}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides the rows, as one flat mapping; a model counts by its hash, not by its path."""
    return {
        "source": manifest.get("source"),
        "images": manifest.get("images"),
        **{name: manifest[name] for name in ("image_column", "caption_column") if manifest.get(name) is not None},
        **{role: manifest["models"].get(role, {}).get("sha256") for role in ROLES},
        **UNNAMED,
        **manifest.get("config", {}),
    }


def itm_bins(itm: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bin of each ITM probability in `SourceScores.histogram` (R,). Compared in float64, as thresholds are."""
    return np.searchsorted(np.arange(NUM_STEPS) / NUM_STEPS, itm.astype(np.float64), side="left")


@dataclass
class SourceScores:
    """Texts of one source and those kept, and of both how many there are in bins of ITM. `NUM_STEPS` equal bins hold
    the scores above their lower end, up to their upper end, and the first one, before them, those that are not above 0.
    So the texts above a threshold of k steps are those in the bins after k.
    """

    texts: int = 0
    kept: int = 0
    histogram: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(NUM_STEPS + 1, np.int64))
    kept_histogram: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(NUM_STEPS + 1, np.int64))


@dataclass
class RunScores:
    """The scores of the shards that were added, and what is kept of them by one decision."""

    images: int = 0
    sources: dict[str, SourceScores] = field(default_factory=lambda: {name: SourceScores() for name in SOURCES})
    combinations: dict[tuple[bool, bool], int] = field(default_factory=lambda: dict.fromkeys(COMBINATIONS, 0))
    """For each of `COMBINATIONS`, the images whose first web and first synthetic text fared so. Images without web text
    are in none."""

    @property
    def texts(self) -> int:
        return sum(scores.texts for scores in self.sources.values())

    @property
    def kept(self) -> int:
        return sum(scores.kept for scores in self.sources.values())

    def add_shard(self, texts: pa.Table) -> dict[tuple[bool, bool], np.ndarray[Any, Any]]:
        """Add the texts of a shard as `read_judged` gives them, and return the first rows (int64) of the images of each
        combination. Of the columns, `SCORED` and `kept` are needed.
        """
        itm = texts["itm"].to_numpy()  # (R,) float32
        kept = texts["kept"].to_numpy()  # (R,) bool
        bins = itm_bins(itm)
        key = texts["key"].combine_chunks()
        starts_image = np.ones(len(itm), bool)  # the rows of an image stand together
        if len(itm) > 1:
            starts_image[1:] = pc.not_equal(key[1:], key[:-1]).to_numpy(zero_copy_only=False)
        first_rows = np.flatnonzero(starts_image)  # (I,)
        image = np.cumsum(starts_image) - 1  # (R,) number of the image that a row belongs to
        is_first = texts["index"].to_numpy() == 0
        fate = {name: np.full(len(first_rows), -1, np.int8) for name in SOURCES}  # (I,) -1: no such text
        self.images += len(first_rows)
        for name, scores in self.sources.items():
            rows = pc.equal(texts["source"], name).to_numpy(zero_copy_only=False)  # (R,) bool
            scores.texts += int(rows.sum())
            scores.kept += int(kept[rows].sum())
            scores.histogram += np.bincount(bins[rows], minlength=NUM_STEPS + 1)
            scores.kept_histogram += np.bincount(bins[rows & kept], minlength=NUM_STEPS + 1)
            firsts = np.flatnonzero(is_first & rows)
            fate[name][image[firsts]] = kept[firsts]
        rows_of = {}
        for web, synthetic in COMBINATIONS:
            rows_of[web, synthetic] = first_rows[(fate["web"] == web) & (fate["synthetic"] == synthetic)]
            self.combinations[web, synthetic] += len(rows_of[web, synthetic])
        return rows_of
