"""A command answers soon: captioning one image with the shipped captioner takes at most 1.5 times as long as torch's
import, with which every command that runs a model begins.

Peer: `python -c "import torch"`.
Method: both are processes of their own, which take turns. Wall time, and the time of all processors together.

    python -m benchmarks.start_up
"""

import sys
import tempfile
from pathlib import Path

from benchmarks import blip_base
from benchmarks.harness import Child, Report, parser, run_command


def main() -> None:
    options = parser(__doc__).parse_args()
    report = Report("start-up", __doc__, options)
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "one.jpg"
        blip_base.images(1)[0].save(image)
        caption = ["-m", "openblip", "caption", str(image), "--model", "openblip-mini-captioner", "--device", "cpu"]
        sides = {"import torch": ["-c", "import torch"], "openblip caption one.jpg": caption}
        children: dict[str, list[Child]] = {name: [] for name in sides}
        for number in range(options.repeats + 1):
            for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
                child = run_command([sys.executable, *sides[name]])
                if number:  # the first round fills the system's file cache
                    children[name].append(child)
    for time, seconds in (
        ("wall time", {name: [child.seconds for child in runs] for name, runs in children.items()}),
        ("CPU time", {name: [child.cpu_seconds for child in runs] for name, runs in children.items()}),
    ):
        report.timings(time, seconds)
        torch, ours = seconds.values()
        report.ratio(f"{time} of a caption, in imports of torch", ours, torch, unit="", target=1.5, at_most=True)
    report.save()


if __name__ == "__main__":
    main()
