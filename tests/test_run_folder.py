"""Whose folder it is, and where a run starts."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prefopt import WPOTrainer
from prefopt.cli import main
from prefopt.files import read_json
from prefopt.run import RECIPE_FILE, find_start, holds_run, open_folder, package_versions
from tests.tiny import write_checkpoint
from tests.tiny_runs import tiny_recipe, write_model, write_pairs

MINE = "beta: 0.1\nlearning_rate: 1.0e-06\noutput_dir: out\n"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out"


def start(folder, *, resume=None, overwrite=False, resolved=MINE):
    return find_start(folder, resume, overwrite, resolved)


def checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
    write_checkpoint(path)
    return str(path)


def test_a_new_folder_starts_at_the_beginning(folder):
    assert start(folder) is None
    assert not folder.exists()
    assert start(folder, resume=True) is None  # the same command may be given again and again on a cluster


def test_notes_of_the_user_are_no_run(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert not holds_run(folder)
    assert start(folder) is None


def test_the_last_checkpoint_of_the_same_run(folder):
    open_folder(folder, MINE, overwrite=False)
    checkpoint(folder, 9)
    last = checkpoint(folder, 10)
    assert start(folder, resume=True) == last
    assert start(folder, resume="true") == last
    assert start(folder, resume=str(folder / "checkpoint-9")) == str(folder / "checkpoint-9")


@pytest.mark.parametrize("state", [None, "", '{"epoch": 1'])
def test_a_checkpoint_that_was_not_written_to_its_end_is_left_out(folder, state, capsys):
    """A killed run leaves a folder without the trainer's state, which is written last, or with a part of it."""
    open_folder(folder, MINE, overwrite=False)
    whole, cut = checkpoint(folder, 9), folder / "checkpoint-10"
    cut.mkdir()
    if state is not None:
        (cut / "trainer_state.json").write_text(state)
    assert start(folder, resume=True) == whole
    assert f"{cut} was not written to its end" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        start(folder, resume=str(cut))
    with pytest.raises(ValueError, match="a run that reached step 9"):
        start(folder)


def test_a_run_without_a_checkpoint_may_start_again(folder):
    open_folder(folder, MINE, overwrite=False)
    assert start(folder) is None
    with pytest.raises(ValueError, match="already holds another run"):
        start(folder, resolved=MINE.replace("0.1", "0.2"))


def test_finished_and_unfinished_runs_are_told_apart(folder):
    open_folder(folder, MINE, overwrite=False)
    checkpoint(folder, 10)
    with pytest.raises(
        ValueError, match=r"a run that reached step 10: continue it with --resume_from_checkpoint true"
    ):
        start(folder)
    (folder / "model.safetensors").write_text("")
    shutil.rmtree(folder / "checkpoint-10")
    with pytest.raises(ValueError, match="a trained model"):
        start(folder)


def test_a_checkpoint_cut_short_is_none(folder):
    """A kill while a checkpoint is written leaves weights without the Trainer's state, which is written last."""
    open_folder(folder, MINE, overwrite=False)
    whole = checkpoint(folder, 9)
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "model.safetensors").write_text("half")
    assert start(folder, resume=True) == whole
    with pytest.raises(ValueError, match="reached step 9"):
        start(folder)
    (folder / "checkpoint-9" / "trainer_state.json").unlink()
    assert start(folder, resume=True) is None
    assert start(folder) is None


@pytest.mark.parametrize("recipe", [MINE.replace("0.1", "0.2"), None])
def test_resuming_does_not_begin_in_the_folder_of_another_model(folder, recipe):
    """With nothing to continue, `--resume_from_checkpoint true` must not train over a model of other settings."""
    folder.mkdir()
    (folder / "model.safetensors").write_text("precious")
    if recipe is not None:
        (folder / RECIPE_FILE).write_text(recipe)
    with pytest.raises(
        ValueError, match="a trained model of other settings, without a checkpoint to continue from: replace"
    ):
        start(folder, resume=True)
    (folder / RECIPE_FILE).write_text(MINE)
    assert (
        start(folder, resume=True) is None
    )  # the same run again, as a pipeline does that was killed after its last step
    with pytest.raises(ValueError, match="a trained model: replace it"):  # there is nothing to continue
        start(folder)


def test_only_what_changes_the_result_matters_for_resuming(folder):
    open_folder(folder, MINE, overwrite=False)
    last = checkpoint(folder, 10)
    assert (
        start(folder, resume=True, resolved=MINE.replace("output_dir: out", "output_dir: elsewhere\nlogging_steps: 3"))
        == last
    )
    with pytest.raises(ValueError, match=r"learning_rate was 1e-06 and is 0\.1"):
        start(folder, resume=True, resolved=MINE.replace("1.0e-06", "0.1"))


