"""`openblip data inspect`: what a source holds, and what of it cannot be used."""

import json
import statistics
from collections import Counter
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from openblip.data.inspect import Inspection
    from openblip.data.sample import Reject, Sample

_LINES_SHOWN = 10
_MISSING_SHOWN = 3


def command(
    source: tyro.conf.Positional[str],
    images: str | None = None,
    samples: int = 200,
    examples: int = 5,
    as_json: bool = False,
) -> int:
    """Count what a data source holds: samples, captions, questions, statements, dialogs, image sizes, what is
    missing and what cannot be read.

    Args:
        source: Tar shards, .parquet, .jsonl, .csv, an annotation file (.json), a folder, capfilt:DIR, or a
            mixture of them.
        images: Folder of the images that an annotation file (or a table) names.
        samples: Samples whose images are decoded, spread over the source; 0 decodes all and so checks every
            image.
        examples: Samples to show.
        as_json: Print one json object per source instead of tables.
    """
    from openblip.data.inspect import inspect_source
    from openblip.data.sources import open_mixture
    from openblip.errors import ConfigError
    from openblip.progress import Progress

    if samples < 0 or examples < 0:
        raise ConfigError("--samples and --examples count samples: 0 or more")
    mixture = open_mixture(source, images=images)
    for number, member in enumerate(mixture.sources):
        with Progress(f"reading {member.name}", total=len(member.shards()), unit="shards") as bar:
            inspection = inspect_source(member, num_read=samples or None, num_examples=examples, on_shard=bar.advance)
        facts = _facts(inspection)
        if mixture.weights is not None and len(mixture.sources) > 1:
            facts["weight"] = round(mixture.weights[number], 4)
        if as_json:
            print(json.dumps({"source": member.name, **facts, "reasons": _reasons(inspection.rejects)}))
        else:
            _print_tables(member.name, facts, inspection)
    return 0


def _facts(inspection: "Inspection") -> dict[str, Any]:
    """What is printed, by name."""
    sizes = [f"{width}x{height}" for (width, height), _ in inspection.image_sizes.most_common(_LINES_SHOWN)]
    per_image = sorted(inspection.captions_per_image.items())
    words = sorted(inspection.caption_words)
    tasks = inspection.tasks.facts()
    facts: dict[str, Any] = {
        **inspection.description,
        "shards": inspection.num_shards,
        "samples": inspection.num_samples,
        **({"task fields counted in": inspection.num_samples} if tasks else {}),
        **tasks,
        "samples read": inspection.num_read,
    }
    for name, count in (("pairs of images", inspection.num_pairs), ("clips", inspection.num_videos)):
        facts |= {name: count} if count else {}
    if inspection.missing_files:
        facts["missing pictures"] = f"{len(inspection.missing_files)} of {inspection.num_read}"
        facts["first missing"] = inspection.missing_files[:_MISSING_SHOWN]
    return facts | {
        "rejects": len(inspection.rejects),
        "captions per image": {str(captions): images for captions, images in per_image},
        "words per caption": {"least": words[0], "median": statistics.median(words), "most": words[-1]}
        if words
        else {},
        "image sizes": sizes,
    }


def _reasons(rejects: "list[Reject]") -> dict[str, int]:
    """How often each reason was given, most frequent first, without the sample's name."""
    reasons = (
        reject.reason.removeprefix(f"{reject.shard}/{reject.key}: ").removeprefix(f"{reject.key}: ")
        for reject in rejects
    )
    return dict(Counter(reasons).most_common())


def _print_tables(name: str, facts: dict[str, Any], inspection: "Inspection") -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console(soft_wrap=True)
    table = Table("", Column(overflow="fold"), title=Text(name), show_header=False, title_justify="left")
    for fact, value in facts.items():
        if value in ({}, []):
            continue
        shown = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(fact, Text(", ".join(shown) if isinstance(shown, list) else str(shown)))
    console.print(table)
    if inspection.examples:
        console.print("Examples")
        for sample in inspection.examples:
            console.print(Text(f"  {sample.shard}/{sample.key}  {_describe(sample)}"))
    if inspection.rejects:
        console.print(f"Rejects ({len(inspection.rejects)})")
        for reason, count in list(_reasons(inspection.rejects).items())[:_LINES_SHOWN]:
            console.print(Text(f"  {count} x {reason}"))
        names = ", ".join(f"{r.shard}/{r.key}" for r in inspection.rejects[:_LINES_SHOWN])
        more = ", ..." if len(inspection.rejects) > _LINES_SHOWN else ""
        console.print(Text(f"  named: {names}{more}"))


def _describe(sample: "Sample") -> str:
    """The texts of a sample, in a line."""
    info, texts = sample.info, list(sample.captions)
    if "question" in info:
        texts.append(f"{info['question']} {_answers(info.get('answers'))}")
    if "statement" in info:
        texts.append(f"{info['statement']} ({str(info.get('label', 'no label')).lower()})")
    elif "label" in info:
        texts.append(f"class {info['label']}")
    rounds = info.get("dialog")
    for turn in rounds if isinstance(rounds, list) else []:
        if isinstance(turn, dict):
            texts.append(f"{turn.get('question')} {_answers(turn.get('answer'))}")
    return " | ".join(texts) or "(no caption)"


def _answers(value: Any) -> str:
    answers = value if isinstance(value, list) else [value] if value else []
    return " / ".join(dict.fromkeys(map(str, answers))) or "(no answer)"
