"""What a step prints: a line of few figures on a terminal, the whole log elsewhere."""

from __future__ import annotations

import ast
import io
import re
import sys
from types import SimpleNamespace

import pytest
from transformers import PrinterCallback, ProgressCallback

from prefopt import SampleCompletionsCallback, progress
from prefopt.trainers import console
from prefopt.trainers.console import duration, step_line
from tests.trainers.pairs import make_trainer, preference_rows

LOG = {
    "loss": 0.61234, "rewards/accuracies": 0.71, "rewards/margins": 0.1321, "rewards/chosen": 0.05,
    "rewards/rejected": -0.11, "wpo/weight_mean": 0.834, "perf/tokens_per_second": 12345.6, "entropy": 1.0,
}  # fmt: skip


def test_a_line_has_the_few_figures_that_matter():
    """Log-ratios are rewards divided by beta."""
    state, args = SimpleNamespace(global_step=12, max_steps=3750), SimpleNamespace(beta=0.1)
    line = step_line(LOG, args, state, seconds_left=3725.0)
    assert line == (
        "step   12/3750  loss  0.6123  accuracy 0.71  margin  +0.132  weight 0.83  log-ratios   +0.50 -1.10  "
        "tokens/s  12,346  1 h 2 min left"
    )
    other = step_line({**LOG, "loss": 10.5, "rewards/margins": -21.25}, args, state, seconds_left=3725.0)
    assert [line.index(word) for word in ("accuracy", "left")] == [other.index(word) for word in ("accuracy", "left")]
    self_play = {"loss": 2.0, "win_prob/chosen": 0.8, "logratios/chosen": 0.5, "logratios/rejected": -1.5}
    assert "win prob 0.80  log-ratios   +0.50 -1.50" in step_line(self_play, args, state, seconds_left=None)
    reward = {"loss": 0.5, "accuracy": 0.9, "margin": 1.5}
    assert step_line(reward, SimpleNamespace(), state, seconds_left=None).endswith("accuracy 0.90  margin  +1.500")
    evaluation = step_line({"eval_loss": 0.5, "eval_rewards/accuracies": 1.0}, args, state, seconds_left=None)
    assert evaluation.startswith("eval   12/3750  loss  0.5000  accuracy 1.00")
    assert evaluation.index("accuracy") == line.index("accuracy")
    assert step_line({"train_runtime": 3.0}, args, state, seconds_left=None) is None


def test_durations():
    times = (0, 59, 3600, 3725, 200000)
    assert [duration(seconds) for seconds in times] == ["0 s", "59 s", "1 h 0 min", "1 h 2 min", "2 d 7 h"]


@pytest.mark.parametrize("bars", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_on_a_terminal_and_in_a_log_file(tmp_path, bars, terminal, capsys, monkeypatch):
    trainer = make_trainer(
        tmp_path, "WPO", rows=preference_rows(12), max_steps=3, logging_steps=1, disable_tqdm=not bars
    )
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    short = [line for line in lines if line.startswith("step ")]
    whole = [ast.literal_eval(line) for line in lines if line.startswith("{")]
    if terminal:
        assert len(short) == 3 and "left" not in short[0] and short[2].endswith("0 s left")
        assert [entry for entry in whole if "loss" in entry] == []
    else:
        assert short == [] and len([entry for entry in whole if len(entry) > 20 and "loss" in entry]) == 3
    assert all("wpo/weight_max" in entry for entry in trainer.state.log_history[:3]), "the state has all of it"


class Terminal(io.StringIO):
    """What both streams of a program write to one terminal."""

    def isatty(self):
        return True


def test_nothing_is_printed_at_the_end_of_a_bar(tmp_path, monkeypatch):
    """Steps, evaluations and samples begin a line of their own, which tqdm clears of its bars."""
    trainer = make_trainer(
        tmp_path, "WPO", rows=preference_rows(12), max_steps=2, logging_steps=1, disable_tqdm=False,
        eval_strategy="steps", eval_steps=1, trainer_options={"eval_dataset": preference_rows(6, seed=1)},
    )  # fmt: skip
    trainer.add_callback(SampleCompletionsCallback(trainer, 1, max_new_tokens=2))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    trainer.train()
    trainer.evaluate()
    text = terminal.getvalue()
    for begin, count in (("step ", 2 + 3), ("eval ", 3)):  # three samples
        assert len(re.findall(rf"(?:^|[\r\n]){begin}\d", text)) == len(re.findall(rf"{begin}\d", text)) == count


@pytest.mark.parametrize("done", [0, 2])
def test_a_log_file_gets_a_line_a_minute_and_no_bar(tmp_path, capsys, monkeypatch, done):
    """Rate and time left are those of the steps that this process trains, after a checkpoint too."""
    options = {"trainer_options": {"eval_dataset": preference_rows(6, seed=1)}}
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    rows = preference_rows(16)
    if done:
        make_trainer(tmp_path, "WPO", rows=rows, **settings, **options).train()
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    trainer = make_trainer(tmp_path, "WPO", rows=rows, disable_tqdm=False, **settings, **options)
    capsys.readouterr()
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2") if done else None)
    written = capsys.readouterr().err.split("\n")
    lines = [line for line in written if "%|" in line and "Writing model shards" not in line]
    assert all(line.startswith("Training:") and "\r" not in line for line in lines)
    assert f" {done}/4 " in lines[0] and " 4/4 " in lines[-1]
    assert len(lines) >= 4 - done and all("steps/s]" in line or "s/ steps]" in line for line in lines)
    assert trainer.pop_callback(ProgressCallback) is not None


def test_the_callbacks_of_transformers_stay_what_they_are(tmp_path):
    trainer = make_trainer(tmp_path, "WPO", rows=preference_rows(4))
    assert trainer.pop_callback(PrinterCallback) is not None and trainer.pop_callback(ProgressCallback) is None


def test_a_notebooks_table_gets_the_figures(tmp_path):
    rows = []
    callback = SimpleNamespace(training_tracker=SimpleNamespace(write_line=rows.append))
    args, state = SimpleNamespace(eval_strategy="no", beta=0.1), SimpleNamespace(global_step=12, max_steps=20)
    assert console._notebook_row(callback, args, state, LOG, None)
    assert rows == [
        {"Step": 12, "Training Loss": 0.61234, "Accuracy": "0.71", "Margin": "+0.132", "Weight": "0.83"}
        | {"Log-ratios": "+0.50 -1.10", "Tokens/s": "12,346"}
    ]
    args.eval_strategy = "steps"  # then the table has a row for each evaluation, of its own figures
    assert not console._notebook_row(callback, args, state, LOG, None)
