"""AlpacaEval 2's win rate and length-controlled win rate, from annotations, offline.

Letters: N annotations; G annotations of AlpacaEval's own gamed baselines.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.data.rows import Row
from prefopt.evaluation.figures import Figure, resampled
from prefopt.files import user_path

# the only file that is fetched from a hub
HUB_REPOSITORY, HUB_FILE = "tatsu-lab/alpaca_eval", "df_gamed.csv"
REGULARIZATION = 0.2  # weight of the gamed baselines, which are two
FOLDS = 5
RESAMPLES = 200


@dataclass(frozen=True)
class GamedBaselines:
    """AlpacaEval's file `df_gamed.csv`: its baseline, asked for short and for long answers, against itself.

    Attributes:
        preferences: (G,) in [0, 1].
        lengths: (G,) standardised differences of lengths.
        difficulties: (G,) of each row's instruction.
        by_index: difficulty of each instruction of the benchmark, by its number.
    """

    preferences: np.ndarray
    lengths: np.ndarray
    difficulties: np.ndarray
    by_index: dict[int, float]


@dataclass(frozen=True)
class AlpacaEvalScore:
    """AlpacaEval's numbers of one model, in percent, as its leaderboard has them, and intervals as shares.

    Attributes:
        win_rate, standard_error, n_wins, n_wins_base, n_draws, n_total, discrete_win_rate: see the package.
        length_controlled_winrate, lc_standard_error: None without the gamed baselines. The latter is the package's:
            the spread of the predictions over instructions, which is not how far the number may be off.
        figures: `win_rate` with a bootstrap interval over instructions, and `length_controlled_win_rate` with one over
            regressions on resampled instructions.
    """

    win_rate: float
    standard_error: float
    n_wins: int
    n_wins_base: int
    n_draws: int
    n_total: int
    discrete_win_rate: float
    length_controlled_winrate: float | None
    lc_standard_error: float | None
    figures: dict[str, Figure]


def read_gamed_baselines(path: str | None) -> GamedBaselines:
    """Read `df_gamed.csv`, or fetch it from the hub's data set `tatsu-lab/alpaca_eval` where no file is given.

    Raises:
        ValueError: it cannot be fetched, or lacks a column.
    """
    place = _fetched() if path is None else user_path(path)
    with open(place, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ("index", "preference", "std_delta_len", "instruction_difficulty")
    if not rows or any(name not in rows[0] for name in columns):
        raise ValueError(f"{place} is not AlpacaEval's {HUB_FILE}: it needs rows with {', '.join(columns)}.")
    if any(row.get("not_gamed_baseline", "False").lower() != "false" for row in rows):
        raise ValueError(f"{place}: its rows must all be of gamed baselines (not_gamed_baseline False).")
    by_index: dict[int, float] = {}
    seen: set[str] = set()
    for number, row in enumerate(rows):
        # as in the package: the difficulties are found by the number of the row in which an instruction comes first
        if row["index"] not in seen:
            seen.add(row["index"])
            by_index[number] = float(row["instruction_difficulty"])
    values = {name: np.array([float(row[name] or "nan") for row in rows]) for name in columns[1:]}
    return GamedBaselines(values["preference"], values["std_delta_len"], values["instruction_difficulty"], by_index)


def _fetched() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id=HUB_REPOSITORY, filename=HUB_FILE, repo_type="dataset"))
    except Exception as error:  # offline, no such host, no login: one remedy for all
        raise ValueError(
            f"the length-controlled win rate needs {HUB_FILE} of the hub's data set {HUB_REPOSITORY}, which cannot be "
            f"fetched ({type(error).__name__}): give the file with --gamed_baselines, or --length_control false."
        ) from error


def alpaca_eval_score(
    annotations: Sequence[Row], gamed: GamedBaselines | None, *, confidence: float = 0.95
) -> AlpacaEvalScore:
    """Compute the numbers of AlpacaEval's leaderboard from the annotations of one model.

    Args:
        annotations: rows of `annotations.json` in the benchmark's order: `preference` (1: the baseline's answer, 2:
            the model's, between them a probability; 0 or 1.5: a tie; None: no verdict), `output_1`, `output_2`,
            `generator_1`, `generator_2`.
        gamed: for the length-controlled win rate; without them it is None.
        confidence: of the intervals.

    Raises:
        ValueError: several models or baselines, no verdict at all, or an instruction without a difficulty.

    Reference: arXiv 2404.04475; the package alpaca-eval 0.6.6, whose numbers these are to 1e-6.
    """
    for side in ("generator_1", "generator_2"):
        if len(names := {str(row[side]) for row in annotations}) != 1:
            raise ValueError(f"the annotations must be of one model against one baseline; {side} is {sorted(names)}.")
    raw = np.array([np.nan if row.get("preference") is None else float(row["preference"]) for row in annotations])
    draws = int(((raw == 0) | (raw == 1.5)).sum())
    preferences = np.where(raw == 0, 1.5, raw)
    valid = (preferences >= 1) & (preferences <= 2)
    if not valid.any():
        raise ValueError("the annotations hold no preference between 1 and 2.")
    shares = preferences[valid] - 1
    discrete = np.where(shares == 0.5, 0.5, np.round(shares + 1) - 1)
    found: dict[str, Any] = {
        "win_rate": float(shares.mean()) * 100,
        "standard_error": _standard_error(shares) * 100,
        "n_wins": int((shares > 0.5).sum()),
        "n_wins_base": int((shares < 0.5).sum()),
        "n_draws": draws,
        "n_total": int(valid.sum()),
        "discrete_win_rate": float(discrete.mean()) * 100,
        "length_controlled_winrate": None,
        "lc_standard_error": None,
    }
    figures = {"win_rate": resampled(lambda rows: float(shares[rows].mean()), len(shares), confidence=confidence)}
    if gamed is not None:
        predicted, figures["length_controlled_win_rate"] = _length_controlled(
            annotations, preferences - 1, gamed, confidence
        )
        found["length_controlled_winrate"] = float(predicted.mean()) * 100
        found["lc_standard_error"] = _standard_error(predicted) * 100
    return AlpacaEvalScore(**found, figures=figures)


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def _length_controlled(
    annotations: Sequence[Row], shares: np.ndarray, gamed: GamedBaselines, confidence: float
) -> tuple[np.ndarray, Figure]:
    """Predict (N,) preferences at equal lengths, and compute the figure of their mean."""
    count = len(annotations)
    if annotations[0]["generator_1"] == annotations[0]["generator_2"]:
        return np.full(count, 0.5), Figure(0.5, 0.5, 0.5, "none", count)
    own, controlled = _features(annotations, gamed)
    others = np.stack([np.tanh(gamed.lengths), gamed.difficulties, np.zeros(len(gamed.lengths))], axis=1)
    labelled = np.isfinite(shares)
    # the package's order: the gamed baselines first; it decides the folds
    features = np.concatenate([others, own[labelled]])
    targets = np.concatenate([gamed.preferences, shares[labelled]])
    weights = np.concatenate([np.full(len(others), REGULARIZATION / 2), np.ones(int(labelled.sum()))])
    coefficients, strength = _fit_chosen(features, targets, weights)
    predicted = _logistic(controlled @ coefficients)

    def refitted(rows: np.ndarray) -> float:
        kept = rows[labelled[rows]]
        again = _fit(
            np.concatenate([others, own[kept]]),
            np.concatenate([gamed.preferences, shares[kept]]),
            np.concatenate([np.full(len(others), REGULARIZATION / 2), np.ones(len(kept))]),
            strength,
        )
        return float(_logistic(controlled[rows] @ again).mean())

    around = resampled(refitted, count, confidence=confidence, resamples=RESAMPLES)
    return predicted, Figure(float(predicted.mean()), around.low, around.high, around.interval, count)


def _features(annotations: Sequence[Row], gamed: GamedBaselines) -> tuple[np.ndarray, np.ndarray]:
    """Return (N, 3): tanh of the standardised difference of lengths, difficulty, 1; and the same at equal lengths."""
    difference = np.array([len(row["output_1"]) - len(row["output_2"]) for row in annotations], dtype=np.float64)
    numbers = [int(row.get("index", place)) for place, row in enumerate(annotations)]
    if absent := [number for number in numbers if number not in gamed.by_index]:
        raise ValueError(
            f"{HUB_FILE} has no difficulty for instruction {absent[0]}: the length-controlled win rate is defined for "
            f"AlpacaEval's {len(gamed.by_index)} instructions in their order; for others use --length_control false."
        )
    difficulty = np.array([gamed.by_index[number] for number in numbers])
    own = np.stack([np.tanh(difference / difference.std(ddof=1)), difficulty, np.ones(len(numbers))], axis=1)
    controlled = own.copy()
    controlled[:, 0] = 0.0
    return own, controlled


def _logistic(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -logits))


def _sklearn() -> Any:
    try:
        import sklearn
    except ImportError as error:
        raise ValueError(
            "the length-controlled win rate needs scikit-learn: pip install 'prefopt[eval]', or --length_control "
            "false."
        ) from error
    return sklearn


def _both_labels(targets: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights and the probabilities of rows that are given twice, with label 1 and with label 0."""
    probabilities = np.concatenate([targets, 1 - targets])
    return probabilities * np.concatenate([weights, weights]), probabilities