def test_overwriting_removes_the_earlier_run_and_nothing_else(folder):
    open_folder(folder, MINE, overwrite=False)
    checkpoint(folder, 10)
    left = ("model.safetensors", "trainer_state.json", "config.json", "adapter_config.json", "eval_results.json")
    for name in (*left, "notes.txt", "checkpoint-notes.txt"):
        (folder / name).write_text("")
    elsewhere = Path(checkpoint(folder.parent, 20))
    (folder / "checkpoint-20").symlink_to(elsewhere)
    (folder / "checkpoint-best").mkdir()
    assert start(folder, overwrite=True) is None
    open_folder(folder, MINE.replace("0.1", "0.2"), overwrite=True)
    kept = ["checkpoint-best", "checkpoint-notes.txt", "notes.txt", "package_versions.json", "recipe.yaml"]
    assert sorted(path.name for path in folder.iterdir()) == kept
    assert (elsewhere / "model.safetensors").is_file()
    assert "0.2" in (folder / RECIPE_FILE).read_text()


def test_a_file_is_no_folder(folder):
    folder.write_text("")
    with pytest.raises(ValueError, match="is a file"):
        start(folder)


def test_versions_name_what_computes():
    assert {"python", "torch", "transformers", "trl", "accelerate", "prefopt"} <= set(package_versions())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model")), write_pairs(
        tmp_path_factory.mktemp("data"), {"train": 6, "test": 2}
    )


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_command_given_again_changes_nothing(tmp_path, tiny, capsys):
    settings = {"do_eval": True, "save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": True}
    recipe = str(tiny_recipe(tmp_path, *tiny, **settings))
    assert main(["wpo", recipe]) == 0
    before = contents(tmp_path / "out")
    assert read_json(tmp_path / "out" / "train_results.json")["train_loss"] > 0
    assert main(["wpo", recipe]) == 0
    assert "had reached its end already" in capsys.readouterr().err
    after = contents(tmp_path / "out")
    assert [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)] == []
    (tmp_path / "out" / "eval_results.json").unlink()  # as if killed during the last evaluation
    assert main(["wpo", recipe]) == 0
    assert (tmp_path / "out" / "eval_results.json").exists()
    assert read_json(tmp_path / "out" / "train_results.json")["train_loss"] > 0


def test_a_folder_that_is_removed_meanwhile_is_made_again(tmp_path, tiny, monkeypatch):
    step = WPOTrainer.training_step

    def remove(self, *args, **kwargs):
        shutil.rmtree(self.args.output_dir, ignore_errors=True)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(WPOTrainer, "training_step", remove)
    assert main(["wpo", str(tiny_recipe(tmp_path, *tiny))]) == 0
    assert {"recipe.yaml", "model.safetensors", "train_results.json"} <= {p.name for p in (tmp_path / "out").iterdir()}


FULL_DISK = """
import resource, sys
from prefopt import training
from prefopt.cli import main

opened = training.open_folder

def limited(*values, **keywords):
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, -1))
    return opened(*values, **keywords)

training.open_folder = limited
sys.exit(main(["wpo", {recipe!r}]))
"""


@pytest.mark.parametrize("limit", [0, 4000, 60_000])
def test_a_full_disk_is_one_line(tmp_path, tiny, capfd, limit):
    """Files cannot grow beyond a limit: what a full disk does, at the recipe, the weights or the optimizer."""
    recipe = tiny_recipe(tmp_path, *tiny, save_strategy="steps", save_steps=1)
    code = FULL_DISK.format(limit=limit, recipe=str(recipe))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    errors = [line for line in result.stderr.splitlines() if line.startswith("prefopt: error: ")]
    assert (result.returncode, len(errors)) == (2, 1), result.stderr
    assert "Traceback" not in result.stderr
    assert str(tmp_path / "out") in errors[0] and "cannot be written" in errors[0]
    assert "GiB are free" in errors[0] and "--resume_from_checkpoint true continues" in errors[0]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, tiny, capsys, monkeypatch, number):
    def fail(self, *_, **__):
        raise OSError(number, os.strerror(number), str(tmp_path / "out" / "checkpoint-1" / "model.safetensors"))

    monkeypatch.setattr(WPOTrainer, "_save", fail)
    recipe = tiny_recipe(tmp_path, *tiny, save_strategy="steps", save_steps=1)
    assert main(["wpo", str(recipe)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prefopt: error: ")]
    assert "checkpoint-1/model.safetensors cannot be written" in line and os.strerror(number) in line
    assert "continues from it" in line


def test_a_damaged_recipe_of_the_run_before_is_one_line(folder):
    open_folder(folder, MINE, overwrite=False)
    checkpoint(folder, 3)
    for damaged in ("beta: [1\n", "\0\0\0", "- x\n"):
        (folder / RECIPE_FILE).write_text(damaged)
        with pytest.raises(ValueError, match=r"recipe\.yaml.*remove that file"):
            start(folder, resume=True)
