"""docs/extending.md shows real changes: each diff applies to a copy of the repository, and its tests pass there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCK = r"^## (.+?)\n.*?^```diff\n(.*?)^```$.*?^<!-- test: (.+?) -->$"
CHANGES = re.findall(BLOCK, PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_page_shows_a_loss_a_weighting_and_a_ranker():
    assert len(CHANGES) == PAGE.count("```diff") == 3


@pytest.mark.parametrize(("title", "diff", "command"), CHANGES, ids=[title for title, _, _ in CHANGES])
def test_a_change_applies_and_its_tests_pass(title, diff, command, tmp_path):
    for name in ("src", "tests", "docs", "training_configs", "accelerate_configs", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, tmp_path / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, tmp_path / name)
    subprocess.run(["git", "init", "-q", "."], cwd=tmp_path, check=True)  # `git apply` looks for a repository above
    applied = subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, capture_output=True)
    assert applied.returncode == 0, applied.stderr
    words, _, wanted = command.partition(" -k ")
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *shlex.split(words), "-k", wanted]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert re.search(r"\b[1-9]\d* passed", done.stdout), done.stdout[-500:]
