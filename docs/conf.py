"""How Sphinx builds the site out of these pages: `make docs`, into build/docs.

Warnings are errors there, so a link that leads nowhere, a page outside the navigation and a docstring that cannot be
read end the build. Nothing is fetched, neither while building nor by a reader's browser.
"""

from __future__ import annotations

import builtins
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref, pending_xref_condition
from sphinx.application import Sphinx

import agentmem

project = "agentmem"
author = "the agentmem authors"
project_copyright = author
release = version = agentmem.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["pictures"]

# Links to headings are written as GitHub names them, so that pages work in both places.
myst_heading_anchors = 4
highlight_language = "none"  # of indented blocks: formulas and outlines

# Docstrings hold `names` and ``names``: both are code. Errors and arguments stand in Google's form.
default_role = "literal"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]  # several in a line, as in "Args:"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_display_short_literal_types = True
maximum_signature_line_length = 90

html_theme = "furo"
html_title = f"agentmem {version}"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}


def prepare(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Say in reStructuredText what docstrings say in ways of their own.

    Examples are indented, as Markdown has it. A field's text may hold a colon; it does not begin with the field's type.
    """
    if what == "attribute" and lines:
        before, colon, after = lines[0].partition(": ")
        lines[:1] = [before + colon.strip(), after]  # with nothing behind it the colon ends no type
    marked: list[str] = []
    for line in lines:
        above = next((kept for kept in reversed(marked) if kept), " ")
        if line.startswith("    ") and not marked[-1] and not above.startswith(" "):
            marked += ["::", ""]
        marked.append(line)
    lines[:] = marked


def leave_builtins(app: Sphinx, document: nodes.document) -> None:
    """`bytes` in a signature is Python's, not the field of that name which some class of ours has."""
    for reference in list(document.findall(pending_xref)):
        if reference.get("refdomain") == "py" and hasattr(builtins, reference["reftarget"]):
            # A name stands there twice, for a reference that is found and for one that is not: here the same.
            forms = list(reference.findall(pending_xref_condition))
            reference.replace_self(forms[0].children if forms else reference.children)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", prepare, priority=400)  # before napoleon reads the sections
    app.connect("doctree-read", leave_builtins)
