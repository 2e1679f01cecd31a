"""The scalar reward model: pooling, padding, loading by others, and what it refuses."""

import json
import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from prefopt.models.heads import pooled_columns
from prefopt.models.reward import RewardModel
from tests.tiny import tiny_model

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "mixtral"]
SEQUENCES = [[5, 6, 7, 8, 9, 2], [11, 12, 2], [21, 22, 23, 24, 2]]


def tiny_reward(architecture="llama", pooling="eos", **overrides):
    config = tiny_model(architecture, **overrides).config
    torch.manual_seed(3)
    return RewardModel.from_backbone_config(config, pooling=pooling).float().eval()


def pad(sequences, side, pad_id=0, width=None):
    width = width or max(map(len, sequences))
    ids, mask = [], []
    for sequence in sequences:
        gap = width - len(sequence)
        padding, real = [pad_id] * gap, [1] * len(sequence)
        ids.append(padding + sequence if side == "left" else sequence + padding)
        mask.append([0] * gap + real if side == "left" else real + [0] * gap)
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize(
    ("architecture", "pooling"),
    [*((name, "eos") for name in ARCHITECTURES), *(("llama", pooling) for pooling in ("last", "mean", "max"))],
)
def test_padding_changes_nothing_on_either_side_whatever_the_pad_id(architecture, pooling):
    model = tiny_reward(architecture, pooling)
    alone = torch.cat([model.rewards(torch.tensor([sequence])) for sequence in SEQUENCES])
    assert alone.unique().numel() == 3
    for side in ("left", "right"):
        for pad_id in (0, 2, 9):  # a pad id of its own, the EOS, and an id that also occurs as a real token
            batch = model.rewards(*pad(SEQUENCES, side, pad_id, width=9))
            torch.testing.assert_close(batch, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_each_pooling_reads(side):
    """The reward is the head on the hidden state(s) that the pooling names, computed here from the backbone by
    hand."""
    ids, mask = pad(SEQUENCES, side)
    for pooling in ("last", "eos", "mean", "max"):
        model = tiny_reward(pooling=pooling)
        for row, sequence in enumerate(SEQUENCES):
            hidden = model.model(torch.tensor([sequence])).last_hidden_state[0]
            state = {"last": hidden[-2], "eos": hidden[-1], "mean": hidden.mean(0), "max": hidden.amax(0)}[pooling]
            expected = state @ model.score.weight[0]
            torch.testing.assert_close(model.rewards(ids, mask)[row], expected, atol=1e-5, rtol=1e-5)


def test_last_is_the_token_before_the_eos_or_the_end_of_a_cut_text():
    ids = torch.tensor([[5, 6, 2, 2], [5, 6, 7, 0], [2, 0, 0, 0], [0, 0, 5, 2]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1]])
    assert pooled_columns(ids, mask, pooling="last", eos_token_ids=(2,)).tolist() == [1, 2, 0, 2]
    assert pooled_columns(ids, mask, pooling="eos", eos_token_ids=(2,)).tolist() == [2, 2, 0, 3]
    assert pooled_columns(ids, mask, pooling="last", eos_token_ids=()).tolist() == [2, 2, 0, 3]


