"""Layouts place every token where the scoring forward looks for it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from prefopt.scoring.layouts import Group, PackedLayout, PaddedLayout
from prefopt.scoring.packing import why_not_packed
from tests.scoring.helpers import dense_mask, random_groups
from tests.tiny import tiny_model

PAD = 0
LAYOUTS = [PaddedLayout(PAD), PackedLayout(PAD), PackedLayout(PAD, share_prompt=False)]


def sequence_of(batch: dict[str, torch.Tensor], completion: int, count: int) -> list[int]:
    """The ids that the last of a completion's tokens may attend to, read from ids and mask alone."""
    ids = batch["input_ids"]
    length = ids.shape[1]
    row, position = divmod(int(batch["last_index"][completion]), length)
    if isinstance(batch["attention_mask"], torch.Tensor):
        return ids[row][batch["attention_mask"][row]].tolist()
    return ids[row][dense_mask(batch["attention_mask"])[row, 0, position]].tolist()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.name}-{getattr(layout, 'share_prompt', '')}")
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 5), completions=st.integers(1, 3), split=st.integers(0, 5))
def test_every_completion_sees_its_own_sequence_and_nothing_else(layout, seed, count, completions, split):
    groups = random_groups(count, seed=seed, completions=completions)
    rows = [row for row in (groups[:split], groups[split:]) if row]
    batch = layout.collate(rows)
    flat_ids, flat_positions = batch["input_ids"].flatten(), batch["position_ids"].flatten()
    completion = 0
    for group in groups:
        for tokens in group.completions:
            scored = batch["score_completions"] == completion
            assert batch["score_targets"][scored].tolist() == list(tokens)
            assert sequence_of(batch, completion, len(tokens)) == [*group.prompt, *tokens]
            # a token is predicted from the position before it, and positions run on from the prompt
            predicting = batch["score_index"][scored]
            expected = range(len(group.prompt) - 1, len(group.prompt) + len(tokens) - 1)
            assert flat_positions[predicting].tolist() == list(expected)
            assert flat_ids[predicting].tolist() == [group.prompt[-1], *tokens[:-1]]
            assert flat_ids[batch["first_index"][completion]] == tokens[0]
            assert flat_ids[batch["last_index"][completion]] == tokens[-1]
            assert flat_ids[batch["prompt_index"][completion]] == group.prompt[-1]
            completion += 1
    assert batch["last_index"].numel() == completion


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.name}-{getattr(layout, 'share_prompt', '')}")
def test_token_weights_count_each_token_once_per_sequence(layout):
    groups = random_groups(4, seed=3, completions=3)
    batch = layout.collate([groups[:1], groups[1:]])
    expected = sum(len(group.prompt) + len(tokens) for group in groups for tokens in group.completions)
    assert batch["token_weights"].sum() == expected


def test_packed_rows_hold_the_prompt_once():
    group = Group([5, 6, 7], [[8, 9], [10]])
    batch = PackedLayout(PAD).collate([[group], [Group([11, 12, 13, 14], [[15, 16], [17, 18]])]])
    assert batch["input_ids"][0].tolist() == [5, 6, 7, 8, 9, 10, PAD, PAD]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 3, 0, 0]
    assert batch["score_index"][:3].tolist() == [2, 3, 2]  # both first tokens are predicted from the last prompt token


def test_padding_to_a_multiple():
    batch = PaddedLayout(PAD, pad_to_multiple_of=8).collate([[Group([5, 6, 7], [[8, 9], [10]])]])
    assert batch["input_ids"].shape == (2, 8)


@pytest.mark.parametrize(
    ("architecture", "overrides", "longest", "reason"),
    [
        ("llama", {}, 400, None),
        ("mistral", {"sliding_window": 64}, 65, "sliding window of 64"),
        ("mistral", {"sliding_window": 64}, 64, None),
        ("gemma2", {"sliding_window": 32}, 33, "sliding window of 32"),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, 100, None),
        ("mixtral", {}, 100, None),
        ("llama", {"attention_dropout": 0.1}, 4, "attention has dropout"),
    ],
)
def test_what_cannot_be_packed_says_why(architecture, overrides, longest, reason):
    config = tiny_model(architecture, **overrides).config
    found = why_not_packed(config, longest_sequence=longest)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("architecture", "overrides", "reason"),
    [
        ("gpt_neo", {"window_size": 8}, "sliding window of 8"),
        ("gpt_neo", {"window_size": 9}, None),
        ("bloom", {}, "ALiBi"),
        ("mpt", {}, "ALiBi"),
        ("falcon", {"alibi": True}, "ALiBi"),
        ("falcon", {}, None),
    ],
)
def test_attention_by_places_in_the_row_cannot_be_packed(architecture, overrides, reason):
    config = AutoConfig.for_model(architecture, **overrides)
    found = why_not_packed(config, longest_sequence=9)
    assert found is None if reason is None else reason in found


def test_recurrent_layers_cannot_be_packed():
    for config in (AutoConfig.for_model("mamba"), AutoConfig.for_model("qwen3_next"), AutoConfig.for_model("jamba")):
        assert "carr" in why_not_packed(config, longest_sequence=8)
