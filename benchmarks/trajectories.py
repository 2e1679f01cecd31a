"""The losses of every trainer over a few steps, to the last bit: numerical proof that a refactoring changed nothing.

    PYTHONPATH=<before>/src python benchmarks/trajectories.py before.json
    PYTHONPATH=<after>/src python benchmarks/trajectories.py after.json --against before.json   # exit status 1 if
    different

Only public names are used, so that one copy of this file runs on both. Everything runs on the CPU with one thread, on
models and rows that are
made here from seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import prefopt
from prefopt.data import tokenize_pairs

WORDS = "blue fox two five sky answer please long short question help woods animal colour morning".split()  # noqa: SIM905
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "max_length": 96,
    "seed": 7,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer with a chat template on the words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    return fast


def make_model(seed: int = 0) -> LlamaForCausalLM:
    """Build a two-layer Llama with random weights."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=320, num_key_value_heads=2, **shape, **tokens))


def _words(rng: random.Random, most: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))


def pair_rows(count: int = 32) -> list[dict[str, Any]]:
    """Make conversational pairs with the columns of every pair method."""
    rng, rows = random.Random(1), []
    while len(rows) < count:
        chosen, rejected = _words(rng, 15), _words(rng, 15)
        if chosen == rejected:
            continue
        probability = rng.random()
        rows.append(
            {
                "prompt": [{"role": "user", "content": _words(rng, 12)}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "chosen_win_prob": probability,
                "rejected_win_prob": 1 - probability,
                "chosen_over_rejected_prob": probability,
                "chosen_score": rng.random(),
                "rejected_score": -rng.random(),
            }
        )
    return rows


def comparison_rows(count: int = 32, *, adversarial: bool = False) -> list[dict[str, Any]]:
    """Make comparisons of two to four responses; of two where every other row is an adversarial pair."""
    rng, rows = random.Random(2), []
    while len(rows) < count:
        size = 2 if adversarial else rng.randint(2, 4)
        responses = [_words(rng, 6) for _ in range(size)]
        if len(set(responses)) == size:
            row = {"prompt": _words(rng, 8) + " ", "responses": responses, "scores": [float(s) for s in range(size)]}
            rows.append(row | ({"is_adversarial": len(rows) % 2 == 1} if adversarial else {}))
    return rows


def scored(rows: list[dict[str, Any]], references: int = 3) -> Dataset:
    """Tokenise pairs and add made-up scores of several references."""
    dataset, _ = tokenize_pairs(Dataset.from_list(rows), make_tokenizer(), max_length=COMMON["max_length"])
    generator = torch.Generator().manual_seed(4)
    for side in ("chosen", "rejected"):
        logps = -60 * torch.rand(len(rows), references, generator=generator) - 20
        counts = torch.randint(5, 20, (len(rows), references), generator=generator)
        dataset = dataset.add_column(f"ref_{side}_logps", logps.tolist())
        dataset = dataset.add_column(f"ref_{side}_counts", counts.float().tolist())
    return dataset


def cases() -> dict[str, tuple[str, Callable[[], list[dict[str, Any]]], dict[str, Any], dict[str, Any]]]:
    """Return name -> (trainer, rows, further settings, further arguments of the constructor)."""
    found: dict[str, Any] = {
        f"dpo-{layout}-{loss}": ("DPO", pair_rows, {"batch_layout": layout, "loss_type": loss}, {})
        for layout in ("packed", "padded")
        for loss in ("sigmoid", "ipo", "hinge", "apo_zero", "simpo")
    }
    found |= {
        "dpo-cached": ("DPO", pair_rows, {"precompute_ref_log_probs": True}, {}),
        "dpo-reference": ("DPO", pair_rows, {"beta": 0.2}, {"ref_model": make_model(9)}),
        "wpo": ("WPO", pair_rows, {}, {}),
        "wpo-greedy": ("WPO", pair_rows, {"weight_alignment": "greedy", "max_weight": None}, {}),
        "sppo": ("SPPO", pair_rows, {"loss_type": "sppo"}, {}),
        "sppo-single": ("SPPO", pair_rows, {"loss_type": "sppo_single"}, {}),
        "gpo": ("SPPO", pair_rows, {"loss_type": "gpo"}, {}),
        "reward": ("Reward", comparison_rows, {}, {}),
        "adversarial-reward": ("AdversarialReward", lambda: comparison_rows(adversarial=True), {}, {}),
        "general-preference": ("GeneralPreference", comparison_rows, {}, {}),
        "rrhf": ("RRHF", comparison_rows, {}, {}),
    }
    for mode in ("multi_dpo", "harmonic", "geometric", "arithmetic"):
        found[f"multi-{mode}"] = ("MultiReferenceDPO", pair_rows, {"mode": mode}, {})
    return found


def trajectory(
    trainer: str, rows: list[dict[str, Any]], settings: dict[str, Any], more: dict[str, Any]
) -> dict[str, Any]:
    """Train and return the logged losses and gradient norms as hexadecimal floats, and a hash of the weights."""
    torch.manual_seed(3)
    cls, config = getattr(prefopt, f"{trainer}Trainer"), getattr(prefopt, f"{trainer}Config")
    with tempfile.TemporaryDirectory() as folder:
        values = {**COMMON, **settings}
        args = config(str(Path(folder) / "out"), **values)
        dataset = scored(rows) if trainer == "MultiReferenceDPO" else Dataset.from_list(rows)
        built = cls(make_model(), args=args, train_dataset=dataset, processing_class=make_tokenizer(), **more)
        built.train()
        steps = [entry for entry in built.state.log_history if "loss" in entry]
        digest = hashlib.sha256()
        for name, tensor in sorted(built.model.state_dict().items()):
            digest.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "loss": [float(step["loss"]).hex() for step in steps],
        "grad_norm": [float(step["grad_norm"]).hex() for step in steps],
        "weights": digest.hexdigest(),
    }


def main() -> int:
    """Run every case, write the trajectories and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = {name: trajectory(t, rows(), s, m) for name, (t, rows, s, m) in cases().items() if args.only in name}
    args.output.write_text(json.dumps(done, indent=1) + "\n")
    print(f"{len(done)} trajectories of {COMMON['max_steps']} steps, prefopt from {Path(prefopt.__file__).parent}")
    if args.against is None:
        return 0
    before = json.loads(args.against.read_text())
    different = [name for name in done if done[name] != before.get(name)]
    for name in different:
        print(f"{name}: {[float.fromhex(x) for x in done[name]['loss']]}")
        print(f"{' ' * len(name)}  {[float.fromhex(x) for x in before.get(name, {'loss': []})['loss']]}")
    print(f"{len(done) - len(different)} of {len(done)} are equal to the last bit")
    return int(bool(different))


if __name__ == "__main__":
    raise SystemExit(main())
