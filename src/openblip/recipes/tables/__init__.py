"""The comparisons of the papers, one file each; `TABLES` has them by the names that the command line calls them."""

import importlib
import pkgutil

from openblip.recipes.ablation import AblationTable

# A file with a `TABLE` is a table: blip_capfilt.py is called blip-capfilt.
TABLES: dict[str, AblationTable] = {
    module.name.replace("_", "-"): importlib.import_module(f"{__name__}.{module.name}").TABLE
    for module in pkgutil.iter_modules(__path__)
}
