"""Reward models on human comparisons of helpful dialogues: a tiny model from nothing, then an adversarial one on top
of it."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from prefopt import AdversarialRewardConfig, AdversarialRewardTrainer, RewardConfig, RewardTrainer
from prefopt.candidates.build_rows import adversarial_pairs
from prefopt.files import read_jsonl
from prefopt.models.reward import RewardModel
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow
DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
HIDDEN, VOCABULARY = 64, 2000


def interval(right: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share `right` of `count`."""
    z = 1.96
    middle = (right + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(right * (1 - right) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return middle - half, middle + half


def read(name: str) -> list[dict]:
    path = DATA / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return read_jsonl(path)


def pairs(rows: list[dict]) -> list[dict]:
    return [
        {"prompt": r["prompt"], "responses": [r["chosen"], r["rejected"]], "scores": [1.0, 0.0], "type": None}
        for r in rows
    ]


def longer_is_better(rows: list[dict]) -> float:
    """Accuracy of preferring the answer with more characters; equal lengths count one half."""
    return sum(
        (len(r["chosen"]) > len(r["rejected"])) + 0.5 * (len(r["chosen"]) == len(r["rejected"])) for r in rows
    ) / len(rows)


class TrigramPolicy:
    """A stand-in for a policy: samples answers word by word from the trigrams of the training answers."""

    def __init__(self, rows: list[dict], seed: int) -> None:
        self.random = random.Random(seed)
        self.next: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            for text in (row["chosen"], row["rejected"]):
                words = ["", "", *text.split(), ""]
                for first, second, third in zip(words, words[1:], words[2:]):
                    self.next.setdefault((first, second), []).append(third)

    def sample(self) -> str:
        words = ["", ""]
        while len(words) < 62 and (word := self.random.choice(self.next[words[-2], words[-1]])):
            words.append(word)
        return " " + " ".join(words[2:])


def adversarial(rows: list[dict], policy: TrigramPolicy) -> list[dict]:
    """Golden answers (the human choices of these prompts) against four samples each."""
    golden = [{"query_id": str(n), "golden": row["chosen"]} for n, row in enumerate(rows)]
    samples = [
        {"query_id": str(n), "query": row["prompt"], **{f"sample_{k}": policy.sample() for k in range(4)}}
        for n, row in enumerate(rows)
    ]
    made, _ = adversarial_pairs(golden, samples)
    return [{name: row[name] for name in ("prompt", "responses", "scores", "type")} for row in made]


def settings(folder: Path, **changes) -> dict:
    """Chosen by the accuracy on a quarter of the training prompts, held out; the test rows were not looked at."""
    usual = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 32,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "warmup_steps": 20,
        "lr_scheduler_type": "cosine",
        "max_length": 192,
        "max_prompt_length": 64,
        "calibration_bins": [5, 10, 20],
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return usual | changes


def fresh_model(seed: int = 0) -> RewardModel:
    backbone = tiny_model(
        vocab_size=VOCABULARY,
        seed=seed,
        attn_implementation="sdpa",
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        head_dim=HIDDEN // 4,
    )
    torch.manual_seed(seed)
    return RewardModel.from_module(backbone, pooling="mean")


def tell(name: str, metrics: dict, prefix: str, count: int) -> float:
    accuracy = metrics[f"eval_{prefix}_accuracy"]
    low, high = interval(accuracy, count)
    print(
        f"{name}, {prefix}: accuracy {100 * accuracy:.1f} % (95 % interval {100 * low:.1f} to {100 * high:.1f}), "
        f"mean reward {metrics[f'eval_{prefix}_mean_reward']:.3f}, "
        + ", ".join(f"{e.upper()} {metrics[f'eval_{prefix}_{e}_bin10']:.3f}" for e in ("ece", "ace", "mce"))
        + f", score-length correlation {metrics[f'eval_{prefix}_score_length_correlation']:.2f}"
    )
    return accuracy


def test_a_reward_model_learns_human_choices_and_an_adversarial_one_the_policys_faults(tmp_path):
    train, test = read("hh_helpful_train"), read("hh_helpful_test")
    tokenizer = tiny_tokenizer(
        None, vocab_size=VOCABULARY, corpus=[r["prompt"] + r[side] for r in train for side in ("chosen", "rejected")]
    )
    policy = TrigramPolicy(train, seed=0)
    held_out = adversarial(test, policy)
    evaluation = {
        "human": Dataset.from_list(pairs(test)),
        "adversarial": Dataset.from_list([{**row, "type": None} for row in held_out]),
    }
    print(f"\npicking the longer answer: {100 * longer_is_better(test):.1f} % of {len(test)} test pairs")

    base = RewardTrainer(
        fresh_model(), args=RewardConfig(**settings(tmp_path / "base")), train_dataset=Dataset.from_list(pairs(train)),
        eval_dataset=evaluation, processing_class=tokenizer,
    )  # fmt: skip
    base.train()
    base_metrics = base.evaluate()
    human = tell("base reward model", base_metrics, "human", len(test))
    before = tell("base reward model", base_metrics, "adversarial", len(held_out))

    rows = pairs(train) + adversarial(train[:400], policy)
    for coeff in (0.1, 4.0):  # as published, and every pair of weight 1
        against = AdversarialRewardTrainer(
            fresh_model(),
            args=AdversarialRewardConfig(
                **settings(tmp_path / f"apo-{coeff}", adversarial_coeff=coeff, num_samples=4)
            ),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=evaluation,
            processing_class=tokenizer,
        )
        against.train()
        adversarial_metrics = against.evaluate()
        still = tell(f"adversarial reward model, {coeff:g} / 4", adversarial_metrics, "human", len(test))
        after = tell(f"adversarial reward model, {coeff:g} / 4", adversarial_metrics, "adversarial", len(held_out))

    assert interval(human, len(test))[0] > 0.5
    assert interval(still, len(test))[0] > 0.5
    assert interval(after, len(held_out))[0] > interval(before, len(held_out))[1]
