"""The certificate, docs/correctness.md: what each part was compared with, on what, and how far it was away.

python docs/certificate.py            runs the tests named below and writes the page
python docs/certificate.py --check    runs nothing; exits with 1 where the page lacks a claim or holds a failed one

Every claim names tests. While they run, each comparison that they make (`assert_close`, `approx`, `allclose`, `equal`)
is measured, so that the page shows the deviation that was seen and not the tolerance that was allowed. A deviation is
|ours - expected| / max(1, |expected|), the largest over all numbers that were compared.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "correctness.md"

DERIVED = "a value derived by hand"
EQUATION = "the equation in plain float64"
LOOPS = "loops over pairs in plain floats"
TRL = "TRL's own code"
PURE = "the pure function on that batch's plain forward"
PLAIN = "the model's own logits"


@dataclass(frozen=True)
class Claim:
    """One line of the certificate.

    Attributes:
        subject: the public name, or the property, that is certified.
        against: what it was compared with.
        on: what the comparison was made on.
        tests: patterns of pytest ids under tests/, of which each must match.
    """

    subject: str
    against: str
    on: str
    tests: tuple[str, ...]


def pair(name: str, case: str, hand: str, trl: str | None = None, on_trl: str = "6 pairs, two beta") -> list[Claim]:
    """Return the claims about a loss of pairs: by hand, by its equation, and by TRL's code where TRL has it."""
    identities, equations = "losses/test_pair_identities.py::", "losses/test_pairwise.py::"
    claims = [
        Claim(name, DERIVED, "one or a few pairs", (f"{identities}test_{hand}_by_hand",)),
        Claim(
            name, EQUATION, "7 pairs", (f"{equations}test_equals_the_equation_written_in_plain_floats[[]{case}[]]",)
        ),
    ]
    if trl:
        test = "losses/test_against_trl.py::" + trl
        claims.append(Claim(name, f"{TRL}, pair by pair and in the mean", on_trl, (test,)))
    return claims


def by_trl(loss_type: str, loss: str) -> str:
    """Return the pattern of the comparisons of one loss with TRL."""
    return f"test_each_pair_and_the_mean_equal_trl[[]*-{loss_type}-{loss}-*"


