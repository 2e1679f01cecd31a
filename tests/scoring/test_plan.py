"""The plan: each group once an epoch, equal steps on every rank, balanced tokens, few row lengths."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.scoring.plan import BatchPlan, GroupLengths, fewest_micro_batches, pack_rows


def lognormal_lengths(count: int, *, prompt: int, chosen: int, rejected: int, cap: int = 2048, seed: int = 0):
    """Lengths with the given means, cut so that a pair's longer sequence fits in `cap`."""
    rng = random.Random(seed)

    def draw(mean: int, sigma: float) -> int:
        return max(1, round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)))

    lengths = []
    for _ in range(count):
        p = min(draw(prompt, 0.9), cap - 2)
        c, r = (min(draw(mean, 0.8), cap - p) for mean in (chosen, rejected))
        lengths.append(GroupLengths(packed=p + c + r, longest=p + max(c, r), completions=2, first_scored=c))
    return lengths


plans = st.fixed_dictionaries(
    {
        "count": st.integers(1, 60),
        "groups_per_micro_batch": st.integers(1, 4),
        "micro_batches": st.integers(1, 3),
        "world_size": st.integers(1, 4),
        "capacity": st.sampled_from([None, 2048, 4096]),
        "seed": st.integers(0, 100),
        "epoch": st.integers(0, 3),
    }
)


def build(count, capacity, epoch, rank=0, **settings_):
    lengths = lognormal_lengths(count, prompt=100, chosen=150, rejected=150, cap=1000)
    plan = BatchPlan(lengths, rank=rank, max_tokens_per_row=capacity, **settings_)
    plan.set_epoch(epoch)
    return plan


