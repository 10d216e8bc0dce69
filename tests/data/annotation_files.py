"""Annotation files in miniature: written, and read back."""

import json

from openblip.data.sample import Reject, Sample
from openblip.data.sources import open_source
from source_items import items_of


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def read_all(spec, images=None):
    """Samples and rejects of a source."""
    items = items_of(open_source(str(spec), images=images and str(images)))
    return [i for i in items if isinstance(i, Sample)], [i for i in items if isinstance(i, Reject)]


def describe(path, images):
    return open_source(str(path), images=str(images)).describe()
