"""`openblip index` and `openblip search`: find images and texts of a source by what they show and say."""

import base64
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from openblip.cli.options import DeviceOptions, ModelOptions, check_output
from openblip.data.config import DecodingAhead
from openblip.errors import ConfigError

if TYPE_CHECKING:
    from openblip.search.index import Hit


def build(
    source: Annotated[str, tyro.conf.arg(metavar="SOURCE")],
    /,
    *,
    model: ModelOptions,
    reading: DecodingAhead,
    out: str,
    batch_size: int = 32,
) -> int:
    """Embeds the images of a source, and the texts that came with them, so that `openblip search` finds them.

    The same command again brings the index up to date: only new and changed images are embedded, and those that are
    gone leave it. It also goes on where it was stopped.

    Args:
        source: a folder of images, tar shards, a table, any data source.
        out: the folder of the index, or a URL such as s3://bucket/index.
        batch_size: images in one step of the model.
    """
    if batch_size < 1:
        raise ConfigError("--batch-size must be at least 1")
    from openblip.search.index import build_index, index_place, load_lancedb

    load_lancedb()  # an error of it comes before a model is loaded
    index_place(out)
    check_output("--out", out, is_folder=True)
    summary = build_index(source, model.load(), out, checkpoint=model.model, reading=reading, batch_size=batch_size)
    print(
        f"{out}: {summary.added:,} images added, {summary.changed:,} changed, {summary.deleted:,} deleted, "
        f"{summary.unchanged:,} as they were"
    )
    for reject in summary.rejects:
        print(f"skipped {reject}", file=sys.stderr)
    return 1 if summary.rejects else 0


def find(
    directory: Annotated[str, tyro.conf.arg(metavar="DIR")],
    text: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None,
    /,
    *,
    image: Path | None = None,
    find: Literal["images", "texts"] = "images",
    top: int = 20,
    rerank: int = 0,
    where: str | None = None,
    exact: bool = False,
    as_json: bool = False,
    html: Path | None = None,
    model: str | None = None,
    device: DeviceOptions,
) -> int:
    """Finds the images of an index that fit a text, or that look like an image.

    With a text and an image, results are near to both. With --find texts, the texts that came with the images are
    searched instead, for example for an image.

    Args:
        directory: the folder of an index, or its URL.
        text: what the images should show.
        image: an image file that results should be like.
        find: what is searched: images or texts.
        top: number of results.
        rerank: compare so many of the nearest anew by ITM, which reads image and text together; 128 in the papers.
        where: a condition of SQL on shard, key, caption, width and height, such as "width > 500".
        exact: compare every vector, where a large index would be searched approximately.
        as_json: print JSON lines instead of a table.
        html: write a page with thumbnails to this file.
        model: the checkpoint that the index was made with, where it lies elsewhere now.
    """
    if html is not None:
        check_output("--html", html)
    from openblip.files import write_text
    from openblip.search.index import ImageIndex, check_query

    check_query(text, image, find=find, top=top, rerank=rerank)
    index = ImageIndex(directory, model, device=device.device, dtype=device.dtype)
    hits = index.search(
        text, image, find=find, top=top, rerank=rerank, where=where, exact=exact, thumbnails=html is not None
    )
    if html is not None:
        title = " and ".join(filter(None, (text, f"images like {image.name}" if image else None)))
        write_text(html, _page(title, directory, hits))
        print(f"page: {html}", file=sys.stderr)
    if as_json:
        for rank, hit in enumerate(hits, 1):
            print(json.dumps({"rank": rank, **{name: x for name, x in hit._asdict().items() if name != "thumbnail"}}))
        return 0
    for rank, hit in enumerate(hits, 1):
        match = "" if hit.match is None else f"{hit.match:7.3f}"
        print(f"{rank:>4}  {hit.similarity:6.3f} {match:>7}  {hit.shard}/{hit.key}  {hit.text}")
    return 0


def _page(title: str, directory: str, hits: Sequence["Hit"]) -> str:
    """A self-contained page with the results."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("openblip.search", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template("results.html").render(title=title, folder=directory, hits=hits)
