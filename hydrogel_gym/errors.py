"""What is said when something is refused."""

from __future__ import annotations


class UsageError(ValueError):
    """A request that cannot be carried out; the message is one line for the person who made it."""


def first_line(error: BaseException) -> str:
    """An error as one line: the first of its message that is not blank, else its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
