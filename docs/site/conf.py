"""Sphinx configuration of the documentation site. `build.py` calls it."""

from __future__ import annotations

from importlib.metadata import version as installed_version

from docutils import nodes
from sphinx.application import Sphinx

project = "Two-Tower Rec"
author = "Two-Tower Rec contributors"
copyright = author
release = version = installed_version("two-tower-rec")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
suppress_warnings = ["misc.highlighting_failure"]  # examples shorten JSON with "…"

myst_heading_anchors = 4  # the fragments that code hosts make of headings
myst_enable_extensions = ["attrs_inline", "html_image"]

default_role = "code"  # docstrings write names in single backticks
napoleon_google_docstring = False
napoleon_use_ivar = False
smartquotes = False  # "auto" in a text is a value: its quotes stay
napoleon_use_rtype = False
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 130

html_theme = "furo"
html_title = project
html_favicon = html_logo = "../../src/twotower/serving/page/icon.svg"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = html_show_sourcelink = html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#2456c8", "color-brand-content": "#2456c8", "color-brand-visited": "#2456c8"},
    "dark_css_variables": {"color-brand-primary": "#8ab0ff", "color-brand-content": "#8ab0ff", "color-brand-visited": "#8ab0ff"},
}


def setup(app: Sphinx) -> None:
    """Extend Sphinx."""
    app.connect("doctree-resolved", _dashes)


def _dashes(_: Sphinx, doctree: nodes.document, name: str) -> None:
    """Write a dash where the lists of parameters and errors have two hyphens; elsewhere "--" begins an option."""
    if name == "reference/python":
        for text in list(doctree.findall(nodes.Text)):
            if text == " -- ":
                text.parent.replace(text, nodes.Text(" – "))
