"""`openblip bootstrap RECIPE`: train, clean the data with what was trained, train anew, compare."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tyro

from openblip.cli.parsing import parse
from openblip.cli.recipe_choice import choose_recipe
from openblip.recipes.catalog import FAMILIES, Family


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `openblip bootstrap` takes besides the recipe's name."""

    web: str
    """Noisy pairs: any data source."""
    human: str
    """Clean pairs: any data source."""
    out: str
    """Folder of the whole loop; the same command again goes on where it was stopped."""
    test: str | None = None
    """Pairs to evaluate on; without, the last 5% of every shard of the human pairs are held out."""
    rounds: int = 1
    """How often the web pairs are cleaned and a model is trained anew."""
    threshold: float = 0.5
    """Texts with an ITM probability above this are kept."""
    num_captions: int = 1
    """Captions written per image."""
    seed: int = 0
    """Of the sampled captions; the trainings have seeds of their own."""
    recipe: Family
    """The settings of the three trainings."""


def run(argv: Sequence[str]) -> int:
    """Reads the recipe's name, then the options; returns the exit code."""
    name, words = choose_recipe("bootstrap", FAMILIES, argv)
    options = parse(
        Options,
        words,
        prog=f"openblip bootstrap {name}",
        default=Options(web=tyro.MISSING, human=tyro.MISSING, out=tyro.MISSING, recipe=FAMILIES[name]()),
        description="Train on noisy pairs, clean them with what was trained (CapFilt), train anew, compare.",
    )
    from openblip.capfilt.bootstrap import BootstrapConfig, bootstrap

    config = BootstrapConfig(
        family=options.recipe,
        web=options.web,
        human=options.human,
        test=options.test,
        rounds=options.rounds,
        threshold=options.threshold,
        num_captions=options.num_captions,
        seed=options.seed,
    )
    results = bootstrap(config, options.out)
    print_results(results)
    print(f"\nall numbers: {options.out}/results.json")
    return 0


def print_results(results: dict[str, Any]) -> None:
    """The models side by side, and CapFilt against the truth where it is known."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Pre-trained models on {results['test']}")
    table.add_column("")
    for number in range(len(results["models"])):
        table.add_column("raw web" if number == 0 else f"bootstrapped {number}", justify="right")
    for label, part, metric, scale in ROWS:
        values = []
        for model in results["models"]:
            found = model[part[0]][part[1]] if len(part) == 2 else model[part[0]]
            values.append(f"{scale * found[metric]:.1f}")
        table.add_row(label, *values)
    console = Console()
    console.print(table)
    for number, measured in enumerate(results["capfilt"], start=1):
        console.print(
            f"CapFilt {number}: noise {measured['noise_before']:.1%} before, "
            f"{measured['noise_after'] or 0:.1%} after; "
            f"filter AUC {measured['web']['auc']:.3f}, precision {measured['web']['precision']:.3f}, "
            f"recall {measured['web']['recall']:.3f}; "
            f"{measured['num_kept']:,} of {measured['num_texts']:,} texts kept"
        )


ROWS = (
    ("captions: exact match %", ("captioning",), "exact_match", 100),
    ("captions: CIDEr", ("captioning",), "cider", 100),
    ("captions: BLEU-4", ("captioning",), "bleu_4", 100),
    ("text retrieval R@1 %, ITC", ("retrieval", "itc"), "tr_r1", 100),
    ("image retrieval R@1 %, ITC", ("retrieval", "itc"), "ir_r1", 100),
    ("text retrieval R@1 %, ITM", ("retrieval", "itm"), "tr_r1", 100),
    ("text retrieval R@5 %, ITM", ("retrieval", "itm"), "tr_r5", 100),
    ("text retrieval R@10 %, ITM", ("retrieval", "itm"), "tr_r10", 100),
    ("image retrieval R@1 %, ITM", ("retrieval", "itm"), "ir_r1", 100),
    ("image retrieval R@5 %, ITM", ("retrieval", "itm"), "ir_r5", 100),
    ("image retrieval R@10 %, ITM", ("retrieval", "itm"), "ir_r10", 100),
)