@settings(max_examples=60, deadline=None)
@given(plans)
def test_each_group_exactly_once_and_ranks_in_step(given_plan):
    world, micro = given_plan["world_size"], given_plan["micro_batches"]
    ranks = [[batch for (batch,) in build(**given_plan, rank=rank)] for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == len(build(**given_plan)) == build(**given_plan).num_steps * micro
    real = [index for batches in ranks for batch in batches if not batch.is_filler for index in batch.indices]
    assert sorted(real) == list(range(given_plan["count"]))
    per_step = given_plan["groups_per_micro_batch"] * micro * world
    for step in range(len(ranks[0]) // micro):
        batches = [batch for rank in ranks for batch in rank[step * micro : (step + 1) * micro]]
        members = [index for batch in batches if not batch.is_filler for index in batch.indices]
        is_last = step == len(ranks[0]) // micro - 1
        assert len(members) == per_step or (is_last and 0 < len(members) <= per_step)
        assert {batch.step_groups for batch in batches} == {len(members)}
        tokens = sum(build(**given_plan).lengths[index].first_scored for index in members)
        assert {batch.step_first_tokens for batch in batches} == {tokens}


@settings(max_examples=40, deadline=None)
@given(plans.filter(lambda plan: plan["capacity"] is not None))
def test_rows_hold_no_more_than_their_capacity(given_plan):
    plan = build(**given_plan)
    for (batch,) in plan:
        fills = [sum(plan.lengths[index].packed for index in row) for row in batch.rows]
        assert max(fills) <= given_plan["capacity"]


def test_the_plan_is_a_pure_function_and_epochs_differ():
    settings_ = {"count": 50, "groups_per_micro_batch": 2, "capacity": 2048, "seed": 7}
    first, again = ([batch for (batch,) in build(**settings_, epoch=0)] for _ in range(2))
    assert first == again
    assert first != [batch for (batch,) in build(**settings_, epoch=1)]
    assert first != [batch for (batch,) in build(**{**settings_, "seed": 8}, epoch=0)]
    plan = build(**settings_, epoch=1)
    assert plan.step(0, 3)[0] == first[3:4]  # any step of any epoch, at any time


@pytest.mark.parametrize(("micro", "count", "world"), [(1, 8, 1), (8, 2, 8), (2, 4, 8), (4, 4, 2), (8, 2, 1)], ids=str)
def test_padding_and_balance_at_real_lengths(micro, count, world):
    """UltraFeedback's means (190/327/302, cut at 2,048): at most 5 % padding; ranks within 5 % of the mean."""
    lengths = lognormal_lengths(3000, prompt=190, chosen=327, rejected=302)
    plan = BatchPlan(
        lengths,
        groups_per_micro_batch=count,
        micro_batches=micro,
        world_size=world,
        max_tokens_per_row=16384,
    )
    real = total = 0
    imbalance = []
    for epoch in range(2):
        for step in range(plan.num_steps - 1):
            loads = []
            for batches in plan.step(epoch, step):
                fills = [sum(lengths[index].packed for index in batch.indices) for batch in batches]
                loads.append(sum(fills))
                for batch in batches:
                    rows = [sum(lengths[index].packed for index in row) for row in batch.rows]
                    total += len(rows) * max(rows)
            real += sum(loads)
            imbalance.append(max(loads) / statistics.mean(loads) - 1)
    assert 1 - real / total <= 0.05
    assert max(imbalance) <= 0.05


def test_padded_micro_batches_group_like_lengths():
    lengths = [GroupLengths(0, longest, 2, 1) for longest in (10, 90, 11, 91)]
    plan = BatchPlan(lengths, groups_per_micro_batch=2, micro_batches=2, shuffle=False)
    assert [sorted(batch.indices) for (batch,) in plan] == [[1, 3], [0, 2]]


def test_drop_last_leaves_out_the_smaller_step():
    settings_ = {"count": 10, "groups_per_micro_batch": 4, "capacity": None, "epoch": 0}
    assert len(build(**settings_)) == 3
    assert len(build(**settings_, drop_last=True)) == 2


@settings(max_examples=40, deadline=None)
@given(plans, st.integers(1, 12))
def test_a_step_keeps_its_groups_however_many_micro_batches_it_has(given_plan, micro_batches):
    """The groups of a step do not depend on its division, which need not be even; all ranks run alike."""
    pairs = build(**given_plan)
    tokens = build(**given_plan | {"micro_batches": micro_batches}, groups_per_step=pairs.groups_per_step)
    assert tokens.num_steps == pairs.num_steps
    for step in range(pairs.num_steps):
        members = [
            sorted(i for rank in plan.step(plan.epoch, step) for m in rank if not m.is_filler for i in m.indices)
            for plan in (pairs, tokens)
        ]
        assert members[0] == members[1]
        assert {len(rank) for rank in tokens.step(tokens.epoch, step)} == {micro_batches}
        sizes = {m.step_groups for rank in tokens.step(tokens.epoch, step) for m in rank}
        assert sizes == {len(members[0])}


@pytest.mark.parametrize("world", [1, 2, 8])
@pytest.mark.parametrize("capacity", [16384, None], ids=["packed", "padded"])
def test_micro_batches_of_tokens_are_as_few_as_hold_no_more(world, capacity):
    """UltraFeedback's lengths, 128 pairs a step: no micro-batch of two epochs is larger; one fewer would be."""
    lengths = lognormal_lengths(1280, prompt=190, chosen=327, rejected=302)

    def plan(micro_batches):
        return BatchPlan(
            lengths, groups_per_step=128, micro_batches=micro_batches, world_size=world, max_tokens_per_row=capacity
        )

    count, heaviest = fewest_micro_batches(plan, 8192, epochs=2)
    chosen = plan(count)
    sizes = [
        chosen.tokens(m) for epoch in (0, 1) for step in range(10) for rank in chosen.step(epoch, step) for m in rank
    ]
    assert max(sizes) == heaviest <= 8192
    assert count == 1 or plan(count - 1).heaviest(epochs=2) > 8192
    if capacity:
        assert statistics.mean(sizes) > 0.7 * 8192 or world == 8  # 16 pairs a rank make two micro-batches
    assert fewest_micro_batches(plan, 10, epochs=1)[0] == 128 // world  # a pair each


def test_a_group_that_fits_in_no_row_is_refused():
    with pytest.raises(ValueError, match=r"A pair has 900 tokens.*max_tokens_per_row.*at least 900"):
        BatchPlan([GroupLengths(900, 600, 2, 300)], groups_per_micro_batch=1, max_tokens_per_row=512)
    with pytest.raises(ValueError, match="no rows"):
        BatchPlan([], groups_per_micro_batch=1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=40))
def test_packed_rows_are_a_partition_within_capacity(sizes):
    rows = pack_rows(range(len(sizes)), sizes, 128)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    fills = [sum(sizes[index] for index in row) for row in rows]
    assert max(fills) <= 128
    assert len(rows) <= max(1, math.ceil(11 / 9 * math.ceil(sum(sizes) / 128)) + sum(size > 64 for size in sizes))


def test_the_heaviest_ranks_tokens_over_the_lightests():
    lengths = [GroupLengths(size, size // 2, 2, 10) for size in (100, 1000) * 64]
    one = BatchPlan(lengths, groups_per_micro_batch=1, world_size=2, max_tokens_per_row=1024, shuffle=False)
    many = BatchPlan(lengths, groups_per_micro_batch=16, world_size=2, max_tokens_per_row=16384, shuffle=False)
    padded = BatchPlan(lengths, groups_per_micro_batch=1, world_size=2, shuffle=False)
    assert one.load_ratio() == padded.load_ratio() == 10
    assert many.load_ratio() == 1
