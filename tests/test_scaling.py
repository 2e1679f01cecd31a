"""The tables of docs/scaling.md are those of the code, and the arithmetic under them that of a case worked by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[1] / "docs" / "scaling.py"


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("docs_scaling", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_up_to_date(scaling):
    page = scaling.PAGE.read_text()
    assert scaling.written(page) == page, "run `python docs/scaling.py`"


def test_gathers_of_eight_gpus(scaling):
    """Seven eighths of 4 x 16.06 GB are 56.2 GB: 0.187 s at 300 GB/s, and 4 x 32 calls of 7 hops of 5 us, 4.5 ms."""
    assert scaling.gather_bytes(8) == pytest.approx(56.2e9, rel=1e-3)
    assert scaling.collective_seconds(scaling.gather_bytes(8), 8, 4 * 32) == pytest.approx(0.1919, rel=1e-3)
    assert scaling.gather_bytes(1) == 0.0


def test_more_pairs_a_rank_balance_better(scaling):
    shares = [scaling.imbalance(8, pairs) for pairs in (1, 2, 8)]
    assert shares[0] > shares[1] > shares[2]
    assert scaling.imbalance(1, 8) == 0.0
