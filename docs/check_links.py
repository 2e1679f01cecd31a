"""Check the links of the built site, offline: every page, file and anchor that a page of it names is there.

python docs/check_links.py docs/_build/html     (part of `make docs`)
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.append(value)
            if name == "id" and value:
                self.anchors.add(value)


def broken_links(folder: Path) -> list[str]:
    """Return a line for each link that leads nowhere."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    broken = []
    for path, page in pages.items():
        for link in dict.fromkeys(page.links):
            target, anchor = urldefrag(link)
            if urlparse(target).scheme or target.startswith("//"):
                continue
            place = (path.parent / unquote(target.partition("?")[0])).resolve() if target else path
            if place.is_dir():
                place = place / "index.html"
            if not place.is_file():
                broken.append(f"{path.relative_to(folder.resolve())}: {link}: no such file")
            elif anchor and place in pages and unquote(anchor) not in pages[place].anchors:
                broken.append(f"{path.relative_to(folder.resolve())}: {link}: no such anchor")
    return broken


def main() -> int:
    """Print the broken links of a folder; the exit status is 1 if there are any."""
    folder = Path(sys.argv[1])
    broken = broken_links(folder)
    print("\n".join(broken) or f"{folder}: every link leads somewhere.")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
