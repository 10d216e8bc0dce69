"""Where samples come from: one file per format, all answering the `Source` protocol."""

from openblip.data.sample import Record, ShardIndex, Source
from openblip.data.sources.opening import Mixture, count_samples, open_mixture, open_source

__all__ = ["Mixture", "Record", "ShardIndex", "Source", "count_samples", "open_mixture", "open_source"]
