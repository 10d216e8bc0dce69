"""A matrix of P(match), every image with every text, takes a small part of the time that transformers needs.

Peer: transformers' BlipForImageTextRetrieval in bfloat16, in the two ways in which its users do it. "Pair by pair": its
forward call on batches of 8 pairs, which encodes the image of every pair. "Taken apart": images encoded once, then its
text encoder and matching head on batches of pairs, which projects the keys and values of the image for every pair.
Method: 8 images at 384 pixels and 16 texts of 8 to 16 tokens, so 128 pairs; random weights. Of the pairs one by one, 8
are timed and their time counts 16-fold. The scores of both sides are compared.

    python -m benchmarks.matching
"""

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor

import openblip
from benchmarks import blip_base
from benchmarks.harness import Report, alternate, parser

NUM_IMAGES, NUM_TEXTS = 8, 16


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--dtypes", nargs="+", default=["bfloat16", "int8"])
    run(options.parse_args())


@torch.inference_mode()
def run(options: argparse.Namespace) -> None:
    report = Report("matching", __doc__, options)
    texts = blip_base.texts(NUM_TEXTS)
    calls: dict[str, Any] = {}
    for dtype in options.dtypes:
        ours = openblip.load(blip_base.filter_folder(), device=options.device, dtype=dtype, encoder_token="[CLS]")
        prepared, normalised = blip_base.pixels(ours, NUM_IMAGES)
        calls[f"openblip {dtype}"] = partial(ours.match_matrix, prepared, texts)
    pixels = normalised.to(options.device, torch.bfloat16)
    tokens = ours.tokenizer.encode(texts).to(options.device)  # from [CLS], as transformers leaves them
    theirs = blip_base.transformers_filter(torch.bfloat16).to(options.device)

    def pair_by_pair() -> Tensor:
        chosen = slice(0, NUM_IMAGES)
        ids, mask = tokens.ids[chosen], tokens.mask[chosen]
        return theirs(ids, pixels, attention_mask=mask, use_itm_head=True).itm_score

    def taken_apart() -> Tensor:
        states = theirs.vision_model(pixels)[0]
        columns = []
        for image in states:
            repeated = image.expand(NUM_TEXTS, -1, -1)
            read = theirs.text_encoder(
                tokens.ids,
                attention_mask=tokens.mask,
                encoder_hidden_states=repeated,
                encoder_attention_mask=torch.ones(repeated.shape[:2], dtype=torch.long, device=repeated.device),
            )
            columns.append(theirs.itm_head(read[0][:, 0]).float().softmax(dim=1)[:, 1])
        return torch.stack(columns)

    calls |= {"transformers, 8 pairs": pair_by_pair, "transformers, taken apart": taken_apart}
    scores = taken_apart().cpu()
    report.facts["largest difference of P(match) to transformers"] = {
        name: float((call() - scores).abs().max()) for name, call in calls.items() if name.startswith("openblip")
    }
    seconds = alternate(calls, options.repeats)
    whole = [NUM_IMAGES * NUM_TEXTS / NUM_IMAGES * own for own in seconds["transformers, 8 pairs"]]
    seconds["transformers, pair by pair (16 times 8 pairs)"] = whole
    report.timings(f"{NUM_IMAGES} images x {NUM_TEXTS} texts", seconds)
    for dtype in options.dtypes:
        own = seconds[f"openblip {dtype}"]
        targets = (25, 4) if dtype == "bfloat16" and options.device == "cpu" else (None, None)
        report.ratio(f"matching matrix, {dtype}, beside pairs one by one", whole, own, target=targets[0])
        apart = seconds["transformers, taken apart"]
        report.ratio(f"matching matrix, {dtype}, beside the model taken apart", apart, own, target=targets[1])
    report.save()


if __name__ == "__main__":
    main()
