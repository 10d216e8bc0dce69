"""Zero-shot VQA and captioning along stage 2 of BLIP-2 (the paper's Figure 5): a table in Markdown.

    python benchmarks/stage2_curve.py RUN... --questions SOURCE --captions SOURCE [--limit N]

RUN is the folder of `openblip train blip2-mini-stage2-... --training.model-every N`. Every model in its
models/ is measured as `openblip evaluate vqa` and `evaluate caption` do, over the first N samples of each.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import openblip
from openblip.data.sources import open_source
from openblip.evaluation.captioning import evaluate_captioning
from openblip.evaluation.question_answering import evaluate_question_answering


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--questions", required=True)
    parser.add_argument("--captions", required=True)
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--prompt", default=None)  # of captions; the checkpoint's own when not given
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    rows = []
    print("| run | step | VQA accuracy | true captions | CIDEr |\n|---|---|---|---|---|")
    for run in options.runs:
        for folder in sorted((run / "models").glob("step_*")):
            row = measured(run, folder, options)
            rows.append(row)
            print("| {run} | {step} | {vqa:.3f} | {true:.3f} | {cider:.1f} |".format(**row), flush=True)
            if options.out is not None:
                options.out.write_text(json.dumps(rows, indent=2) + "\n")


def measured(run: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    model = openblip.load(folder, device="cpu")
    model.prompt = model.prompt if options.prompt is None else options.prompt
    limit = options.limit
    decoding = model.answer_decoding
    vqa = evaluate_question_answering(model, open_source(options.questions), decoding=decoding, limit=limit)
    written = evaluate_captioning(model, open_source(options.captions), limit=limit)
    return {
        "run": run.name,
        "step": int(folder.name.removeprefix("step_")),
        "vqa": vqa["vqa_accuracy"],
        "by_type": vqa.get("by_type"),
        "true": written["exact_match"],
        "cider": written["cider"],
    }


if __name__ == "__main__":
    main()
