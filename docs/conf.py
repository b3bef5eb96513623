"""Configuration of the documentation: Sphinx, furo, MyST."""

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

# Our own directive: tables that the code says.
sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "asgi-dbscope"
author = "The asgi-dbscope authors"
copyright = f"2026, {author}"  # noqa: A001 - the name that Sphinx reads
release = importlib.metadata.version("asgi-dbscope")
version = release

extensions = [
    "directives",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "asgi-dbscope"
html_static_path = ["_static"]
html_css_files = ["rendered.css"]
exclude_patterns = ["_build"]

# Base classes of the integrations; their libraries are not needed to read about them.
autodoc_mock_imports = ["faststream", "taskiq"]
autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

nitpicky = True
nitpick_ignore_regex = [
    # Building must not need the network, so names of other projects are not resolved.
    (r"py:.*", r"(anyio|asyncio|collections|contextlib|datetime|sqlalchemy|time|types|typing)\..*"),
    # The same, and builtins, as autodoc prints them; type variables.
    (r"py:.*", r"(?!asgi_dbscope)[A-Z]\w*"),
    (r"py:.*", r"(async_)?sessionmaker"),
    (r"py:.*", r"bool|bytes|dict|float|int|list|object|str|tuple|type|optional"),
    # Signatures name the private module that a public name comes from.
    (r"py:.*", r"asgi_dbscope\._.*"),
]


# Napoleon takes what stands before a colon in an attribute's docstring for its type.
_docstrings: dict[str, list[str]] = {}


def keep_docstring(app: Any, what: str, name: str, *rest: Any) -> None:
    """Before napoleon: remember the docstring of an attribute."""
    if what in {"attribute", "data", "property"}:
        _docstrings[name] = [*rest[-1]]


def restore_docstring(app: Any, what: str, name: str, *rest: Any) -> None:
    """After napoleon: put the docstring of an attribute back."""
    rest[-1][:] = _docstrings.pop(name, rest[-1])


def setup(app: Any) -> None:
    """Run around napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", keep_docstring, priority=400)
    app.connect("autodoc-process-docstring", restore_docstring, priority=600)
