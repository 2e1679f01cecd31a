"""How a trainer runs: metrics of a log, the watch for non-finite losses, precision, checkpoints and what damages them."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.trainers.metrics import MetricLog

# ---- metrics


class OnDevice(torch.Tensor):
    """A tensor that says that it lies on a GPU, where the host must not choose among values without waiting."""

    @property
    def device(self):
        return torch.device("cuda")


def test_a_step_without_a_kind_of_row_leaves_the_log_window_as_it_is():
    nan, inf = math.nan, math.inf
    steps = {"mean": [1.0, nan, 4.0], "least": [2.0, inf, 3.0], "most": [2.0, -inf, 3.0], "sum": [1.0, 2.0, 3.0], "none": 3 * [nan]}
    for make in (torch.tensor, lambda value: torch.tensor(value).as_subclass(OnDevice)):
        log = MetricLog()
        for step in range(3):
            log.append({name: make(values[step]) for name, values in steps.items()})
        folded = log.drain(minima=("least",), maxima=("most",), totals=("sum",))
        assert folded == {"mean": 2.5, "least": 2.0, "most": 3.0, "sum": 6.0}
        assert log.drain() == {}
