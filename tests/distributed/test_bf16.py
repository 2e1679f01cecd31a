"""DPO in bfloat16 on two CPU ranks, by DDP and DeepSpeed, beside one float32 process.

Ids, counts and cached scores must be the same, and scores must differ by no more than rounding explains. accelerate
launches this file as a module: then it trains, and writes what the loss has read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from prefopt import DPOConfig, DPOTrainer
from prefopt.files import read_json, write_json
from prefopt.scoring.layouts import Group
from tests.scoring.helpers import plain_logps
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers.pairs import COMMON, preference_rows

ROOT = Path(__file__).resolve().parents[2]
ROWS = 22  # so that the last step of 4 is smaller
SIDES = ("chosen", "rejected")
WRAPPINGS = {
    "ddp-autocast": ("cpu_ddp_2ranks", {}),
    "ddp-weights": ("cpu_ddp_2ranks", {"model_init_kwargs": {"dtype": "bfloat16"}}),
    "zero2": ("cpu_zero2_2ranks", {}),
    "zero3": ("cpu_zero3_2ranks", {}),
}

pytestmark = pytest.mark.slow


class Recorder(DPOTrainer):
    """Keeps what the loss reads of every pair, by its row."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.seen: dict[str, Any] = {}
        super().__init__(*args, **settings)

    def pair_scores(self, scores, reference, batch):
        pair = super().pair_scores(scores, reference, batch)
        for number, row in enumerate(batch["row_ids"]):
            if batch["real"][number]:
                assert row not in self.seen
                owned = [batch["score_completions"] == 2 * number + place for place in (0, 1)]
                self.seen[row] = {
                    "ids": [batch["score_targets"][mask].tolist() for mask in owned],
                    "counts": [getattr(pair, f"{side}_counts")[number].item() for side in SIDES],
                    "policy": [getattr(pair, f"{side}_logps")[number].item() for side in SIDES],
                    "reference": [getattr(pair, f"ref_{side}_logps")[number].item() for side in SIDES],
                }
        return pair


def train(folder: Path, **settings: Any) -> Recorder:
    """Train one epoch that changes nothing."""
    settings = {**COMMON, "per_device_train_batch_size": 2, "learning_rate": 0.0, **settings}
    trainer = Recorder(
        str(folder / "model"),
        args=DPOConfig(str(folder / "out"), **settings),
        train_dataset=preference_rows(ROWS),
        processing_class=tiny_tokenizer("llama3"),
    )
    trainer.train()
    return trainer


def main(folder: Path, settings: dict[str, Any]) -> None:
    """Train on this rank, and write what it has read."""
    trainer = train(folder, bf16=True, **settings)
    columns = [f"ref_{side}_logps" for side in SIDES]
    if columns[0] in trainer.train_dataset.column_names:
        kept = trainer.train_dataset.select_columns(["row_id", *columns]).to_list()
        write_json(folder / f"cached-{os.environ['RANK']}.json", {row.pop("row_id"): [*row.values()] for row in kept})
    write_json(folder / f"seen-{os.environ['RANK']}.json", trainer.seen)


def two_ranks(folder: Path, config: str, **settings: Any) -> dict[str, Any]:
    """Train under an accelerate config with `mixed_precision: bf16`; return what was read of each pair."""
    values = yaml.safe_load((ROOT / "accelerate_configs" / f"{config}.yaml").read_text())
    (folder / "accelerate.yaml").write_text(yaml.safe_dump({**values, "mixed_precision": "bf16"}))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
    done = subprocess.run(
        [sys.executable, *launcher, "--main_process_port", "0", "-m", __name__, str(folder), json.dumps(settings)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,  # DeepSpeed compiles once
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    ranks = [read_json(folder / f"seen-{rank}.json") for rank in (0, 1)]
    assert all(ranks) and not ranks[0].keys() & ranks[1].keys()
    return ranks[0] | ranks[1]


def small_model():
    """A model whose log-probs are far from uniform, so that other tokens have other scores."""
    return tiny_model("llama", initializer_range=0.2)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bf16")
    small_model().save_pretrained(folder / "model")
    tiny_tokenizer("llama3").save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def folder(tmp_path, model) -> Path:
    (tmp_path / "model").symlink_to(model)
    return tmp_path


@pytest.fixture(scope="module")
def one(model) -> Recorder:
    """The run of one float32 process."""
    return train(model.parent)


@pytest.fixture(scope="module")
def rounding(one) -> float:
    """The most by which a plain forward of rounded weights misses the score of a completion."""
    groups = [Group.of_pair(row) for row in one.train_dataset]
    exact, rounded = plain_logps(small_model(), groups), plain_logps(small_model().bfloat16(), groups)
    return (rounded - exact).abs().max().item()


def numbers(seen: dict[str, Any], rows: list[str], name: str) -> np.ndarray:
    """What was read of chosen and rejected, (rows, 2)."""
    return np.array([seen[row][name] for row in rows])


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_what_the_loss_reads(wrapping, cached, folder, one, rounding):
    config, settings = WRAPPINGS[wrapping]
    if cached:
        settings = settings | {"precompute_ref_log_probs": True, "ref_logps_dir": str(folder / "scores")}
    seen, rows = two_ranks(folder, config, **settings), sorted(one.seen)
    assert sorted(seen) == rows and len(rows) == ROWS
    for row in rows:
        assert (seen[row]["ids"], seen[row]["counts"]) == (one.seen[row]["ids"], one.seen[row]["counts"])
    for name in ("policy", "reference"):
        gap = np.abs(numbers(seen, rows, name) - numbers(one.seen, rows, name)).max()
        print(f"{wrapping}, {'cached' if cached else 'live'}: {name} differs by at most {gap:.2g} of {rounding:.2g}")
        assert 0 < gap <= 2 * rounding
    if cached:
        stored = [logp for path in (folder / "scores").glob("*/*.npz") for logp in np.load(path)["logps"].tolist()]
        assert sorted(stored) == sorted(numbers(seen, rows, "reference").ravel())
        for rank in (0, 1):
            assert read_json(folder / f"cached-{rank}.json") == {row: seen[row]["reference"] for row in rows}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
