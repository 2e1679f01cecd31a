"""Cyclic preferences, a > b > c > a: a general preference model learns them, Bradley-Terry cannot. Runs on a CPU in
about a minute.

    python examples/cyclic_preferences.py docs/images/cyclic_preferences.png

For each of 40 prompts three answers beat each other in a circle. A scalar reward can order at most two of the three
pairs of a circle, so Bradley-Terry is right in at most 2/3 of them, however long it trains.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from prefopt import GeneralPreferenceConfig, GeneralPreferenceTrainer
from prefopt.files import atomic_path

ANSWERS = ("rock", "paper", "scissors")
PROMPTS = 40
STEPS = 100


def rows() -> Dataset:
    """Paper beats rock, scissors beat paper, rock beats scissors."""
    return Dataset.from_list(
        [
            {"prompt": f"game {number} :", "chosen": f" {ANSWERS[(k + 1) % 3]}", "rejected": f" {ANSWERS[k]}"}
            for number in range(PROMPTS)
            for k in range(3)
        ]
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "game", ":", *ANSWERS, *map(str, range(PROMPTS))]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def train(loss_type: str, folder: str) -> tuple[list[int], list[float], dict[str, float]]:
    """Steps, training accuracy at them, and the final evaluation on the training rows."""
    words = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
    )
    args = GeneralPreferenceConfig(
        folder,
        loss_type=loss_type,
        pooling="last",
        per_device_train_batch_size=60,
        max_steps=STEPS,
        learning_rate=3e-3,
        eval_strategy="steps",
        eval_steps=5,
        eval_on_start=True,
        logging_steps=50,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GeneralPreferenceTrainer(
        AutoModelForCausalLM.from_config(config),
        args=args,
        train_dataset=rows(),
        eval_dataset=rows(),
        processing_class=words,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    return [entry["step"] for entry in logged], [entry["eval_accuracy"] for entry in logged], logged[-1]


def main(path: str) -> dict[str, dict[str, float]]:
    """Train both, print the figures, draw the curves into `path`; returns the final evaluations."""
    figure = Figure(figsize=(6, 3.5))
    axes = figure.subplots()
    results = {}
    for loss_type, name in (
        ("general_preference", "general preference model, d = 2"),
        ("bradley_terry", "Bradley-Terry"),
    ):
        with tempfile.TemporaryDirectory() as folder:
            steps, accuracy, results[loss_type] = train(loss_type, folder)
        axes.plot(steps, accuracy, label=f"{name}: {100 * accuracy[-1]:.1f} %")
        print(
            f"{name}: training accuracy {100 * accuracy[-1]:.1f} %, cyclic triads "
            f"{100 * results[loss_type]['eval_transitivity/cyclic_triads']:.0f} %"
        )
    axes.axhline(2 / 3, color="0.6", linestyle="--", linewidth=1, label="most that any scalar can reach: 66.7 %")
    axes.set(
        xlabel="optimizer step", ylabel="training accuracy", ylim=(0, 1.02), title="Preferences that go in circles"
    )
    axes.legend(loc="lower right", fontsize="small")
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.rpartition(".")[2], dpi=110)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", default="cyclic_preferences.png", help="where the curves are drawn")
    main(parser.parse_args().path)
