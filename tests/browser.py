"""A headless Chromium, where the machine has one: what a page really looks like."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=2000",
)  # fmt: skip
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


def browser() -> str:
    """The browser's path; the test is skipped where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed (Debian: apt-get install chromium)")
    return found


def _run(folder: Path, *words: str) -> str:
    command = [browser(), *OPTIONS, f"--user-data-dir={folder / 'profile'}", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def screenshot(page: Path, picture: Path, *, width: int, height: int) -> None:
    """Take a picture of a page as it is."""
    _run(picture.parent, f"--window-size={width},{height}", f"--screenshot={picture}", page.as_uri())


def evaluate(page: Path, expression: str, folder: Path, *, width: int, height: int) -> Any:
    """What a JavaScript expression gives in the page, whose policy forbids scripts: in a copy without the policy."""
    text, count = POLICY.subn("", page.read_text())
    assert count == 1, "the page has no policy against requests"
    script = f"<script>document.title = JSON.stringify({expression})</script></body>"
    copy = folder / "measured.html"
    copy.write_text(text.replace("</body>", script))
    dom = _run(folder, f"--window-size={width},{height}", "--dump-dom", copy.as_uri())
    return json.loads(unescape(re.search(r"<title>(.*?)</title>", dom, re.S)[1]))
