"""Configuration of the documentation.

    sphinx-build -W -n --keep-going -b html docs docs/_build/html

Needs no network, and neither do the pages. `fragments` makes what the pages include. External links
are checked where there is a network: HYDROGEL_DOCS_EXTERNAL=1 sphinx-build -b linkcheck docs OUT.
"""

import os
import re
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import pandas
import pyarrow
from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

import fragments  # noqa: E402  (a module beside this file)

import hydrogel_gym  # noqa: E402
from hydrogel_gym.models.mechanistic import MechanisticParams  # noqa: E402

fragments.write()

# What some modules import for type checkers alone.
for _name in fragments.module_names():
    vars(import_module(f"hydrogel_gym.{_name}")).update(pd=pandas, pa=pyarrow)

project = "hydrogel_gym"
author = "the authors of hydrogel_gym"
copyright = "2026, the authors of hydrogel_gym; MIT licence"
version = release = hydrogel_gym.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build", "_generated", "README.md"]
default_role = "literal"  # a single backtick in docstrings

html_theme = "furo"
html_title = f"hydrogel_gym {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 4

# The tutorial is executed, and an error in it is one of the build.
nb_execution_mode = os.environ.get("HYDROGEL_DOCS_EXECUTE", "cache")
if os.environ.get("HYDROGEL_TUTORIAL_SHORT") and nb_execution_mode == "cache":
    nb_execution_mode = "force"  # so that it is not taken for the whole one later
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_output_stderr = "remove"  # progress bars

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# Types of other projects and of the standard library, whose inventories would have to be fetched.
OTHERS = "torch numpy np pandas pd pyarrow pa gymnasium stable_baselines3".split()
OTHERS += "os pathlib collections typing enum".split()
BY_NAME = "Tensor Module PathLike ResetNeeded DependencyNotInstalled".split()
nitpick_ignore_regex = [
    ("py:.*", rf"({'|'.join(OTHERS)})\..*"),
    ("py:.*", "|".join(BY_NAME)),
]

linkcheck_ignore = [] if os.environ.get("HYDROGEL_DOCS_EXTERNAL") else [r"https?://.*"]


def name_constants(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the constants of the built-in model into its equations, where they are named `@name@`."""
    if docname != "reward-model":
        return
    params = MechanisticParams()
    source[0] = re.sub(
        r"@(\w+)@", lambda match: fragments.in_equation(getattr(params, match[1])), source[0]
    )


def prepare_docstring(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Turn what napoleon does not know, or takes for something else, into reStructuredText."""
    if obj is hydrogel_gym.HydrogelEnv:  # Markdown, and a page of its own
        lines[:] = [lines[0], "", "The manual is the page :doc:`/environment`.", ""]
    text = "\n".join(lines)
    # Napoleon would take the words before a colon for a type.
    text = re.sub(r"(?m)^( *)Returns:\n((?:\1 +.*\n?|\n)+)", returned, text)
    # An entry of a bibliography, over one line or several.
    text = re.sub(r"(?m)^( *)(\[\w+\](?:, \[\w+\])*) (.+(?:\n\1(?!\[|$).+)*)", keyed_entry, text)
    lines[:] = text.split("\n")


def returned(match: re.Match[str]) -> str:
    """What a function returns, as a field."""
    indent, text = match.groups()
    text = textwrap.indent(textwrap.dedent(text).strip(), indent + "   ")
    return f"{indent}:returns:\n{text}\n\n"


def keyed_entry(match: re.Match[str]) -> str:
    """An entry as an item of a list."""
    indent, key, text = match.groups()
    return f"{indent}* {key} {' '.join(text.split())}"


def setup(app: Sphinx) -> None:
    """Connect the two changes of what is read; the second comes before napoleon."""
    app.connect("source-read", name_constants)
    app.connect("autodoc-process-docstring", prepare_docstring, priority=400)
