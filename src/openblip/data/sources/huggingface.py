"""Data sets as Hugging Face keeps them: repositories, on the hub or in a folder, and folders of `save_to_disk`.

A repository's splits are those that its README lists, else those that its files are named after.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

from openblip.data.sample import is_hidden
from openblip.data.sources import storage
from openblip.errors import SourceError

SHARD_SUFFIXES = ("tar", "parquet", "arrow", "feather")
_CARD = "README.md"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w.~/-]+)?")  # user/name, and maybe a revision
_NUMBERED = re.compile(r"(?:^|/)(\w[\w.]*?)-\d{5}-of-\d{5}\.\w+$")  # train-00000-of-00002.parquet
_WORDS = {"train": "train|training", "validation": "validation|valid|val|dev", "test": "test|testing|eval|evaluation"}
_SPLIT_WORDS = {split: re.compile(rf"(?:^|[-_./ ])(?:{words})(?:[-_./ \d]|$)") for split, words in _WORDS.items()}


def is_dataset_name(name: str) -> bool:
    """Whether a name is of the form user/name, and no path in a folder that is here."""
    return bool(_HUB_NAME.fullmatch(name)) and not storage.exists(name.partition("/")[0])


def find_hub_folder(name: str) -> str:
    """The URL of the data set of this name; raises `SourceError` when there is none, or the hub cannot be asked."""
    url = f"hf://datasets/{name}"
    try:
        storage.list_files(url)  # unlike other calls, it says what went wrong
        if storage.is_directory(url):
            return url
    except FileNotFoundError:
        pass
    except OSError as error:
        reason = f"the Hugging Face hub could not be asked for a data set of this name ({error})"
        raise SourceError(f"{name}: no file or folder here, and {reason}") from error
    raise SourceError(f"{name}: no file or folder here, and no data set on the Hugging Face hub")


def repository_files(folder: str, files: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The shards of each split of a repository or a saved data set, and the files beside them; none for another folder.

    folder: a canonical path; files: those at its top. Raises `SourceError` where a file about them cannot be read.
    """
    names = {path.removeprefix(f"{folder}/"): path for path in files}
    splits: dict[str, list[str]] = {}
    if "dataset_dict.json" in names:
        for split in storage.read_object(names["dataset_dict.json"]).get("splits") or ():
            inner = storage.join(folder, str(split))
            splits[str(split)] = repository_files(inner, storage.list_files(inner))[0].get("", [])
    elif "state.json" in names:
        listed = storage.read_object(names["state.json"]).get("_data_files") or ()
        stated = [storage.join(folder, str(file["filename"])) for file in listed if "filename" in file]
        # What `map` has stored beside the data is no part of it.
        arrow = [path for name, path in names.items() if name.endswith(".arrow") and not name.startswith("cache-")]
        splits[""] = stated or arrow
    elif _CARD in names or storage.is_directory(storage.join(folder, "data")):
        has_shards = any(storage.suffix(path) in SHARD_SUFFIXES for path in files)
        files = [path for path in storage.list_files(folder, recursive=True) if not is_hidden(path)]
        shards = [path for path in files if storage.suffix(path) in SHARD_SUFFIXES]
        splits = _splits_of_card(names[_CARD], folder, shards) if _CARD in names else {}
        formats = ([path for path in shards if storage.suffix(path) == suffix] for suffix in SHARD_SUFFIXES)
        if not splits and not has_shards:
            splits = splits_of_names(folder, next(filter(None, formats), []))
    known = {path for paths in splits.values() for path in paths}
    return {name: paths for name, paths in splits.items() if paths}, [path for path in files if path not in known]


def splits_of_names(folder: str, paths: Sequence[str]) -> dict[str, list[str]]:
    """The files of each split that they are named after; of one without a name, if a file is named after none."""
    splits: dict[str, list[str]] = {}
    for path in sorted(paths):
        splits.setdefault(_split_of(path.removeprefix(f"{folder}/")), []).append(path)
    return {"": sorted(paths)} if "" in splits else splits


def choose_split(spec: str, splits: Mapping[str, list[str]], split: str | None) -> list[str]:
    """The files of a split, or of the only one; raises `SourceError` that lists the splits."""
    if split is None and len(splits) <= 1:
        return next(iter(splits.values()), [])
    if split is not None and split in splits:
        return splits[split]
    wanted = "say which split after a #" if split is None else f"there is no split {split}"
    listed = ", ".join(f"#{name}" for name in splits if name)
    raise SourceError(f"{spec}: {wanted}; the folder has {listed or 'none'}")


def _split_of(name: str) -> str:
    """The split that a file is named after, by itself or by its folders; empty for none."""
    if match := _NUMBERED.search(name):
        return match[1]
    return next((split for split, word in _SPLIT_WORDS.items() if word.search(name.lower())), "")


def _splits_of_card(card: str, folder: str, files: Sequence[str]) -> dict[str, list[str]]:
    """The files of each split, `subset/split` where there are several subsets, as a README lists them."""
    from huggingface_hub import DatasetCard

    try:
        content = storage.read_bytes(card).decode()
        if "configs:" not in content:
            return {}
        configs = DatasetCard(content, ignore_metadata_errors=True).data.get("configs") or []
    except Exception:  # a README without a readable head is a README
        return {}
    splits: dict[str, list[str]] = {}
    for config in configs:
        prefix = f"{config.get('config_name')}/" if len(configs) > 1 else ""
        listed = config.get("data_files") or []
        entries = [entry for entry in listed if isinstance(entry, Mapping)] if isinstance(listed, list) else []
        for entry in entries or [{"split": "train", "path": listed}]:
            patterns = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
            names = ((path, path.removeprefix(f"{folder}/")) for path in files)
            paths = [path for path, name in names if any(fnmatch(name, pattern) for pattern in patterns)]
            if paths:
                splits[f"{prefix}{entry.get('split', 'train')}"] = paths
    return splits
