"""Scores that are computed after a CapFilt run: one column each, whatever stops the command."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from capfilt_world import all_rows

import openblip
from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.local import run_capfilt
from openblip.data.captions import read_embeddings, read_texts
from openblip.data.reader import read_source
from openblip.data.sources import open_source
from openblip.errors import ConfigError, SourceError


@pytest.fixture(scope="session")
def embedded_run(tmp_path_factory: pytest.TempPathFactory, web: Path, captioner: str, filter_model: str) -> Path:
    """A whole run over `web` with its embeddings, for tests that only read it."""
    out = tmp_path_factory.mktemp("embedded") / "run"
    models = {"captioner": captioner, "filter": filter_model, "dtype": "float32"}
    run_capfilt(CapFiltConfig(source=str(web), **models, batch_size=4, keep_embeddings=True), out)
    return out


def test_kept_embeddings_are_the_filters(embedded_run: Path, finished_run: Path, web: Path, filter_model: str) -> None:
    assert all_rows(embedded_run) == all_rows(finished_run)
    model = openblip.load(filter_model, dtype="float32")
    images = [sample.image for sample, _ in read_source(open_source(str(web)), id, shards=["00001"])]
    texts = read_texts(embedded_run, "00001")
    embeddings = read_embeddings(embedded_run, "00001")
    assert embeddings.images.dtype == np.float16
    np.testing.assert_allclose(embeddings.images, model.embed_images(images).numpy(), atol=1e-3)
    np.testing.assert_allclose(embeddings.texts, model.embed_texts(texts["caption"].to_pylist()).numpy(), atol=1e-3)
    starts = texts["key"].to_pylist()
    owners = [sorted(set(starts)).index(key) for key in starts]
    cosines = (embeddings.images[owners].astype(np.float32) * embeddings.texts).sum(axis=1)
    np.testing.assert_allclose(cosines, texts["itc"].to_numpy(), atol=2e-3)
    with pytest.raises(SourceError, match="embeddings"):
        read_embeddings(finished_run, "00001")


def test_a_run_cannot_begin_to_keep_embeddings(run_copy: Path, config: CapFiltConfig) -> None:
    with pytest.raises(ConfigError, match="keep_embeddings was False, is now True"):
        run_capfilt(replace(config, keep_embeddings=True), run_copy)