LOSSES = [
    *pair("dpo_loss", "dpo", "dpo", by_trl("sigmoid", "dpo_loss")),
    *pair("hinge_loss", "hinge", "hinge", by_trl("hinge", "hinge_loss")),
    *pair("robust_dpo_loss", "robust", "robust_dpo", by_trl("robust", "robust_dpo_loss")),
    *pair("exo_pair_loss", "exo_pair", "exo", by_trl("exo_pair", "exo_pair_loss")),
    *pair("nca_pair_loss", "nca_pair", "nca", by_trl("nca_pair", "nca_pair_loss")),
    *pair("bco_pair_loss", "bco_pair", "bco", by_trl("bco_pair", "bco_pair_loss")),
    *pair("anchored_zero_loss", "apo_zero", "anchored", by_trl("apo_zero", "anchored_zero_loss")),
    *pair("anchored_down_loss", "apo_down", "anchored", by_trl("apo_down", "anchored_down_loss")),
    *pair("discopop_loss", "discopop", "discopop", by_trl("discopop", "discopop_loss")),
    *pair("ipo_loss", "ipo", "ipo", by_trl("ipo", "ipo_loss")),
    *pair("sigmoid_norm_loss", "sigmoid_norm", "length_normalised_dpo", by_trl("sigmoid_norm", "sigmoid_norm_loss")),
    *pair("simpo_loss", "simpo", "simpo", "test_simpo_equals_trl", "6 pairs (TRL's CPO trainer)"),
    *pair("aot_loss", "aot", "aot", "test_aot_equals_trl_over_the_batch[[]*-aot-*", "a batch of 6"),
    *pair(
        "aot_unpaired_loss",
        "aot_unpaired",
        "aot",
        "test_aot_equals_trl_over_the_batch[[]*-aot_unpaired-*",
        "a batch of 6",
    ),
    *pair("sppo_loss", "sppo", "sppo"),
    *pair("sppo_single_loss", "sppo_single", "sppo_single"),
    *pair("sppo_hard_loss", "sppo_hard", "sppo_hard", by_trl("sppo_hard", "sppo_hard_loss")),
    *pair("gpo_loss", "gpo", "gpo"),
    Claim("bradley_terry_loss", DERIVED, "two pairs", ("losses/test_preference.py::test_bradley_terry_by_hand",)),
    Claim(
        "bradley_terry_loss",
        "TRL's reward trainer",
        "5 pairs, with and without margin",
        ("losses/test_against_trl.py::test_bradley_terry_equals_trl*",),
    ),
    Claim(
        "general_preference_score",
        "the skew-symmetric operator as a matrix",
        "random embeddings, with scales",
        ("losses/test_preference.py::test_preference_score_*",),
    ),
    Claim(
        "general_preference_loss",
        EQUATION,
        "7 pairs",
        ("losses/test_pairwise.py::test_equals_the_equation_written_in_plain_floats[[]general_preference[]]",),
    ),
    Claim(
        "ranking_loss",
        LOOPS,
        "padded lists, both kinds",
        (
            "losses/test_reward.py::test_ranking_values*",
            "losses/test_reward.py::test_ranking_equals_loops_over_pairs*",
        ),
    ),
    Claim(
        "adversarial_reward_loss",
        DERIVED,
        "human and adversarial rows, both kinds",
        (
            "losses/test_reward.py::test_adversarial_value",
            "losses/test_reward.py::test_kind_is_that_of_the_adversarial_term_only",
        ),
    ),
    Claim(
        "rrhf_loss",
        LOOPS,
        "padded lists",
        ("losses/test_reward.py::test_rrhf_by_hand", "losses/test_reward.py::test_rrhf_equals_loops_over_pairs"),
    ),
    Claim(
        "mixture_logps",
        "sums of probabilities in float64",
        "three mixtures, weights (K,) and (K, B)",
        (
            "losses/test_multi_reference.py::test_mixtures_by_hand",
            "losses/test_multi_reference.py::test_mixtures_equal_sums_of_probabilities*",
        ),
    ),
    Claim(
        "multi_dpo_loss",
        EQUATION,
        "K references",
        (
            "losses/test_multi_reference.py::test_multi_dpo_by_hand",
            "losses/test_multi_reference.py::test_multi_dpo_and_forward_kl_equal_their_equations",
        ),
    ),
    Claim(
        "forward_kl_loss",
        EQUATION,
        "K references",
        (
            "losses/test_multi_reference.py::test_forward_kl_by_hand",
            "losses/test_multi_reference.py::test_multi_dpo_and_forward_kl_equal_their_equations",
        ),
    ),
    Claim(
        "mixture_logps, forward_kl_loss",
        "the optimum of the regularised objective, found by descent",
        "bandits with known rewards",
        ("losses/test_multi_reference_optimum.py::*recovers*",),
    ),
    Claim("clip_to_anchor", DERIVED, "three references", ("losses/test_trust_region.py::test_trust_region_by_hand",)),
]

WEIGHTS = [
    Claim("wpo_pair_weights", DERIVED, "a few pairs", ("losses/test_weighting.py::test_weights_by_hand",)),
    Claim(
        "wpo_pair_weights",
        f"{TRL} (`use_weighting`), six losses",
        "6 pairs, without clamp",
        ("losses/test_against_trl.py::test_unbounded_wpo_weights_are_trls*",),
    ),
    Claim(
        "WPO's aligned log-weights",
        "the paper's formulas on plain logits",
        "sampled and greedy alignment, both layouts",
        ("scoring/test_logprobs.py::test_alignments_are_wpos_formulas*",),
    ),
    Claim("uniform_weights", DERIVED, "K references", ("references/test_weights.py::test_uniform*",)),
    Claim(
        "discriminative_confidence",
        DERIVED,
        "two references",
        ("references/test_weights.py::test_confidence_is_the_absolute_difference",),
    ),
    Claim(
        "adaptive_weights", DERIVED, "two references", ("references/test_weights.py::test_adaptive_weights_by_hand",)
    ),
    Claim(
        "validation_discrimination_weights",
        DERIVED,
        "a small set",
        ("references/test_weights.py::test_validation_discrimination_is_a_ratio_of_sums",),
    ),
    Claim(
        "validation_accuracy_weights",
        DERIVED,
        "a small set",
        ("references/test_weights.py::test_validation_accuracy_by_hand",),
    ),
    Claim(
        "SlidingWindowWeights",
        DERIVED,
        "windows of 1 and 2, both reductions",
        (
            "references/test_online_weights.py::test_window_starts_uniform_and_looks_one_step_back",
            "references/test_online_weights.py::test_window_of_two_and_both_reductions*",
        ),
    ),
    Claim(
        "ThompsonSampling",
        "the Beta posterior's own moments",
        "many draws",
        ("references/test_online_weights.py::test_thompson_draws_are_beta_posteriors",),
    ),
]

