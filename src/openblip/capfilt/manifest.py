"""What a run was made with, and whether a later command is the same run."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.folder import CapFiltFolder, write_json
from openblip.errors import ConfigError
from openblip.predictor import BasePredictor


def describe_model(checkpoint: str, predictor: BasePredictor) -> dict[str, Any]:
    """A checkpoint's name, size, and a hash of all that decides its answers: weights, shapes, tokenizer,
    pictures.

    The hash is taken of the loaded model, so it is the same wherever a checkpoint is read from.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(predictor.settings, sort_keys=True).encode())
    with tempfile.TemporaryDirectory() as folder:
        predictor.save_vocabularies(Path(folder))
        for vocabulary in sorted(Path(folder).rglob("tokenizer.json")):
            digest.update(vocabulary.read_bytes())
    for name, tensor in sorted(predictor.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    parameters = sum(parameter.numel() for parameter in predictor.model.parameters())
    return {"checkpoint": checkpoint, "parameters": parameters, "sha256": digest.hexdigest()}


def absolute(path: str | None) -> str | None:
    """A local path made independent of the working directory; URLs and None as they are."""
    if path is None or "://" in path:
        return path
    scheme, colon, rest = path.partition(":")
    if colon and scheme == "capfilt":
        return f"capfilt:{os.path.abspath(os.path.expanduser(rest))}"
    return os.path.abspath(os.path.expanduser(path))


def build_manifest(
    config: CapFiltConfig, captioner: Mapping[str, Any], filter_: Mapping[str, Any], num_shards: int
) -> dict[str, Any]:
    """The content of manifest.json. Paths are absolute, since `capfilt:DIR` reads the originals from
    anywhere."""
    return {
        "openblip": version("openblip"),
        "source": absolute(config.source),
        "images": absolute(config.images),
        "num_shards": num_shards,
        "threshold": config.threshold,
        "captioner": dict(captioner),
        "filter": dict(filter_),
        "config": config.row_settings(),
    }


def config_hash(manifest: Mapping[str, Any]) -> str:
    """A short name of everything that decides the rows."""
    return hashlib.sha256(json.dumps(_identity(manifest), sort_keys=True).encode()).hexdigest()[:16]


def start_or_resume(folder: CapFiltFolder, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest of a new run, or checks that the folder's is of the same run.

    Raises `ConfigError` with the difference, field by field, when it is of another run.
    """
    if not folder.manifest.exists():
        if folder.captions_dir.exists() and any(folder.captions_dir.glob("*.report.json")):
            raise ConfigError(
                f"{folder.root} holds caption files but no manifest.json that says how they were made; "
                "restore it or choose another --out"
            )
        folder.captions_dir.mkdir(parents=True, exist_ok=True)
        write_json(folder.manifest, manifest)
        return
    earlier = folder.read_manifest()
    before = _identity(earlier) | {"threshold": earlier.get("threshold")}
    now = _identity(manifest) | {"threshold": manifest["threshold"]}
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        lines = "; ".join(f"{name} was {before.get(name)!r}, is now {now.get(name)!r}" for name in changed)
        advice = (
            f"to change the threshold run `openblip capfilt-select {folder.root} --threshold "
            f"{manifest['threshold']}`, which needs no model"
            if changed == ["threshold"]
            else "run the earlier settings to resume it, or choose another --out"
        )
        raise ConfigError(f"{folder.root} holds a CapFilt run with other settings: {lines}. So, {advice}.")
    if earlier.get("num_shards") != manifest["num_shards"]:  # the source grew: its new shards are to do
        write_json(folder.manifest, {**earlier, "num_shards": manifest["num_shards"]})


def _identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the rows, flat: a model is its weights, wherever they lie."""
    return {
        "source": manifest.get("source"),
        "images": manifest.get("images"),
        "captioner": manifest.get("captioner", {}).get("sha256"),
        "filter": manifest.get("filter", {}).get("sha256"),
        **manifest.get("config", {}),
    }
