"""Adapter folders as models of trainers, rankers and evaluations, and adapters that none of them can use."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from prefopt import (
    DPOConfig,
    DPOTrainer,
    GeneralPreferenceConfig,
    GeneralPreferenceTrainer,
    RewardConfig,
    RewardTrainer,
    RRHFConfig,
    RRHFTrainer,
)
from prefopt.candidates.rankers import RankerOptions, build_ranker
from prefopt.evaluation.preference import preference_accuracy
from prefopt.models.reward import RewardModel
from tests.trainers.comparisons import TOKENIZER, backbone, comparison_rows, dataset, pairs, settings

ROWS = dataset(comparison_rows(8))
LORA = {"r": 2, "target_modules": ["q_proj"]}


@pytest.fixture
def folders(tmp_path):
    """A causal LM, a LoRA adapter of it, and a reward model's adapter on it."""
    backbone().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    policy = get_peft_model(backbone(), LoraConfig(**LORA, task_type="CAUSAL_LM"))
    policy.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    policy.save_pretrained(tmp_path / "policy")
    TOKENIZER.save_pretrained(tmp_path / "policy")
    trainer = RewardTrainer(
        str(tmp_path / "base"),
        args=RewardConfig(**settings(tmp_path / "reward", max_steps=1)),
        train_dataset=ROWS,
        peft_config=LoraConfig(**LORA),
    )
    trainer.train()
    trainer.save_model()
    return tmp_path


def test_a_reward_models_adapter_folder_is_a_model_like_any_other(folders):
    """Given to the trainer it is trained on in full; to the ranker it scores; to a policy's evaluation it raises."""
    trainer = RewardTrainer(
        str(folders / "reward"), args=RewardConfig(**settings(folders / "more", max_steps=2)), train_dataset=ROWS
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if p.dim() > 1)
    trainer.save_model()
    assert RewardModel.from_pretrained(folders / "more").head_record == trainer.model.head_record
    build_ranker(RankerOptions("reward-model", str(folders / "reward"), torch.device("cpu")))
    for name in ("reward", "more"):
        with pytest.raises(ValueError, match="is a reward model, which gives no log-probs"):
            preference_accuracy(str(folders / name), dataset(pairs(comparison_rows(4))), dtype="float32")


@pytest.mark.parametrize(
    ("trainer", "config"), [(RewardTrainer, RewardConfig), (GeneralPreferenceTrainer, GeneralPreferenceConfig)]
)
def test_a_policys_adapter_folder_says_how_to_use_it(folders, trainer, config):
    with pytest.raises(ValueError, match="merge it into its base"):
        trainer(str(folders / "policy"), args=config(**settings(folders / "out")), train_dataset=ROWS)
    for kind in ("reward-model", "general-preference", "pair-rm"):
        with pytest.raises(ValueError, match=r"adapter|config\.json"):
            build_ranker(RankerOptions(kind, str(folders / "policy"), torch.device("cpu")))


@pytest.mark.parametrize(
    ("trainer", "config", "more"),
    [(RRHFTrainer, RRHFConfig, {}), (GeneralPreferenceTrainer, GeneralPreferenceConfig, {"sft_coeff": 0.1})],
)
def test_adapters_that_the_scoring_path_would_ignore_are_found_before_training(tmp_path, trainer, config, more):
    def make(model, **lora):
        return trainer(
            model,
            args=config(**settings(tmp_path, **more)),
            train_dataset=ROWS,
            processing_class=TOKENIZER,
            peft_config=LoraConfig(r=2, **lora),
        )

    with pytest.raises(ValueError, match="`trainable_token_indices` wraps the LM head"):
        make(backbone(tie_word_embeddings=True), target_modules=["q_proj"], trainable_token_indices=[3, 4])
    with pytest.raises(ValueError, match="An adapter on `lm_head` would be ignored"):
        make(backbone(), target_modules=["q_proj", "lm_head"])


@pytest.mark.parametrize(("trainer", "config"), [(RRHFTrainer, RRHFConfig), (DPOTrainer, DPOConfig)])
def test_a_policys_adapter_folder_is_trained_on(folders, trainer, config):
    rows = ROWS if trainer is RRHFTrainer else dataset(pairs(comparison_rows(8)))
    built = trainer(str(folders / "policy"), args=config(**settings(folders / "out")), train_dataset=rows)
    trained = {name: p.detach().clone() for name, p in built.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    built.train()
    assert any(not torch.equal(p, trained[name]) for name, p in built.model.named_parameters() if name in trained)
    built.save_model()
    assert (folders / "out" / "adapter_config.json").is_file()


def test_new_tokens_train_where_the_embeddings_are_not_tied(tmp_path):
    trainer = RewardTrainer(
        backbone(tie_word_embeddings=True),  # the reward model drops the LM head, so nothing is tied
        args=RewardConfig(**settings(tmp_path)),
        train_dataset=ROWS,
        processing_class=TOKENIZER,
        peft_config=LoraConfig(**LORA, trainable_token_indices=[3, 4]),
    )
    trainer.train()
    assert any("trainable_tokens" in name for name, p in trainer.model.named_parameters() if p.requires_grad)


def test_a_model_that_nothing_trains_is_found_before_training(tmp_path):
    frozen = RewardModel.from_module(backbone()).requires_grad_(False)
    with pytest.raises(ValueError, match="No parameter of the model is trainable"):
        RewardTrainer(frozen, args=RewardConfig(**settings(tmp_path)), train_dataset=ROWS, processing_class=TOKENIZER)