PAIRS = "trainers/test_preference.py::"
TRAINERS = [
    Claim(
        "DPOTrainer",
        "TRL's DPOTrainer, step by step",
        "the same weights, pairs and order; padded and packed",
        (f"{PAIRS}test_training_is_trls[[]DPO-*",),
    ),
    Claim(
        "WPOTrainer",
        "TRL's DPOTrainer with `use_weighting`, step by step",
        "the same weights, pairs and order; padded and packed",
        (f"{PAIRS}test_training_is_trls[[]WPO-*",),
    ),
    Claim(
        "DPOTrainer, WPOTrainer",
        "the equation on that batch's plain forward",
        "all alignments, padded and packed",
        (f"{PAIRS}test_the_logged_loss_is_the_equation_on_that_batch*",),
    ),
    Claim(
        "every `loss_type`",
        "TRL's DPOTrainer",
        "the loss of a step",
        (f"{PAIRS}test_every_loss_of_trl_has_trls_value*",),
    ),
    Claim(
        "`loss_type: simpo`, `ipo_sum`",
        EQUATION,
        "the loss and the rewards of a step",
        (
            f"{PAIRS}test_losses_without_a_reference_keep_none",
            f"{PAIRS}test_ipo_on_sums_is_the_equation_without_lengths",
        ),
    ),
    Claim(
        "SPPOTrainer",
        "the equation on that batch's plain forward",
        "SPPO, single, hard, GPO; padded and packed",
        ("trainers/test_sppo.py::test_what_is_logged_is_the_equation_on_that_batch*",),
    ),
    Claim(
        "MultiReferenceDPOTrainer",
        PURE,
        "four mixtures, three normalisations",
        ("trainers/test_multi_reference.py::test_the_logged_loss_is_the_pure_function_on_the_batch*",),
    ),
    Claim(
        "MultiReferenceDPOTrainer",
        "DPO",
        "one reference, and equal references",
        ("trainers/test_multi_reference.py::test_one_reference_and_equal_references_are_dpo*",),
    ),
    Claim(
        "RewardTrainer",
        PURE,
        "both poolings, padded and packed",
        ("trainers/test_reward.py::test_the_logged_loss_is_the_ranking_loss_of_the_step*",),
    ),
    Claim(
        "AdversarialRewardTrainer",
        "the weighted sum written out",
        "four settings of coefficients and samples",
        ("trainers/test_adversarial.py::test_the_logged_loss_weighs_each_pair*",),
    ),
    Claim(
        "GeneralPreferenceTrainer",
        PURE,
        "heads with and without gate, padded and packed",
        ("trainers/test_general_preference.py::test_the_logged_loss_is_the_preference_loss_of_the_step*",),
    ),
    Claim(
        "RRHFTrainer",
        PURE,
        "three coefficients of the SFT term, padded and packed",
        ("trainers/test_rrhf.py::test_the_logged_loss_is_rrhf*",),
    ),
    Claim(
        "micro-batches",
        "one micro-batch of the whole step",
        "the weights after training, pairs and reward models",
        (
            f"{PAIRS}test_micro_batches_add_up*",
            "trainers/test_reward.py::test_division_into_micro_batches_and_layout_change_nothing*",
        ),
    ),
]

