"""Markdown pages and their pictures: tables, text of data made harmless, matplotlib where it is installed."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

# what Markdown reads as emphasis, code, links, images, cells, strikethrough or formulas
_MARKDOWN = re.compile(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w))")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# categories of characters that show nothing and may act: controls (ANSI escapes), formats (overridden direction,
# invisible joiners), surrogates that cannot be encoded, and line separators that are not the line feed
_ACTING = ("Cc", "Cf", "Cs", "Zl", "Zp")
# joiners of emoji and of several scripts
_KEPT = "\n\t\u200c\u200d"


def printable(text: str) -> str:
    """Replace the characters of `text` that a terminal would act on; line feeds and tabs stay."""
    return "".join(
        "\ufffd" if character not in _KEPT and unicodedata.category(character) in _ACTING else character
        for character in text
    )


def escape(text: object) -> str:
    """Return text of unknown origin as one line that Markdown and HTML show literally: no tag, link, image or cell."""
    line = printable(" ".join(str(text).split()))
    line = _MARKDOWN.sub(r"\\\1", "".join(_HTML.get(character, character) for character in line))
    # bare addresses become links on their own
    return re.sub(r"(?i)(https?|ftp|mailto|xmpp|www)([:.])", lambda found: f"{found[1]}&#{ord(found[2])};", line)


def fenced(text: str) -> str:
    """Return text for a block of three backticks, which it cannot end early."""
    return printable(text).replace("```", "\u02cb\u02cb\u02cb")


def picture(title: str, path: str) -> str:
    """Return the Markdown of a picture that lies beside the page; no character of its path ends the link early."""
    return f"![{title}]({quote(path)})"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [
        "".join(f"| {cell} " if cell != "" else "| " for cell in cells) + "|"
        for cells in (head, ["---"] * len(head), *rows)
    ]


def figure_class() -> Any:
    """Import matplotlib's `Figure`, which needs no display; return None without matplotlib (the extra `plots`)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure
