"""The quickstart: WPO from nothing to a measured improvement, on a CPU, in under three minutes.

    python examples/quickstart/quickstart.py            (`make quickstart` sets everything up and runs this)

1. Write a preference set (preferences.py), train a tokenizer on it, and teach a tiny chat model both styles of answer.
2. Run WPO through the script and the recipe that a real run uses.
3. Measure the model before and after on prompts that neither phase has seen, and show some of its answers.

What stays is one folder: the model, its tokenizer, the resolved recipe, and the figures.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import torch
import transformers
from measuring import compare, measure
from preferences import Question, all_questions, answer
from start_model import make_start_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.files import write_json, write_jsonl

# nothing is downloaded, and no GPU is used even where there is one
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",  # the model is too small to gain from more threads
}
REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = "training_configs/quickstart.yaml"
OUTPUTS = "outputs"
TRAINING_PAIRS, HELD_OUT_PAIRS = 1000, 200


def write_pairs(folder: Path, seed: int) -> list[Question]:
    """Writes train.jsonl and test.jsonl; returns the questions of test.jsonl, none of which is in train.jsonl."""
    rng = random.Random(seed)
    questions = all_questions()
    rng.shuffle(questions)
    held_out = questions[:HELD_OUT_PAIRS]
    for split, part in (("test", held_out), ("train", questions[HELD_OUT_PAIRS : HELD_OUT_PAIRS + TRAINING_PAIRS])):
        rows = [
            {
                "prompt": [{"role": "user", "content": question.prompt}],
                "chosen": [{"role": "assistant", "content": answer(question, firm=True, rng=rng)}],
                "rejected": [{"role": "assistant", "content": answer(question, firm=False, rng=rng)}],
            }
            for question in part
        ]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return held_out


def run_wpo(start: Path, output_dir: Path, seed: int) -> None:
    """Runs the recipe as a user would; the command line changes it only where this run is not the standard one."""
    command = ["accelerate", "launch", "scripts/run_wpo.py", RECIPE]
    if (output_dir, seed) != (REPOSITORY / OUTPUTS / "quickstart", 0):
        command += [
            f"--model_name_or_path={start}",
            f"--dataset_name={start / 'pairs'}",
            f"--output_dir={output_dir}",
            f"--seed={seed}",
        ]
    print(f"\n$ {' '.join(command)}", flush=True)
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    subprocess.run([*launcher, *command[2:]], check=True, cwd=REPOSITORY)


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tiny chat model with WPO and show what changed.")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data, the start model and WPO")
    parser.add_argument(
        "--outputs", type=Path, default=REPOSITORY / OUTPUTS, help="where the folder `quickstart` goes"
    )
    parser.add_argument(
        "--keep-start", action="store_true", help="keep the start model and the pairs, to run the recipe by hand"
    )
    options = parser.parse_args()
    start, output_dir = options.outputs.resolve() / "quickstart-start", options.outputs.resolve() / "quickstart"
    clock = time.monotonic()
    os.environ |= ENVIRONMENT
    torch.set_num_threads(1)
    datasets.disable_progress_bars()  # those of the two training phases are enough
    transformers.utils.logging.disable_progress_bar()

    print("1. A preference set, and a model that answers in both of its styles")
    shutil.rmtree(start, ignore_errors=True)
    held_out = write_pairs(start / "pairs", options.seed)
    make_start_model(start, seed=options.seed)
    policy, tokenizer = load(start)
    before = measure(policy, tokenizer, policy, start / "pairs" / "test.jsonl", held_out)

    print("\n2. WPO")
    run_wpo(start, output_dir, options.seed)

    print("\n3. Before and after")
    trained, _ = load(output_dir)
    after = measure(trained, tokenizer, policy, start / "pairs" / "test.jsonl", held_out)
    print(compare(before, after, held_out))
    figures = {
        "seed": options.seed,
        "before": before.figures(),
        "after": after.figures(),
        "seconds": round(time.monotonic() - clock),
    }
    write_json(output_dir / "quickstart.json", figures)
    if not options.keep_start:
        shutil.rmtree(start)
    print(NEXT.format(folder=output_dir, seconds=figures["seconds"]))


NEXT = """
The model and its recipe (recipe.yaml) are in {folder}; all of this took {seconds} s. Next, on a GPU (`source .venv/bin/activate` first):

  prefopt check llama3/wpo --accelerate_config deepspeed_zero3 --num_processes 8      (does it fit? what would stop it?)
  accelerate launch --config_file accelerate_configs/deepspeed_zero3.yaml scripts/run_wpo.py training_configs/llama3/wpo.yaml

Your own pairs: a file pairs.jsonl, each line `prompt`, `chosen`, `rejected`; then --dataset_name pairs.jsonl --test_split_size 0.05."""  # noqa: E501


if __name__ == "__main__":
    main()
