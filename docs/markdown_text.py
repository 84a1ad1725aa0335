"""Markdown as text: its headings, sections, links and tables."""

from __future__ import annotations

import re
from collections.abc import Iterator

FENCE = re.compile(r"^```.*?^```[ \t]*$", re.MULTILINE | re.DOTALL)


HEADING = re.compile(r"^(#{1,4}) +(.+?) *$", re.MULTILINE)


LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def slug(heading: str) -> str:
    """Anchor of a heading, in GitHub's manner, which is MyST's too."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def without_code(text: str) -> str:
    """The text with blanks for what fences and backticks hold, of the same length."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    return re.sub(r"`[^`\n]+`", blank, FENCE.sub(blank, text))


def headings(text: str) -> Iterator[re.Match[str]]:
    """Headings of a Markdown text that are not within code; spans hold in the text as it is."""
    hidden = FENCE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    yield from HEADING.finditer(hidden)


def anchors(text: str) -> set[str]:
    """Anchors of all headings of a Markdown text."""
    return {slug(match[2]) for match in headings(text)}


def links(text: str) -> list[str]:
    """Targets of the links and pictures of a Markdown text."""
    return [match[3] for match in LINK.finditer(FENCE.sub("", text))]


def sections(text: str) -> dict[str, str]:
    """What lies between a heading and the next of any level, by the heading's anchor."""
    found = list(headings(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    return {
        slug(match[2]): text[match.end() : end].strip() + "\n"
        for match, end in zip(found, ends, strict=True)
    }


def demoted(text: str, levels: int) -> str:
    """The text with headings so many levels further down."""
    for match in reversed(list(headings(text))):
        text = text[: match.start()] + "#" * levels + text[match.start() :]
    return text


def without_title(text: str) -> str:
    """The text without its first heading of the first level."""
    return re.sub(r"\A# .*\n+", "", text)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )
