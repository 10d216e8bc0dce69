"""CapFilt closes at least 97 % of the gap between models trained on noisy and on clean pairs of the same images.

Peer: the same training on the raw pairs, 40 % of which are noise, and on the pairs as they were before the noise.
Method: emoji scenes, whose truth is known. The shipped models caption and filter them; they were trained as the paper
does, from one pre-trained model, on 60,000 clean pairs of other scenes. Then a captioner is trained on each set of
texts, for the same number of steps and with the same seeds, and captions scenes whose pairs of things no training has
shown. Its text side and its vocabulary start anew, and its image side from the ViT of the shipped filter, where the
paper's starts from a ViT of ImageNet. As in the paper's Table 1, "filtered" is the web texts that the filter keeps,
"captioned" all web texts with all synthetic ones, "both" what the filter keeps of the two. "both, mix" keeps what a
learned mix of the scores, fitted to 200 labelled texts, finds true more likely than not. "best 10 %" takes for each
image the text that the mix likes best, and of these the best tenth; "tenth of the mix" is a random tenth of what the
mix keeps.

    python -m benchmarks.capfilt_recovery [--parallel 16] [--minutes 5] [--seeds 3] [--device cpu] [--folder FOLDER]

The scenes, their captions and scores are made once, in FOLDER/data, which may travel to another machine; this part
needs the extras demo and capfilt. The same command again goes on with the trainings that are missing. CIDEr needs
pycocoevalcap; without it the table has exact match alone, and the same command where it is installed adds it.
"""

import argparse
import io
import json
import math
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import Report, parser, run_child

TARGET = 0.97
SHARDS, ROWS_PER_GROUP = 7, 125
IMAGE_SIZE, WEBP_QUALITY = 128, 60
NUM_LABELS, PROBE_STEPS, MAX_TOKENS = 200, 20, 36
RAW, CLEAN, BOTH, MIXED = "raw", "clean", "both", "both, mix"
PAPERS = (RAW, "filtered", "captioned", BOTH)
RANDOM_TENTH = "tenth of the mix"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, default=Path("runs/recovery"), help="of the data and the trainings")
    options.add_argument("--images", type=int, default=7000, help="that the models are trained on")
    options.add_argument("--test-images", type=int, default=800)
    options.add_argument("--noise", type=float, default=0.4)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--steps", type=int, default=500, help="of each training, 64 pairs each")
    options.add_argument("--minutes", type=float, help="choose the steps so that all trainings take about so long")
    options.add_argument("--parallel", type=int, default=1, help="trainings side by side, one thread each")
    options.add_argument("--shares", type=float, nargs="*", default=[0.1, 0.25, 0.5], help="of the curve")
    options.add_argument("--data-only", action="store_true", help="make the data and stop")
    run(options.parse_args())


def run(options: argparse.Namespace) -> None:
    data = options.folder / "data"
    prepare_data(data, options)
    if options.data_only:
        return
    report = Report("capfilt-recovery", __doc__, options)
    write_vision(options.folder / "vision")
    sets = write_sets(data, options.folder / "sets", options.shares)
    jobs = [(name, seed) for seed in range(options.seeds) for name in sets]  # whatever cuts it short, a seed is whole
    steps = choose_steps(sets[RAW], data, len(jobs), options)
    folder = options.folder / f"steps-{steps}-{options.device.partition(':')[0]}"
    results = dict(zip(jobs, train_all(jobs, sets, data, folder, steps, options), strict=True))
    report.facts |= {"steps": steps, "quality_of_sets": {name: facts for name, (_, facts) in sets.items()}}
    tabulate(report, results, sets, data)
    report.save()


# The data, which is made once.


def prepare_data(data: Path, options: argparse.Namespace) -> None:
    """Scenes, their captions and scores, and the mix of the scores; what is there already stays."""
    scale = {"images": options.images, "test_images": options.test_images, "noise": options.noise}
    marker = data / "data.json"
    if marker.exists():
        if (earlier := json.loads(marker.read_text())) != scale:
            raise SystemExit(f"{data} holds other data ({earlier}): name another --folder")
        return
    write_scenes(data / "test", "test", options.test_images, 0.0)
    write_scenes(data / "web", "web", options.images, options.noise)
    print(f"\nCapFilt over {options.images:,} images", flush=True)
    run_child(run_shipped_capfilt, str(data), options.device)
    texts = mixed_scores(data)
    pq.write_table(pa.Table.from_pylist(texts), data / "texts.parquet", compression="zstd")
    marker.write_text(json.dumps(scale))


