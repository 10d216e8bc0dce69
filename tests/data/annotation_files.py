"""Annotation files in miniature: written, and read back."""

import json

from openblip.data.sample import Reject, Sample
from openblip.data.sources import open_source
from source_items import items_of


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def write_lines(path, rows):
    return write(path, "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))


def read_all(spec, images=None):
    """Samples and rejects of a source."""
    items = items_of(open_source(str(spec), images=images and str(images)))
    return [i for i in items if isinstance(i, Sample)], [i for i in items if isinstance(i, Reject)]


def read_samples(spec, images=None):
    """The samples of a source without rejects."""
    samples, rejects = read_all(spec, images)
    assert not rejects
    return samples


def describe(path, images):
    return open_source(str(path), images=str(images)).describe()
