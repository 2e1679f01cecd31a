"""How text becomes ids is decided in training, saved with the model, and the same wherever the model scores."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig

from prefopt import (
    AdversarialRewardConfig,
    AdversarialRewardTrainer,
    GeneralPreferenceConfig,
    GeneralPreferenceTrainer,
    RewardConfig,
    RewardTrainer,
)
from prefopt.candidates.rankers import RankerOptions, build_ranker
from prefopt.candidates.rankers.base import Request
from prefopt.models.reward import RewardModel
from tests.candidates.ranking import tally
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers.comparisons import comparison_rows, dataset, settings

CHAT = tiny_tokenizer("llama3")  # with a chat template
STRINGS = [{**row, "prompt": row["prompt"].strip() + " "} for row in comparison_rows(12)]
MESSAGES = [
    {
        **row,
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "responses": [[{"role": "assistant", "content": text}] for text in row["responses"]],
    }
    for row in STRINGS
]
REQUESTS = [Request(f"row{n}", row["prompt"], row["responses"]) for n, row in enumerate(STRINGS)]


def train(folder, rows, *, model=None, trainer=RewardTrainer, config=RewardConfig, evaluation=None, **more):
    built = trainer(
        model or tiny_model(attn_implementation="sdpa"),
        args=config(**settings(folder, max_steps=2, learning_rate=5e-3)),
        train_dataset=dataset(rows),
        eval_dataset=evaluation,
        processing_class=CHAT,
        **more,
    )
    built.train()
    built.save_model()
    return built


def margin(kind, folder):
    """Mean logit of the better answer over the worse one, over all ranked pairs of the rows, under the ranker."""
    scores = build_ranker(RankerOptions(kind, str(folder), torch.device("cpu"))).rank(REQUESTS, tally())
    gaps = []
    for row, found in zip(STRINGS, scores):
        table = found[:, None] - found[None, :] if found.ndim == 1 else found
        ranks = np.array(row["scores"])
        gaps += table[ranks[:, None] > ranks[None, :]].tolist()
    return float(np.mean(gaps))


@pytest.mark.parametrize("rows", [STRINGS, MESSAGES], ids=["strings", "messages"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_reward_model_ranks_the_text_that_it_was_trained_on(tmp_path, rows, lora):
    """The margin of training's evaluation and that of the ranker agree, whichever form the rows had."""
    more = {}
    if lora:
        tiny_model().save_pretrained(tmp_path / "base")
        more = {"model": str(tmp_path / "base"), "peft_config": LoraConfig(r=2, target_modules=["q_proj"])}
    trainer = train(tmp_path / "out", rows, **more)
    assert margin("reward-model", tmp_path / "out") == pytest.approx(
        trainer.evaluate(dataset(rows))["eval_margin"], abs=1e-4
    )


@pytest.mark.parametrize("rows", [STRINGS, MESSAGES], ids=["strings", "messages"])
def test_a_general_preference_model_ranks_the_text_that_it_was_trained_on(tmp_path, rows):
    trainer = train(tmp_path, rows, trainer=GeneralPreferenceTrainer, config=GeneralPreferenceConfig)
    found = trainer.evaluate(dataset(rows))["eval_margin"]
    assert margin("general-preference", tmp_path) == pytest.approx(found, rel=1e-3, abs=1e-4)


def test_strings_and_messages_do_not_mix(tmp_path):
    for train_rows, other in ((STRINGS, MESSAGES), (MESSAGES, STRINGS)):
        with pytest.raises(ValueError, match=r"The eval/human set holds \w+, but the model was trained on"):
            train(tmp_path, train_rows, evaluation={"human": dataset(other)})
    trainer = train(tmp_path / "strings", STRINGS)
    with pytest.raises(ValueError, match="The eval set holds messages, but the model was trained on strings"):
        trainer.evaluate(dataset(MESSAGES))
    # a model that goes on training, as in a loop
    adversarial = [{**row, "type": "apo" if number % 2 else None} for number, row in enumerate(MESSAGES)]
    with pytest.raises(ValueError, match="The train set holds messages, but the model was trained on strings"):
        train(
            tmp_path / "more",
            adversarial,
            model=RewardModel.from_pretrained(tmp_path / "strings"),
            trainer=AdversarialRewardTrainer,
            config=AdversarialRewardConfig,
        )


def test_another_template_or_tokenizer_than_in_training_raises(tmp_path):
    train(tmp_path, MESSAGES)
    build_ranker(RankerOptions("reward-model", str(tmp_path), torch.device("cpu")))
    tiny_tokenizer("gemma2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gives other ids than the one in training"):
        build_ranker(RankerOptions("reward-model", str(tmp_path), torch.device("cpu")))


def test_a_dialogue_for_a_model_of_strings_raises_and_one_turn_is_its_string(tmp_path):
    train(tmp_path, STRINGS)
    ranker = build_ranker(RankerOptions("reward-model", str(tmp_path), torch.device("cpu")))
    turns = [{"role": "user", "content": STRINGS[0]["prompt"]}]
    (one,) = ranker.rank([Request("one", turns, STRINGS[0]["responses"])], tally())
    (same,) = ranker.rank(REQUESTS[:1], tally())
    np.testing.assert_allclose(one, same)
    system = [{"role": "system", "content": "Be brief."}, *turns]
    with pytest.raises(ValueError, match=r"Row 'two': its prompt is a dialogue of 2 turns"):
        ranker.rank([Request("two", system, ["a", "b"])], tally())


def test_a_model_of_before_is_read_under_its_template(tmp_path):
    train(tmp_path, MESSAGES)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["prefopt_head"]["text"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = margin("reward-model", tmp_path)
    train(tmp_path, MESSAGES)
    assert margin("reward-model", tmp_path) == pytest.approx(expected)
