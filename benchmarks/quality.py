"""What lower precisions change: at least 99 % of the tokens stay, and a filter's AUC moves by less than 0.002.

Peer: the same model in float32; for the model with random weights transformers in bfloat16, too, as a yardstick.
Method: the shipped models on fresh emoji scenes, whose truth is known. "Tokens, each after float32's": the share of
places in which the model would write the token of float32's greedy caption after its beginning; a caption that parts in
one token is counted once. "Whole captions": greedy captions that are equal to the last letter. "True captions": those
that say what the scene shows. AUC: of P(match) for telling true captions from noise. BLIP-base with random weights is a
hard case: its probabilities are nearly flat, so that the smallest rounding decides between tokens.

    python -m benchmarks.quality [--scenes 600] [--dtypes bfloat16 float16 int8]
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import openblip
from benchmarks import blip_base
from benchmarks.captions import NUM_TOKENS
from benchmarks.harness import Report, parser
from openblip.data.reader import read_source
from openblip.data.sources import open_source
from openblip.emoji_scenes.writer import write_emoji_scenes
from openblip.evaluation.captioning import reference_captions
from openblip.evaluation.filtering import evaluate_filter

GREEDY = openblip.Greedy(max_new_tokens=NUM_TOKENS)
TOKENS_TARGET, AUC_TARGET = 0.99, 0.002


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--scenes", type=int, default=600)
    options.add_argument("--base-images", type=int, default=16)
    options.add_argument("--dtypes", nargs="+", default=["bfloat16", "int8"])
    run(options.parse_args())


@torch.inference_mode()
def run(options: argparse.Namespace) -> None:
    report = Report("quality", __doc__, options)
    scenes = blip_base.written_once(f"scenes-{options.scenes}", partial(write_scenes, options.scenes))
    for model in ("openblip-mini-captioner", "openblip-mini"):
        compare_captions(report, model, scenes / "true", options)
    for model in ("openblip-mini-filter", "openblip-mini"):
        compare_filters(report, model, scenes / "web", options)
    compare_base(report, options)
    report.save()


def write_scenes(count: int, folder: Path) -> None:
    write_emoji_scenes(folder / "true", split="test", num_samples=count, progress=False, num_workers=1)
    write_emoji_scenes(folder / "web", split="web", num_samples=count, seed=900, progress=False, num_workers=1)


def compare_captions(report: Report, name: str, scenes: Path, options: argparse.Namespace) -> None:
    exact = openblip.load(name, device=options.device, dtype="float32")
    samples = [sample for sample, _ in read_source(open_source(str(scenes)), lambda sample: None)]
    truths = [set(reference_captions(sample)) for sample in samples]
    prepared = exact.prepare([sample.image for sample in samples])
    expected = exact.caption(prepared, decoding=GREEDY, return_scores=True)
    true_share = share(caption.text in truth for caption, truth in zip(expected, truths, strict=True))
    report.facts[f"{name}, true captions in float32"] = true_share
    for dtype in options.dtypes:
        model = openblip.load(name, device=options.device, dtype=dtype)
        written = model.caption(prepared, decoding=GREEDY, return_scores=True)
        agreement = forced_agreement(model, prepared, [caption.ids for caption in expected])
        report.add(f"{name}, {dtype}: tokens, each after float32's", agreement, unit="equal", target=TOKENS_TARGET)
        same = share(a.text == b.text for a, b in zip(written, expected, strict=True))
        report.add(f"{name}, {dtype}: whole captions", same, unit="equal")
        true = share(caption.text in truth for caption, truth in zip(written, truths, strict=True))
        report.add(f"{name}, {dtype}: change of the share of true captions", true - true_share, unit="")


def forced_agreement(model: Any, prepared: Tensor, texts: Sequence[Sequence[int]], batch_size: int = 64) -> float:
    """The share of tokens that the model finds likeliest where they stand, each after the earlier ones."""
    equal: list[bool] = []
    start: list[int] = model.tokenizer.prompt(model.prompt).tolist()
    for rows, encoded in model.encoded_batches(prepared, batch_size):
        part = texts[rows]
        longest = max(map(len, part))
        ids = torch.tensor([[*start, *text, *[model.tokenizer.pad_id] * (longest - len(text))] for text in part])
        image_kv = model.model.image_kv(encoded.tokens, "decode")
        logits = model.model.decode(ids[:, :-1].to(model.device), image_kv)[:, len(start) - 1 :]
        for text, chosen in zip(part, logits.argmax(dim=-1).tolist(), strict=True):
            equal += [a == b for a, b in zip(text, chosen, strict=False)]
    return share(equal)


def compare_filters(report: Report, name: str, scenes: Path, options: argparse.Namespace) -> None:
    measure = partial(evaluate_filter, source=open_source(str(scenes)), batch_size=64)
    exact = measure(openblip.load(name, device=options.device, dtype="float32"))["auc"]
    report.facts[f"{name}, AUC in float32"] = exact
    for dtype in options.dtypes:
        auc = measure(openblip.load(name, device=options.device, dtype=dtype))["auc"]
        settings = {"unit": "", "target": AUC_TARGET, "at_most": True}
        report.add(f"{name}, {dtype}: change of the AUC", abs(auc - exact), **settings)


def compare_base(report: Report, options: argparse.Namespace) -> None:
    """Random weights: tokens of the captioner, and P(match) of the filter."""
    exact = openblip.load(blip_base.captioner_folder(), device=options.device, dtype="float32")
    prepared, normalised = blip_base.pixels(exact, options.base_images)
    decoding = openblip.Greedy(max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS)
    ids = [caption.ids for caption in exact.caption(prepared, prompt="", decoding=decoding, return_scores=True)]
    for dtype in options.dtypes:
        model = openblip.load(blip_base.captioner_folder(), device=options.device, dtype=dtype)
        agreement = forced_agreement(model, prepared, ids, batch_size=8)
        report.add(f"BLIP-base, random, {dtype}: tokens, each after float32's", agreement, unit="equal")
    theirs = blip_base.transformers_captioner(torch.bfloat16).to(options.device)
    inputs = normalised.to(options.device, torch.bfloat16)
    start = torch.full((len(ids), 1), exact.tokenizer.dec_id)
    rows = torch.cat([start, torch.tensor(ids)], dim=1).to(options.device)
    logits = theirs.text_decoder(rows[:, :-1], encoder_hidden_states=theirs.vision_model(inputs)[0]).logits
    agreement = float((logits.argmax(dim=-1) == rows[:, 1:]).float().mean())
    report.add("BLIP-base, random, transformers bfloat16: tokens, each after float32's", agreement, unit="equal")
    texts, folder = blip_base.texts(8), blip_base.filter_folder()
    expected = openblip.load(folder, device=options.device, dtype="float32").match_matrix(prepared, texts)
    for dtype in options.dtypes:
        scores = openblip.load(folder, device=options.device, dtype=dtype).match_matrix(prepared, texts)
        largest = float((scores - expected).abs().max())
        report.add(f"BLIP-base, random, {dtype}: largest change of P(match)", largest, unit="")


def share(holds: Any) -> float:
    values = list(holds)
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
