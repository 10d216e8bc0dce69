"""What `openblip answer` and `openblip match` have in common: texts for every image, or each image's own."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from openblip.cli.inputs import Inputs, find_inputs, names_one_file
from openblip.cli.jsonl_file import Row
from openblip.cli.jsonl_job import JsonlJob, lines_to
from openblip.errors import ConfigError


def inputs_for_texts(
    source: str, texts: Sequence[str], *, out: Path | None, images: str | None, clips: bool, missing: str
) -> Inputs | None:
    """The images of a source; None for one file whose rows are printed at once.

    Raises ConfigError, which says what is `missing`, when there are no texts and the images bring none.
    """
    alone = out is None and names_one_file(source)
    inputs = None if alone else find_inputs([source], images=images, clips=clips)
    if not texts and (inputs is None or not inputs.may_have_texts):
        raise ConfigError(f"there is no {missing}")
    return inputs


def print_rows(rows: Iterable[Row]) -> int:
    """Those of one file, to standard output; the command's exit code."""
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))
    return 0


def run_job(job: JsonlJob[Any], inputs: Inputs, out: Path | None, *, done: str) -> int:
    """Work through the inputs and say on standard error how many are `done`; the command's exit code."""
    with lines_to(out, job.layout) as (stream, present):
        outcome = job.run(inputs, stream, present)
    print(f"{done} {outcome.done} images, skipped {outcome.skipped}", file=sys.stderr)
    return outcome.exit_code
