"""Progress of a long stage: rate and time left, as lines where nothing can be overwritten."""

import re

from prefopt import progress
from prefopt.progress import Progress


def test_a_log_gets_whole_lines_with_rate_and_time_left(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with Progress(4, "Scoring under llama", unit="completions") as bar:
        for _ in range(4):
            bar.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2 and all(line.startswith("Scoring under llama:") for line in lines)
    assert "4/4" in lines[-1] and re.search(r"\[\d+:\d+<\d+:\d+,.*completions/s\]", lines[-1])


def test_nothing_is_printed_where_it_is_not_shown(capsys):
    with Progress(4, "Scoring", unit="rows", shown=False) as bar:
        bar.advance(4)
    assert capsys.readouterr().err == ""