RANKERS = [
    Claim(
        "reward-model",
        "a plain forward of each whole conversation",
        "classifiers of transformers, and models of prefopt",
        (
            "candidates/test_rankers.py::test_reward_model_scores_whole_conversations*",
            "candidates/test_rankers.py::test_our_own_reward_model_is_read_by_its_own_pooling*",
        ),
    ),
    Claim(
        "reward-model (ArmoRM)",
        "a transcription of the published gating and regression",
        "the published layout of weights",
        ("candidates/test_rankers.py::test_armo_rm_is_read_without_its_code",),
    ),
    Claim(
        "pair-rm",
        "llm-blender's own code",
        "the same weights and token ids; needs an environment of its own (.ci/blender_check.sh)",
        ("models/test_pair_ranker.py::test_parity_with_llm_blender*",),
    ),
    Claim(
        "pair-rm",
        "one forward for each ordered pair",
        "all pairs of a prompt",
        ("candidates/test_rankers.py::test_pair_rm_runs_all_ordered_pairs*",),
    ),
    Claim(
        "general-preference",
        "the operator on plain forwards",
        "models of prefopt, and the released layout",
        (
            "candidates/test_rankers.py::test_general_preference_tables*",
            "models/test_general_preference.py::test_the_table_is_the_skew_symmetric_operator*",
        ),
    ),
    Claim(
        "general-preference, `released_format`",
        "ids written from the authors' training, example and fork",
        "rows with and without BOS",
        ("candidates/test_rankers.py::test_general_preference_ids_of_the_authors_other_code*",),
    ),
    Claim(
        "judge",
        "a server with known verdicts",
        "both orders",
        ("candidates/test_rankers.py::test_judge_sees_both_orders*",),
    ),
    Claim(
        "function",
        "the function itself",
        "a file and a module",
        ("candidates/test_rankers.py::test_functions_by_file_and_by_module*",),
    ),
]

PICKING = "candidates/test_pairs.py::"
PAIR_RULES = [
    Claim("best_worst", DERIVED, "ties", (f"{PICKING}test_best_worst_takes_the_first_of_several",)),
    Claim(
        "max_min",
        DERIVED,
        "an intransitive table",
        (f"{PICKING}test_pairwise_and_aggregate_differ_on_an_intransitive_table",),
    ),
    Claim("best_random", DERIVED, "many seeds", (f"{PICKING}test_best_random_is_seeded_and_never_picks_the_best",)),
    Claim("wpo_v2", DERIVED, "ties of length", (f"{PICKING}test_wpo_v2_breaks_ties_by_length",)),
    Claim("all_pairs", DERIVED, "gaps around the margin", (f"{PICKING}test_all_pairs_above_a_margin",)),
    Claim("sppo", DERIVED, "scores and tables", (f"{PICKING}test_sppo_by_hand",)),
    Claim(
        "sppo_paper",
        "the released pipeline, written from its description in its own float32",
        "random tables of 2 to 15 candidates",
        (f"{PICKING}test_preset_reproduces_the_published_numbers*",),
    ),
    Claim(
        "sppo_mean_logit",
        "the fork's arithmetic, written from its description",
        "random antisymmetric tables of 2 to 8 candidates",
        (f"{PICKING}test_mean_logit_reproduces_the_fork_for_general_preference_models*",),
    ),
    Claim(
        "gpo",
        DERIVED,
        "scores, with and without the self term",
        (f"{PICKING}test_gpo_scores_are_means_of_differences",),
    ),
]

