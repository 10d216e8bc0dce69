"""Complete trainings as data; `RECIPES` has them by the names that the command line calls them."""

from collections.abc import Callable
from inspect import isfunction, signature

from openblip.recipes import blip, blip2, mini, systems
from openblip.recipes.run import Run

# Every function without parameters in these files is a recipe, and `blip_base` is called blip-base.
RECIPES: dict[str, Callable[[], Run]] = {
    name.rstrip("_").replace("_", "-"): function
    for module in (mini, blip, blip2, systems)
    for name, function in vars(module).items()
    if isfunction(function) and function.__module__ == module.__name__ and not signature(function).parameters
}
