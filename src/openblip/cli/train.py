"""`openblip train RECIPE` and `openblip bootstrap RECIPE`: trainings by name, with any of their settings changed."""

import functools
import inspect
import operator
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro

from openblip.cli.options import check_output, parse
from openblip.errors import ConfigError
from openblip.recipes import RECIPES
from openblip.recipes.bootstrap import FAMILIES, BootstrapConfig, bootstrap
from openblip.recipes.run import Run, with_settings
from openblip.training.config import PRECISIONS

# What the table of a bootstrap says, and where it stands in evaluation.json.
ROWS = {
    "captions: exact match %": ("captioning", "exact_match"),
    "captions: CIDEr": ("captioning", "cider"),
    "captions: BLEU-4": ("captioning", "bleu_4"),
    "text retrieval R@1 %, ITC": ("retrieval", "itc", "tr_r1"),
    "image retrieval R@1 %, ITC": ("retrieval", "itc", "ir_r1"),
    "text retrieval R@1 %, ITM": ("retrieval", "itm", "tr_r1"),
    "text retrieval R@5 %, ITM": ("retrieval", "itm", "tr_r5"),
    "text retrieval R@10 %, ITM": ("retrieval", "itm", "tr_r10"),
    "image retrieval R@1 %, ITM": ("retrieval", "itm", "ir_r1"),
    "image retrieval R@5 %, ITM": ("retrieval", "itm", "ir_r5"),
    "image retrieval R@10 %, ITM": ("retrieval", "itm", "ir_r10"),
}


def run_recipe(argv: Sequence[str]) -> int:
    """Trains the recipe that the first word names, or goes on with the run that `--resume RUN` names.

    The exit code is 130 when a signal stopped it.
    """
    argv = _present_options(argv)
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--resume=") else [word])]
    resume = "--resume" in words
    position = words.index("--resume") if resume else len(words)
    if resume:
        del words[position]
    if resume and position < len(words) and not words[position].startswith("-"):
        run = read_run(words.pop(position))
        if words and words[0] in RECIPES and words.pop(0) != run.recipe:
            raise ConfigError(f"{run.out} is a run of the recipe {run.recipe}; leave out the name")
        chosen = parse_run(run, words, prog=f"openblip train --resume {run.out}")
        if chosen.out != run.out:
            raise ConfigError(f"--resume {run.out} goes on in that folder; leave out --out")
    else:
        name, words = choose_recipe("train", RECIPES, words)
        chosen = parse_run(RECIPES[name](), words, prog=f"openblip train {name}")
    check_output("--out", Path(chosen.out), is_folder=True)
    if chosen.train(resume=resume):
        print(f"trained: {chosen.out}/model", file=sys.stderr)
        return 0
    print(f"stopped; `openblip train --resume {chosen.out}` goes on", file=sys.stderr)
    return 130


def _present_options(words: Sequence[str]) -> list[str]:
    """The words with --training.precision, as earlier versions called it, under its present name --training.dtype."""
    present: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        if name.startswith("--") and name.endswith("training.precision"):
            word = f"{name.removesuffix('precision')}dtype{equals}{PRECISIONS.get(value, value)}"
        elif present and present[-1].endswith("training.dtype"):
            word = PRECISIONS.get(word, word)
        present.append(word)
    return present


def read_run(folder: str) -> Run:
    """The run in a folder, with the settings of its config.json. Raises `ConfigError` where there is none."""
    from openblip.training.run_folder import RunFolder

    config = RunFolder(folder).read_config()
    if config is None:
        raise ConfigError(f"{folder} holds no run that could be resumed: nothing was trained there yet")
    recipe = RECIPES.get(str(config["recipe"]))
    if recipe is None:
        raise ConfigError(f"{folder}/config.json names no recipe of this version; give the whole command and --resume")
    run: Run = with_settings(recipe(), config)
    return replace(run, out=folder)


def run_bootstrap(argv: Sequence[str]) -> int:
    """Trains, cleans the data with what was trained, trains anew and compares, with the recipe of the first word."""
    name, options = choose_recipe("bootstrap", FAMILIES, _present_options(argv))
    config = parse(
        BootstrapConfig,
        options,
        prog=f"openblip bootstrap {name}",
        default=BootstrapConfig(web=tyro.MISSING, human=tyro.MISSING, out=tyro.MISSING, recipe=FAMILIES[name]()),
        description="Train on human and noisy pairs, clean the noisy ones (CapFilt), train anew, compare.",
    )
    check_output("--out", Path(config.out), is_folder=True)
    results = bootstrap(config)
    from rich.console import Console
    from rich.table import Table

    table = Table("", title=f"Pre-trained models on {results['test']}")
    for number in range(len(results["models"])):
        table.add_column(f"bootstrapped {number}" if number else "human + raw web", justify="right")
    for label, path in ROWS.items():
        scores = [functools.reduce(operator.getitem, path, model) for model in results["models"]]
        scale = 1 if path[-1] == "cider" else 100
        table.add_row(label, *(f"{scale * score:.1f}" for score in scores))
    Console().print(table)
    for number, check in enumerate(results["filter_checks"], start=1):
        if check is not None:
            from openblip.capfilt.check import describe

            print(f"Filter {number}: {describe(check)}")
    for number, measured in enumerate(results["capfilt"], start=1):
        shares = {"noise before": measured["noise_before"], "after": measured["noise_after"]}
        shares |= {f"filter {name}": measured["web"][name] for name in ("auc", "precision", "recall")}
        known = (f"{name} {value:.3f}" for name, value in shares.items() if value is not None)  # else of no texts
        kept = f"{measured['num_kept']:,} of {measured['num_texts']:,} texts kept"
        print(f"CapFilt {number}: {', '.join(known)}; {kept}")
    print(f"\nall numbers: {config.out}/results.json")
    return 0


def parse_run(default: Run, options: Sequence[str], *, prog: str) -> Run:
    """A run with changed settings, described by its recipe."""
    recipe = RECIPES[default.recipe]
    shared = inspect.getdoc(inspect.getmodule(recipe))
    text = (
        f"{inspect.getdoc(recipe)}\n\n{shared}\n\nAlso: --resume continues the run in --out where it was stopped; "
        "`openblip train --resume RUN` does it with the settings of the run folder. Options after it change them: the "
        "docs say which."
    )
    # tyro joins lines, but for those that begin with no letter: here commands stand apart, and all others are joined.
    text = re.sub(r"(\n +\S.*)\n(?=\S)", r"\1\n\n", text)
    text = re.sub(r"(?<=\S)\n(?=\S)", " ", text)
    return parse(type(default), options, prog=prog, default=default, description=text)


def choose_recipe(command: str, recipes: Mapping[str, Callable[[], Any]], argv: Sequence[str]) -> tuple[str, list[str]]:
    """The name that `argv` begins with, and the words after it; ConfigError for none, SystemExit after `--help`."""
    if argv and argv[0] in recipes:
        return argv[0], list(argv[1:])
    if argv and argv[0] in ("-h", "--help"):
        resume = ", or openblip train --resume RUN [options]" if command == "train" else ""
        print(f"usage: openblip {command} RECIPE [options]{resume}\n\nrecipes:")
        width = max(map(len, recipes)) + 2
        for name in recipes:
            summary = (inspect.getdoc(RECIPES[name]) or "").split("\n")[0]  # that a bootstrap begins with
            print(f"  {name:<{width}}{summary}")
        print(f"\n`openblip {command} RECIPE --help` shows every option with the recipe's value.")
        raise SystemExit(0)
    given = f'there is no recipe "{argv[0]}"' if argv else "no recipe is named"
    raise ConfigError(f"{given}; choose one of {', '.join(recipes)}")