LAYOUTS = [
    Claim(
        "scores of completions, and their gradients",
        PLAIN,
        "eight architectures; padded, packed, packed with a prompt for each",
        ("scoring/test_logprobs.py::test_scores_and_gradients_equal_the_models_own_logits*",),
    ),
    Claim(
        "attention of packed rows, forward and backward",
        "a dense mask",
        "float64",
        ("scoring/test_attention.py::test_values_and_gradients_are_those_of_the_dense_mask*",),
    ),
    Claim(
        "attention sinks",
        "one more key",
        "float64",
        ("scoring/test_attention.py::test_attention_sinks_are_one_more_key*",),
    ),
    Claim(
        "packed training",
        "padded training",
        "every `loss_type`",
        (f"{PAIRS}test_packed_rows_train_like_padded_ones_for_every_loss*",),
    ),
    Claim(
        "cached reference scores",
        "a live reference",
        "the losses of a run",
        (f"{PAIRS}test_cached_reference_scores_train_like_a_live_reference*",),
    ),
    Claim(
        "token ids of messages and strings",
        "TRL's tokenisation",
        "five templates, with tools and system prompts",
        ("data/test_encoding.py::test_messages_get_trls_ids*", "data/test_encoding.py::test_strings_get_trls_ids*"),
    ),
    Claim(
        "`chat_rendering`, `special_tokens`, `truncation_mode: trl09`",
        "ids that TRL 0.9.6 and the code of WPO, SimPO and SPPO gave",
        "four tokenizers, rows that are cut and rows that are not",
        ("data/test_authors_ids.py::test_ids_are_those_of_the_authors_code*",),
    ),
    Claim(
        "scores of several assistant turns",
        PLAIN,
        "the tokens of the answers alone; packed and padded",
        ("trainers/test_completion_turns.py::test_sums_are_the_models_own_on_the_answers*",),
    ),
    Claim(
        "truncation",
        "TRL's",
        "both sides",
        ("data/test_truncation.py::test_keep_start_is_trls*", "data/test_truncation.py::test_keep_end_is_trls*"),
    ),
]

PRECISIONS = [
    Claim(
        "bf16 scores, packed",
        "float32 scores; the error is at most that of padded rows",
        "a tiny Llama",
        ("scoring/test_logprobs.py::test_bf16_packing_errs_no_more_than_padding*",),
    ),
    Claim(
        "bf16 weights with float32 copies",
        "training in float32",
        "the loss and the weights after training",
        ("trainers/test_running.py::test_bf16_weights_train_as_float32_ones",),
    ),
    Claim(
        "stochastic rounding",
        "the exact mean",
        "many seeds",
        ("trainers/test_running.py::test_stochastic_rounding_is_exact_in_the_mean_and_the_same_for_one_seed",),
    ),
    Claim(
        "numbers of a batch under DeepSpeed",
        "themselves",
        "cached scores, margins, win probabilities",
        (f"{PAIRS}test_numbers_of_a_batch_keep_their_dtype_under_deepspeed*",),
    ),
]

WRAPPERS = [
    Claim(
        "DDP, ZeRO-2, ZeRO-3",
        "one process",
        "two ranks through the real script; padded and packed",
        ("distributed/test_launch.py::test_two_ranks_train_like_one*",),
    ),
    Claim(
        "FSDP2",
        "one process",
        "two sharded ranks: scores and gradients, float32 and bf16",
        ("distributed/test_fsdp2.py::*",),
    ),
    Claim(
        "reward and general preference models, DDP and ZeRO-3",
        "one process",
        "two ranks",
        ("trainers/test_head_ranks.py::test_two_ranks_train_the_same_model_as_one_process*",),
    ),
    Claim(
        "activation checkpointing",
        "none",
        "the losses of a run",
        (f"{PAIRS}test_checkpointing_changes_nothing*",),
    ),
    Claim(
        "every n-th layer, selective, all layers recomputed",
        "none recomputed",
        "losses, gradient norms and weights",
        ("trainers/test_checkpointing.py::test_every_mode_trains_alike*",),
    ),
    Claim(
        "micro-batches of tokens",
        "micro-batches of pairs",
        "figures and weights after training",
        ("trainers/test_token_batches.py::test_a_step_is_the_same_in_micro_batches_of_tokens*",),
    ),
    Claim("torch.compile", "none", "the losses of a run", (f"{PAIRS}test_torch_compile_trains_alike*",)),
]

RESUMING = [
    Claim(
        "pairs", "an uninterrupted run", "stopped in the second epoch", (f"{PAIRS}test_resumed_equals_uninterrupted*",)
    ),
    Claim(
        "several references",
        "an uninterrupted run",
        "the weighting's state too",
        ("trainers/test_multi_reference.py::test_a_resumed_run_equals_an_uninterrupted_one*",),
    ),
    Claim(
        "reward models",
        "an uninterrupted run",
        "one process",
        ("trainers/test_reward.py::test_resuming_equals_not_stopping*",),
    ),
    Claim(
        "16-bit weights",
        "an uninterrupted run",
        "float32 copies, stochastic rounding",
        ("trainers/test_running.py::test_resumed_equals_uninterrupted_with_bf16_weights*",),
    ),
    Claim(
        "two ranks",
        "an uninterrupted run",
        "in the second epoch, through the real script",
        ("distributed/test_launch.py::test_resumed_in_the_second_epoch_equals_uninterrupted*",),
    ),
]

