"""How Sphinx builds the site from these pages: `make docs`, into build/docs.

Warnings are errors: a broken link, a page outside the navigation or a docstring that cannot be parsed ends the build.
Nothing is downloaded, neither while building nor by a reader's browser.
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

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["pictures"]

# Links to headings are written as GitHub names them, so that pages work in both places.
myst_heading_anchors = 4
highlight_language = "none"  # of indented blocks: formulas and outlines

# `names` in docstrings are code. Errors and arguments are in Google's form.
default_role = "literal"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]  # several in a line, as in "Args:"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_display_short_literal_types = True
maximum_signature_line_length = 90

# In a console block the button copies the commands, without the prompt and without their output.
copybutton_prompt_text = "$ "

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"agentmem {version}"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}


def prepare(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Convert the parts of a docstring that are not reStructuredText.

    Examples are only indented, as in Markdown. A field's text may contain a colon that does not follow a type.
    """
    if what == "attribute" and lines:
        before, colon, after = lines[0].partition(": ")
        lines[:1] = [before + colon.strip(), after]  # with nothing after it the colon does not end a type
    marked: list[str] = []
    for line in lines:
        above = next((kept for kept in reversed(marked) if kept), " ")
        if line.startswith("    ") and not marked[-1] and not above.startswith(" "):
            marked += ["::", ""]
        marked.append(line)
    lines[:] = marked


def leave_builtins(app: Sphinx, document: nodes.document) -> None:
    """Make names like `bytes` in a signature refer to Python's type, not to a field of that name in our classes."""
    for reference in list(document.findall(pending_xref)):
        if reference.get("refdomain") == "py" and hasattr(builtins, reference["reftarget"]):
            # The name is there twice, for a resolved and for an unresolved reference; here both are the same.
            forms = list(reference.findall(pending_xref_condition))
            reference.replace_self(forms[0].children if forms else reference.children)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", prepare, priority=400)  # before napoleon reads the sections
    app.connect("doctree-read", leave_builtins)
