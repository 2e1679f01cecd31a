"""Preference accuracy of a policy on pairs, by itself and against its reference: margins, calibration, length bias.

Letters: N pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from prefopt.candidates.pairs import sigmoid
from prefopt.data import tokenize_comparisons, tokenize_pairs
from prefopt.data.encoding import load_tokenizer
from prefopt.evaluation.calibration import calibration_errors
from prefopt.evaluation.figures import Figure, correlation, mean, resampled, share
from prefopt.models.heads import head_kind
from prefopt.references.filling import ReferenceModel, group_scorer, plan_batches, prepare_model
from prefopt.scoring.layouts import Group
from prefopt.scoring.packing import choose_layout, nearest_to_probe, probe_group

GPU_TOKENS, CPU_TOKENS = 16384, 1024  # of one forward
CALIBRATION_BINS = 10
UNITS = ("sum", "token", "byte")


@dataclass(frozen=True)
class PreferenceResult:
    """Accuracy and margin of a model on pairs, by log pi(y|x) alone.

    Attributes:
        accuracy: share of pairs with log pi(chosen) > log pi(rejected), summed over tokens.
        margin: mean of log pi(chosen) - log pi(rejected), nats.
        accuracy_per_token: the same of means over each answer's tokens, which length does not favour.
        margin_per_token: likewise.
        pairs: how many could be used.
    """

    accuracy: float
    margin: float
    accuracy_per_token: float
    margin_per_token: float
    pairs: int


def preference_accuracy(
    model: str | ReferenceModel,
    pairs: Dataset,
    *,
    max_length: int | None = None,
    dtype: str = "bfloat16",
    max_tokens: int | None = None,
) -> PreferenceResult:
    """Score the pairs under the model on all processes, each with a share and a copy of the model.

    Args:
        model: hub name, folder, or a model in memory.
        pairs: preference rows in any form that `prefopt.data` reads.
        max_length: tokens of prompt and answer; longer rows are cut.
        dtype: of the weights of a model that is loaded by name: bfloat16, float16 or float32.
        max_tokens: of one forward; default: 16384 on a GPU, 1024 on a CPU.

    Raises:
        ValueError: no row can be used.
    """
    scores = score_pairs(model, {"": pairs}, max_length=max_length, dtype=dtype, max_tokens=max_tokens)
    return preference_result(scores)


@dataclass(frozen=True)
class PairScores:
    """Log-probs of the N pairs' answers under a policy, summed over their tokens.

    Attributes:
        chosen, rejected: (N,) log pi(y|x), nats; under a reference too, log pi(y|x) - log pi_ref(y|x).
        tokens, bytes: (N, 2) scored tokens and UTF-8 bytes of chosen and rejected.
        sources: (N,) name of the set that each pair is from.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    sources: np.ndarray

    def margins(self, unit: str) -> np.ndarray:
        """Return (N,) chosen minus rejected, each summed ("sum") or divided by its tokens or bytes."""
        if unit == "sum":
            return self.chosen - self.rejected
        # an answer of special tokens only has no bytes
        lengths = np.maximum({"token": self.tokens, "byte": self.bytes}[unit], 1)
        return self.chosen / lengths[:, 0] - self.rejected / lengths[:, 1]

    def against(self, reference: PairScores) -> PairScores:
        """Return the log-ratios to a reference that scored the same pairs.

        Raises:
            ValueError: the reference's tokenizer dropped or cut other rows.
        """
        if len(reference.chosen) != len(self.chosen) or (reference.sources != self.sources).any():
            raise ValueError(
                "policy and reference do not score the same pairs: one of their tokenizers drops rows that the other "
                "keeps; remove these rows, or give a reference with the policy's tokenizer and chat template."
            )
        return replace(self, chosen=self.chosen - reference.chosen, rejected=self.rejected - reference.rejected)


