"""Where samples come from: one file per format, all of them a `Source`."""

from openblip.data.sample import Source
from openblip.data.sources.opening import (
    Mixture,
    absolute_spec,
    check_options_used,
    open_mixture,
    open_source,
    require_texts,
)

__all__ = ["Mixture", "Source", "absolute_spec", "check_options_used", "open_mixture", "open_source", "require_texts"]
