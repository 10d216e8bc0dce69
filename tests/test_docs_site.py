"""The documentation site is built without a warning, leads to every page, and loads nothing from elsewhere."""

import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from test_documentation import pages_of_errors

pytest.importorskip("furo", reason='needs pip install "openblip[docs]"')
pytest.importorskip("myst_nb", reason='needs pip install "openblip[docs]"')

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """The links, anchors and loaded files of an HTML page, and its images without a description."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.undescribed: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if "src" in found or (tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload")):
            self.loaded.append(found.get("src") or found["href"])
        if tag == "img" and not found.get("alt"):
            self.undescribed.append(found["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """Every page of the site by its address; a warning of the build is a failure."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "--keep-going", DOCS, folder]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (built.returncode, built.stderr) == (0, "")
    pages = (page for page in folder.rglob("*.html") if "_modules" not in page.parts)
    return {str(page.relative_to(folder)): Page(page.read_text()) for page in pages}


def local_targets(address: str, page: Page) -> Iterator[tuple[str, str, str]]:
    """The page and the anchor of each link to another place on the site, after the link itself."""
    for link in page.links:
        path, _, anchor = unquote(link).partition("#")
        if not path:
            yield link, address, anchor
        elif "://" not in path and path.endswith(".html") and "_modules" not in path:
            yield link, str(Path(address).parent / path), anchor


def test_every_page_is_there(site: dict[str, Page]) -> None:
    sources = {file.stem for suffix in ("md", "rst", "ipynb") for file in DOCS.glob(f"*.{suffix}")}
    assert {f"{name}.html" for name in sources} <= site.keys()
    listed = {path for _, path, _ in local_targets("index.html", site["index.html"])}
    assert {f"{name}.html" for name in sources} <= listed


def test_links_lead_somewhere(site: dict[str, Page]) -> None:
    broken = [
        (address, link)
        for address, page in site.items()
        for link, path, anchor in local_targets(address, page)
        if path not in site or (anchor and anchor not in site[path].anchors)
    ]
    assert broken == []


def test_pages_of_errors_are_there(site: dict[str, Page]) -> None:
    for place, page in pages_of_errors():
        path, _, anchor = page.replace(".md", ".html").partition("#")
        assert path in site, f"{place}: {page}"
        assert not anchor or anchor in site[path].anchors, f"{place}: {page}"


def test_nothing_is_loaded_from_elsewhere(site: dict[str, Page]) -> None:
    assert [(address, file) for address, page in site.items() for file in page.loaded if "//" in file] == []


def test_images_are_described(site: dict[str, Page]) -> None:
    assert [(address, page.undescribed) for address, page in site.items() if page.undescribed] == []


def test_the_reference_has_the_public_names(site: dict[str, Page]) -> None:
    import openblip

    names = {name for name in openblip.__all__ if not name.endswith("Error")}
    assert {f"openblip.{name}" for name in names} <= site["api.html"].anchors
    assert "openblip.predictor.BasePredictor.caption" in site["api.html"].anchors


def test_no_page_has_the_name_of_one_that_sphinx_makes() -> None:
    """It would be overwritten: the search of the site is search.html."""
    made = {"search", "genindex", "py-modindex"}
    assert not made & {path.stem for path in DOCS.iterdir()}
