"""The fuzzer: it counts, repeats itself, and shows what it finds."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter

import pytest
from hypothesis import strategies as st

from benchmarks import fuzz


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_every_target_holds_for_a_few_inputs(name):
    counts: Counter[str] = Counter()
    assert fuzz.run_round(name, dataclasses.replace(fuzz.TARGETS[name], a_round=5), 3, counts) is None
    assert counts[name] == 5


def test_a_find_is_shown_with_its_smallest_example_and_ends_with_status_1(monkeypatch, capsys):
    def is_small(number: int) -> None:
        if number >= 1000:
            raise TypeError("no such luck")

    monkeypatch.setattr(fuzz, "TARGETS", {"numbers": fuzz.Target(is_small, st.integers())})
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--minutes", "1", "--seed", "5"])
    assert fuzz.main() == 1
    printed = capsys.readouterr().out
    assert "FOUND numbers (seed" in printed and "TypeError: no such luck" in printed and "with 1000" in printed
    assert "1 finds" in printed


def test_the_same_seed_draws_the_same_inputs():
    drawn: list[list[object]] = []
    for _ in range(2):
        drawn.append([])
        target = dataclasses.replace(fuzz.TARGETS["yaml"], check=drawn[-1].append, a_round=20)
        fuzz.run_round("yaml", target, 7, Counter())
    assert drawn[0] == drawn[1] and len(drawn[0]) == 20


def test_a_message_that_nobody_reads_is_a_find():
    def silent() -> None:
        raise ValueError(" ")

    with pytest.raises(AssertionError, match="must say something"):
        fuzz.one_line(silent)
