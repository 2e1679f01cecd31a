"""Agreement of predicted probabilities with what happened: calibration errors and the reliability diagram.

Letters: M predictions, K bins.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt.files import atomic_path
from prefopt.pages import figure_class


@dataclass(frozen=True)
class CalibrationErrors:
    """Calibration errors, and the bins that they come from.

    Attributes:
        ece: expected calibration error, sum_k |sum p - sum y| / M over the predictions of each bin k.
        ace: average calibration error, mean over non-empty bins of |mean p - mean y|.
        mce: maximum calibration error, the largest |mean p - mean y| of a non-empty bin.
        counts: (K,) predictions in each bin.
        mean_probabilities, frequencies: (K,) mean p and mean y of each bin, NaN where it is empty.
    """

    ece: float
    ace: float
    mce: float
    counts: np.ndarray
    mean_probabilities: np.ndarray
    frequencies: np.ndarray


def calibration_errors(probabilities: Any, outcomes: Any, *, num_bins: int = 10) -> CalibrationErrors:
    """Compute calibration errors over K uniform bins (k/K, (k+1)/K]; a probability of 0 falls into the first.

    Args:
        probabilities: (M,) predicted probabilities in [0, 1]; list, numpy array or tensor.
        outcomes: (M,) what happened, 0 or 1 (bool allowed).
        num_bins: K.

    Raises:
        ValueError: no predictions, lengths that differ, a probability outside [0, 1] or not a number, an outcome other
            than 0 or 1.

    Reference: arXiv 1706.04599 (ECE, MCE); bins and ACE as in the released code of arXiv 2311.08045.
    """
    p, y = _as_array(probabilities), _as_array(outcomes).astype(np.float64)
    if p.shape != y.shape or p.ndim != 1 or p.size == 0:
        raise ValueError(
            f"probabilities and outcomes must be two lists of the same length (M,), M > 0; got {p.shape} and "
            f"{y.shape}."
        )
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError("probabilities must lie in [0, 1].")
    if not np.all((y == 0) | (y == 1)):
        raise ValueError("outcomes must be 0 or 1.")
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}.")
    # edges in the probabilities' own precision: a float32 0.2 belongs to the bin that ends at 0.2
    edges = (np.arange(1, num_bins) / num_bins).astype(p.dtype)
    bins = np.searchsorted(edges, p, side="left")
    counts = np.bincount(bins, minlength=num_bins)
    sum_p = np.bincount(bins, weights=p, minlength=num_bins)
    sum_y = np.bincount(bins, weights=y, minlength=num_bins)
    filled = counts > 0
    gaps = np.abs(sum_p - sum_y)
    mean_gaps = gaps[filled] / counts[filled]
    empty_is_nan = np.where(filled, counts, np.nan)
    return CalibrationErrors(
        ece=float(gaps.sum() / p.size),
        ace=float(mean_gaps.mean()),
        mce=float(mean_gaps.max()),
        counts=counts,
        mean_probabilities=sum_p / empty_is_nan,
        frequencies=sum_y / empty_is_nan,
    )


def reliability_diagram(
    errors: CalibrationErrors | dict[str, CalibrationErrors], path: str | os.PathLike[str], *, title: str = ""
) -> None:
    """Draw observed frequency against predicted probability, one line a set, with the bins' counts below.

    Args:
        errors: what `calibration_errors` returned, or several by name.
        path: image file; its ending names the format (png, svg, pdf). Written whole or not at all.
        title: of the figure.

    Raises:
        ValueError: matplotlib is not installed.
    """
    sets = errors if isinstance(errors, dict) else {"": errors}
    if (Figure := figure_class()) is None:
        raise ValueError("Diagrams need matplotlib: pip install 'prefopt[plots]'.")
    figure = Figure(figsize=(5, 6))
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    above.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="perfect")
    for number, (name, each) in enumerate(sets.items()):
        filled = each.counts > 0
        label = f"{name} ECE {each.ece:.3f}, ACE {each.ace:.3f}, MCE {each.mce:.3f}".strip()
        above.plot(each.mean_probabilities[filled], each.frequencies[filled], marker="o", markersize=4, label=label)
        width = 1 / len(each.counts)
        left = (np.arange(len(each.counts)) + number / len(sets)) * width
        below.bar(left, each.counts, width=width / len(sets), align="edge")
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="observed frequency", title=title)
    above.legend(fontsize="small", loc="upper left")
    below.set(xlabel="predicted probability", ylabel="count")
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=os.fspath(path).rpartition(".")[2], dpi=120)


def score_length_correlation(scores: Sequence[float] | Any, lengths: Sequence[int] | Any) -> float:
    """Compute Pearson's correlation of scores with response lengths; NaN where fewer than two values, or all equal.

    Args:
        scores: (M,).
        lengths: (M,) in tokens, or any unit.
    """
    s, n = _as_array(scores).astype(np.float64), _as_array(lengths).astype(np.float64)
    if s.shape != n.shape or s.ndim != 1:
        raise ValueError(f"scores and lengths must have the same shape (M,); got {s.shape} and {n.shape}.")
    if s.size < 2 or np.ptp(s) == 0 or np.ptp(n) == 0:
        return float("nan")
    return float(np.corrcoef(s, n)[0, 1])


def _as_array(values: Any) -> np.ndarray:
    """Convert a list, array or tensor to a numpy array; floating dtypes are kept (bf16 becomes float32)."""
    if isinstance(values, np.ndarray):
        return values
    import torch

    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()
    return np.asarray(values)
