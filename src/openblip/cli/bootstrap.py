"""`openblip bootstrap RECIPE`: train, clean the data with what was trained, train anew, compare."""

import functools
import operator
from collections.abc import Sequence

import tyro

from openblip.cli.parsing import parse
from openblip.cli.train import choose_recipe
from openblip.recipes.bootstrap import FAMILIES, BootstrapConfig

# What the table says, and where it stands in evaluation.json.
ROWS = (
    ("captions: exact match %", "captioning", "exact_match"),
    ("captions: CIDEr", "captioning", "cider"),
    ("captions: BLEU-4", "captioning", "bleu_4"),
    ("text retrieval R@1 %, ITC", "retrieval", "itc", "tr_r1"),
    ("image retrieval R@1 %, ITC", "retrieval", "itc", "ir_r1"),
    ("text retrieval R@1 %, ITM", "retrieval", "itm", "tr_r1"),
    ("text retrieval R@5 %, ITM", "retrieval", "itm", "tr_r5"),
    ("text retrieval R@10 %, ITM", "retrieval", "itm", "tr_r10"),
    ("image retrieval R@1 %, ITM", "retrieval", "itm", "ir_r1"),
    ("image retrieval R@5 %, ITM", "retrieval", "itm", "ir_r5"),
    ("image retrieval R@10 %, ITM", "retrieval", "itm", "ir_r10"),
)


def run_bootstrap(argv: Sequence[str]) -> int:
    """Runs the loop with the recipe that the first word names; the exit code is 0 when it is done."""
    name, options = choose_recipe("bootstrap", FAMILIES, argv)
    config = parse(
        BootstrapConfig,
        options,
        prog=f"openblip bootstrap {name}",
        default=BootstrapConfig(web=tyro.MISSING, human=tyro.MISSING, out=tyro.MISSING, recipe=FAMILIES[name]()),
        description="Train on human and noisy pairs, clean the noisy ones (CapFilt), train anew, compare.",
    )
    from openblip.recipes.bootstrap import bootstrap

    results = bootstrap(config)
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Pre-trained models on {results['test']}")
    table.add_column("")
    for number in range(len(results["models"])):
        table.add_column("human + raw web" if number == 0 else f"bootstrapped {number}", justify="right")
    for label, *path in ROWS:
        scores = [functools.reduce(operator.getitem, path, model) for model in results["models"]]
        table.add_row(label, *(f"{100 * score:.1f}" for score in scores))
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
    print(f"\nall numbers: {config.out}/results.json")
    return 0
