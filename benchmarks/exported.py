"""Exported graphs give what the model gives, and are written in the memory of two models.

Peer: `openblip.Greedy()` in float32.
Method: `openblip export` is a process of its own, for a captioner and a filter, the shipped ones and those of BLIP-base
with random weights at 384 pixels. What it says of each graph, which it runs beside torch, is kept: the largest
difference is a share of the largest value, or of 1 where that is less. The captioner of docs/export.md then writes
captions of 8 images in a process that has neither torch nor OpenBLIP. Memory and the files of weights are in shares of
the model's weights in float32.

    python -m benchmarks.exported --format onnx
    python -m benchmarks.exported --format openvino   in an environment with openvino, which need not be the tests'
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import openblip
from benchmarks import blip_base
from benchmarks.harness import ROOT, Report, parser, run_command

NUM_IMAGES = 8
WITHOUT = "import sys\nsys.modules.update(dict.fromkeys(('torch', 'transformers', 'openblip')))\n"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--format", choices=("onnx", "openvino"), default="onnx")
    options.add_argument("--sizes", nargs="+", choices=("mini", "base"), default=["mini", "base"])
    chosen = options.parse_args()
    report = Report(f"exported-{chosen.format}", __doc__, chosen)
    models = {"mini": ("openblip-mini-captioner", "openblip-mini-filter")}
    if "base" in chosen.sizes:
        models["base"] = (str(blip_base.captioner_folder()), str(blip_base.filter_folder()))
    for size in chosen.sizes:
        for role, source in zip(("captioner", "filter"), models[size], strict=True):
            with tempfile.TemporaryDirectory() as folder:
                _measure(report, f"{size} {role}", source, Path(folder) / "exported")
    report.save()


def _measure(report: Report, name: str, source: str, out: Path) -> None:
    command = [sys.executable, "-m", "openblip", "export", source, str(out), "--format", report.options.format]
    child = run_command(command)
    report.add(f"{name}, seconds to export", child.seconds, unit="s")
    described = json.loads((out / "export.json").read_text())["graphs"]
    differences = {graph: facts["differs_from_torch_by"] for graph, facts in described.items()}
    report.add(f"{name}, largest difference", max(differences.values()), unit="", target=1e-3, at_most=True)
    report.facts[name] = {
        "differences": differences,
        "bytes": {file.name: file.stat().st_size for file in sorted(out.iterdir())},
    }
    model = openblip.load(source, device="cpu")
    weights = sum(weight.numel() * 4 for weight in model.model.parameters())
    written = sum(file.stat().st_size for file in out.iterdir() if file.suffix == ".bin")
    report.add(f"{name}, files of weights", written / weights, unit="x the model")
    if "mini" not in name:  # whose weights are little beside the libraries
        report.add(f"{name}, peak memory of the export", child.peak_bytes / weights, unit="x the model")
    if "caption" not in model.tasks:
        return
    files = [out.parent / f"{number}.png" for number in range(NUM_IMAGES)]
    for file, image in zip(files, blip_base.images(NUM_IMAGES), strict=True):
        image.save(file)
    ours = model.caption(files, decoding=openblip.Greedy())
    child = run_command([sys.executable, "-c", WITHOUT + _captioner(report.options.format, out, files)])
    same = sum(a == b for a, b in zip(ours, json.loads(child.value), strict=True))
    report.add(f"{name}, equal captions of {NUM_IMAGES}", same, unit="", target=NUM_IMAGES)
    report.facts[name]["captions"] = ours


def _captioner(format: str, folder: Path, files: list[Path]) -> str:
    """The program of docs/export.md, which prints JSON."""
    written, of_openvino = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "export.md").read_text(), re.M | re.S)
    definitions = written.partition("\nprint(")[0].replace('"exported/"', repr(f"{folder}/"))
    if format == "openvino":
        before, opened, after = definitions.replace("import onnxruntime\n", "").partition("encoder, prefill, step =")
        definitions = f"{before}{of_openvino}\n\n{opened}{after}"
    return f"{definitions}\nprint(json.dumps(caption({[str(file) for file in files]})))\n"


if __name__ == "__main__":
    main()
