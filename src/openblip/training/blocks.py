"""The transformer blocks of a task: what a run computes twice to save memory, or divides among processes."""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

from torch import nn
from torch.utils.checkpoint import checkpoint


class Stack(NamedTuple):
    """A model of transformers, or of peft around one, with its blocks."""

    model: nn.Module
    blocks: list[nn.Module]


def find_stacks(module: nn.Module) -> list[Stack]:
    """The outermost models within that tell their blocks as transformers' do, by the names of their classes.

    That list (`_no_split_modules`) also names embeddings; blocks are those that stand in a ModuleList.
    """
    kinds = getattr(module, "_no_split_modules", None)
    if not kinds:
        return [stack for child in module.children() for stack in find_stacks(child)]
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    return [Stack(module, [block for part in lists for block in part if type(block).__name__ in kinds])]


def recompute_activations(task: nn.Module) -> None:
    """Keep only the inputs of every transformer block for the backward pass, which computes it once more.

    Our own transformers have a switch of their own. That of transformers' models does nothing in eval mode,
    which is where frozen language models stay; their blocks are wrapped here. Only `forward` is, so that the
    hooks around a block, such as FSDP's, run once.
    """
    for module in task.modules():
        if isinstance(getattr(module, "activation_checkpointing", None), bool):
            module.activation_checkpointing = True  # type: ignore[assignment]  # torch types all as modules
    for stack in find_stacks(task):
        for block in stack.blocks:
            block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **settings: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **settings)

    return run
