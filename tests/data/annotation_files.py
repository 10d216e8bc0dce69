"""Annotation files in miniature: written, and read back; and what any source holds."""

import json

from openblip.data.sample import Reject, Sample
from openblip.data.sources import open_source


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def items_of(source, **arguments):
    """Every sample and reject of every shard, in order."""
    return [item for shard in source.shards() for _, item in source.read(shard, **arguments)]


def read_all(spec, images=None):
    """Samples and rejects of a source."""
    items = items_of(open_source(str(spec), images=images and str(images)))
    return [i for i in items if isinstance(i, Sample)], [i for i in items if isinstance(i, Reject)]


def describe(path, images):
    return open_source(str(path), images=str(images)).describe()
