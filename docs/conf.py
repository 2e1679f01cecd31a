"""Settings of the site: Sphinx, MyST and furo; `make docs` builds it with warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]

import generated_pages
from markdown_docstrings import to_rst

import prefopt

project = "prefopt"
author = "The prefopt authors"
copyright = author
release = version = prefopt.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "generated/tables", "**/.ipynb_checkpoints"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # the notebooks bring their outputs; `make notebooks` runs them

html_theme = "furo"
html_title = "prefopt"
html_show_sphinx = False
html_copy_source = False
html_static_path: list[str] = []

autodoc_typehints = "none"  # signatures have them
autodoc_member_order = "bysource"
autodoc_default_options = {
    "members": True,
    # tables and types of the code's own
    "exclude-members": "pair_loss_table, config_class, metric_minima, metric_maxima, args, model",
    "no-value": True,
}
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes are described with their class, once
napoleon_google_docstring = True


def setup(app) -> None:
    """Write the pages that come from the code before anything is read, and let docstrings be Markdown."""
    generated_pages.write(HERE / "generated")
    app.connect("autodoc-process-docstring", lambda app, what, name, obj, options, lines: to_rst(lines), priority=100)
