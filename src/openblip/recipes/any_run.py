"""All kinds of runs. No torch here: `--help` reads it."""

from openblip.recipes.blip2_run import Blip2Run
from openblip.recipes.language_run import LanguageRun
from openblip.recipes.run import Run

AnyRun = Run | Blip2Run | LanguageRun