def write_scenes(folder: Path, split: Any, num_images: int, noise: float) -> None:
    """Scenes as parquet files with small images, each with its caption, and the one that it had before the noise."""
    from PIL import Image

    from openblip.emoji_scenes.writer import SceneRequest, draw_distinct, sample_members

    per_shard = math.ceil(num_images / (SHARDS if split == "web" else 1))
    request = SceneRequest(split=split, num_samples=num_images, seed=314, noise=noise, samples_per_shard=per_shard)
    plans = draw_distinct(request) if split == "test" else [None] * num_images
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, num_images, per_shard)):
        path = folder / f"{number:04d}.parquet"
        if path.exists():
            continue
        rows = []
        for index, plan in list(enumerate(plans))[start : start + per_shard]:
            (_, jpeg), (_, fields) = sample_members(request, index, plan)
            webp, said = io.BytesIO(), json.loads(fields)
            with Image.open(io.BytesIO(jpeg)) as image:
                image.resize((IMAGE_SIZE, IMAGE_SIZE)).save(webp, "WEBP", quality=WEBP_QUALITY)
            clean = Random(f"clean/{index}").choice(said["references"])
            row = {"key": f"{index:06d}", "image": webp.getvalue(), "caption": said["caption"], "clean_caption": clean}
            rows.append(row | {"references": said["references"], "noise": said["noise"]})
        kinds = pa.Table.from_pylist(rows).schema.set(5, pa.field("noise", pa.string()))
        table = pa.Table.from_pylist(rows, schema=kinds)
        pq.write_table(table, f"{path}.unfinished", row_group_size=ROWS_PER_GROUP, compression="zstd")
        os.replace(f"{path}.unfinished", path)


def run_shipped_capfilt(data: str, device: str) -> None:
    """CapFilt with the shipped models, and what the captioner thinks of every text, as further columns."""
    import torch

    import openblip
    from openblip.capfilt.config import CapFiltConfig
    from openblip.capfilt.local import run_capfilt
    from openblip.data.captions import read_captions
    from openblip.data.reader import read_source
    from openblip.data.sources import open_source

    torch.set_num_threads(1)
    captioner, filter_, web = "openblip-mini-captioner", "openblip-mini-filter", f"{data}/web"
    settings = CapFiltConfig(source=web, captioner=captioner, filter=filter_, caption_column="caption", num_workers=1)
    summary = run_capfilt(settings, f"{data}/capfilt", device=device)
    assert not summary.failed, summary.failed
    model, source = openblip.load(captioner, device=device, dtype="float32"), open_source(web, caption_column="caption")
    for shard in source.shards():
        path = Path(data, "scored", f"{shard}.parquet")
        if path.exists():
            continue
        rows: dict[str, list[dict[str, Any]]] = {}
        for row in read_captions(f"{data}/capfilt", shard).to_pylist():
            rows.setdefault(row["key"], []).append(row)
        samples = [sample for sample, _ in read_source(source, lambda sample: None, shards=[shard])]
        for start in range(0, len(samples), 32):
            part = samples[start : start + 32]
            add_log_probabilities(model, [s.image for s in part], [rows[s.key] for s in part])
        for sample in samples:
            add_truth(rows[sample.key], sample.info)
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist([row for texts in rows.values() for row in texts]), f"{path}.unfinished")
        os.replace(f"{path}.unfinished", path)


def add_log_probabilities(model: Any, images: Sequence[bytes], lists: Sequence[list[dict[str, Any]]]) -> None:
    """The mean and the least log-probability of the tokens of each text, under the captioner."""
    import torch

    from openblip.data.texts import normalize_caption

    start = model.tokenizer.prompt(model.prompt).tolist()
    flat = [(owner, row) for owner, rows in enumerate(lists) for row in rows]
    tokens = [model.tokenizer.prompt(normalize_caption(row["caption"])).tolist()[1:] for _, row in flat]
    texts = [[*start, *text[:MAX_TOKENS], model.tokenizer.sep_id] for text in tokens]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [model.tokenizer.pad_id] * (longest - len(text)) for text in texts], device=model.device)
    with torch.inference_mode():
        states = model.encode(images).tokens[torch.tensor([owner for owner, _ in flat], device=model.device)]
        logits = model.model.decode(ids[:, :-1], model.model.image_kv(states, "decode")).float()
        scores = logits.log_softmax(dim=-1).gather(2, ids[:, 1:, None])[..., 0].cpu()
    for (_, row), text, score in zip(flat, texts, scores, strict=True):
        of_text = score[len(start) - 1 : len(text) - 1]
        row |= {"mean_logprob": float(of_text.mean()), "least_logprob": float(of_text.min()), "length": len(text)}


def add_truth(rows: Sequence[dict[str, Any]], info: Mapping[str, Any]) -> None:
    from openblip.data.texts import normalize_caption

    references = {normalize_caption(text) for text in info["references"]}
    for row in rows:
        is_web = row["source"] == "web"
        row["is_true"] = info.get("noise") is None if is_web else normalize_caption(row["caption"]) in references
        row["noise"] = info.get("noise") if is_web else None


def mixed_scores(data: Path) -> list[dict[str, Any]]:
    """Every text with a column `mix`: the probability that it is true, fitted to labels of a few."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = [row for path in sorted((data / "scored").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    itm = np.clip([row["itm"] for row in rows], 1e-6, 1 - 1e-6)
    columns = [np.log(itm / (1 - itm))]
    columns += [np.array([row[name] for row in rows]) for name in ("itc", "mean_logprob", "least_logprob", "length")]
    scores, is_true = np.stack(columns, axis=1), np.array([row["is_true"] for row in rows])
    labelled = np.random.default_rng(0).choice(len(rows), min(NUM_LABELS, len(rows) // 2), replace=False)
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(scores[labelled], is_true[labelled])
    for row, mix in zip(rows, model.predict_proba(scores)[:, 1], strict=True):
        row["mix"] = float(mix)
    return rows


# The sets of texts, each a source.


def write_sets(data: Path, folder: Path, shares: Sequence[float]) -> dict[str, tuple[dict[str, str], dict[str, Any]]]:
    """For each set the settings that read it, and its size and noise.

    A set of some of the texts is the folder of a CapFilt run that holds these texts alone.
    """
    web = str((data / "web").resolve())
    texts = pq.read_table(data / "texts.parquet").to_pylist()
    best: dict[str, dict[str, Any]] = {}
    for row in texts:
        if row["caption"].strip() and ((known := best.get(row["key"])) is None or row["mix"] > known["mix"]):
            best[row["key"]] = row
    ranked = sorted(best.values(), key=lambda row: (-row["mix"], row["key"]))
    num_pairs = sum(row["source"] == "web" for row in texts)
    mixed = [row for row in texts if row["mix"] > 0.5]
    chosen = {
        "filtered": [row for row in texts if row["source"] == "web" and row["itm"] > 0.5],
        "captioned": texts,
        BOTH: [row for row in texts if row["itm"] > 0.5],
        MIXED: mixed,
    }
    chosen |= {share_name(share): ranked[: round(share * num_pairs)] for share in shares}
    chosen[RANDOM_TENTH] = Random(0).sample(mixed, min(len(mixed), num_pairs // 10))
    sets = {RAW: ({"source": web, "caption_column": "caption"}, describe([r for r in texts if r["source"] == "web"]))}
    for name, rows in chosen.items():
        target = folder / name.replace(" ", "-").replace(",", "").replace("%", "percent")
        write_run(target, web, [row for row in rows if row["caption"].strip()])
        sets[name] = ({"source": f"capfilt:{target}"}, describe(rows))
    sets[CLEAN] = ({"source": web, "caption_column": "clean_caption"}, {"texts": num_pairs, "noise": 0.0})
    return sets


def share_name(share: float) -> str:
    return f"best {share:.0%}".replace("%", " %")


def describe(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"texts": len(rows), "noise": round(1 - statistics.fmean(row["is_true"] for row in rows), 4)}


def write_run(folder: Path, web: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A finished CapFilt run of these rows, all of which are kept."""
    from openblip.data.captions import CAPTION_SCHEMA

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "captions").mkdir(parents=True)
    everything: dict[str, Any] = {"threshold": None}
    manifest = {"source": web, "caption_column": "caption", "threshold": 0.0, "decision": everything}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    by_shard: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["shard"], row["key"], row["source"] == "synthetic", row["index"])):
        by_shard.setdefault(row["shard"], []).append(row)
    for shard, of_shard in by_shard.items():
        listed = [{name: row[name] for name in CAPTION_SCHEMA.names} for row in of_shard]
        pq.write_table(pa.Table.from_pylist(listed, CAPTION_SCHEMA), folder / "captions" / f"{shard}.parquet")
        (folder / "captions" / f"{shard}.report.json").write_text(json.dumps({"shard": shard, "counts": {}}))


