"""Docstrings are written as plain Markdown under Google's headings; autodoc reads reStructuredText."""

from __future__ import annotations

import re

SECTIONS = ("Args:", "Attributes:", "Returns:", "Raises:", "Yields:", "Reference:", "Example:")


def to_rst(lines: list[str]) -> None:
    """Translate a docstring in place: fences and indented formulas to literal blocks, `code` to ``code``."""
    done: list[str] = []
    fence = in_section = in_block = False
    for number, line in enumerate(lines):
        if line.strip().startswith("```"):
            fence = not fence
            done += ["", ".. code-block:: python", ""] if fence else [""]
            continue
        if fence:
            done.append(f"    {line}")
            continue
        if not line.strip():
            done.append(line)
            continue
        indented = line.startswith(" ")
        if not indented:
            in_section, in_block = line.strip() in SECTIONS, False
        before_is_blank = number == 0 or not lines[number - 1].strip()
        if indented and not in_section and before_is_blank and not in_block:
            done += ["::", ""]
            in_block = True
        if line.strip() == "Example:":
            done += ["**Example**", ""]
        elif line.startswith("Reference:"):
            done.append(_inline(line))
        else:
            done.append(line if in_block else _inline(line))
    lines[:] = done


def _inline(text: str) -> str:
    """Double the marks of code, and escape what reStructuredText would read as marks of its own."""
    done: list[str] = []
    for part in re.split(r"(``[^`]+``|`[^`]+`)", text):
        if part.startswith("`"):
            done.append(part if part.startswith("``") else f"`{part}`")
            continue
        # a literal ends at white space or punctuation: `code`s would not
        joined = "\\ " if done and part[:1].isalnum() else ""
        done.append(joined + re.sub(r"([*|\\])", r"\\\1", part))
    return "".join(done)
