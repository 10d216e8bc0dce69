"""Floating-point operations of one training step of a run, forward and backward.

    python benchmarks/step_operations.py RECIPE [the options of `openblip train`]

Counted are matrix products and attention (torch.utils.flop_counter), which do not depend on the machine, over
the run's first batch. Frozen parts count where the run computes them; features from a cache do not.
"""

import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

from openblip.cli.train import choose_recipe, parse_run
from openblip.distributed import Process
from openblip.recipes import RECIPES


def main() -> None:
    name, options = choose_recipe("train", RECIPES, sys.argv[1:])
    run = parse_run(name, options, prog=f"step_operations.py {name}")
    trainer = run.build(Process(0, 1, torch.device("cpu")))
    batch = next(iter(trainer.loader)).batch
    with FlopCounterMode(display=False) as counter:
        losses = trainer.task.train()(batch, 0, torch.Generator().manual_seed(0))
        torch.stack(list(losses.values())).sum().backward()
    operations = counter.get_total_flops()
    print(f"{name}: {operations / 1e9:.2f} GFLOP a step, {operations / len(batch) / 1e6:.1f} MFLOP a sample")


if __name__ == "__main__":
    main()