SECTIONS = {
    "Losses": LOSSES,
    "Weights": WEIGHTS,
    "Trainers": TRAINERS,
    "Rankers": RANKERS,
    "Pair rules": PAIR_RULES,
    "From text to scores": LAYOUTS,
    "Precision": PRECISIONS,
    "Wrappers": WRAPPERS,
    "Resuming": RESUMING,
}


def claims() -> Iterator[Claim]:
    """Yield the claims of all sections."""
    for section in SECTIONS.values():
        yield from section


@dataclass
class Outcome:
    """What happened in one test: the numbers that it compared, the largest deviation, and how it ended."""

    comparisons: int = 0
    deviation: float = 0.0
    ended: str = "passed"
    reason: str = ""


@dataclass
class Measured:
    """A pytest plugin that measures the comparisons of each test."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    collected: list[str] = field(default_factory=list)
    now: str | None = None

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the tests that a claim names."""
        self.collected = [item.nodeid for item in items]
        items[:] = [item for item in items if any(matches(item.nodeid, claim) for claim in claims())]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Measure while the test itself runs."""
        self.now = item.nodeid
        self.outcomes.setdefault(item.nodeid, Outcome())
        yield
        self.now = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember how the test ended."""
        outcome = self.outcomes.setdefault(report.nodeid, Outcome())
        if report.skipped or (report.failed and outcome.ended == "passed"):
            outcome.ended = report.outcome
            outcome.reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""

    def add(self, actual: Any, expected: Any) -> None:
        """Measure one comparison that held."""
        if self.now is None:
            return
        outcome = self.outcomes[self.now]
        for ours, theirs in leaves(actual, expected):
            outcome.comparisons += ours.size
            if ours.size:
                with np.errstate(invalid="ignore"):
                    gap = np.abs(ours - theirs) / np.maximum(1.0, np.abs(theirs))
                # equal infinities subtract to NaN
                outcome.deviation = max(outcome.deviation, float(np.where(ours == theirs, 0.0, gap).max()))

    def install(self) -> None:
        """Replace the functions that compare numbers by ones that measure as well."""

        def measuring(function: Callable[..., Any]) -> Callable[..., Any]:
            def compare(actual: Any, expected: Any, *args: Any, **kwargs: Any) -> Any:
                result = function(actual, expected, *args, **kwargs)
                if result is None or result is True:
                    self.add(actual, expected)
                return result

            return compare

        torch.testing.assert_close = measuring(torch.testing.assert_close)
        torch.equal = measuring(torch.equal)
        torch.allclose = measuring(torch.allclose)
        np.testing.assert_allclose = measuring(np.testing.assert_allclose)
        # sequences, mappings and arrays compare their numbers one by one through this class
        scalar = type(pytest.approx(1.0))
        compare = scalar.__eq__

        def approximately(approx: Any, actual: Any) -> bool:
            held = compare(approx, actual)
            if held:
                self.add(actual, approx.expected)
            return held

        scalar.__eq__ = approximately  # type: ignore[method-assign, assignment]


