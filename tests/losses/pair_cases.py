"""Every pairwise loss with its columns, settings, and equation written out again in plain Python floats."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from prefopt import losses


@dataclass(frozen=True)
class PairCase:
    """One loss at one setting; `equation` maps a row of columns (or, where `sorts`, whole columns) to its loss(es)."""

    name: str
    loss: Callable[..., torch.Tensor]
    equation: Callable
    settings: dict = field(default_factory=dict)
    columns: str = "xx"  # x: unbounded numbers, p: probabilities
    sorts: bool = False

    def __call__(self, *columns: torch.Tensor) -> torch.Tensor:
        return self.loss(*columns, **self.settings)

    def make(self, *, batch: int = 7, scale: float = 3.0, seed: int = 0, dtype=torch.float64) -> list[torch.Tensor]:
        """Random columns, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        made = []
        for kind in self.columns:
            noise = torch.rand(batch, generator=generator, dtype=torch.float64)
            made.append((noise if kind == "p" else scale * (2 * noise - 1)).to(dtype))
        return made


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def nls(x: float) -> float:
    """Negative log sigmoid."""
    return math.log(1 + math.exp(-x))


def smoothed(x: float, eps: float) -> float:
    return (1 - eps) * nls(x) + eps * nls(-x)


def exo(x: float, eps: float) -> float:
    q = sigmoid(x)
    return q * math.log(q / (1 - eps)) + (1 - q) * math.log((1 - q) / eps)


def discopop(x: float, tau: float) -> float:
    m = sigmoid(x / tau)
    return (1 - m) * nls(x) + m * math.exp(-x)


def clip(x: float, bound: float) -> float:
    return min(max(x, -bound), bound)


def half_squares(a: float, b: float) -> float:
    return (a**2 + b**2) / 2


CASES = [
    PairCase("dpo", losses.dpo_loss, lambda c, r: nls(0.7 * (c - r)), {"beta": 0.7}),
    PairCase(
        "cdpo",
        losses.dpo_loss,
        lambda c, r: smoothed(0.7 * (c - r), 0.2),
        {"beta": 0.7, "label_smoothing": 0.2},
    ),
    PairCase("hinge", losses.hinge_loss, lambda c, r: max(0.0, 1 - 0.7 * (c - r)), {"beta": 0.7}),
    PairCase(
        "robust",
        losses.robust_dpo_loss,
        lambda c, r: (0.8 * nls(0.7 * (c - r)) - 0.2 * nls(-0.7 * (c - r))) / 0.6,
        {"beta": 0.7, "label_smoothing": 0.2},
    ),
    PairCase(
        "exo_pair",
        losses.exo_pair_loss,
        lambda c, r: exo(0.7 * (c - r), 1e-3),
        {"beta": 0.7, "label_smoothing": 1e-3},
    ),
    PairCase("discopop", losses.discopop_loss, lambda c, r: discopop(0.7 * (c - r), 0.05), {"beta": 0.7}),
    PairCase(
        "discopop_wide", losses.discopop_loss, lambda c, r: discopop(0.7 * (c - r), 1.0), {"beta": 0.7, "tau": 1.0}
    ),
    PairCase("ipo", losses.ipo_loss, lambda c, r: (c - r - 1 / 1.4) ** 2, {"beta": 0.7}),
    PairCase("sigmoid_norm", losses.sigmoid_norm_loss, lambda c, r: nls(0.7 * (c - r)), {"beta": 0.7}),
    PairCase(
        "simpo",
        losses.simpo_loss,
        lambda c, r: nls(2.5 * (c - r) - 2.5 * 0.4),
        {"beta": 2.5, "gamma_beta_ratio": 0.4},
    ),
    PairCase(
        "nca_pair",
        losses.nca_pair_loss,
        lambda c, r: nls(0.7 * c) + 0.5 * nls(-0.7 * c) + 0.5 * nls(-0.7 * r),
        {"beta": 0.7},
    ),
    PairCase("bco_pair", losses.bco_pair_loss, lambda c, r: nls(0.7 * c) + nls(-0.7 * r), {"beta": 0.7}),
    PairCase(
        "apo_zero", losses.anchored_zero_loss, lambda c, r: 1 - sigmoid(0.7 * c) + sigmoid(0.7 * r), {"beta": 0.7}
    ),
    PairCase(
        "apo_down",
        losses.anchored_down_loss,
        lambda c, r: sigmoid(0.7 * c) + 1 - sigmoid(0.7 * (c - r)),
        {"beta": 0.7},
    ),
    PairCase(
        "aot",
        losses.aot_loss,
        lambda p, q: [smoothed(0.7 * (a - b), 0.2) for a, b in zip(sorted(p), sorted(q), strict=True)],
        {"beta": 0.7, "label_smoothing": 0.2},
        sorts=True,
    ),
    PairCase(
        "aot_unpaired",
        losses.aot_unpaired_loss,
        lambda c, r: [smoothed(0.7 * (a - b), 0.2) for a, b in zip(sorted(c), sorted(r), strict=True)],
        {"beta": 0.7, "label_smoothing": 0.2},
        sorts=True,
    ),
    PairCase(
        "sppo",
        losses.sppo_loss,
        lambda c, r, p, q: half_squares(c - (p - 0.5) / 0.2, r - (q - 0.5) / 0.2),
        {"beta": 0.2},
        "xxpp",
    ),
    PairCase(
        "sppo_single",
        losses.sppo_single_loss,
        lambda c, r, p: half_squares(c - (p - 0.5) / 0.2, r + (p - 0.5) / 0.2),
        {"beta": 0.2},
        "xxp",
    ),
    PairCase(
        "sppo_hard",
        losses.sppo_hard_loss,
        lambda c, r: (c - 0.5 / 0.2) ** 2 + (r + 0.5 / 0.2) ** 2,
        {"beta": 0.2},
    ),
    PairCase(
        "gpo",
        losses.gpo_loss,
        lambda c, r, s, t: half_squares(c - s / 0.2, r - t / 0.2),
        {"beta": 0.2},
        "xxxx",
    ),
    PairCase(
        "gpo_clipped",
        losses.gpo_loss,
        lambda c, r, s, t: half_squares(c - clip(s / 0.2, 6.0), r - clip(t / 0.2, 6.0)),
        {"beta": 0.2, "max_target": 6.0},
        "xxxx",
    ),
    PairCase("bradley_terry", losses.bradley_terry_loss, lambda c, r: nls((c - r) / 0.4), {"tau": 0.4}),
    PairCase(
        "bradley_terry_margin",
        lambda c, r, m, **settings: losses.bradley_terry_loss(c, r, margin=m, **settings),
        lambda c, r, m: nls((c - r - m) / 0.4),
        {"tau": 0.4},
        "xxx",
    ),
    PairCase(
        "general_preference",
        lambda s, m, **settings: losses.general_preference_loss(s, margin=m, **settings),
        lambda s, m: nls((s - m) / 0.4),
        {"tau": 0.4},
    ),
]
BY_NAME = {case.name: case for case in CASES}
