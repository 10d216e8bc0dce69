"""Holds a CapFilt run against the truth, where the original samples know it (as emoji scenes do)."""

from pathlib import Path
from typing import Any

import numpy as np

from openblip.data.captions import read_captions
from openblip.data.sources.capfilt import CapFiltSource
from openblip.data.tokenizer import normalize_caption
from openblip.errors import SourceError
from openblip.evaluation.captioning import references
from openblip.evaluation.filtering import filter_report, none_if_undefined
from openblip.metrics.filtering import auc, filter_quality


def knows_truth(directory: str | Path) -> bool:
    """Whether the samples that a CapFilt run cleaned say what is true of them."""
    run = CapFiltSource.open(f"capfilt:{directory}", str(directory))
    records = run.original.index(run.shards()[0]).records
    return bool(records) and {"noise", "references"} <= records[0].read().info.keys()


def measure_capfilt(directory: str | Path) -> dict[str, Any]:
    """Noise before and after a CapFilt run, and how well its filter told true texts from others.

    A web text is true when its sample says `noise: null`; a synthetic one when it is among the sample's
    `references`. The bootstrapped set is every kept text of both sources.

    Raises SourceError when the samples do not know the truth.
    """
    run = CapFiltSource.open(f"capfilt:{directory}", str(directory))
    threshold = run.threshold
    scores, sources, true, kinds = [], [], [], []
    for shard in run.shards():
        samples = {record.key: record for record in run.original.index(shard).records}
        for row in read_captions(directory, shard).to_pylist():
            sample = samples[row["key"]].read()
            if "noise" not in sample.info or "references" not in sample.info:
                raise SourceError(
                    f"{run.original.name}: {shard}/{row['key']} does not say what is true of it."
                )
            is_web = row["source"] == "web"
            kind = sample.info["noise"] if is_web else None
            written = normalize_caption(row["caption"]) in references(sample)
            scores.append(row["itm"])
            sources.append(row["source"])
            true.append(kind is None if is_web else written)
            kinds.append(kind)
    itm, clean = np.array(scores), np.array(true)
    web = np.array(sources) == "web"
    kept = itm > threshold
    return {
        "num_images": int(web.sum()),
        "web": filter_report(
            itm[web], [kind for kind, is_web in zip(kinds, web, strict=True) if is_web], threshold
        ),
        "synthetic": _synthetic_report(itm[~web], clean[~web], threshold),
        "noise_before": float(1 - clean[web].mean()),
        "noise_after": float(1 - clean[kept].mean()) if kept.any() else None,
        "num_kept": int(kept.sum()),
        "num_texts": len(scores),
    }


def _synthetic_report(
    itm: "np.ndarray[Any, Any]", clean: "np.ndarray[Any, Any]", threshold: float
) -> dict[str, Any]:
    if not len(itm):
        return {"num_texts": 0}
    quality = filter_quality(itm, clean, threshold)
    both = 0 < clean.sum() < len(clean)
    return {
        "num_texts": len(itm),
        "correct": float(clean.mean()),
        "correct_kept": none_if_undefined(quality.precision),
        "recall": none_if_undefined(quality.recall),
        "auc": auc(itm, clean) if both else None,
    }
