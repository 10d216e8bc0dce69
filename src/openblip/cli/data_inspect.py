"""`openblip data inspect`: what a source holds, and what of it cannot be used."""

import json
import statistics
from collections import Counter
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from openblip.data.inspection import Inspection
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
        images: Folder of the pictures that an annotation file (or a table) names.
        samples: Samples to read and decode, spread over the source; 0 reads all and so checks every image.
        examples: Samples to show.
        as_json: Print one json object per source instead of tables.
    """
    from openblip.data.inspection import inspect_source
    from openblip.data.sources import open_mixture
    from openblip.errors import ConfigError
    from openblip.progress import Progress

    if samples < 0 or examples < 0:
        raise ConfigError("--samples and --examples count samples: 0 or more")
    mixture = open_mixture(source, images=images)
    for member, weight in zip(mixture.sources, mixture.weights, strict=True):
        with Progress(f"indexing {member.name}", total=len(member.shards()), unit="shards") as bar:
            found = inspect_source(
                member,
                num_read=samples or None,
                num_examples=examples,
                on_shard=bar.advance,
            )
        facts = _facts(found) | ({"weight": round(weight, 4)} if len(mixture.sources) > 1 else {})
        if as_json:
            print(json.dumps({"source": member.name, **facts, "reasons": _reasons(found.rejects)}))
        else:
            _print_tables(member.name, facts, found)
    return 0


def _facts(found: "Inspection") -> dict[str, Any]:
    sizes = [f"{width}x{height}" for (width, height), _ in found.image_sizes.most_common(_LINES_SHOWN)]
    per_image = sorted(found.captions_per_image.items())
    words = sorted(found.caption_words)
    facts: dict[str, Any] = {
        **found.described,
        "shards": found.num_shards,
        "samples": found.num_samples,
        **({"task fields counted in": found.num_counted} if (tasks := found.tasks.facts()) else {}),
        **tasks,
        "samples read": found.num_read,
    }
    for name, count in (("pairs of images", found.num_pairs), ("clips", found.num_clips)):
        facts |= {name: count} if count else {}
    if found.missing_files:
        facts["missing pictures"] = f"{len(found.missing_files)} of {found.num_read}"
        facts["first missing"] = found.missing_files[:_MISSING_SHOWN]
    return facts | {
        "rejects": len(found.rejects),
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


def _print_tables(name: str, facts: dict[str, Any], found: "Inspection") -> None:
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
    if found.examples:
        console.print("Examples")
        for sample in found.examples:
            console.print(Text(f"  {sample.shard}/{sample.key}  {_shown(sample)}"))
    if found.rejects:
        console.print(f"Rejects ({len(found.rejects)})")
        for reason, count in list(_reasons(found.rejects).items())[:_LINES_SHOWN]:
            console.print(Text(f"  {count} x {reason}"))
        named = ", ".join(f"{r.shard}/{r.key}" for r in found.rejects[:_LINES_SHOWN])
        more = ", ..." if len(found.rejects) > _LINES_SHOWN else ""
        console.print(Text(f"  named: {named}{more}"))


def _shown(sample: "Sample") -> str:
    """What is said about a picture, in a line."""
    info, said = sample.info, list(sample.captions)
    if "question" in info:
        said.append(f"{info['question']} {_answers(info.get('answers'))}")
    if "statement" in info:
        said.append(f"{info['statement']} ({str(info.get('label', 'no label')).lower()})")
    elif "label" in info:
        said.append(f"class {info['label']}")
    rounds = info.get("dialog")
    for turn in rounds if isinstance(rounds, list) else []:
        if isinstance(turn, dict):
            said.append(f"{turn.get('question')} {_answers(turn.get('answer'))}")
    return " | ".join(said) or "(no caption)"


def _answers(found: Any) -> str:
    answers = found if isinstance(found, list) else [found] if found else []
    return " / ".join(dict.fromkeys(map(str, answers))) or "(no answer)"
