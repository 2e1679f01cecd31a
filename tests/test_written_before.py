"""Artifacts that version 0.1 wrote before it was reorganised: checkpoints, cached scores, models, candidates."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefopt.cli import main

WRITTEN = Path(__file__).parent / "fixtures" / "written_by_0_1"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the fixture as working directory: its recipe names relative paths."""
    shutil.copytree(WRITTEN, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_a_killed_run_continues_from_its_checkpoint_and_its_cached_scores(folder):
    scores = {path: path.read_bytes() for path in (folder / "scores").rglob("*.npz")}
    assert main(["wpo", "recipe.yaml", "--resume_from_checkpoint", "true"]) == 0
    now, expected = (
        load_file(folder / "run" / "model.safetensors"),
        load_file(folder / "finished" / "model.safetensors"),
    )
    assert now.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(now[name], tensor, rtol=0, atol=1e-6)
    assert {path: path.read_bytes() for path in (folder / "scores").rglob("*.npz")} == scores, (
        "the reference was scored again"
    )
    state = json.loads((folder / "run" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == list(range(1, 13))


@pytest.mark.parametrize(
    ("ranker", "model", "expected"),
    [
        ("reward-model", "reward-model", "reward-model-scores.jsonl"),
        ("general-preference", "general-preference-model", "general-preference-scores.jsonl"),
    ],
)
def test_models_with_heads_give_the_scores_they_gave(folder, ranker, model, expected):
    words = ["rank", "--candidates", "candidates.jsonl", "--output_dir", "ranked", "--ranker", ranker]
    assert main([*words, "--model_name_or_path", model, "--output_format", "jsonl", "--dtype", "float32"]) == 0
    now = [json.loads(line) for line in (folder / "ranked" / "candidates.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (folder / expected).read_text().splitlines()]
    assert len(now) == len(before) == 4
    for row, old in zip(now, before):
        for candidate, old_candidate in zip(row["candidates"], old["candidates"]):
            assert candidate["text"] == old_candidate["text"]
            assert candidate["scores"][model] == pytest.approx(old_candidate["scores"][model], abs=1e-5)


@pytest.mark.parametrize(
    ("method", "where"),
    [("wpo", "run"), ("reward-model", "reward-model"), ("general-preference-model", "general-preference-model")],
)
def test_resolved_recipes_are_read(folder, method, where, capsys):
    """The recipe that a run wrote beside its model is a recipe for the same run."""
    assert main(["check", f"{where}/recipe.yaml", "--method", method, "--output_dir", "elsewhere"]) == 0
    assert "problem" not in capsys.readouterr().out.lower()
