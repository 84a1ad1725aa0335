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
from typing import TypeVar

import pandas
import pyarrow
from docutils.nodes import Element
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

import fragments  # noqa: E402  (a module beside this file)

import hydrogel_gym  # noqa: E402
from hydrogel_gym.models.mechanistic import MechanisticParams  # noqa: E402

fragments.write()

# What some modules import for type checkers alone.
MODULES = [import_module(f"hydrogel_gym.{name}") for name in fragments.module_names()]
for _module in MODULES:
    vars(_module).update(pd=pandas, pa=pyarrow)

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
OTHERS = "torch nn go plotly numpy np pandas pd pyarrow pa gymnasium gym stable_baselines3".split()
OTHERS += "concurrent os pathlib collections typing enum datetime contextlib importlib".split()
BY_NAME = "Tensor Module Figure Path PathLike ResetNeeded DependencyNotInstalled".split()
BY_NAME += [
    *"DesignPolicy Designs Infos".split(),
    r"dict\[str",
]  # names of types, and a part of one
# What stands for any type is described nowhere.
BY_NAME += [
    rf"{re.escape(module.__name__)}\.{name}"
    for module in MODULES
    for name, value in vars(module).items()
    if isinstance(value, TypeVar)
]
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
    if what in ("attribute", "data", "property"):
        # An empty comment, or napoleon takes the words before a colon for a type.
        lines[:] = ["..", "", *lines]
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


def resolve_exported(
    app: Sphinx, env: BuildEnvironment, node: Element, contnode: Element
) -> Element | None:
    """Lead a reference to a name that a module exports to where the name is described."""
    target = node.get("reftarget", "")
    module, _, name = target.rpartition(".")
    if module.partition(".")[0] != "hydrogel_gym" or module not in sys.modules:
        return None
    home = getattr(getattr(sys.modules[module], name, None), "__module__", module)
    if home == module:
        return None
    return env.get_domain("py").resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], f"{home}.{name}", node, contnode
    )


def setup(app: Sphinx) -> None:
    """Connect the changes of what is read, those of docstrings before napoleon, and of links."""
    app.connect("source-read", name_constants)
    app.connect("autodoc-process-docstring", prepare_docstring, priority=400)
    app.connect("missing-reference", resolve_exported)
