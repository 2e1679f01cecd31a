"""`prefopt score-references`, from a recipe to scores that training picks up."""

import numpy as np
import pytest
import yaml

from prefopt.cli import main
from prefopt.files import read_json, write_jsonl
from prefopt.references.cache import ScoreCache, describe_scorers
from tests.references.helpers import ROWS, reference

FAMILIES = [("llama3", "llama", 400), ("chatml", "qwen2", 350), ("zephyr", "mistral", 380)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three references on disk, the first of them the policy."""
    folder = tmp_path_factory.mktemp("models")
    for style, architecture, size in FAMILIES:
        ref = reference(style, architecture, vocab_size=size)
        ref.model.save_pretrained(folder / style)
        ref.tokenizer.save_pretrained(folder / style)
    return [str(folder / style) for style, *_ in FAMILIES]


def recipe(folder, models, method="multi-reference-dpo", **changes):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{prompt} ({n})"}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for n in range(3)
        for prompt, chosen, rejected in ROWS
    ]
    write_jsonl(folder / "train.jsonl", rows)
    settings = {
        "method": method,
        "model_name_or_path": models[0],
        "dtype": "float32",
        "dataset_name": str(folder / "train.jsonl"),
        "test_split_size": 3,
        "eval_strategy": "no",
        "do_eval": True,
        "max_length": 256,
        "output_dir": str(folder / "out"),
        "ref_logps_dir": str(folder / "scores"),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if method == "multi-reference-dpo":
        settings |= {"references": models, "reference_dtype": "float32", "weighting": "vaw", "validation_rows": 3}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings | changes))
    return str(path)


def test_score_then_train_then_change_what_does_not_matter(tmp_path, models, capsys):
    path = recipe(tmp_path, models)
    assert main(["check", path]) == 2
    assert "Run `prefopt score-references`" in capsys.readouterr().out
    assert main(["multi-reference-dpo", path]) == 2
    assert "Run `prefopt score-references`" in capsys.readouterr().err
    assert main(["score-references", path]) == 0
    told = capsys.readouterr()
    assert told.err.count("24 completions scored, 0 found") == 3
    for name in models:
        assert f"{name}  " in told.out
    assert main(["check", path]) == 0
    capsys.readouterr()
    assert (
        main(
            ["score-references", path, "--learning_rate", "1e-6", "--beta", "0.7", "--output_dir", str(tmp_path / "b")]
        )
        == 0
    )
    assert capsys.readouterr().err.count("0 completions scored, 24 found") == 3
    assert main(["multi-reference-dpo", path]) == 0
    out = capsys.readouterr().out
    assert "scores of 3 references taken from" in out and "12 of 12 rows" not in out
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert (
        main(["multi-reference-dpo", path, "--reference_dtype", "bfloat16", "--output_dir", str(tmp_path / "c")]) == 2
    )
    assert "the dtype changed since it was scored" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_the_policys_own_scores_are_filled_ahead_and_picked_up(tmp_path, models, capsys):
    path = recipe(tmp_path, models, method="dpo")
    assert main(["score-references", path]) == 0
    assert "18 scored now" in capsys.readouterr().out
    assert not (tmp_path / "out" / "model.safetensors").exists()
    changed = ["--learning_rate", "1e-6", "--beta", "0.9", "--output_dir", str(tmp_path / "elsewhere")]
    assert main(["dpo", path, "--precompute_ref_log_probs", "true", *changed]) == 0
    assert "18 read from" in capsys.readouterr().out


def test_mistakes_end_in_one_line(tmp_path, models, capsys):
    for changes, words, message in (
        ({}, ["--method", "reward-model"], "no reference model"),
        ({"references": [models[0], str(tmp_path / "nowhere")]}, [], "nowhere"),
        ({"references": None}, [], "references is missing"),
    ):
        assert main(["score-references", recipe(tmp_path, models, **changes), *words]) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error


@pytest.mark.slow
def test_two_ranks_under_zero3_score_and_train_as_one_process(tmp_path, models, capsys):
    """Scores are equal, and online weights are the same on both ranks (the logged mean is one-hot, or sums to one)."""
    path = recipe(tmp_path, models, weighting="tsw", sampling_subset=3)
    sharded = ["--num_processes", "2", "--accelerate_config", "cpu_zero3_2ranks"]
    assert main(["score-references", path, *sharded]) == 0
    assert main(["score-references", path, "--ref_logps_dir", str(tmp_path / "alone")]) == 0
    for scorer in describe_scorers(tmp_path / "alone"):
        alone, shared = (ScoreCache(tmp_path / root, scorer) for root in ("alone", "scores"))
        keys = list(alone._index)
        assert len(keys) == 24
        np.testing.assert_allclose(shared.lookup(keys).logps, alone.lookup(keys).logps, rtol=1e-5)
    for weighting in ("tsw", "swcw"):
        out = tmp_path / weighting
        assert main(["multi-reference-dpo", path, "--weighting", weighting, "--output_dir", str(out), *sharded]) == 0
        history = read_json(out / "trainer_state.json")["log_history"]
        steps = [
            [v for k, v in entry.items() if k.startswith("references/weight/")] for entry in history if "loss" in entry
        ]
        assert len(steps) == 2 and all(sum(weights) == pytest.approx(1, abs=1e-5) for weights in steps)
        if weighting == "tsw":
            assert all(sorted(weights) == [0, 0, 1] for weights in steps)
        print(weighting, steps)
