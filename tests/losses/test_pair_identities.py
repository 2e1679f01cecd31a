"""Values by hand, identities between losses, and ranges of settings."""

from __future__ import annotations

import math
from math import log

import pytest
import torch

from prefopt import losses

from .pair_cases import BY_NAME

LN3 = log(3)  # sigmoid(ln 3) = 3/4


def one(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def check(actual: torch.Tensor, *expected: float) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_dpo_by_hand():
    """beta h = 1/2 (3 ln 3 - ln 3) = ln 3, so the loss is -ln 3/4; smoothed by 1/4: -3/4 ln 3/4 - 1/4 ln 1/4."""
    columns = one(3 * LN3, LN3)
    check(losses.dpo_loss(*columns, beta=0.5), log(4 / 3))
    check(losses.dpo_loss(*columns, beta=0.5, label_smoothing=0.25), 0.75 * log(4 / 3) + 0.25 * log(4))


def test_hinge_by_hand():
    """1 - 1/2 (1 - 1/2) = 3/4; beyond 1 / beta = 2 nats the loss is 0."""
    check(losses.hinge_loss(*one(1.0, 0.5), beta=0.5), 0.75)
    check(losses.hinge_loss(*one(2.5, 0.0), beta=0.5), 0.0)


def test_robust_dpo_by_hand():
    """beta h = ln 3, eps = 1/4: (3/4 ln 4/3 - 1/4 ln 4) / (1/2)."""
    check(
        losses.robust_dpo_loss(*one(LN3, 0.0), beta=1.0, label_smoothing=0.25),
        (0.75 * log(4 / 3) - 0.25 * log(4)) / 0.5,
    )


def test_exo_by_hand():
    """q = 3/4. Against (1/2, 1/2): 3/4 ln 3/2 + 1/4 ln 1/2; against (3/4, 1/4) it is a divergence of equals, 0."""
    columns = one(LN3, 0.0)
    expected = 0.75 * log(1.5) + 0.25 * log(0.5)
    check(losses.exo_pair_loss(*columns, beta=1.0, label_smoothing=0.5), expected)
    check(losses.exo_pair_loss(*columns, beta=1.0, label_smoothing=0.25), 0.0)


def test_discopop_by_hand():
    """beta h = ln 3, tau = 1: m = 3/4, exp(-beta h) = 1/3, so 1/4 ln 4/3 + 3/4 * 1/3."""
    check(losses.discopop_loss(*one(LN3, 0.0), beta=1.0, tau=1.0), 0.25 * log(4 / 3) + 0.25)


def test_ipo_by_hand():
    """The target is 1 / (2 * 1/2) = 1 nat per token; h = 3, so (3 - 1)^2 = 4."""
    check(losses.ipo_loss(*one(1.0, -2.0), beta=0.5), 4.0)


def test_length_normalised_dpo_by_hand():
    """5 * (ln 3) / 5 = ln 3."""
    check(losses.sigmoid_norm_loss(*one(0.0, -LN3 / 5), beta=5.0), log(4 / 3))


def test_simpo_by_hand():
    """2 (-1/4 + 3/4 + (ln 3) / 2 - 1/2) = ln 3."""
    check(losses.simpo_loss(*one(-0.25, -0.75 - LN3 / 2), beta=2.0, gamma_beta_ratio=0.5), log(4 / 3))


def test_nca_by_hand():
    """c = ln 3, r = -ln 3: -ln 3/4 - 1/2 ln 1/4 - 1/2 ln 3/4."""
    check(losses.nca_pair_loss(*one(LN3, -LN3), beta=1.0), 1.5 * log(4 / 3) + 0.5 * log(4))


def test_bco_by_hand():
    """c = ln 3, r = 0: -ln 3/4 - ln 1/2."""
    check(losses.bco_pair_loss(*one(2 * LN3, 0.0), beta=0.5), log(4 / 3) + log(2))


def test_anchored_by_hand():
    """Zero: 1 - 3/4 + 3/4 at c = r = ln 3. Down: sigmoid(ln 3) + 1 - sigmoid(-ln 3) = 3/4 + 3/4 at r = 2 c."""
    check(losses.anchored_zero_loss(*one(LN3, LN3), beta=1.0), 1.0)
    check(losses.anchored_zero_loss(*one(LN3, -LN3), beta=1.0), 0.5)
    check(losses.anchored_down_loss(*one(LN3, 2 * LN3), beta=1.0), 1.5)


def test_aot_by_hand():
    """Policy (ln 3, 0), reference (-ln 3, 0): sorted, (0, ln 3) - (-ln 3, 0) = (ln 3, ln 3); by pairs, (2 ln 3, 0)."""
    policy, reference = torch.tensor([[LN3, 0.0], [-LN3, 0.0]], dtype=torch.float64)
    check(losses.aot_loss(policy, reference, beta=1.0), log(4 / 3), log(4 / 3))
    check(losses.aot_unpaired_loss(policy, reference, beta=1.0), log(4 / 3), log(4 / 3))


def test_sppo_by_hand():
    """beta = 0.001, p = .8 and .3: targets 300 and -200, so 1/2 (290^2 + 195^2) = 1/2 (84100 + 38025)."""
    check(losses.sppo_loss(*one(10.0, -5.0, 0.8, 0.3), beta=0.001), 61062.5)


def test_sppo_single_by_hand():
    """beta = 1/2, P = 3/4: targets 1/2 and -1/2, so 1/2 ((3/2 - 1/2)^2 + (1/2 + 1/2)^2) = 1."""
    check(losses.sppo_single_loss(*one(1.5, 0.5, 0.75), beta=0.5), 1.0)


def test_sppo_hard_by_hand():
    """beta = 1/2: targets 1 and -1, so (2 - 1)^2 + (1 + 1)^2 = 5, without a factor 1/2."""
    check(losses.sppo_hard_loss(*one(2.0, 1.0), beta=0.5), 5.0)


def test_gpo_by_hand():
    """beta = 1/2: targets 2 and -6; 1/2 ((1 - 2)^2 + (-2 + 6)^2) = 8.5; clipped at 4 nats, 1/2 (1 + 4) = 2.5."""
    columns = one(1.0, -2.0, 1.0, -3.0)
    check(losses.gpo_loss(*columns, beta=0.5), 8.5)
    check(losses.gpo_loss(*columns, beta=0.5, max_target=4.0), 2.5)


@pytest.mark.parametrize("smoothed", [losses.dpo_loss, losses.robust_dpo_loss], ids=["dpo", "robust"])
def test_smoothing_zero_is_dpo(smoothed):
    columns = BY_NAME["dpo"].make()
    check(smoothed(*columns, beta=0.3, label_smoothing=0.0), *losses.dpo_loss(*columns, beta=0.3).tolist())


def test_robust_dpo_is_unbiased_under_flipped_labels():
    chosen, rejected = BY_NAME["dpo"].make()
    kept = losses.robust_dpo_loss(chosen, rejected, beta=0.3, label_smoothing=0.2)
    flipped = losses.robust_dpo_loss(rejected, chosen, beta=0.3, label_smoothing=0.2)
    check(0.8 * kept + 0.2 * flipped, *losses.dpo_loss(chosen, rejected, beta=0.3).tolist())


def test_dpo_at_the_reference_is_log_two():
    check(losses.dpo_loss(*one(-3.0, -3.0), beta=0.1), log(2))


def test_aot_of_one_pair_is_dpo_and_unpaired_of_log_ratios_alike():
    policy, reference = one(1.5, -0.25)
    expected = losses.dpo_loss(policy, reference, beta=0.3).item()
    check(losses.aot_loss(policy, reference, beta=0.3), expected)
    check(losses.aot_unpaired_loss(policy, reference, beta=0.3), expected)


def test_simpo_without_margin_is_length_normalised_dpo_without_reference():
    columns = BY_NAME["simpo"].make()
    expected = losses.sigmoid_norm_loss(*columns, beta=2.0).tolist()
    check(losses.simpo_loss(*columns, beta=2.0, gamma_beta_ratio=0.0), *expected)


def test_hard_sppo_is_twice_sppo_with_certain_outcomes():
    chosen, rejected = BY_NAME["sppo_hard"].make()
    ones, zeros = torch.ones_like(chosen), torch.zeros_like(chosen)
    soft = losses.sppo_loss(chosen, rejected, ones, zeros, beta=0.2)
    single = losses.sppo_single_loss(chosen, rejected, ones, beta=0.2)
    hard = losses.sppo_hard_loss(chosen, rejected, beta=0.2)
    check(hard, *(2 * soft).tolist())
    check(single, *soft.tolist())


def test_gpo_with_centred_probabilities_is_sppo():
    chosen, rejected, chosen_wins, rejected_wins = BY_NAME["sppo"].make()
    expected = losses.sppo_loss(chosen, rejected, chosen_wins, rejected_wins, beta=0.01)
    check(losses.gpo_loss(chosen, rejected, chosen_wins - 0.5, rejected_wins - 0.5, beta=0.01), *expected.tolist())


def test_a_bound_that_does_not_bind_changes_nothing():
    columns = BY_NAME["gpo"].make()
    assert torch.equal(losses.gpo_loss(*columns, beta=0.2, max_target=1e3), losses.gpo_loss(*columns, beta=0.2))


def test_exo_is_least_where_the_policy_says_the_smoothed_label():
    """q = 1 - eps at beta h = ln((1 - eps) / eps); on both sides of it the loss is larger."""
    best = math.log(0.9 / 0.1)
    margins = torch.tensor([best - 0.5, best, best + 0.5], dtype=torch.float64)
    left, middle, right = losses.exo_pair_loss(margins, torch.zeros_like(margins), beta=1.0, label_smoothing=0.1)
    assert middle.item() == pytest.approx(0.0, abs=1e-12)
    assert left > 1e-3
    assert right > 1e-3


def test_whole_number_win_probabilities_are_read_as_numbers():
    chosen, rejected = one(1.0, -1.0)
    outcome = torch.tensor([1])
    check(losses.sppo_single_loss(chosen, rejected, outcome, beta=0.5), 0.0)


@pytest.mark.parametrize(
    ("name", "setting", "bad", "good"),
    [
        ("dpo", "label_smoothing", [-0.1, 0.6, 1.0, float("nan")], [0.0, 0.5]),
        ("aot", "label_smoothing", [-0.1, 0.6, float("nan")], [0.0, 0.5]),
        ("aot_unpaired", "label_smoothing", [-0.1, 0.6, float("nan")], [0.0, 0.5]),
        ("robust", "label_smoothing", [-0.1, 0.5, 0.6, float("nan")], [0.0, 0.49]),
        ("exo_pair", "label_smoothing", [0.0, -0.1, 0.6, 1.0, float("nan")], [1e-3, 0.5]),
        ("discopop", "tau", [0.0, -1.0, 1.5, float("nan")], [0.05, 1.0]),
        ("simpo", "gamma_beta_ratio", [-0.1, float("nan"), float("inf")], [0.0, 1.0]),
        ("gpo", "max_target", [0.0, -1.0, float("nan"), float("inf")], [1e-3, None]),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, setting, bad, good):
    case = BY_NAME[name]
    for value in bad:
        with pytest.raises(ValueError, match=setting):
            case.loss(*case.make(), **{**case.settings, setting: value})
    for value in good:
        assert case.loss(*case.make(), **{**case.settings, setting: value}).isfinite().all()
