"""Pages as Markdown and HTML: tables, figures, text of data made harmless; matplotlib where it is installed."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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


def counted(number: int, one: str, several: str | None = None) -> str:
    """Write a number with its noun: 1 process, 2 processes; `several` defaults to `one` with an s."""
    return f"{number} {one if number == 1 else several or f'{one}s'}"


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


# ---- pages of blocks, written as Markdown or as one HTML file


class Own(str):
    """Text that prefopt wrote itself (numbers, intervals): Markdown needs no escapes for it."""


class Strong(str):
    """Text of unknown origin that stands out."""


@dataclass(frozen=True)
class Heading:
    """A heading of the second level, or a lower one."""

    text: str
    level: int = 2

    def markdown(self) -> list[str]:
        """Return the block's lines."""
        return [f"{'#' * self.level} {_cell(self.text)}", ""]

    def html(self) -> str:
        """Return the block's element."""
        return f"<h{self.level}>{_html(self.text)}</h{self.level}>"


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of texts, some of them `Strong` or prefopt's `Own`."""

    parts: tuple[str, ...]

    def __init__(self, *parts: str) -> None:
        object.__setattr__(self, "parts", parts)

    def markdown(self) -> list[str]:
        """Return the block's lines."""
        return ["".join(_inline(part) for part in self.parts), ""]

    def html(self) -> str:
        """Return the block's element."""
        inner = (f"<strong>{_html(p)}</strong>" if isinstance(p, Strong) else _html(p) for p in self.parts)
        return f"<p>{''.join(inner)}</p>"


@dataclass(frozen=True)
class Table:
    """A table; cells are shown as `str` shows them."""

    head: Sequence[object]
    rows: Sequence[Sequence[object]]

    def markdown(self) -> list[str]:
        """Return the block's lines."""
        return [*table(list(map(_cell, self.head)), [list(map(_cell, row)) for row in self.rows]), ""]

    def html(self) -> str:
        """Return the block's element."""
        head = "".join(f"<th>{_html(cell)}</th>" for cell in self.head)
        rows = "\n".join(f"<tr>{''.join(f'<td>{_html(cell)}</td>' for cell in row)}</tr>" for row in self.rows)
        return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>'


@dataclass(frozen=True)
class Figures:
    """SVG elements of `prefopt.charts`, side by side; in Markdown a picture of the file `file`, where there is one."""

    drawn: Sequence[str]
    title: str = ""
    file: str | None = None

    def markdown(self) -> list[str]:
        """Return the block's lines."""
        return [] if self.file is None else [picture(self.title, self.file), ""]

    def html(self) -> str:
        """Return the block's element."""
        return f'<div class="figures">{"".join(f"<figure>{svg}</figure>" for svg in self.drawn)}</div>'


@dataclass(frozen=True)
class Sample:
    """A prompt and what was written after it, each with the writer's name; `note` (a score) stands beside the name."""

    prompt: str
    answers: Sequence[tuple[str, str, str]]  # name, note, text

    def markdown(self) -> list[str]:
        """Return the block's lines."""
        lines = [f"> **{escape(self.prompt)}**", ">"]
        for name, note, text in self.answers:
            lines += [f"> *{escape(name)}*{note}: {escape(text)}", ">"]
        return [*lines, ""]

    def html(self) -> str:
        """Return the block's element."""
        answers = "".join(
            f"<dt>{_html(name)}{_html(note)}</dt><dd>{_html(text, lines=True)}</dd>"
            for name, note, text in self.answers
        )
        return f'<div class="sample"><p>{_html(self.prompt, lines=True)}</p><dl>{answers}</dl></div>'


@dataclass(frozen=True)
class Details:
    """A long text that is folded away until it is asked for."""

    summary: str
    text: str

    def markdown(self) -> list[str]:
        """Return the block's lines."""
        return [f"{escape(self.summary)}:", "", "```", fenced(self.text.rstrip()), "```", ""]

    def html(self) -> str:
        """Return the block's element."""
        return f"<details><summary>{_html(self.summary)}</summary><pre>{_html(self.text)}</pre></details>"


Block = Heading | Paragraph | Table | Figures | Sample | Details


def markdown_page(title: str, blocks: Sequence[Block]) -> str:
    """Write a page as Markdown."""
    return "\n".join([f"# {escape(title)}", "", *(line for block in blocks for line in block.markdown())])


def html_page(title: str, blocks: Sequence[Block]) -> str:
    """Write a page as one HTML file that fetches nothing: its policy forbids scripts, and whatever is not in it."""
    body = "\n".join(block.html() for block in blocks)
    return _HTML_PAGE.format(title=_html(title), body=body)


def _inline(part: str) -> str:
    return f"**{escape(part)}**" if isinstance(part, Strong) else part if isinstance(part, Own) else _spaced(part)


def _spaced(text: str) -> str:
    """Escape a part of a line, keeping the spaces that part it from its neighbours."""
    inner = escape(text)
    return f"{' ' if text[:1].isspace() else ''}{inner}{' ' if text[-1:].isspace() and inner else ''}"


def _cell(value: object) -> str:
    return str(value) if isinstance(value, (Own, int, float)) else escape(value)


def _html(value: object, *, lines: bool = False) -> str:
    """Return text of unknown origin as HTML that shows it literally."""
    text = html.escape(printable(str(value)))
    return text.replace("\n", "<br>") if lines else text


_HTML_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; color: #1f2328;
  max-width: 1120px; margin: 2rem auto; padding: 0 1.2rem; }}
h1 {{ font-size: 1.7rem; }} h2 {{ margin-top: 2.2rem; border-bottom: 1px solid #d8dee4; padding-bottom: .2rem; }}
h1, h2, h3, p, td, dd {{ overflow-wrap: anywhere; }}
.scroll {{ overflow-x: auto; margin: .8rem 0; }} td:first-child {{ white-space: nowrap; }}
table {{ border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }}
th, td {{ border: 1px solid #d8dee4; padding: .28rem .6rem; text-align: left; vertical-align: top; }}
th {{ background: #f6f8fa; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr)); gap: 1rem; }}
figure {{ margin: 0; border: 1px solid #d8dee4; border-radius: 6px; padding: .4rem; }}
svg {{ display: block; width: 100%; height: auto; }}
.sample {{ border-left: 3px solid #d8dee4; padding-left: .9rem; margin: 1.2rem 0; font-size: .92rem; }}
.sample p {{ font-weight: 600; margin: 0 0 .4rem; }}
details {{ margin: .6rem 0; }} pre {{ background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: .82rem; }}
dt {{ color: #59636e; font-size: .85rem; }} dd {{ margin: 0 0 .5rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


# ---- matplotlib


def figure_class() -> Any:
    """Import matplotlib's `Figure`, which needs no display; return None without matplotlib (the extra `plots`)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure
