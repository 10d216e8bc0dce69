"""The documentation site: `python -m sphinx -W -n docs build/site`, with `pip install "openblip[docs]"`.

The pages are plain Markdown that a code host shows as well. index.md lists them all, and the site's contents are made
of its lists: a new page needs a line there and nothing here. api.rst takes the reference from docstrings.
"""

import ast
import inspect
import re
import textwrap
from typing import Any

from sphinx.application import Sphinx

from openblip import __version__

project, author, release = "OpenBLIP", "the authors of OpenBLIP", __version__
copyright = f"2026, {author}"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["images/*.py"]

myst_heading_anchors = 4  # links to headings, as code hosts form them
nb_execution_mode = "off"  # a test runs the notebook; the site shows the outputs that are in it

highlight_language = "none"  # of blocks that name no language: what programs print, and commands in docstrings

html_theme = "furo"
html_title = f"OpenBLIP {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

default_role = "literal"  # docstrings write `name`, as Markdown does
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
nitpick_ignore_regex = [("py:.*", ".*")]  # types in signatures, most of which have no page here; links are checked


def add_contents(app: Sphinx, page: str, text: list[str]) -> None:
    """Give index.md its toctrees: one for each heading with a list of pages below it."""
    if page != "index":
        return
    for heading, section in re.findall(r"^## (.+)\n((?:(?!## ).*\n?)*)", text[0], re.MULTILINE):
        pages = re.findall(r"^- \[([^\]]+)\]\(([\w-]+)\.(?:md|rst|ipynb)\)", section, re.MULTILINE)
        if pages:
            entries = "\n".join(f"{title} <{name}>" for title, name in pages)
            text[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {heading}\n\n{entries}\n```\n"


def mark_up_docstring(app: Sphinx, what: str, name: str, documented: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are prose with `code`, and with commands indented below a line: make reStructuredText of that."""
    marked: list[str] = []
    is_command, is_list = False, False  # of a command, or of arguments as napoleon reads them
    for line in lines:
        if not line.startswith(" "):
            marked += [""] if is_command else []
            is_command, is_list = False, line in ("Args:", "Raises:") or (is_list and not line)
        elif not is_list and not is_command and marked and marked[-1]:
            marked += ["", "::", ""]
            is_command = True
        parts = [line] if is_command else line.split("`")
        if not is_command:
            parts[::2] = [re.sub(r"([*|\\]|_\b)", r"\\\1", part) for part in parts[::2]]
        marked.append("`".join(parts))
    lines[:] = marked


def written_signature(
    app: Sphinx, what: str, name: str, documented: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """The parameters as the source has them: `images: Images`, where autodoc would list all types that this means."""
    function = inspect.unwrap(documented.__init__ if what == "class" else documented)
    if not inspect.isfunction(function) or function.__code__.co_filename == "<string>":  # made by dataclass
        return None
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(definition, ast.FunctionDef)
    arguments = definition.args
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        del arguments.args[0]
    return f"({ast.unparse(arguments)})", ast.unparse(definition.returns) if definition.returns else None


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", mark_up_docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", written_signature)
