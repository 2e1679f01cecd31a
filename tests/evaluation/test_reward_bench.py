"""RewardBench's format: any subset names, sections as the benchmark weighs them, and a trainer that fills the
table."""

import pytest
import torch

from prefopt import GeneralPreferenceConfig, GeneralPreferenceTrainer
from prefopt.evaluation.reward_bench import SECTIONS, load_reward_bench, reward_bench_table
from prefopt.files import write_jsonl
from tests.tiny import tiny_model, tiny_tokenizer


def metrics(values):
    found = {}
    for name, (accuracy, count) in values.items():
        found |= {f"eval_{name}_accuracy": accuracy, f"eval_{name}_ranked_pairs": float(count)}
    return found


def test_sections_and_score():
    """Chat (0.9 * 100 + 0.5 * 40) / 140; Reasoning: code 0.5 over 2 * 10 pairs, maths 1.0 at the same weight 20, so
    0.75."""
    values = {
        "alpacaeval-easy": (0.9, 100),
        "mt-bench-med": (0.5, 40),
        "math-prm": (1.0, 447),
        "hep-go": (0.4, 10),
        "hep-js": (0.6, 10),
        "my own": (0.25, 4),
    }
    table = reward_bench_table(metrics(values), list(values))
    assert table.sections == pytest.approx({"Chat": 110 / 140, "Reasoning": 0.75})
    assert table.score == pytest.approx((110 / 140 + 0.75) / 2)
    assert table.all_pairs == pytest.approx((90 + 20 + 447 + 4 + 6 + 1) / 611)
    assert "| my own | 4 | 25.0 |" in table.markdown() and "| **Chat** | | 78.6 |" in table.markdown()


def test_unknown_subsets_have_no_score():
    table = reward_bench_table(metrics({"a": (0.5, 2), "b": (1.0, 6)}), ["a", "b"])
    assert table.sections == {} and table.score is None and table.all_pairs == 0.875
    assert sum(map(len, SECTIONS.values())) == 23


def test_a_local_file_through_a_trainer(tmp_path):
    rows = [
        {
            "id": n,
            "prompt": f"question {n}",
            "chosen": f"yes {n}",
            "rejected": f"no {n}",
            "subset": subset,
            "chosen_model": "m",
        }
        for n, subset in enumerate(["hep-go", "mine", "hep-go", "mine", "mine"])
    ]
    write_jsonl(tmp_path / "bench.jsonl", rows)
    sets = load_reward_bench(tmp_path / "bench.jsonl")
    assert {name: len(each) for name, each in sets.items()} == {"hep-go": 2, "mine": 3}
    assert sets["mine"][0]["chosen"] == [{"role": "assistant", "content": "yes 1"}]
    torch.manual_seed(0)
    args = GeneralPreferenceConfig(
        str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", scale_gate="softmax", dim=4
    )
    trainer = GeneralPreferenceTrainer(
        tiny_model(attn_implementation="sdpa"), args=args, processing_class=tiny_tokenizer("llama3")
    )
    table = reward_bench_table(trainer.evaluate(sets), list(sets))
    assert table.subsets["mine"][1] == 3 and table.subsets["hep-go"][1] == 2
    assert table.sections == {"Reasoning": table.subsets["hep-go"][0]}

    write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    with pytest.raises(ValueError, match="has no column `subset`"):
        load_reward_bench(tmp_path / "bad.jsonl")
