"""Errors as messages for a person."""

from __future__ import annotations

from typing import Any


class UsageError(ValueError):
    """A request that cannot be carried out; the message is one line for the person who made it."""


def first_line(error: BaseException) -> str:
    """An error as one line: the first of its message that is not blank, else its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def differences(saved: dict[str, Any], here: dict[str, Any], where: str) -> str:
    """Fields that differ, as "name: value WHERE, now value"; empty where none does."""
    names = [name for name in {**saved, **here} if saved.get(name) != here.get(name)]
    return "; ".join(f"{name}: {saved.get(name)} {where}, now {here.get(name)}" for name in names)