def test_rewards_of_a_bf16_model_are_float32():
    model = tiny_reward().to(torch.bfloat16)
    ids, mask = pad(SEQUENCES, "right")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(ids, mask).logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("architecture", "pooling"), [("llama", "eos"), ("gemma2", "last"), ("mixtral", "mean"), ("qwen3", "max")]
)
def test_saved_and_loaded_scores_are_equal(architecture, pooling, tmp_path):
    model = tiny_reward(architecture, pooling)
    model.save_pretrained(tmp_path)
    again = RewardModel.from_pretrained(tmp_path).eval()
    assert again.head_record["pooling"] == pooling
    ids, mask = pad(SEQUENCES, "left")
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in again.state_dict().items())
    # not to the last bit: where a weight lies in memory decides the order of a product's sums
    torch.testing.assert_close(again.rewards(ids, mask), model.rewards(ids, mask), atol=1e-6, rtol=1e-5)
    again.save_pretrained(tmp_path / "twice")  # a loaded model saves the same config
    assert json.loads((tmp_path / "twice" / "config.json").read_text()) == json.loads(
        (tmp_path / "config.json").read_text()
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sequence_classification_loads_an_eos_model_and_scores_alike(architecture, tmp_path):
    model = tiny_reward(architecture, "eos")
    model.save_pretrained(tmp_path)
    other, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(other).__name__ == json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    ids, mask = pad(SEQUENCES, "right")
    with torch.no_grad():
        logits = other.eval()(ids, attention_mask=mask).logits
    assert logits.shape == (3, 1)
    torch.testing.assert_close(logits[:, 0], model.rewards(ids, mask), atol=1e-5, rtol=1e-5)


def test_sequence_classification_scores_a_last_model_alike_without_the_eos(tmp_path):
    model = tiny_reward(pooling="last")
    model.save_pretrained(tmp_path)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with_eos, mask = pad(SEQUENCES, "right")
    without, short_mask = pad([sequence[:-1] for sequence in SEQUENCES], "right")
    with torch.no_grad():
        torch.testing.assert_close(
            other(without, attention_mask=short_mask).logits[:, 0], model.rewards(with_eos, mask), atol=1e-5, rtol=1e-5
        )
        other.config.pad_token_id = 2  # and with it, where the pad token is the EOS
        ids, mask = pad(SEQUENCES, "right", pad_id=2)
        torch.testing.assert_close(
            other(ids, attention_mask=mask).logits[:, 0], model.rewards(ids, mask), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("pooling", "pad", "said"),
    [("eos", 2, "one token too early"), ("eos", 0, None), ("last", 0, "will read a closing EOS"), ("last", 2, None)],
)
def test_saving_warns_where_other_loaders_read_another_token(pooling, pad, said, tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(logging.getLogger("prefopt.models.reward"), "warning_once", heard.append, raising=False)
    tiny_reward(pooling=pooling, pad_token_id=pad, eos_token_id=2).save_pretrained(tmp_path)
    assert len(heard) == (said is not None) and all(said in line for line in heard)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_sequence_classification_refuses_a_model_that_it_would_misread(pooling, tmp_path):
    tiny_reward(pooling=pooling).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "prefopt_reward_model"
    assert RewardModel.from_pretrained(tmp_path).config.model_type == "llama"


def test_a_published_sequence_classifier_is_read(tmp_path):
    config = AutoConfig.for_model(**{**tiny_model().config.to_dict(), "num_labels": 1})
    torch.manual_seed(0)
    theirs = AutoModelForSequenceClassification.from_config(config).float().eval()
    theirs.save_pretrained(tmp_path)
    ids, mask = pad(SEQUENCES, "right")
    ours = RewardModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            ours.rewards(ids, mask), theirs(ids, attention_mask=mask).logits[:, 0], atol=1e-5, rtol=1e-5
        )


def test_a_causal_lm_needs_leave_to_get_a_fresh_head(tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no trained head \(score.weight not found\)"):
        RewardModel.from_pretrained(tmp_path)
    model = RewardModel.from_pretrained(tmp_path, new_head=True, pooling="last")
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)
    assert 0.005 < model.score.weight.std() < 0.04  # N(0, initializer_range = 0.02)
    assert not any("lm_head" in name for name, _ in model.named_parameters())


def test_missing_backbone_weights_are_an_error(tmp_path):
    tiny_reward().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "layer_types": None}))
    with pytest.raises(ValueError, match=r"lacks \d+ weights of the backbone"):
        RewardModel.from_pretrained(tmp_path)


def test_contradicting_and_unknown_settings_are_errors(tmp_path):
    tiny_reward(pooling="last").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained with pooling='last'"):
        RewardModel.from_pretrained(tmp_path, pooling="mean")
    with pytest.raises(ValueError, match="Unknown pooling 'median'"):
        RewardModel.from_backbone_config(tiny_model().config, pooling="median")
    with pytest.raises(ValueError, match="Unknown settings of a reward head: width"):
        RewardModel.from_backbone_config(tiny_model().config, width=3)
    with pytest.raises(ValueError, match="not the config of a causal LM"):
        RewardModel.from_backbone_config(AutoConfig.for_model("vit"))


def test_the_backbone_config_is_not_changed():
    config = tiny_model().config
    before = config.to_dict()
    RewardModel.from_backbone_config(config, pooling="mean")
    assert config.to_dict() == before


def test_a_sequence_classifier_written_by_others_may_be_sharded(tmp_path):
    model = tiny_reward()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    ids, mask = pad(SEQUENCES, "right")
    torch.testing.assert_close(RewardModel.from_pretrained(tmp_path).rewards(ids, mask), model.rewards(ids, mask))


@pytest.mark.parametrize(("architecture", "pooling"), [("llama", "last"), *((name, "eos") for name in ARCHITECTURES)])
def test_packed_rows_with_a_shared_prompt_give_the_same_rewards(architecture, pooling):
    from prefopt.scoring.attention import use_packed_attention
    from prefopt.scoring.layouts import Group, PackedLayout, PaddedLayout

    model = tiny_reward(architecture, pooling, attn_implementation="eager")
    groups = [Group([5, 6, 7], [[8, 9, 2], [10, 2], [11, 12, 13, 2]]), Group([20, 21], [[22, 2], [23, 24]])]
    padded = PaddedLayout(0).collate([groups])
    packed = PackedLayout(0).collate([groups])
    with torch.no_grad():
        apart = model(
            padded["input_ids"], padded["attention_mask"], padded["position_ids"], padded["last_index"]
        ).logits
        alone = model.rewards(padded["input_ids"], padded["attention_mask"])
        use_packed_attention(model)
        together = model(
            packed["input_ids"], packed["attention_mask"], packed["position_ids"], packed["last_index"]
        ).logits
    assert packed["input_ids"].numel() < padded["attention_mask"].sum()
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone, apart[:, 0], atol=1e-6, rtol=1e-6)


def test_mean_pooling_of_a_packed_row_is_refused():
    model = tiny_reward(pooling="mean", attn_implementation="eager")
    with pytest.raises(ValueError, match="batch_layout: padded"):
        model(torch.tensor([[5, 6, 2]]), torch.zeros(1, 1, 3, 3), torch.tensor([[0, 1, 2]]), torch.tensor([2]))
