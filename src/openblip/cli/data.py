"""`openblip data inspect`: what a source holds; `openblip data emoji-scenes`: the embedded world as tar shards."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import tyro

from openblip.cli.options import check_output, only_with
from openblip.data.config import SourceOptions
from openblip.data.sample import Sample
from openblip.emoji_scenes.scene import Kind, Split
from openblip.errors import Condition, ConfigError
from openblip.progress import Progress

_LINES_SHOWN = 10


@only_with(Condition("examples", lambda o: not o.as_json, "--as-json prints counts alone"))
def inspect_data(
    source: Annotated[str, tyro.conf.arg(metavar="SOURCE")],
    /,
    *,
    reading: SourceOptions,
    samples: int = 200,
    examples: int = 5,
    as_json: bool = False,
) -> int:
    """Count what a data source holds: samples, captions, questions, statements, dialogs, image sizes, what is
    missing and what cannot be read.

    Args:
        source: Tar shards, .parquet, .jsonl, .csv, an annotation file (.json), a folder, capfilt:DIR, or a mixture.
        samples: Samples whose images are decoded, spread over the source; 0 decodes all and so checks every image.
        examples: Samples to show.
        as_json: Print one json object per source instead of tables.
    """
    if samples < 0 or examples < 0:
        raise ConfigError("--samples and --examples count samples: 0 or more")
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from openblip.data.inspect import inspect_source
    from openblip.data.sources import check_options_used, open_mixture

    mixture, num_empty = open_mixture(source, **reading.reading), 0
    check_options_used(mixture.sources, reading)
    for number, member in enumerate(mixture.sources):
        with Progress(f"reading {member.name}", total=len(member.shards()), unit="shards") as bar:
            inspection = inspect_source(member, num_read=samples or None, num_examples=examples, on_shard=bar.advance)
        num_empty += not inspection.num_samples
        facts = inspection.facts()
        count_of_reason = dict(Counter(reject.why for reject in inspection.rejects).most_common())
        if mixture.weights is not None and len(mixture.sources) > 1:
            facts["weight"] = round(mixture.weights[number], 4)
        if as_json:
            print(json.dumps({"source": member.name, **facts, "reasons": count_of_reason}))
            continue
        table = Table("", Column(overflow="fold"), title=Text(member.name), show_header=False, title_justify="left")
        for fact, value in facts.items():
            if value not in ({}, []):
                shown = [f"{k}: {v}" for k, v in value.items()] if isinstance(value, dict) else value
                table.add_row(fact, Text(", ".join(shown) if isinstance(shown, list) else str(shown)))
        Console(soft_wrap=True).print(table)
        if inspection.examples:
            print("Examples")
            for sample in inspection.examples:
                print(f"  {sample.place}  {_describe(sample)}")
        if rejects := inspection.rejects:
            print(f"Rejects ({len(rejects)})")
            for reason, count in list(count_of_reason.items())[:_LINES_SHOWN]:
                print(f"  {count} x {reason}")
            names = ", ".join(reject.place for reject in rejects[:_LINES_SHOWN])
            print(f"  named: {names}{', ...' if len(rejects) > _LINES_SHOWN else ''}")
    return 1 if num_empty else 0


def _describe(sample: Sample) -> str:
    """The texts of a sample, in a line."""
    info, texts = sample.info, list(sample.captions)

    def add_question(question: Any, value: Any) -> None:
        answers = value if isinstance(value, list) else [value] if value else []
        texts.append(f"{question} {' / '.join(dict.fromkeys(map(str, answers))) or '(no answer)'}")

    if "question" in info:
        add_question(info["question"], info.get("answers"))
    if "statement" in info:
        texts.append(f"{info['statement']} ({str(info.get('label', 'no label')).lower()})")
    elif "label" in info:
        texts.append(f"class {info['label']}")
    rounds = info.get("dialog")
    for turn in rounds if isinstance(rounds, list) else []:
        if isinstance(turn, dict):
            add_question(turn.get("question"), turn.get("answer"))
    return " | ".join(texts) or "(no caption)"


@only_with(
    Condition("noise", lambda o: o.split == "web" and o.kind == "captions", "only captions of --split web are noisy")
)
def write_scenes(
    out: Annotated[Path, tyro.conf.arg(metavar="OUT")],
    /,
    *,
    split: Split,
    num_samples: int,
    kind: Kind = "captions",
    seed: int = 0,
    noise: float = 0.4,
    samples_per_shard: int = 1000,
    num_workers: int | None = None,
    overwrite: bool = False,
) -> int:
    """Write emoji scenes with captions, or with what another task needs, as tar shards.

    Everything true of a scene is known. The same request gives the same bytes; interrupted, the same command goes on
    where it stopped.

    Args:
        out: Folder for 0000.tar, 0001.tar, ...; new, empty, or of the same request.
        split: web has noisy captions; human, val and test have true ones. Pairs of nouns in val and in test
            occur in no other split. No two samples of one of them share a true caption, or show and ask the same.
        num_samples: Number of samples.
        kind: What a sample holds: an image with a caption (captions), five (paraphrases), a question and its answers
            (questions), a dialog and candidate answers (dialogs), a label (classes) or a text about it (documents); two
            images with a statement that is true or false (statements); or a short video with a caption (clips) or a
            question (clip-questions).
        seed: Same kind, split and seed, same scenes.
        noise: Share of noisy captions of kind captions in split web; all else is true.
        samples_per_shard: Samples per tar file.
        num_workers: Processes; by default one per processor. Changes nothing in what is written.
        overwrite: Replace the scenes in OUT by new ones.
    """
    check_output("OUT", out, is_folder=True)
    from openblip.emoji_scenes.writer import write_emoji_scenes

    folder = write_emoji_scenes(
        out, split=split, num_samples=num_samples, kind=kind, seed=seed, noise=noise, overwrite=overwrite,
        samples_per_shard=samples_per_shard, num_workers=num_workers,
    )  # fmt: skip
    print(f"wrote {num_samples} {split} scenes ({kind}) to {folder} (CC BY-SA 4.0, see LICENSE.txt there)")
    return 0
