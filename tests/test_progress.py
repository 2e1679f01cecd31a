"""Progress of a long stage: rate and time left, as lines where nothing can be overwritten."""

import re

import datasets
import huggingface_hub
import pytest
from transformers.utils import logging

import prefopt
from prefopt import progress
from prefopt.cli import main
from prefopt.progress import Progress, library_bars
from tests.tiny_runs import tiny_recipe, write_model, write_pairs
from tests.trainers.pairs import COMMON, preference_rows


def test_a_log_gets_whole_lines_with_rate_and_time_left(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with Progress(4, "Scoring under llama", unit="completions") as bar:
        for _ in range(4):
            bar.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2 and all(line.startswith("Scoring under llama:") for line in lines)
    assert "4/4" in lines[-1] and re.search(r"\[\d+:\d+<\d+:\d+,.*completions/s\]", lines[-1])


def test_nothing_is_printed_where_it_is_not_shown(capsys):
    with Progress(4, "Scoring", unit="rows", shown=False) as bar:
        bar.advance(4)
    assert capsys.readouterr().err == ""


@pytest.fixture
def bars_of_libraries():
    """Whether `datasets`, the loading of weights and the hub's client draw bars; all are turned on first."""

    def shown() -> list[bool]:
        hub = huggingface_hub.utils.are_progress_bars_disabled()
        return [not datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled(), not hub]

    before = shown()
    datasets.enable_progress_bars()
    logging.enable_progress_bar()
    yield shown
    for was_shown, library in zip(before, (datasets, logging, huggingface_hub.utils)):
        name = "progress_bar" if library is logging else "progress_bars"
        getattr(library, f"{'enable' if was_shown else 'disable'}_{name}")()


def test_bars_of_libraries_are_as_before_afterwards(bars_of_libraries):
    huggingface_hub.utils.disable_progress_bars()
    with library_bars(shown=True):
        assert bars_of_libraries() == [True, True, False]
    with pytest.raises(KeyError), library_bars(shown=False):
        assert bars_of_libraries() == [False, False, False]
        raise KeyError
    assert bars_of_libraries() == [True, True, False]


BAR = re.compile(r"\d%\|")


@pytest.mark.parametrize("silent", [True, False])
def test_disable_tqdm_silences_every_bar_of_a_command(tmp_path, capfd, silent, bars_of_libraries):
    data = write_pairs(tmp_path / "data", {"train": 8, "test": 4})
    recipe = tiny_recipe(tmp_path, write_model(tmp_path / "model"), data, disable_tqdm=silent, eval_strategy="epoch")
    capfd.readouterr()  # saving the model has drawn a bar
    assert main(["wpo", str(recipe)]) == 0
    assert bool(BAR.search(capfd.readouterr().err)) is not silent
    assert bars_of_libraries() == [True] * 3


@pytest.mark.parametrize("method", ["WPO", "Reward"])
def test_disable_tqdm_silences_every_bar_of_a_trainer(tmp_path, capfd, method, bars_of_libraries):
    """From the names of files to the saved model; what its user does with other data keeps its bars."""
    folder, rows = str(write_model(tmp_path / "model")), preference_rows(8)
    settings = {**COMMON, "save_strategy": "steps", "max_steps": 1}
    config = getattr(prefopt, f"{method}Config")(str(tmp_path / "out"), **settings)
    capfd.readouterr()
    trainer = getattr(prefopt, f"{method}Trainer")(folder, args=config, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    trainer.evaluate(preference_rows(4, seed=1))
    trainer.save_model()
    assert not BAR.search(capfd.readouterr().err)
    rows.map(lambda row: {"words": len(row["chosen"])}, new_fingerprint="other")
    assert BAR.search(capfd.readouterr().err)
