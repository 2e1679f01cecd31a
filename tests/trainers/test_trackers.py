"""Trackers, offline: what a run and its samples leave with each that is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefopt.pipelines.state import run_logged, tracker_group

SCRIPT = """
import sys
from pathlib import Path
import prefopt
from tests.trainers.pairs import make_trainer, preference_rows

trainer = make_trainer(
    Path(sys.argv[1]), "WPO", rows=preference_rows(12), max_steps=2, report_to=[sys.argv[2]], run_name="wpo-1",
    trainer_options={"eval_dataset": preference_rows(4, seed=1)}, **dict(word.split("=") for word in sys.argv[3:]),
)
trainer.add_callback(prefopt.SampleCompletionsCallback(trainer, 2, max_new_tokens=3))
trainer.train()
"""


def track(folder: Path, name: str, *settings: str, **environment: str) -> None:
    """Train in a process of its own, as trackers keep state for a whole process."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root / "src"), str(root)])
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), name, *settings],
        check=True, cwd=folder, timeout=300,
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track(tmp_path, "tensorboard")
    (file,) = (tmp_path / "out" / "runs").rglob("events.*")
    events = EventAccumulator(str(file.parent)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert {"train/wpo/weight_mean", "train/rewards/accuracies"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Tensors("samples/text_summary")] == [0, 2]


@pytest.mark.slow
def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    group = tracker_group(tmp_path / "loop" / "logs" / "iteration-1-train.log")
    track(tmp_path, "wandb", WANDB_MODE="offline", WANDB_SILENT="true", **group)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    written = file.read_bytes()
    assert b"loop" in written and b"train/wpo/weight_mean" in written
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/table/samples_*.table.json"))


@pytest.mark.slow
def test_mlflow_in_a_file(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    group = tracker_group(tmp_path / "loop" / "logs" / "iteration-1-train.log")
    track(tmp_path, "mlflow", MLFLOW_TRACKING_URI=store, **group)
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("loop").experiment_id])
    assert run.data.metrics.keys() >= {"loss", "wpo/weight_mean"} and run.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(run.info.run_id, "samples")} == {
        "samples/step-0.md",
        "samples/step-2.md",
    }


@pytest.mark.slow
def test_trackio_in_a_folder(tmp_path):
    pytest.importorskip("trackio")
    track(tmp_path, "trackio", "project=loop", TRACKIO_DIR=str(tmp_path / "trackio"))
    files = [path for path in (tmp_path / "trackio").glob("loop*") if path.is_file()]  # a database, and its journal
    assert any(b"wpo/weight_mean" in path.read_bytes() for path in files)


def test_stages_of_a_pipeline_are_one_group_unless_the_user_says_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_NAME", "mine")
    log = tmp_path / "my-loop" / "logs" / "iteration-1-train.log"
    words = [sys.executable, "-c", "import os; print(*(os.environ[n] for n in ('WANDB_RUN_GROUP', 'WANDB_NAME')))"]
    with open(os.devnull) as nothing, open(os.devnull, "w") as console:
        assert run_logged(words, log, mark="x", keep_open=nothing.fileno(), console=console) == 0
    assert log.read_text().split() == ["my-loop", "mine"]
