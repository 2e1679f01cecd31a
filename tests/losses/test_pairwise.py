"""What every pairwise loss must do, one ladder for all of them."""

from __future__ import annotations

import pytest
import torch

from .pair_cases import BY_NAME, CASES, PairCase

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def gradients(case: PairCase, columns: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    leaves = [column.clone().requires_grad_() for column in columns]
    losses = case(*leaves)
    return losses.detach(), list(torch.autograd.grad(losses.sum(), leaves))


@each_case
def test_equals_the_equation_written_in_plain_floats(case):
    columns = case.make()
    rows = [column.tolist() for column in columns]
    expected = case.equation(*rows) if case.sorts else [case.equation(*row) for row in zip(*rows, strict=True)]
    torch.testing.assert_close(case(*columns), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@each_case
def test_gradient_is_the_derivative(case):
    columns = [column.requires_grad_() for column in case.make(batch=4, seed=1)]
    assert torch.autograd.gradcheck(case, columns)


@each_case
def test_extreme_log_ratios_leave_loss_and_gradient_finite(case):
    extremes = torch.tensor([-1e4, -2000.0, -200.0, 0.0, 200.0, 2000.0, 1e4])
    grid = torch.cartesian_prod(extremes, extremes)
    sides = iter([grid[:, 0], grid[:, 1], grid[:, 0], grid[:, 1]])
    columns = [next(sides) if kind == "x" else torch.ones(len(grid)) for kind in case.columns]
    loss, grads = gradients(case, columns)
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(case, dtype):
    columns = case.make(dtype=dtype)
    loss, grads = gradients(case, columns)
    in_float32 = case(*[column.float() for column in columns])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, in_float32, rtol=0, atol=0)
    assert all(grad.dtype == dtype and grad.isfinite().all() for grad in grads)


@each_case
def test_float64_stays_float64_and_mixed_columns_take_the_wider(case):
    columns = case.make()
    assert case(*columns).dtype == torch.float64
    assert case(columns[0].bfloat16(), *columns[1:]).dtype == torch.float64
    assert case(*[column.bfloat16() for column in columns[:-1]], columns[-1].float()).dtype == torch.float32


@each_case
@pytest.mark.parametrize("shape", [(6,), (7, 1), (1,), ()], ids=str)
def test_no_column_is_broadcast(case, shape):
    for position in range(len(case.columns)):
        columns = case.make()
        columns[position] = torch.zeros(shape, dtype=torch.float64)
        with pytest.raises(ValueError) as error:
            case(*columns)
        assert str(tuple(shape)) in str(error.value)
        assert "(7,)" in str(error.value)


@each_case
def test_two_dimensional_columns_and_numbers_are_refused(case):
    with pytest.raises(ValueError, match=r"\(7, 2\)"):
        case(*[torch.zeros(7, 2) for _ in case.columns])
    with pytest.raises(ValueError, match=r"must be a torch\.Tensor"):
        case(0.5, *case.make()[1:])


@each_case
@pytest.mark.parametrize("value", [0.0, -0.1, float("nan"), float("inf")])
def test_scale_must_be_above_zero_and_finite(case, value):
    scale = "beta" if "beta" in case.settings else "tau"
    with pytest.raises(ValueError, match=scale):
        case.loss(*case.make(), **{**case.settings, scale: value})


@each_case
def test_shapes_are_checked_before_settings(case):
    scale = "beta" if "beta" in case.settings else "tau"
    columns = case.make()
    columns[-1] = columns[-1][:3]
    with pytest.raises(ValueError, match="shapes do not agree"):
        case.loss(*columns, **{**case.settings, scale: -1.0})


@each_case
def test_values_are_never_looked_at(case):
    """A tensor without values is enough, so nothing waits for a device in the middle of a step."""
    losses = case(*[torch.empty(7, device="meta") for _ in case.columns])
    assert losses.device.type == "meta"
    assert losses.shape == (7,)


@each_case
def test_an_empty_batch_gives_no_losses(case):
    assert case(*case.make(batch=0)).shape == (0,)


@each_case
def test_pairs_do_not_see_each_other(case):
    columns = case.make()
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    permuted = case(*[column[order] for column in columns])
    if case.sorts:  # the batch as a whole is what counts
        permuted_alone = case(columns[0], columns[1][order])
        torch.testing.assert_close(permuted_alone, case(*columns), rtol=0, atol=0)
        torch.testing.assert_close(permuted, case(*columns), rtol=0, atol=0)
    else:
        torch.testing.assert_close(permuted, case(*columns)[order], rtol=0, atol=0)


@pytest.mark.parametrize(
    "name",
    [
        "dpo",
        "cdpo",
        "hinge",
        "robust",
        "exo_pair",
        "ipo",
        "sigmoid_norm",
        "simpo",
        "bco_pair",
        "apo_zero",
        "sppo_hard",
    ],
)
def test_a_step_from_the_reference_raises_chosen_and_lowers_rejected(name):
    _, (chosen, rejected) = gradients(BY_NAME[name], [torch.zeros(3), torch.zeros(3)])
    assert (chosen < 0).all()
    assert (rejected > 0).all()


def test_anchored_down_lowers_both_and_the_rejected_more():
    _, (chosen, rejected) = gradients(BY_NAME["apo_down"], [torch.full((1,), 0.5), torch.full((1,), -0.5)])
    assert 0 < chosen.item() < rejected.item()


def test_nca_keeps_pulling_the_chosen_up_where_both_sank_together():
    """At equal log-ratios far below 0 DPO has slope beta / 2 on both; NCA pulls chosen up and leaves rejected
    alone."""
    sunk = [torch.full((1,), -30.0), torch.full((1,), -30.0)]
    _, (nca_chosen, nca_rejected) = gradients(BY_NAME["nca_pair"], sunk)
    _, (dpo_chosen, dpo_rejected) = gradients(BY_NAME["dpo"], sunk)
    assert nca_chosen.item() == pytest.approx(-0.7)
    assert nca_rejected.item() == pytest.approx(0.0, abs=1e-6)
    assert dpo_chosen.item() == pytest.approx(-dpo_rejected.item()) == pytest.approx(-0.35)