def score_pairs(
    model: str | ReferenceModel,
    sets: dict[str, Dataset],
    *,
    max_length: int | None = None,
    dtype: str = "bfloat16",
    max_tokens: int | None = None,
) -> PairScores:
    """Score the pairs of several sets under one model, on all processes; see `preference_accuracy`.

    Args:
        model: hub name, folder, or a model in memory.
        sets: name -> preference rows.
        max_length: tokens of prompt and answer; longer rows are cut.
        dtype: of the weights of a model that is loaded by name.
        max_tokens: of one forward.

    Raises:
        ValueError: the model gives no log-probs, or a set has no row that can be used.
    """
    if isinstance(model, str) and (kind := head_kind(model)) is not None:
        raise ValueError(
            f"{model} is a {kind} model, which gives no log-probs: compare answers with it as a `ranker`."
        )
    tokenizer = model.tokenizer if isinstance(model, ReferenceModel) else load_tokenizer(model)
    tokenised = {
        name: tokenize_pairs(rows, tokenizer, max_length=max_length, name=name or "evaluation")[0]
        for name, rows in sets.items()
    }
    rows = [row for each in tokenised.values() for row in each]
    groups = [Group.of_pair(row) for row in rows]
    chosen, rejected = _logps(model, groups, tokenizer.pad_token_id, dtype=dtype, max_tokens=max_tokens)
    return PairScores(
        chosen,
        rejected,
        np.array([[len(scored) for scored in group.scored] for group in groups], dtype=np.float64),
        np.array([[row["chosen_bytes"], row["rejected_bytes"]] for row in rows], dtype=np.float64),
        np.array([name for name, each in tokenised.items() for _ in range(len(each))], dtype=object),
    )


