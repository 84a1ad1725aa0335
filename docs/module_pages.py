"""A page for each module of the package, found recursively, so that none is forgotten."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from importlib.util import find_spec
from types import ModuleType

from markdown_text import table

import hydrogel_gym

# Order of reading; what is not named comes after these.
MODULES = (
    "env spaces wrappers sb3 problem problem.fields problem.polymers problem.cohort problem.reward "
    "problem.dynamics models models.contract envs envs.single envs.vector envs.spaces oracle "
    "oracle.best oracle.search designs runs report memory compiled files errors"
).split()


NOT_DESCRIBED = ("patients", "train")  # data, and scripts, whose flags have pages of their own


def module_names() -> list[str]:
    """Modules and packages of the package, at any depth, in the order of reading.

    What needs a library that is not installed is left out.
    """
    needing = () if find_spec("stable_baselines3") else ("sb3", "envs.sb3")
    have, prefix = [], "hydrogel_gym."
    for module in pkgutil.walk_packages(hydrogel_gym.__path__, prefix, raise_import_error):
        name = module.name.removeprefix(prefix)
        if name.partition(".")[0] not in NOT_DESCRIBED and name not in needing:
            have.append(name)
    known = [name for name in MODULES if name in have]
    return known + sorted(set(have) - set(known))


def raise_import_error(name: str) -> None:
    """Let no package that cannot be imported be passed over."""
    raise ImportError(f"{name} cannot be imported, and would be missing from the reference")


def modules_in(package: str) -> list[str]:
    """Modules and packages right below a package, or below all of them if it is ""."""
    return [name for name in module_names() if name.rpartition(".")[0] == package]


def only_exports(module: ModuleType) -> bool:
    """Whether a module has no code of its own, but names from elsewhere."""
    body = ast.parse(inspect.getsource(module)).body
    kinds = (ast.Import, ast.ImportFrom, ast.Expr)
    own = [node for node in body if not isinstance(node, kinds)]
    return len(own) == 1 and ast.unparse(own[0]).startswith("__all__ = ")


def module_page(name: str) -> str:
    """The page of a module in the reference; that of a package lists what is in it."""
    full = f"hydrogel_gym.{name}"
    title = full.replace("_", r"\_")
    exports = only_exports(module := importlib.import_module(full))
    options = "" if exports else "   :members:\n   :show-inheritance:\n"
    text = f"# {title}\n\n```{{eval-rst}}\n.. automodule:: {full}\n{options}"
    text += ("   :no-members:\n" if exports else "") + "```\n"
    if exports:
        text += f"\n{exported_names(module)}"
    if inside := modules_in(name):
        text += f"\n{contents(inside)}"
    return text


def contents(names: list[str], folder: str = "") -> str:
    """A table of contents of some modules' pages."""
    lines = [f"{folder}{name}\n" for name in names]
    return "".join(["```{toctree}\n:maxdepth: 1\n\n", *lines, "```\n"])


def exported_names(module: ModuleType) -> str:
    """What a module exports that others describe, and where."""
    rows = []
    for name in module.__all__:
        thing = getattr(module, name)
        if not inspect.isclass(thing) and not inspect.isfunction(thing):
            rows.append((f"`{name}`", "a constant"))
            continue
        kind = "class" if inspect.isclass(thing) else "func"
        first = inspect.getdoc(thing).splitlines()[0].rstrip(".")
        rows.append((f"{{py:{kind}}}`{name} <{thing.__module__}.{name}>`", first))
    return table(("name", ""), rows)
