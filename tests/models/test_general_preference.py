"""The general preference model: its operator, its variants, the released checkpoints' layout, and what it refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.quantizers.base import HfQuantizer

from prefopt.models.general_preference import GeneralPreferenceModel, preference_table
from prefopt.models.reward import RewardModel
from tests.models.test_reward import SEQUENCES, pad
from tests.tiny import tiny_model

PROMPT_LENGTHS = torch.tensor([3, 1, 2])


def tiny_gpm(architecture="llama", seed=4, **settings):
    config = tiny_model(architecture).config
    torch.manual_seed(seed)
    return GeneralPreferenceModel.from_backbone_config(config, **settings).float().eval()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "mixtral"])
def test_padding_changes_neither_embeddings_nor_scales(architecture):
    model = tiny_gpm(architecture, dim=6, scale_gate="softmax")
    alone = [model.embeddings(torch.tensor([s]), None, n[None]) for s, n in zip(SEQUENCES, PROMPT_LENGTHS)]
    for side in ("left", "right"):
        for pad_id in (0, 2, 9):
            embeddings, scales = model.embeddings(*pad(SEQUENCES, side, pad_id, width=9), PROMPT_LENGTHS)
            torch.testing.assert_close(embeddings, torch.cat([e for e, _ in alone]), atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(scales, torch.cat([s for _, s in alone]), atol=1e-6, rtol=1e-5)


def test_embeddings_and_scales_by_hand():
    sequence, length = SEQUENCES[0], 3
    for gate in ("softmax", "scaled_softmax"):
        for normalize in (False, True):
            model = tiny_gpm(dim=4, scale_gate=gate, normalize=normalize)
            nn.init.normal_(model.prompt_head.weight, std=1.0)  # far from uniform scales
            hidden = model.model(torch.tensor([sequence])).last_hidden_state[0]
            value = model.value_head.weight @ hidden[-1]
            z = model.prompt_head.weight @ hidden[length - 1]
            expected = z.softmax(0) if gate == "softmax" else (z / 32**0.5).softmax(0) * 2
            embeddings, scales = model.embeddings(torch.tensor([sequence]), None, torch.tensor([length]))
            torch.testing.assert_close(
                embeddings[0], value / value.norm() if normalize else value, atol=1e-6, rtol=1e-5
            )
            torch.testing.assert_close(scales[0], expected, atol=1e-6, rtol=1e-5)
            assert expected.max() > 1.2 * expected.min()


def test_heads_start_with_the_released_initialisation():
    weight = tiny_gpm(dim=64, seed=1).value_head.weight
    assert abs(weight.std().item() * 33 - 1) < 0.05  # N(0, 1 / (H + 1)), H = 32


def test_the_table_is_the_skew_symmetric_operator():
    """T_ij = v_i^T R^T v_j / tau with R's 2x2 blocks [[0, -scale], [scale, 0]], built here as a matrix."""
    torch.manual_seed(0)
    embeddings, scales = torch.randn(5, 6, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    for given in (None, scales, scales.expand(5, 3)):
        operator = torch.zeros(6, 6, dtype=torch.float64)
        for k in range(3):
            weight = 1.0 if given is None else scales[k]
            operator[2 * k, 2 * k + 1], operator[2 * k + 1, 2 * k] = -weight, weight
        expected = embeddings @ operator.T @ embeddings.T / 0.1
        table = preference_table(embeddings, given, temperature=0.1)
        torch.testing.assert_close(table, expected)
        torch.testing.assert_close(table, -table.T)
        assert table.diagonal().eq(0).all()
    with pytest.raises(ValueError, match=r"must have shape \(R, d\)"):
        preference_table(embeddings[0], temperature=0.1)


def test_the_sign_of_the_operator():
    """c = (1, 0), r = (0, 1): s(c > r) = c0 r1 - c1 r0 = 1, so c wins with probability sigmoid(1 / tau)."""
    table = preference_table(torch.eye(2), temperature=0.5)
    assert table.tolist() == [[0.0, 2.0], [-2.0, 0.0]]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dim": 4, "normalize": True},
        {"dim": 6, "scale_gate": "scaled_softmax", "temperature": 1.0, "pooling": "last"},
    ],
)
def test_the_variant_is_saved_with_the_model(settings, tmp_path):
    model = tiny_gpm(**settings)
    model.save_pretrained(tmp_path)
    again = GeneralPreferenceModel.from_pretrained(tmp_path)
    assert again.head_record == model.head_record and again.head_record.items() >= settings.items()
    assert again.temperature == settings.get("temperature", 0.1)
    batch = (*pad(SEQUENCES, "right"), PROMPT_LENGTHS)
    for ours, theirs in zip(again.embeddings(*batch), model.embeddings(*batch)):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="trained with dim="):
        GeneralPreferenceModel.from_pretrained(tmp_path, dim=8)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shards", [False, True])
