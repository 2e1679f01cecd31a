"""Draws the figure of README.md from the figures that the quickstart left.

    for seed in 0 1 2; do python examples/quickstart/quickstart.py --seed $seed --outputs outputs/seed-$seed; done
    python docs/figures.py outputs/seed-0 outputs/seed-1 outputs/seed-2

Each folder holds `quickstart/quickstart.json`; the picture goes to docs/assets/quickstart.svg.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

TARGET = Path(__file__).parent / "assets" / "quickstart.svg"
PANELS = (
    ("accuracy", "preference accuracy", (0, 1.05)),
    ("margin", "reward margin (nats)", (0, 1.5)),
    ("win_rate", "win rate against the start model", (0, 1.05)),
    ("well_formed", "well-formed answers", (0, 1.05)),
)


def main() -> None:
    """Draw one panel a figure: before and after, one line a seed."""
    runs = [json.loads((Path(folder) / "quickstart" / "quickstart.json").read_text()) for folder in sys.argv[1:]]
    matplotlib.rcParams["svg.hashsalt"] = "prefopt"  # the same file for the same figures
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(10, 2.6), layout="constrained")
    for axis, (key, title, limits) in zip(axes, PANELS):
        for run in runs:
            values = [run["before"][key], run["after"][key]]
            axis.plot([0, 1], values, marker="o", color="#2a6f97", alpha=0.75)
        axis.set(xticks=[0, 1], xticklabels=["before", "after WPO"], ylim=limits, xlim=(-0.25, 1.25))
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    TARGET.parent.mkdir(exist_ok=True)
    figure.savefig(TARGET, metadata={"Date": None})
    print(f"{TARGET}: seeds {', '.join(str(run['seed']) for run in runs)}")


if __name__ == "__main__":
    main()
