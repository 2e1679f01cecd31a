"""TRL by value, wherever TRL has the loss: its own code on the same log-probabilities."""

from __future__ import annotations

import pytest
import torch

from prefopt import losses

from .trl_oracle import trl_dpo_loss, trl_reward_loss, trl_simpo_losses


class Batch:
    """Token log-probabilities of a few pairs of different lengths, with reference sums."""

    def __init__(self, seed: int = 0, pairs: int = 6):
        generator = torch.Generator().manual_seed(seed)

        def rand(*shape):
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        lengths = torch.randint(1, 12, (2, pairs), generator=generator)
        self.chosen, self.rejected = ([-2 * rand(int(n)) for n in row] for row in lengths)
        self.chosen_counts, self.rejected_counts = lengths
        self.chosen_logps = torch.stack([tokens.sum() for tokens in self.chosen])
        self.rejected_logps = torch.stack([tokens.sum() for tokens in self.rejected])
        self.ref_chosen_logps = self.chosen_logps + 12 * (rand(pairs) - 0.5)
        self.ref_rejected_logps = self.rejected_logps + 12 * (rand(pairs) - 0.5)
        self.log_sum_sq_probs = [-2.2 * rand(len(tokens)) for tokens in [*self.chosen, *self.rejected]]

    def logratios(self):
        return self.chosen_logps - self.ref_chosen_logps, self.rejected_logps - self.ref_rejected_logps

    def mean_logratios(self):
        chosen, rejected = self.logratios()
        return chosen / self.chosen_counts, rejected / self.rejected_counts

    def margins(self):
        return self.chosen_logps - self.rejected_logps, self.ref_chosen_logps - self.ref_rejected_logps

    def mean_aligned_logps(self):
        tokens = [*self.chosen, *self.rejected]
        means = torch.stack([(t - s).mean() for t, s in zip(tokens, self.log_sum_sq_probs, strict=True)])
        return means.chunk(2)

    def trl(self, loss_type, pair=None, **settings):
        """TRL's mean loss of the batch, or its loss of one pair alone."""
        rows = slice(None) if pair is None else slice(pair, pair + 1)
        return trl_dpo_loss(
            loss_type,
            self.chosen[rows],
            self.rejected[rows],
            self.ref_chosen_logps[rows],
            self.ref_rejected_logps[rows],
            **settings,
        )


SMOOTHED = {"label_smoothing": 0.1}
TRL_LOSSES = [
    ("sigmoid", losses.dpo_loss, Batch.logratios, {}),
    ("hinge", losses.hinge_loss, Batch.logratios, {}),
    ("ipo", losses.ipo_loss, Batch.mean_logratios, {}),
    ("exo_pair", losses.exo_pair_loss, Batch.logratios, {"label_smoothing": 1e-3}),
    ("nca_pair", losses.nca_pair_loss, Batch.logratios, {}),
    ("robust", losses.robust_dpo_loss, Batch.logratios, SMOOTHED),
    ("bco_pair", losses.bco_pair_loss, Batch.logratios, {}),
    ("sppo_hard", losses.sppo_hard_loss, Batch.logratios, {}),
    ("apo_zero", losses.anchored_zero_loss, Batch.logratios, {}),
    ("apo_down", losses.anchored_down_loss, Batch.logratios, {}),
    ("discopop", losses.discopop_loss, Batch.logratios, {"tau": 0.05}),
    ("discopop", losses.discopop_loss, Batch.logratios, {"tau": 0.9}),
    ("sigmoid_norm", losses.sigmoid_norm_loss, Batch.mean_logratios, {}),
]


@pytest.mark.parametrize(("loss_type", "loss", "columns", "settings"), TRL_LOSSES)
@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_each_pair_and_the_mean_equal_trl(loss_type, loss, columns, settings, beta):
    batch = Batch()
    ours = loss(*columns(batch), beta=beta, **settings)
    theirs = torch.stack([batch.trl(loss_type, pair, beta=beta, **settings) for pair in range(len(ours))])
    # TRL holds EXO's smoothing in float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6 if loss_type == "exo_pair" else 1e-9, atol=1e-9)
    torch.testing.assert_close(ours.mean(), batch.trl(loss_type, beta=beta, **settings), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("loss_type", "loss", "columns"),
    [("aot", losses.aot_loss, Batch.margins), ("aot_unpaired", losses.aot_unpaired_loss, Batch.logratios)],
)
@pytest.mark.parametrize("settings", [{}, SMOOTHED], ids=["plain", "smoothed"])
def test_aot_equals_trl_over_the_batch(loss_type, loss, columns, settings):
    batch = Batch(seed=3)
    ours = loss(*columns(batch), beta=0.8, **settings).mean()
    torch.testing.assert_close(ours, batch.trl(loss_type, beta=0.8, **settings), rtol=1e-9, atol=1e-12)
    one_by_one = torch.stack([batch.trl(loss_type, pair, beta=0.8, **settings) for pair in range(6)]).mean()
    assert (ours - one_by_one).abs() > 1e-4  # sorting matters on this batch


def test_discopop_is_finite_where_trl_is_not():
    chosen, rejected = torch.tensor([-2000.0]), torch.tensor([0.0])
    assert trl_dpo_loss("discopop", [chosen], [rejected], rejected, rejected, beta=0.1).isnan()
    torch.testing.assert_close(losses.discopop_loss(chosen, rejected, beta=0.1), torch.tensor([200.0]))


@pytest.mark.parametrize(("loss_type", "loss", "columns", "settings"), TRL_LOSSES[:6])
def test_unbounded_wpo_weights_are_trls(loss_type, loss, columns, settings):
    batch = Batch(seed=1)
    weights = losses.wpo_pair_weights(*batch.mean_aligned_logps(), max_weight=None)
    assert (weights > 1).any() and (weights < 1).any()
    ours = weights * loss(*columns(batch), beta=0.4, **settings)
    theirs = batch.trl(loss_type, beta=0.4, log_sum_sq_probs=batch.log_sum_sq_probs, **settings)
    torch.testing.assert_close(ours.mean(), theirs, rtol=1e-6, atol=1e-9)


def test_simpo_equals_trl():
    batch = Batch(seed=2)
    means = batch.chosen_logps / batch.chosen_counts, batch.rejected_logps / batch.rejected_counts
    ours = losses.simpo_loss(*means, beta=2.5, gamma_beta_ratio=0.55)
    torch.testing.assert_close(ours, trl_simpo_losses(*means, beta=2.5, gamma=0.55 * 2.5), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_margin", [False, True])
def test_bradley_terry_equals_trl(with_margin):
    chosen, rejected, margin = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = margin.abs() if with_margin else None
    ours = losses.bradley_terry_loss(chosen, rejected, margin=given).mean()
    torch.testing.assert_close(ours, trl_reward_loss(chosen, rejected, given), rtol=1e-12, atol=1e-12)