# The trainings.


def choose_steps(raw: tuple[dict[str, str], Any], data: Path, num_jobs: int, options: argparse.Namespace) -> int:
    """--steps, or with --minutes as many as a short run of as many trainings as will run side by side allows.

    What was chosen once stays, so that the same command goes on with the same trainings.
    """
    chosen = options.folder / "steps.json"
    if options.minutes is None:
        return int(options.steps)
    settings = {"minutes": options.minutes, "parallel": options.parallel, "device": options.device, "jobs": num_jobs}
    if chosen.exists() and (earlier := json.loads(chosen.read_text()))["settings"] == settings:
        return int(earlier["steps"])
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.parallel) as pool:
        probes = list(
            pool.map(
                lambda number: train_in_child(raw[0], number, PROBE_STEPS, data, Path(scratch, str(number)), options),
                range(options.parallel),
            )
        )
    per_step = statistics.median(seconds["step"] for _, seconds in probes)
    other = max(seconds["process"] - PROBE_STEPS * seconds["step"] for _, seconds in probes)
    budget = 60 * options.minutes / math.ceil(num_jobs / options.parallel)
    steps = max(PROBE_STEPS, 10 * int((budget - other) / per_step / 10))
    print(f"\n{per_step:.3f} s a step, {other:.0f} s for the rest of a training: {steps} steps", flush=True)
    chosen.parent.mkdir(parents=True, exist_ok=True)
    chosen.write_text(json.dumps({"settings": settings, "steps": steps}))
    return steps


def train_all(
    jobs: Sequence[tuple[str, int]],
    sets: Mapping[str, tuple[dict[str, str], Any]],
    data: Path,
    folder: Path,
    steps: int,
    options: argparse.Namespace,
) -> Iterator[list[str]]:
    """The captions of the test images by each training; those that were done before are read."""

    def train_one(job: tuple[str, int]) -> list[str]:
        name, seed = job
        path = folder / f"{name.replace(' ', '-').replace(',', '').replace('%', 'percent')}-{seed}.json"
        if not path.exists():
            captions, seconds = train_in_child(sets[name][0], seed, steps, data, path.with_suffix(""), options)
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps({"captions": captions, "seconds": seconds}))
            os.replace(unfinished, path)
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            print(f"{name}, seed {seed}: {seconds['process']:.0f} s", flush=True)
        return list(json.loads(path.read_text())["captions"])

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.parallel) as pool:
        yield from pool.map(train_one, jobs)


def train_in_child(
    reading: Mapping[str, str], seed: int, steps: int, data: Path, folder: Path, options: argparse.Namespace
) -> tuple[list[str], dict[str, float]]:
    """The captions by a model that is trained in a process of its own, and the seconds of a step and of the process."""
    env = {"OMP_NUM_THREADS": "1"}
    if not options.device.startswith("cuda"):
        env["CUDA_VISIBLE_DEVICES"] = ""  # a training takes a GPU where there is one
    vision = str(options.folder / "vision")
    child = run_child(train_captioner, dict(reading), seed, steps, vision, str(data / "test"), str(folder), env=env)
    captions, step = child.value
    return captions, {"step": step, "process": child.seconds}


def write_vision(folder: Path) -> None:
    """The ViT of the shipped filter, as a model of transformers."""
    import transformers

    import openblip

    if folder.exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        openblip.load("openblip-mini-filter").save(scratch, format="huggingface")
        whole: Any = transformers.BlipForImageTextRetrieval
        whole.from_pretrained(scratch).vision_model.save_pretrained(folder)


