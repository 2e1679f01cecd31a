"""Layouts place every token where the scoring forward looks for it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from prefopt.scoring.attention import packed_attention_mask, why_not_packed
from prefopt.scoring.layouts import Group, PackedLayout, PaddedLayout
from tests.scoring.helpers import random_groups
from tests.tiny import tiny_model

PAD = 0
LAYOUTS = [PaddedLayout(PAD), PackedLayout(PAD), PackedLayout(PAD, share_prompt=False)]


def sequence_of(batch: dict[str, torch.Tensor], completion: int, count: int) -> list[int]:
    """The ids that the last of a completion's tokens may attend to, read from ids and mask alone."""
    ids = batch["input_ids"]
    length = ids.shape[1]
    row, position = divmod(int(batch["last_index"][completion]), length)
    if "attention_mask" in batch:
        return ids[row][batch["attention_mask"][row]].tolist()
    mask = packed_attention_mask(batch["group_ids"], batch["branch_ids"], implementation="sdpa", dtype=torch.float32)
    return ids[row][mask[row, 0, position]].tolist()


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
    batch = PackedLayout(PAD).collate([[group]], row_length=8)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, PAD, PAD]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 0, 0]]
    assert batch["score_index"].tolist() == [2, 3, 2]  # both first tokens are predicted from the last prompt token


def test_a_row_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match=r"6 tokens does not fit in rows of 5.*max_tokens_per_row"):
        PackedLayout(PAD).collate([[Group([5, 6, 7], [[8, 9], [10]])]], row_length=5)


def test_padding_to_a_multiple():
    batch = PaddedLayout(PAD, pad_to_multiple_of=8).collate([[Group([5, 6, 7], [[8, 9], [10]])]])
    assert batch["input_ids"].shape == (2, 8)


def test_the_additive_mask_forbids_what_the_boolean_mask_forbids():
    batch = PackedLayout(PAD).collate([random_groups(3, seed=5)], row_length=120)
    allowed = packed_attention_mask(
        batch["group_ids"], batch["branch_ids"], implementation="sdpa", dtype=torch.float32
    )
    added = packed_attention_mask(batch["group_ids"], batch["branch_ids"], implementation="eager", dtype=torch.float32)
    assert torch.equal(added == 0, allowed)
    assert torch.equal(added == torch.finfo(torch.float32).min, ~allowed)


def test_the_block_mask_allows_what_the_boolean_mask_allows_except_in_padding():
    from torch.nn.attention.flex_attention import create_mask

    batch = PackedLayout(PAD).collate([random_groups(3, seed=5)], row_length=128)
    ids = batch["group_ids"], batch["branch_ids"]
    allowed = packed_attention_mask(*ids, implementation="sdpa", dtype=torch.float32)
    blocks = packed_attention_mask(*ids, implementation="flex_attention", dtype=torch.float32)
    assert torch.equal(create_mask(blocks.mask_mod, 1, 1, 128, 128, device="cpu"), allowed)


def test_an_implementation_without_masks_is_refused():
    with pytest.raises(ValueError, match="flash_attention_2"):
        packed_attention_mask(
            torch.zeros(1, 2), torch.zeros(1, 2), implementation="flash_attention_2", dtype=torch.float32
        )


@pytest.mark.parametrize(
    ("architecture", "overrides", "longest", "reason"),
    [
        ("llama", {}, 400, None),
        ("mistral", {"sliding_window": 64}, 65, "sliding window of 64"),
        ("mistral", {"sliding_window": 64}, 64, None),
        ("gemma2", {"sliding_window": 32}, 33, "sliding window of 32"),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, 100, None),
        ("mixtral", {}, 100, None),
    ],
)
def test_what_cannot_be_packed_says_why(architecture, overrides, longest, reason):
    config = tiny_model(architecture, **overrides).config
    found = why_not_packed(config, implementation="sdpa", longest_sequence=longest)
    assert found is None if reason is None else reason in found
    assert "takes no mask" in why_not_packed(config, implementation="flash_attention_2", longest_sequence=1)


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
    found = why_not_packed(config, implementation="eager", longest_sequence=9)
    assert found is None if reason is None else reason in found


def test_recurrent_layers_cannot_be_packed():
    for config in (AutoConfig.for_model("mamba"), AutoConfig.for_model("qwen3_next"), AutoConfig.for_model("jamba")):
        assert "carr" in why_not_packed(config, implementation="sdpa", longest_sequence=8)
