"""`openblip capfilt-score`: further scores of a finished CapFilt run."""

import sys

from openblip.capfilt.config import SCORES, ScoreConfig
from openblip.cli.capfilt import Directory
from openblip.cli.options import DeviceOptions
from openblip.cluster import EngineOptions


def command(directory: Directory, /, *, scoring: ScoreConfig, engine: EngineOptions, device: DeviceOptions) -> int:
    from openblip.capfilt.scores import ScoreEngine, score_run

    where = ScoreEngine()
    if engine.engine == "ray":
        from openblip.capfilt.ray import RayScoreEngine

        where = RayScoreEngine(engine)
    summary = score_run(directory, scoring, device=device.device, dtype=device.dtype, engine=where)
    for name, count in summary.done.items():
        nulls = summary.nulls.get(name, 0)
        without = f"; {nulls:,} texts have none" if nulls else ""
        before = summary.num_shards - count - sum(name == failed for failed, _, _ in summary.failed)
        earlier = f", {before:,} were done" if before > 0 else ""
        print(f"{name}: {count:,} of {summary.num_shards:,} shards{earlier}{without}")
    if summary.rejects:
        first = summary.rejects[0]
        print(f"{len(summary.rejects):,} images can no longer be read; the first is {first}", file=sys.stderr)
    for name, shard, error in summary.failed:
        print(f"failed: {name}: {shard}: {error}", file=sys.stderr)
    if summary.failed:
        print("the same command again tries what failed", file=sys.stderr)
    return 1 if summary.failed else 0


command.__doc__ = """Adds scores to a finished CapFilt run: columns that `capfilt-select --where` can use.

The same command again resumes. The caption files stay as they are: a score is written to DIR/scores/NAME.
FILE.py:FUNCTION is a score of your own: a function of the rows of some texts and, if it has two parameters,
of their images.

Scores:

{}
""".format("\n".join(f"    {name:<22}{summary}" for name, summary in SCORES.items()))
