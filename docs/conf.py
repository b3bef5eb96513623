"""Configuration of the documentation: Sphinx, furo, MyST."""

import importlib.metadata

project = "asgi-dbscope"
author = "The asgi-dbscope authors"
copyright = f"2026, {author}"  # noqa: A001 - the name that Sphinx reads
release = importlib.metadata.version("asgi-dbscope")
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "asgi-dbscope"
exclude_patterns = ["_build"]

autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

nitpicky = True
nitpick_ignore_regex = [
    # Building must not need the network, so names of other projects are not resolved.
    (r"py:.*", r"(anyio|asyncio|collections|contextlib|datetime|sqlalchemy|types|typing)\..*"),
    # The same, and builtins, as autodoc prints them; type variables.
    (r"py:.*", r"(?!asgi_dbscope)[A-Z]\w*"),
    (r"py:.*", r"bool|bytes|dict|float|int|list|object|str|tuple|type|optional"),
    (r"py:(class|obj)", r"asgi_dbscope\.(.*\.)?_?[A-Z]"),
]
