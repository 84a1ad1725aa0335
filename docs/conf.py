"""Configuration of the documentation.

    sphinx-build -W -n --keep-going -b html docs docs/_build/html

Needs no network, and neither do the pages. External links are checked where there is a network:
HYDROGEL_DOCS_EXTERNAL=1 sphinx-build -b linkcheck docs OUT.
"""

import os
import sys
from pathlib import Path

from sphinx.application import Sphinx

import hydrogel_gym

sys.path.insert(0, str(Path(__file__).parent))

import tables  # noqa: E402  (a module beside this file)

project = "hydrogel_gym"
author = "the authors of hydrogel_gym"
copyright = "2026, the authors of hydrogel_gym; MIT licence"
version = release = hydrogel_gym.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
default_role = "literal"  # a single backtick in docstrings

html_theme = "furo"
html_title = f"hydrogel_gym {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False
smartquotes = False

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "substitution"]
myst_heading_anchors = 4
myst_substitutions = tables.substitutions()

# The tutorial is executed, and an error in it is one of the build.
nb_execution_mode = os.environ.get("HYDROGEL_DOCS_EXECUTE", "cache")
if os.environ.get("HYDROGEL_TUTORIAL_SHORT") and nb_execution_mode == "cache":
    nb_execution_mode = "force"  # so that it is not taken for the whole one later
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_output_stderr = "remove"  # progress bars

autosummary_context = {"exports": tables.exports()}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
# Plain text: napoleon would take the words before a colon for a type.
napoleon_custom_sections = ["Returns"]

# Types of other projects and of the standard library, whose inventories would have to be fetched.
OTHERS = "torch nn go plotly numpy np pandas pd pyarrow pa gymnasium gym stable_baselines3".split()
OTHERS += "concurrent os pathlib collections typing enum datetime contextlib importlib".split()
# Names without their module, and what stands for any type.
NAMES = "Tensor Figure Path ResetNeeded DependencyNotInstalled Designs DesignTable DesignPolicy"
NAMES += r" Traversable Infos Agent Class Made dict\[str"
nitpick_ignore_regex = [
    ("py:.*", rf"({'|'.join(OTHERS)})\..*"),
    ("py:.*", rf"(.*\.)?({'|'.join(NAMES.split())})"),
]

linkcheck_ignore = [] if os.environ.get("HYDROGEL_DOCS_EXTERNAL") else [r"https?://.*"]


def fill_equations(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the constants of the built-in model into its equations."""
    if docname == "reward-model":
        source[0] = tables.in_equations(source[0])


def prepare_docstring(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Change what napoleon would misread, before it does."""
    if what in ("attribute", "data", "property"):
        # An empty comment, or napoleon takes the words before a colon for a type.
        lines[:] = ["..", "", *lines]
    # Markdown, and pages of their own.
    pages = {hydrogel_gym.HydrogelEnv: "environment", hydrogel_gym.HydrogelAdaptEnv: "adaptive"}
    if isinstance(obj, type) and obj in pages:
        lines[:] = [lines[0], "", f"The manual is the page :doc:`/{pages[obj]}`.", ""]


def setup(app: Sphinx) -> None:
    """Connect the changes of what is read, those of docstrings before napoleon's."""
    app.connect("source-read", fill_equations)
    app.connect("autodoc-process-docstring", prepare_docstring, priority=400)
