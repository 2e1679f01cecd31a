"""Several references on real pairs, one of them deliberately damaged: is it noticed, and which mode is hurt least by
it?

    python benchmarks/multi_reference_study.py --data ../shared/data --seeds 0 1 2 --outputs
    outputs/multi-reference-study

Makes a tiny policy and four tiny references (one is the policy itself; every one of another family, with a tokenizer
of its own), trained on
the spot as language models on rows that the study does not use, and damages one more, as token ids of another
vocabulary would. Then sweeps
from one score cache: `clean`, in which the damaged reference is quarantined; `accepted`, in which it takes part; and
`weightings`, the same
with every weighting and the first seed. Stages run in this process, to save the starts of Python. Printed and written
to figures.json: the
health cards, each setting's accuracy with and without the damaged reference, the verdicts.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/tiny.py makes models and tokenizers

import datasets
import torch
import transformers
import yaml

from prefopt.cli import main as prefopt
from prefopt.evaluation.study import HEALTH_FILE, Study, conclude, paired_difference, read_study
from prefopt.files import read_json, read_jsonl, write_json, write_jsonl
from prefopt.pipelines.stages import Runner
from prefopt.pipelines.sweep import Sweep, SweepArguments
from tests.tiny import tiny_model, tiny_tokenizer

# name -> chat template, architecture, vocabulary; the first is the policy's own initial model, the last will be
# damaged
FAMILIES = {
    "own-qwen2": ("chatml", "qwen2", 700),
    "llama": ("llama3", "llama", 600),
    "mistral": ("mistral", "mistral", 800),
    "phi3": ("zephyr", "phi3", 500),
    "damaged": ("gemma2", "qwen3", 650),
}
WEIGHTINGS = ("uniform", "arwc", "arwc_normalized", "vdw", "vaw", "swcw", "swcw_one_hot", "tsw")
MODES = ("multi_dpo", "geometric", "harmonic")
MAX_LENGTH = 640
SHAPE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "max_position_embeddings": MAX_LENGTH}
LANGUAGE_FILE, PAIRS_FILE = "hh_helpful_test.jsonl.gz", "hh_helpful_train.jsonl.gz"
TRAINING = {
    "dtype": "float32",
    "reference_dtype": "float32",
    "max_length": MAX_LENGTH,
    "beta": 0.1,
    "normalize": "none",
    "sampling_subset": 32,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "num_train_epochs": 2,
    "vocab_metrics": False,
    "logging_steps": 5,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


class InProcess(Runner):
    """Runs stages in this process, with their output in the stage's log."""

    def _execute(self, stage, log, lock):
        assert stage.command[0] == "prefopt"
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with (
            open(log, "a", encoding="utf-8") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            status = prefopt(list(stage.command[1:]))
        return status, time.monotonic() - started


def messages(row: dict[str, Any]) -> dict[str, Any]:
    """An HH row with its dialogue as messages."""
    turns = re.split(r"\n\n(Human|Assistant):", row["prompt"])[1:-2]
    roles = {"Human": "user", "Assistant": "assistant"}
    prompt = [{"role": roles[who], "content": text.strip()} for who, text in zip(turns[::2], turns[1::2])]
    answers = {side: [{"role": "assistant", "content": row[side].strip()}] for side in ("chosen", "rejected")}
    return {"prompt": prompt, **answers}


def train_language_model(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], *, steps: int, seed: int
) -> float:
    """Teach a model the chosen answers; returns the last loss in nats per token."""
    texts = tokenizer.apply_chat_template([row["prompt"] + row["chosen"] for row in rows], tokenize=False)
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"][:MAX_LENGTH] for text in texts]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        chosen = [encoded[i] for i in torch.randint(len(encoded), (8,), generator=generator)]
        batch = tokenizer.pad({"input_ids": chosen}, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return loss.item()


def damage(model: Any, *, scale: float) -> None:
    """Give every token's output to another one, as when token ids come from another vocabulary, and make it `scale`
    times as large."""
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        assert weight is not model.get_input_embeddings().weight
        weight.copy_(scale * weight.roll(len(weight) // 2, dims=0))


def write_models(
    folder: Path, rows: Sequence[dict[str, Any]], names: Sequence[str], *, steps: int, scale: float
) -> list[str]:
    """Make and train the models; returns their folders."""
    places = []
    for seed, name in enumerate(names):
        style, architecture, vocabulary = FAMILIES[name]
        place = folder / name
        places.append(str(place))
        if (place / "model.safetensors").is_file():
            continue
        own = [row for number, row in enumerate(rows) if number % 3 != seed % 3]  # every tokenizer from other text
        corpus = [row["chosen"][0]["content"] for row in own]
        tokenizer = tiny_tokenizer(style, vocab_size=vocabulary, corpus=corpus)
        model = tiny_model(architecture, vocab_size=len(tokenizer), seed=seed, **SHAPE)
        loss = train_language_model(model, tokenizer, own, steps=steps, seed=seed)
        if name == "damaged":
            damage(model, scale=scale)
        tokenizer.save_pretrained(place)
        model.save_pretrained(place)
        print(f"{name}: {architecture}, {len(tokenizer)} tokens, {loss:.2f} nats per token", flush=True)
    return places


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that are not long."""
    rows = read_jsonl(path)
    return [
        messages(row)
        for row in rows
        if len(row["prompt"]) < 600 and max(len(row["chosen"]), len(row["rejected"])) < 400
    ]


def prepare(
    outputs: Path, data: Path, names: Sequence[str], *, steps: int, scale: float = 1.0
) -> tuple[list[str], Path]:
    """Models, and the pairs that the study may use; the models' language comes from other rows."""
    models = write_models(outputs / "models", read_rows(data / LANGUAGE_FILE), names, steps=steps, scale=scale)
    write_jsonl(outputs / "pairs.jsonl", read_rows(data / PAIRS_FILE))
    return models, outputs / "pairs.jsonl"


def sweep(outputs: Path, name: str, models: list[str], pairs: Path, sizes: Sequence[int], **settings: Any) -> Study:
    """Run one of the two sweeps; both use one score cache."""
    training = {
        **TRAINING,
        "model_name_or_path": models[0],
        "references": models,
        "ref_logps_dir": str(outputs / "scores"),
        **settings.pop("training", {}),
    }
    rows = dict(zip(("train_rows", "validation_rows", "test_rows"), sizes))
    arguments = {
        "run_dir": str(outputs / name),
        "training": training,
        "dataset_name": str(pairs),
        "pool_rows": sum(sizes),
        **rows,
        **settings,
    }
    (outputs / f"{name}.yaml").write_text(yaml.safe_dump(arguments, sort_keys=False))  # for `prefopt sweep`
    Sweep(SweepArguments(**arguments), runner=InProcess).run()
    return read_study(outputs / name)


def harm(clean: Study, accepted: Study) -> dict[str, dict[str, Any]]:
    """For each mode with uniform weights: what the damaged reference changes, paired within seeds."""
    found = {}
    for mode in MODES:
        before, after = (
            next(r for r in s.runs if r.name == f"mode={mode},weighting=uniform") for s in (clean, accepted)
        )
        found[mode] = {
            measure: {
                "without": dict(getattr(before, measure)),
                "with": dict(getattr(after, measure)),
                "difference": str(paired_difference(getattr(after, measure), getattr(before, measure))),
            }
            for measure in ("test", "own_init", "chosen_logps")
            if getattr(before, measure) and getattr(after, measure)
        }
    return found


def logged_numbers_are_finite(run_dir: Path) -> int:
    """How many numbers the runs have logged, each of them checked to be finite."""
    count = 0
    for state in run_dir.glob("runs/*/*/trainer_state.json"):
        for entry in read_json(state)["log_history"]:
            for key, value in entry.items():
                assert not isinstance(value, float) or math.isfinite(value), f"{state}: {key} is {value}"
                count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description="Several references on real pairs, one of them damaged.")
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {LANGUAGE_FILE} and {PAIRS_FILE}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sizes", type=int, nargs=3, default=[300, 150, 200], help="rows of train, validation, test")
    parser.add_argument("--steps", type=int, default=150, help="of language-model training")
    parser.add_argument("--outputs", type=Path, default=Path("outputs/multi-reference-study"))
    options = parser.parse_args()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    clock = time.monotonic()
    models, pairs = prepare(options.outputs, options.data, list(FAMILIES), steps=options.steps)
    common = {"seeds": options.seeds, "grid": {"mode": list(MODES), "weighting": ["uniform"]}}
    clean = sweep(options.outputs, "clean", models, pairs, options.sizes, **common)
    alone = {"mode": "multi_dpo", "weighting": "fixed", "reference_weights": [0.0] * (len(models) - 1) + [1.0]}
    runs = {
        f"{mode}-{w}": {"mode": mode, "weighting": w} for mode in ("multi_dpo", "harmonic") for w in WEIGHTINGS[1:]
    }
    accept = {"training": {"accept_outliers": True}, "baselines": False}
    arguments = (models, pairs, options.sizes)
    accepted = sweep(options.outputs, "accepted", *arguments, **common, **accept, runs={"damaged-alone": alone})
    weighted = sweep(options.outputs, "weightings", *arguments, seeds=options.seeds[:1], **accept, runs=runs)
    figures = {
        "health": read_json(options.outputs / "clean" / HEALTH_FILE),
        "harm": harm(clean, accepted),
        "verdict": conclude(clean).lines,
        "accuracies": {
            name: {r.name: [r.test, r.own_init] for r in s.runs}
            for name, s in (("clean", clean), ("accepted", accepted), ("weightings", weighted))
        },
        "finite_numbers": sum(
            logged_numbers_are_finite(options.outputs / name) for name in ("clean", "accepted", "weightings")
        ),
        "seconds": round(time.monotonic() - clock),
    }
    write_json(options.outputs / "figures.json", figures)
    for mode, measures in figures["harm"].items():
        for measure, told in measures.items():
            print(f"{mode}: {measure} with the damaged reference minus without: {told['difference']}")
    print(f"{figures['finite_numbers']} logged numbers, all finite; {figures['seconds']} s")


if __name__ == "__main__":
    main()
