"""`openblip docs` shows pages and sections. That errors point to some that are there: tests/test_documentation.py."""

from typing import Any

import pytest

from openblip.cli.docs import read_page
from openblip.cli.main import main


def test_a_section_ends_where_the_next_of_its_depth_begins() -> None:
    section = read_page("install#extras")
    assert section.startswith("## Extras\n")
    assert "| `search` |" in section
    assert "## As a container" not in section
    assert section in read_page("install.md")
    headings = [line for line in read_page("image-search").splitlines() if line.startswith("#")]
    assert read_page("image-search#searching-your-own-images") == read_page("image-search")
    assert len(headings) > 2


def test_pages_are_listed_with_their_titles(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docs"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert listed["errors"] == "What errors mean"
    assert "contributing" not in listed  # the site makes it of another file


def test_what_is_not_there(refusal: Any) -> None:
    assert "no page instal; did you mean install?" in refusal("docs", "instal")
    assert "no section extra in install; did you mean extras?" in refusal("docs", "install#extra")
