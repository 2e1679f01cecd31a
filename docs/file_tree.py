"""Writes the file tree of docs/architecture.md: one line a file, each with the first sentence that the file says about
itself.

python docs/file_tree.py            (part of `make style`)
python docs/file_tree.py --check    (exit status 1 where docs/architecture.md is out of date)
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- tree: written by docs/file_tree.py -->", "<!-- end of tree -->"
WIDTH = 105
SHOWN = ("src/prefopt/", "benchmarks/", "docs/", "examples/")
FOLDERS = (
    ("scripts/", "one short script a command, for `accelerate launch`: `run_<method>.py`, `<tool>.py`"),
    ("training_configs/", "recipes: `<model>/<method>.yaml`, `quickstart.yaml`"),
    ("accelerate_configs/", "launcher settings: one GPU to several nodes, and CPU ranks for tests"),
    ("tests/", "mirrors src/; `tiny.py` builds models and tokenizers, nothing is downloaded"),
    (".ci/run", "everything, from a fresh clone, within limits"),
    ("Makefile", "set-up, style, quality, test, quickstart, bench, clean"),
    ("constraints.txt", "the versions that all of this runs on"),
)


def file_tree() -> str:
    """The tree as a fenced block."""
    listed = subprocess.run(["git", "ls-files", *SHOWN], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    lines, folder = ["```"], None
    for path in sorted(map(Path, listed.splitlines()), key=lambda path: (path.parent, path.name)):
        summary = describe(ROOT / path) if (ROOT / path).is_file() else None
        if summary is None:
            continue
        if path.parent != folder:
            folder = path.parent
            lines.append(f"{folder.as_posix()}/")
        lines.append(f"    {path.name:<26} {summary}")
    lines += [f"{name:<30} {summary}" for name, summary in FOLDERS]
    return "\n".join([*lines, "```"])


def describe(path: Path) -> str | None:
    """What a module's docstring or a page's title says, in at most `WIDTH` characters; None: not worth a line."""
    if path.suffix == ".md":
        return shorten(path.read_text().splitlines()[0].lstrip("# "))
    if path.suffix != ".py" or path.is_symlink():
        return None
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    if not docstring or path.name == "__main__.py":
        return None
    return shorten(" ".join(docstring.split("\n\n")[0].split()))


def shorten(text: str) -> str:
    """The first sentence of `text`, where it is too long up to its last colon, or to the last whole word."""
    text = text.split(". ")[0].rstrip(".")
    if len(text) <= WIDTH:
        return text
    cut = max(text.rfind(mark, 40, WIDTH) for mark in (": ", "; "))
    return text[:cut] if cut > 0 else text[:WIDTH].rsplit(" ", 1)[0].rstrip(",") + " …"


def main() -> int:
    page = ROOT / "docs/architecture.md"
    text = page.read_text()
    before, rest = text.split(BEGIN)
    updated = f"{before}{BEGIN}\n{file_tree()}\n{END}{rest.split(END)[1]}"
    if "--check" in sys.argv:
        if updated != text:
            print("docs/architecture.md: the file tree is out of date; run `make style`.")
        return int(updated != text)
    page.write_text(updated)
    return 0


if __name__ == "__main__":
    sys.exit(main())