def test_the_released_layout_is_read(gated, shards, tmp_path):
    """A causal LM's folder with `value_head.weight` (and `prompt_head.weight`) beside the LM's weights, and nothing
    in the config."""
    base = tiny_model()
    torch.manual_seed(0)
    heads = {"value_head.weight": torch.randn(6, 32)} | ({"prompt_head.weight": torch.randn(3, 32)} if gated else {})
    base.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if shards:
        (tmp_path / "model.safetensors").unlink()
        for number, part in enumerate((weights, heads)):
            save_file(part, tmp_path / f"model-0000{number + 1}-of-00002.safetensors", {"format": "pt"})
        weight_map = {
            name: f"model-0000{n + 1}-of-00002.safetensors" for n, part in enumerate((weights, heads)) for name in part
        }
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        save_file(weights | heads, tmp_path / "model.safetensors", {"format": "pt"})

    model = GeneralPreferenceModel.from_pretrained(tmp_path).eval()
    usual = {"dim": 6, "normalize": True, "scale_gate": "softmax" if gated else None, "temperature": 0.1}
    assert model.head_record.items() >= usual.items()
    ids, mask = pad(SEQUENCES, "left")
    embeddings, scales = model.embeddings(ids, mask, PROMPT_LENGTHS)
    with torch.no_grad():
        hidden = base.model(torch.tensor([SEQUENCES[0]])).last_hidden_state[0]
    value = heads["value_head.weight"] @ hidden[-1]
    torch.testing.assert_close(embeddings[0], value / value.norm(), atol=1e-5, rtol=1e-5)
    if gated:
        torch.testing.assert_close(
            scales[0], (heads["prompt_head.weight"] @ hidden[2]).softmax(0), atol=1e-5, rtol=1e-5
        )
    # another of the published variants, asked for; and what the weights contradict
    other = GeneralPreferenceModel.from_pretrained(
        tmp_path, normalize=False, scale_gate="scaled_softmax" if gated else None
    )
    assert other.head_record["normalize"] is False
    with pytest.raises(ValueError, match="has embeddings of width 6"):
        GeneralPreferenceModel.from_pretrained(tmp_path, dim=4)
    if not gated:
        with pytest.raises(ValueError, match="no prompt head"):
            GeneralPreferenceModel.from_pretrained(tmp_path, scale_gate="softmax")
    # saved by us, the variant is no longer in doubt
    model.save_pretrained(tmp_path / "ours")
    assert GeneralPreferenceModel.from_pretrained(tmp_path / "ours").head_record == model.head_record


def test_a_released_bradley_terry_model_is_read_as_a_reward_model(tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path)
    head = torch.randn(1, 32)
    save_file(
        load_file(tmp_path / "model.safetensors") | {"value_head.weight": head},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    model = RewardModel.from_pretrained(tmp_path)
    torch.testing.assert_close(model.score.weight.detach(), head)
    model.save_pretrained(tmp_path / "ours")
    assert "score.weight" in load_file(tmp_path / "ours" / "model.safetensors")
    with pytest.raises(ValueError, match="must be a positive even number, got 1; for one scalar use a RewardModel"):
        GeneralPreferenceModel.from_pretrained(tmp_path)


def test_the_two_kinds_do_not_pass_for_each_other(tmp_path):
    tiny_gpm().save_pretrained(tmp_path / "gpm")
    with pytest.raises(ValueError, match="holds a general_preference head, not a reward head"):
        RewardModel.from_pretrained(tmp_path / "gpm")
    tiny_model().save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="no trained head"):
        GeneralPreferenceModel.from_pretrained(tmp_path / "lm")
    fresh = GeneralPreferenceModel.from_pretrained(tmp_path / "lm", new_head=True, dim=4, scale_gate="softmax")
    assert fresh.value_head.weight.shape == (4, 32) and fresh.prompt_head.weight.shape == (2, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 3}, "positive even number, got 3"),
        ({"dim": 0}, "positive even number, got 0"),
        ({"scale_gate": "sigmoid"}, "Unknown scale gate 'sigmoid'"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"pooling": "first"}, "Unknown pooling 'first'"),
        ({"heads": 2}, "Unknown settings of a general_preference head: heads"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GeneralPreferenceModel.from_backbone_config(tiny_model().config, **settings)


def test_a_prompt_head_needs_the_prompts_end():
    with pytest.raises(ValueError, match="has a prompt head"):
        tiny_gpm(scale_gate="softmax").embeddings(*pad(SEQUENCES, "right"))


def test_quantisation_spares_both_heads_and_the_lm_head():
    """Heads are trained in full beside an adapter, which 4-bit weights cannot be."""
    model = tiny_gpm(dim=4, scale_gate="softmax", lm_head=True)
    spared = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    assert {"value_head", "prompt_head", "lm_head"} <= set(spared)


@pytest.mark.parametrize("tied", [False, True])
def test_log_probs_of_the_kept_lm_head_are_the_lms(tied, tmp_path):
    base = tiny_model(tie_word_embeddings=tied)
    base.save_pretrained(tmp_path)
    model = GeneralPreferenceModel.from_pretrained(tmp_path, new_head=True, lm_head=True).eval()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    sequence = torch.tensor([SEQUENCES[0]])
    with torch.no_grad():
        expected = base(sequence).logits[0].log_softmax(-1)[range(5), sequence[0, 1:]].sum()
        output = model(
            sequence,
            sft_index=torch.arange(5),
            sft_targets=sequence[0, 1:],
            sft_completions=torch.zeros(5, dtype=torch.long),
        )
    torch.testing.assert_close(output.logps, expected[None], atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    again = GeneralPreferenceModel.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again.lm_head.weight, base.lm_head.weight)
    with pytest.raises(ValueError, match="made without its LM head"):
        tiny_gpm()(
            sequence,
            sft_index=torch.arange(5),
            sft_targets=sequence[0, 1:],
            sft_completions=torch.zeros(5, dtype=torch.long),
        )
