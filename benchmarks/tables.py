"""Puts the tables of `openblip ablate` into docs/results.md: `python -m benchmarks.tables OUT [--page PAGE]`.

OUT is the folder of the command. A table stands between the lines `<!-- table: NAME -->` and `<!-- end of NAME -->`,
which are written anew; what stands around them, such as why a claim does not hold, is written by hand and stays. A
table that the page does not have yet gets a section at the end of "The papers' tables". Plots with curves are copied
to docs/images.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

from benchmarks.harness import ROOT

PAGE = ROOT / "docs" / "results.md"
HEADING = "## The papers' tables"
MARKED = "<!-- table: {name} -->\n{body}<!-- end of {name} -->\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    text = options.page.read_text(encoding="utf-8")
    if HEADING not in text:
        text = f"{text.rstrip()}\n\n{HEADING}\n\n`openblip ablate` makes them; [ablations.md](ablations.md) says how.\n"
    for results in sorted(options.out.glob("*/results.json")):
        name = results.parent.name
        text = with_table(text, name, section(results.parent, name, options.page.parent / "images"))
    options.page.write_text(text, encoding="utf-8")


def section(folder: Path, name: str, images: Path) -> str:
    """The page of a table as a part of another, with its plot where there are curves."""
    body = (folder / "table.md").read_text(encoding="utf-8").replace("# ", "### ", 1)
    if json.loads((folder / "results.json").read_text(encoding="utf-8"))["curves"]:
        shutil.copyfile(folder / "plot.svg", images / f"{name}.svg")
        body += f"\n![{body.splitlines()[0].lstrip('# ')}: scores over steps and operations](images/{name}.svg)\n"
    return body


def with_table(text: str, name: str, body: str) -> str:
    """The page with a table in its place, or at the end of the section of all tables."""
    marked = MARKED.format(name=name, body=body)
    place = re.compile(re.escape(MARKED.format(name=name, body="\0")).replace("\0", "(?:.*\n)*?"))
    if place.search(text):
        return place.sub(lambda _: marked, text)
    start = text.index(HEADING) + len(HEADING)
    following = re.search(r"^## ", text[start:], re.MULTILINE)
    end = len(text) if following is None else start + following.start()
    return f"{text[:end].rstrip()}\n\n{marked}{'' if following is None else chr(10)}{text[end:]}"


if __name__ == "__main__":
    main()