def score_answers(
    model: str, rows: Sequence[dict[str, Any]], *, max_length: int | None = None, dtype: str = "bfloat16"
) -> list[np.ndarray]:
    """Compute the summed log-probs of every answer of every row under a model, on all processes.

    Args:
        model: hub name or folder.
        rows: comparison rows: `prompt`, `responses` and `scores`.
        max_length: tokens of prompt and answer; longer rows are cut.
        dtype: of the weights.

    Returns:
        (R,) nats for each row.

    Raises:
        ValueError: a row that cannot be used.
    """
    tokenizer = load_tokenizer(model)
    tokenised, _ = tokenize_comparisons(
        Dataset.from_list(list(rows)), tokenizer, max_length=max_length, on_bad_row="raise", name="evaluation"
    )
    groups: list[Group] = []
    sizes = []
    for row in tokenised:
        answers = row["response_ids"]
        sizes.append(len(answers))
        # the scorer takes answers in pairs; an odd last one is paired with itself
        groups += [
            Group(row["prompt_ids"], (answers[place], answers[min(place + 1, len(answers) - 1)]))
            for place in range(0, len(answers), 2)
        ]
    flat = iter(zip(*_logps(model, groups, tokenizer.pad_token_id, dtype=dtype, max_tokens=None)))
    found = []
    for size in sizes:
        logps = [value for _ in range((size + 1) // 2) for value in next(flat)]
        found.append(np.array(logps[:size]))
    return found


def preference_result(scores: PairScores) -> PreferenceResult:
    """Compute accuracies and margins of log-probs."""
    margins, per_token = scores.margins("sum"), scores.margins("token")
    return PreferenceResult(
        accuracy=float((margins > 0).mean()),
        margin=float(margins.mean()),
        accuracy_per_token=float((per_token > 0).mean()),
        margin_per_token=float(per_token.mean()),
        pairs=len(margins),
    )


def pair_figures(scores: PairScores, *, beta: float, confidence: float) -> dict[str, Figure]:
    """Compute every figure of log-probs or log-ratios on pairs.

    - `accuracy`, `margin`: of sums over tokens; `..._per_token`, `..._per_byte`: of means.
    - `ece`: expected calibration error of sigmoid(beta * margin) over ten bins, each pair taken from both sides.
    - `length_correlation`: Pearson's, of the summed margin with the difference of the answers' tokens.
    - `chosen_longer`: share of pairs, among those of unequal length, whose chosen answer has more tokens;
      `accuracy_chosen_longer`, `accuracy_chosen_shorter`: accuracies of these two parts.

    Args:
        scores: of N pairs.
        beta: scale of the implicit reward; 1 for log-probs by themselves.
        confidence: of the intervals.
    """
    found: dict[str, Figure] = {}
    for unit in UNITS:
        margins, end = scores.margins(unit), "" if unit == "sum" else f"_per_{unit}"
        found[f"accuracy{end}"] = share(margins > 0, confidence=confidence)
        found[f"margin{end}"] = mean(margins, confidence=confidence)
    margins = scores.margins("sum")
    probabilities = sigmoid(beta * margins)
    found["ece"] = resampled(lambda rows: _ece(probabilities[rows]), len(margins), confidence=confidence)
    differences = scores.tokens[:, 0] - scores.tokens[:, 1]
    found["length_correlation"] = correlation(margins, differences, confidence=confidence)
    found["chosen_longer"] = share(differences[differences != 0] > 0, confidence=confidence)
    for name, part in (("longer", differences > 0), ("shorter", differences < 0)):
        found[f"accuracy_chosen_{name}"] = share(margins[part] > 0, confidence=confidence)
    return found


def _ece(probabilities: np.ndarray) -> float:
    outcomes = np.repeat([1.0, 0.0], len(probabilities))
    both = np.concatenate([probabilities, 1 - probabilities])
    return calibration_errors(both, outcomes, num_bins=CALIBRATION_BINS).ece


def by_source(scores: PairScores, *, confidence: float) -> dict[str, dict[str, Figure]]:
    """Compute accuracies and the margin of each set."""
    found = {}
    for name in dict.fromkeys(scores.sources.tolist()):
        rows = scores.sources == name
        part = PairScores(*(column[rows] for column in vars(scores).values()))
        found[name] = {
            **{
                f"accuracy{'' if u == 'sum' else f'_per_{u}'}": share(part.margins(u) > 0, confidence=confidence)
                for u in UNITS
            },
            "margin": mean(part.margins("sum"), confidence=confidence),
        }
    return found


def split_by_column(rows: Dataset, column: str) -> dict[str, Dataset]:
    """Split rows into one set for each value of a column, in the order in which the values first appear.

    Raises:
        ValueError: there is no such column.
    """
    if column not in rows.column_names:
        raise ValueError(f"the pairs have no column {column!r}; they have {', '.join(sorted(rows.column_names))}.")
    values: list[Any] = rows[column]
    places: dict[str, list[int]] = {}
    for place, value in enumerate(values):
        places.setdefault(str(value), []).append(place)
    return {name: rows.select(indices) for name, indices in places.items()}


def _logps(
    model: str | ReferenceModel, groups: Sequence[Group], pad_token_id: int, *, dtype: str, max_tokens: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Compute (N,) summed log-probs of chosen and of rejected, the same on every process."""
    state = PartialState()
    module, config = prepare_model(model, dtype=dtype, accelerator=None)
    longest = max(len(group.prompt) + len(completion) for group in groups for completion in group.completions)
    tried = groups[nearest_to_probe([group.shared_length for group in groups])]
    layout, _ = choose_layout(
        "auto",
        config,
        pad_token_id=pad_token_id,
        longest_sequence=longest,
        probe=lambda packed: probe_group(module, tried, packed, device=state.device),
    )
    score = group_scorer(module, layout, device=state.device)
    sizes = [group.shared_length if layout.name == "packed" else 2 * longest for group in groups]
    batches = plan_batches(sizes, max_tokens or (CPU_TOKENS if state.device.type == "cpu" else GPU_TOKENS))
    mine = []
    for round_ in range(0, len(batches), state.num_processes):  # every process runs as many forwards
        place = min(round_ + state.process_index, len(batches) - 1)
        logps = score([groups[index] for index in batches[place]])
        if round_ + state.process_index < len(batches):
            mine += list(zip(batches[place], logps[0::2].tolist(), logps[1::2].tolist()))
    found = sorted(gather_object(mine) if state.num_processes > 1 else mine)
    assert [index for index, _, _ in found] == list(range(len(groups)))
    return np.array([c for _, c, _ in found]), np.array([r for _, _, r in found])
