"""Tables of the scripts' flags, read from their dataclasses."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import io
import tokenize
from types import ModuleType
from typing import Any, NamedTuple

from markdown_text import table


def class_source(kind: type) -> ast.ClassDef:
    """Syntax tree of a class."""
    return ast.parse(inspect.getsource(kind)).body[0]


def recipe(name: str) -> ModuleType:
    """A script of `train/` as a module."""
    return importlib.import_module(f"hydrogel_gym.train.{name}")


class Flag(NamedTuple):
    """A field of a script's `Args`."""

    name: str
    default: Any
    meaning: str
    section: str  # "" where the source has no heading


def flags(kind: type) -> list[Flag]:
    """Fields of a dataclass with the texts below them, those of its bases first."""
    below: dict[str, tuple[str, str]] = {}
    for base in reversed(kind.__mro__[:-1]):
        source = inspect.getsource(base)
        comments = {
            token.start[0]: token.string.removeprefix("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT and token.line.strip() == token.string
        }
        body, section = class_source(base).body, ""
        for node, following in zip(body, [*body[1:], None], strict=True):
            if not isinstance(node, ast.AnnAssign):
                continue
            section = comments.get(node.lineno - 1, section)
            text = following.value.value if isinstance(following, ast.Expr) else ""
            below[node.target.id] = " ".join(text.split()), section
    return [Flag(f.name, f.default, *below[f.name]) for f in dataclasses.fields(kind)]


def shown(value: Any) -> str:
    """A default as a flag's value is written."""
    if value is dataclasses.MISSING:
        return "required"
    if value is None or value == ():
        return ""
    return f"`{value}`"


def spelled(flag: Flag) -> str:
    """The flag as it is typed."""
    word = flag.name.replace("_", "-")
    if flag.default is dataclasses.MISSING:
        return f"`{word.upper()}`"
    if isinstance(flag.default, bool):
        return f"`--no-{word}`" if flag.default else f"`--{word}`"
    return f"`--{word}`"


def flag_tables(every: list[Flag]) -> str:
    """A table of flags for each section of a script's `Args`."""
    parts = []
    for section in dict.fromkeys(flag.section for flag in every):
        rows = [
            (
                spelled(flag),
                "" if isinstance(flag.default, bool) else shown(flag.default),
                f"{'turns off: ' if flag.default is True else ''}{flag.meaning}",
            )
            for flag in every
            if flag.section == section
        ]
        head = f"**{section}**\n\n" if section else ""
        parts.append(head + table(("flag", "default", "meaning"), rows))
    return "\n".join(parts)


def preset_table(trainer: ModuleType) -> str:
    """What the presets of the trainer set."""
    presets = {name: trainer.Args(preset=name, **given) for name, given in trainer.PRESETS.items()}
    rows = [
        (
            f"`--{name.replace('_', '-')}`",
            *(shown(getattr(args, name)) for args in presets.values()),
        )
        for name in dict.fromkeys(key for given in trainer.PRESETS.values() for key in given)
    ]
    return table(("flag", *presets), rows)