# liblinear is not exact: the same solver with the same seed, rows and tolerance gives the package's numbers
_SOLVER: dict[str, Any] = {
    "random_state": 123,
    "dual": False,
    "penalty": "l1",
    "solver": "liblinear",
    "fit_intercept": False,
}


def _fit_chosen(features: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Fit the L1 regression with the strength that cross-validation chooses; return coefficients and strength."""
    sklearn = _sklearn()
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.metrics import make_scorer
    from sklearn.model_selection import GroupKFold

    sample_weight, probabilities = _both_labels(targets, weights)
    rows = len(targets)
    with sklearn.config_context(enable_metadata_routing=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="sklearn")  # about arguments that the package's numbers depend on
        scorer = make_scorer(_log_loss, response_method="predict_proba", greater_is_better=False).set_score_request(
            true_prob=True, row_weight=True
        )
        model = LogisticRegressionCV(cv=GroupKFold(n_splits=FOLDS), scoring=scorer, **_SOLVER)
        model.set_fit_request(sample_weight=True)
        model.fit(
            np.concatenate([features, features]),
            np.repeat([1, 0], rows),
            sample_weight=sample_weight,
            groups=np.tile(np.arange(rows), 2),
            true_prob=probabilities,
            row_weight=np.concatenate([weights, weights]),
        )
    return np.asarray(model.coef_[0]), float(np.ravel(model.C_)[0])


def _fit(features: np.ndarray, targets: np.ndarray, weights: np.ndarray, strength: float) -> np.ndarray:
    """Fit the L1 regression with a given strength."""
    _sklearn()
    from sklearn.linear_model import LogisticRegression

    sample_weight, _ = _both_labels(targets, weights)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="sklearn")  # about arguments that the package's numbers depend on
        model = LogisticRegression(C=strength, **_SOLVER)
        model.fit(np.concatenate([features, features]), np.repeat([1, 0], len(targets)), sample_weight=sample_weight)
    return np.asarray(model.coef_[0])


def _log_loss(y_true: Any, predicted: Any, true_prob: Any, row_weight: Any) -> float:
    """Score predicted probabilities against probabilities: scikit-learn knows labels only."""
    wanted = np.where(y_true == 1, true_prob, 1 - true_prob)
    kept = np.clip(predicted, 1e-15, 1 - 1e-15)
    return float(-np.mean((wanted * np.log(kept) + (1 - wanted) * np.log(1 - kept)) * row_weight))
