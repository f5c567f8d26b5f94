"""How Sphinx builds the site: `make docs`."""

from typing import Any

import longspan

project = "longspan"
author = "The longspan authors"
copyright = author  # the name that Sphinx reads
release = version = longspan.__version__
html_theme = "furo"
html_title = "longspan"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 3
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Args of a call", "params_style"), ("Returns of a call", "returns_style")]
default_role = "literal"  # docstrings name code in single backticks
exclude_patterns = ["_build"]


def escape_bars(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """|i - j| in a docstring is an absolute value, not a substitution."""
    lines[:] = [line.replace("|", r"\|") if "``" not in line else line for line in lines]


def skip_fields(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Fields of named tuples are described under Attributes."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("autodoc-skip-member", skip_fields)
