"""`--dtype auto` with a captioner and a filter for which it chooses differently."""

from pathlib import Path

import pytest

import openblip.predictor as predictor
from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.process import ShardWorker


def test_auto_is_resolved_for_each_model_and_by_every_worker_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {name: openblip_parameters(name) for name in ("openblip-mini-captioner", "openblip-mini-filter")}
    monkeypatch.setattr(predictor, "AUTO_WEIGHTS", sum(sizes.values()) // 2)
    monkeypatch.setattr(predictor, "has_bfloat16", lambda device: True)
    (tmp_path / "pairs.jsonl").write_text('{"image": "a.png", "caption": "a dog"}\n')
    config = CapFiltConfig(source=str(tmp_path / "pairs.jsonl"), captioner=min(sizes, key=sizes.__getitem__),
                           filter=max(sizes, key=sizes.__getitem__))  # fmt: skip
    first = ShardWorker.load(config, tmp_path / "out", "cpu")
    assert {first.captioner.precision, first.filter.precision} == {"float32", "bfloat16"}
    second = ShardWorker.load(first.facts.config, tmp_path / "out", "cpu")
    assert second.facts.models == first.facts.models
    assert second.facts.config == first.facts.config


def openblip_parameters(name: str) -> int:
    return predictor.load(name, device="cpu").num_parameters