def train_captioner(
    reading: dict[str, str], seed: int, steps: int, vision: str, test: str, folder: str
) -> tuple[list[str], float]:
    """blip-mini with LM alone, then its greedy captions of the test images; the seconds of a step."""
    import contextlib
    import sys

    import openblip
    from openblip.data.reader import read_source
    from openblip.data.sources import open_source
    from openblip.recipes import mini
    from openblip.tasks.config import CaptioningConfig

    training = mini.mini_training(steps=steps, warmup_steps=min(50, steps // 5), num_threads=1, seed=seed)
    recipe = replace(
        mini.blip_mini(),
        recipe="capfilt-recovery",
        vision_init=vision,
        data=replace(mini.DATA, num_workers=0, **reading),
        task=CaptioningConfig(label_smoothing=0.0),
        training=training,
        out=folder,
    )
    with contextlib.redirect_stdout(sys.stderr):
        assert recipe.train(resume=True), "a signal stopped the training"
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    rates = [line["samples_per_second"] for line in lines if "samples_per_second" in line]
    model = openblip.load(Path(folder, "model"), dtype="float32")
    images = [sample.image for sample, _ in read_source(open_source(test), lambda sample: None)]
    captions = model.caption(images, decoding=openblip.Greedy(max_new_tokens=24), batch_size=64)
    return captions, training.batch_size / statistics.median(rates)


# The scores.


def tabulate(
    report: Report,
    results: Mapping[tuple[str, int], list[str]],
    sets: Mapping[str, tuple[Any, Mapping[str, Any]]],
    data: Path,
) -> None:
    """The table of all sets, the paper's ordering, the share of the gap that is closed, and the curve."""
    references = pq.read_table(data / "test", columns=["references"])["references"].to_pylist()
    scores: dict[str, dict[str, list[float]]] = {}  # by metric, then by set: one for each seed
    for (name, _), captions in results.items():
        for metric, value in caption_metrics(captions, references).items():
            scores.setdefault(metric, {}).setdefault(name, []).append(value)
    print(f"\n| texts | number | noise | {' | '.join(scores)} |\n|---|---|---|{'---|' * len(scores)}")
    for name, (_, facts) in sets.items():
        cells = [name, f"{facts['texts']:,}", f"{facts['noise']:.1%}"]
        cells += [f"{statistics.fmean(by_set[name]):.1f} ({spread(by_set[name])})" for by_set in scores.values()]
        print("|", " | ".join(cells), "|", flush=True)
    report.facts["scores"] = scores
    for metric, by_set in scores.items():
        mean = {name: statistics.fmean(values) for name, values in by_set.items()}
        if mean[CLEAN] == mean[RAW]:
            print(f"\n{metric}: noise costs nothing after so few steps")
            continue
        for name in (*PAPERS[1:], MIXED):
            # Seeds are paired: the weights that a training starts from and its order of samples are of its seed.
            trios = zip(by_set[name], by_set[RAW], by_set[CLEAN], strict=True)
            of_seeds = [(ours - raw) / (clean - raw) for ours, raw, clean in trios if clean != raw]
            closed = (mean[name] - mean[RAW]) / (mean[CLEAN] - mean[RAW])
            settings: dict[str, Any] = {"unit": "of the gap"} | ({"target": TARGET} if name in (BOTH, MIXED) else {})
            report.add(f"{metric}: {name}", closed, min(of_seeds), max(of_seeds), **settings)
        ordered = mean[RAW] < min(mean[name] for name in PAPERS[1:3]) and mean[BOTH] == max(mean[n] for n in PAPERS)
        report.facts[f"{metric}: the paper's ordering holds"] = ordered
        print(f"\n{metric}: raw < filtered, captioned < both: {'yes' if ordered else 'NO'}")
        for name in (share_name(0.1), RANDOM_TENTH):
            if name in mean:
                difference = mean[name] - mean[RAW]
                settings = {"unit": "points", "target": 0.0}
                report.add(f"{metric}: {name} less the raw whole", difference, **settings)


def caption_metrics(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    from openblip.data.texts import normalize_caption
    from openblip.errors import MissingExtraError
    from openblip.metrics.captioning import caption_scores, exact_match

    normal = [[normalize_caption(text) for text in texts] for texts in references]
    metrics = {"exact match": 100 * exact_match(captions, normal, normalize_caption)}
    try:
        metrics["CIDEr"] = caption_scores(captions, normal)["cider"]
    except MissingExtraError as error:
        print(f"no CIDEr: {error}")
    return metrics


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}"


if __name__ == "__main__":
    main()
