"""The option for screenshots of the page."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--page-screenshots", metavar="DIR", help="write screenshots of the page for the docs to this folder"
    )