def leaves(actual: Any, expected: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the numbers of two nested values side by side, as float64 arrays."""
    if isinstance(expected, dict):
        for key in expected:
            yield from leaves(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)) and any(
        isinstance(part, (torch.Tensor, list, tuple)) for part in expected
    ):
        for one, other in zip(actual, expected):
            yield from leaves(one, other)
    else:
        try:
            arrays = [
                value.detach().double().cpu().numpy()
                if isinstance(value, torch.Tensor)
                else np.asarray(value, np.float64)
                for value in (actual, expected)
            ]
            yield tuple(np.broadcast_arrays(*arrays))  # type: ignore[misc]
        except (TypeError, ValueError):
            return  # words and the like: equal, or the test would have failed


def matches(test: str, claim: Claim) -> bool:
    """Whether a claim names the test."""
    return any(fnmatchcase(test, f"tests/{pattern}") for pattern in claim.tests)


def run() -> Measured:
    """Run the tests that the claims name; raise where one names no test."""
    measured = Measured()
    measured.install()
    files = sorted({f"tests/{pattern.split('::')[0]}" for claim in claims() for pattern in claim.tests})
    os.chdir(ROOT)
    pytest.main(
        [*files, "-q", "-m", "slow or not slow", "-p", "no:xdist", "-p", "no:cacheprovider"], plugins=[measured]
    )
    for claim in claims():
        for pattern in claim.tests:
            if not any(fnmatchcase(test, f"tests/{pattern}") for test in measured.collected):
                raise SystemExit(f"{claim.subject}: no test is named {pattern}")
    return measured


def row(claim: Claim, measured: Measured) -> str:
    """Return the claim's line of the table."""
    found = [outcome for test, outcome in measured.outcomes.items() if matches(test, claim)]
    ended = {outcome.ended for outcome in found}
    ran = [outcome for outcome in found if outcome.ended == "passed"]
    numbers = sum(outcome.comparisons for outcome in ran)
    deviation = max((outcome.deviation for outcome in ran), default=math.nan)
    if not found or "failed" in ended:
        seen = "**failed**"
    elif not ran:
        seen = f"not run: {found[0].reason.removeprefix('Skipped: ')}"
    elif not numbers:
        seen = "held"
    else:
        seen = "0" if deviation == 0 else f"{deviation:.0e}"
    return f"| {subject(claim)} | {claim.against} | {claim.on} | {len(ran)} | {numbers or '–'} | {seen} |"


def subject(claim: Claim) -> str:
    """Return the subject as the page shows it: names as code, words as words."""
    is_name = " " not in claim.subject and "`" not in claim.subject and claim.subject.isascii()
    return (
        f"`{claim.subject}`"
        if is_name and ("_" in claim.subject or claim.subject.endswith("Trainer"))
        else claim.subject
    )


def page(measured: Measured, minutes: float) -> str:
    """Write the page from the outcomes."""
    ran = sum(outcome.ended == "passed" for outcome in measured.outcomes.values())
    torch_version = torch.__version__.split("+")[0]
    lines = [
        "# Correctness",
        "",
        "What the loss says is what is computed. Each line names a part, what it was compared with, on what, and",
        "the largest deviation that was *seen* (not the one that was allowed): |ours − expected| / max(1, |expected|)",
        "over all numbers that the tests compared. *held* means that ids, choices or states were compared, or that",
        "the test has a bound of its own. Differences from the papers' code, and the switch for each, stand in",
        "[fidelity.md](fidelity.md).",
        "",
        f"Written by `make certificate` (`docs/certificate.py`): {ran} tests on a CPU with torch {torch_version}, in",
        f"{minutes:.0f} minutes. Nothing here has run on a GPU.",
        "",
    ]
    for name, section in SECTIONS.items():
        lines += [f"## {name}", ""]
        lines += [
            "| what | compared with | on | tests | numbers | largest deviation |",
            "|---|---|---|---:|---:|---:|",
        ]
        lines += [*(row(claim, measured) for claim in section), ""]
    return "\n".join(lines)


def problems() -> list[str]:
    """Return what the page lacks, or shows as failed."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    lines = text.splitlines()
    missing = [
        f"{claim.subject}, compared with {claim.against}"
        for claim in claims()
        if not any(line.startswith(f"| {subject(claim)} | {claim.against} | {claim.on} |") for line in lines)
    ]
    return [
        *(f"missing: {words}" for words in missing),
        *(f"failed: {line}" for line in lines if "**failed**" in line),
    ]


def main() -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="run nothing; check that the page holds every claim")
    if not parser.parse_args().check:
        begin = time.monotonic()
        measured = run()
        PAGE.write_text(page(measured, (time.monotonic() - begin) / 60), encoding="utf-8")
    if found := problems():
        print("\n".join([f"{PAGE.relative_to(ROOT)} is out of date; run `make certificate`:", *found]))
        sys.exit(1)


if __name__ == "__main__":
    main()
