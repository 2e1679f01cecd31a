"""The self-play toy: a tiny chat model that has learned to answer in every style alike, and prompts to play on.

    python examples/self_play/game.py outputs/self-play-start --seed 0
    prefopt pipeline examples/self_play/recipe.yaml

Questions and answers are the quickstart's; the ranker is `rule.py`. Everything runs on a CPU, in a few minutes.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))

import torch
from datasets import Dataset, disable_progress_bars
from preferences import all_questions, answer
from start_model import train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from prefopt.files import write_jsonl

TEACHING_ROWS = 1200


def make_game(folder: Path, *, seed: int, prompts: int = 450, held_out: int = 100, head_dim: int = 16) -> None:
    """Write prompts/train.jsonl, prompts/test.jsonl (no question is in both) and the start model to `folder`."""
    rng = random.Random(seed)
    questions = all_questions()
    rng.shuffle(questions)
    for split, part in (("test", questions[:held_out]), ("train", questions[held_out : held_out + prompts])):
        rows = [{"prompt": [{"role": "user", "content": question.prompt}]} for question in part]
        write_jsonl(folder / "prompts" / f"{split}.jsonl", rows)
    taught = [rng.choice(questions[held_out:]) for _ in range(TEACHING_ROWS)]
    rows = [
        {
            "prompt": [{"role": "user", "content": question.prompt}],
            "completion": [{"role": "assistant", "content": answer(question, firm=rng.random() < 0.5, rng=rng)}],
        }
        for question in taught
    ]
    teach(folder, rows, seed=seed, head_dim=head_dim)


def teach(folder: Path, rows: list[dict], *, seed: int, head_dim: int) -> None:
    """Train a tokenizer and a two-layer Llama on `rows` and save both in `folder`."""
    disable_progress_bars()
    logging.disable_progress_bar()
    tokenizer = train_tokenizer([{"prompt": r["prompt"], "chosen": r["completion"], "rejected": []} for r in rows])
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=head_dim,
        max_position_embeddings=256,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    args = SFTConfig(
        str(folder),
        num_train_epochs=5,
        learning_rate=5e-3,
        per_device_train_batch_size=16,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_length=128,
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = LlamaForCausalLM(config)
    SFTTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Make the game from the command line."""
    parser = argparse.ArgumentParser(description="Make the start model and the prompts of the self-play toy.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    make_game(options.folder, seed=options.seed)
    print(f"The start model and its prompts are in {options.folder}.")


if __name__ == "__main__":
    main()
