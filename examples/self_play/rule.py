"""The toy's preference: a rule that anyone can check. `prefopt rank --ranker function` calls `certainty`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))

from preferences import FIRM_CLOSINGS, HEDGED_OPENINGS


def certainty(prompt: object, candidates: list[str]) -> list[float]:
    """A score for each answer, in nats: how certain it sounds, whatever was asked."""
    return [level(text) for text in candidates]


def level(text: str) -> float:
    """-1: no sentence of the two styles; 0: hedged; 1 to 4: firm, by its closing in the order of `FIRM_CLOSINGS`."""
    for number, closing in enumerate(FIRM_CLOSINGS, start=1):
        if text.startswith(("A ", "An ")) and text.endswith(f", {closing}."):
            return float(number)
    return 0.0 if text.startswith(HEDGED_OPENINGS) and text.endswith(".") else -1.0
