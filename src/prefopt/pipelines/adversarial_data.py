"""What the adversarial loop looks at before anything runs: disjoint prompts, golden answers that fit."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from prefopt.candidates.prompts import load_prompts
from prefopt.candidates.split import prompt_text_key
from prefopt.data.comparisons import normalise_comparison
from prefopt.data.faults import BadRow
from prefopt.data.messages import without_none
from prefopt.data.sources import DataSource, load_source
from prefopt.pipelines.adversarial_loop import AdversarialLoop


def check_data(loop: AdversarialLoop) -> dict[str, int]:
    """The numbers of prompts and golden answers, having seen that sets of prompts are disjoint and golden answers fit.

    Raises:
        ValueError: two sets share a prompt, or golden answers do not meet prompts.
    """
    prompts = {"policy_prompts": _keys(loop.policy_prompts), "test_prompts": _keys(loop.test_prompts)}
    counts: dict[str, int] = {}
    if loop.reward_update != "fixed":
        ids = _prompts(loop.reward_prompts)
        prompts["reward_prompts"] = {prompt_text_key(prompt) for prompt in ids.values()}
        counts |= _check_golden(loop, set(ids))
    prompts["comparisons"] = _compared(loop.comparisons)
    for one, other in combinations(prompts, 2):
        common = prompts[one] & prompts[other]
        if common and {one, other} != {"reward_prompts", "comparisons"}:
            raise ValueError(
                f"{one} ({getattr(loop, one)}) and {other} ({getattr(loop, other)}) have {len(common)} prompts in common; they must be "
                "disjoint, or the reward model judges answers that it was trained on: `prefopt split` makes disjoint sets."
            )
    if loop.testing_comparisons is not None:
        common = prompts["test_prompts"] & _compared(loop.testing_comparisons)
        if common:
            raise ValueError(
                f"test_prompts ({loop.test_prompts}) and testing_comparisons ({loop.testing_comparisons}) have {len(common)} prompts in "
                "common: the evaluating reward model must not be trained on the prompts on which it judges."
            )
    return {f"prompts of {name}": len(keys) for name, keys in prompts.items()} | counts


def _prompts(path: str) -> dict[str, Any]:
    """prompt_id -> prompt."""
    read = load_prompts(DataSource(path), column="prompt", off_policy_columns=())
    if not read.items:
        raise ValueError(f"{path}: no row has a prompt ({dict(read.reasons())}).")
    return {item["prompt_id"]: item["prompt"] for item in read.items}


def _keys(path: str) -> set[str]:
    return {prompt_text_key(prompt) for prompt in _prompts(path).values()}


def _compared(path: str) -> set[str]:
    """The prompts of comparisons in any form; rows that cannot be used are for the trainer to report."""
    found = set()
    for row in load_source(DataSource(path)):
        try:
            found.add(prompt_text_key(normalise_comparison(without_none(row))["prompt"]))
        except BadRow:
            continue
    return found


def _check_golden(loop: AdversarialLoop, ids: set[str]) -> dict[str, int]:
    """How many golden answers and reward prompts have no counterpart."""
    path = loop.golden or loop.reward_prompts
    rows = load_source(DataSource(path))
    name = next((name for name in ("query_id", "prompt_id") if name in rows.column_names), None)
    if name is None or "golden" not in rows.column_names:
        raise ValueError(f"{path}: golden answers need `golden` and `prompt_id`; it has {sorted(rows.column_names)}.")
    answered = {str(key) for key, golden in zip(rows[name], rows["golden"]) if golden is not None}
    without = {
        "golden answers without a reward prompt": answered - ids,
        "reward prompts without a golden answer": ids - answered,
    }
    if not ids & answered:
        raise ValueError(
            f"{path}: no golden answer has the prompt_id of one of the {len(ids)} prompts of {loop.reward_prompts}."
        )
    for what, found in without.items():
        if found and loop.on_unmatched == "raise":
            raise ValueError(
                f"{len(found)} {what}, {min(found)!r} among them; mend the data or set on_unmatched: drop."
            )
    return {what: len(found) for what, found in without.items()}
