"""What a step prints: on a terminal and in a notebook one aligned line of the few figures that matter.

In a log file, where a bar cannot be redrawn, progress is a line a minute. The whole log goes to trackers, to the
trainer's state and, where the output is no terminal, to the output as before.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from prefopt._transformers import HookedTrainer, progress_callbacks
from prefopt.progress import can_redraw, make_bar, print_above_bars


def few_figures(logs: Mapping[str, Any], args: Any) -> dict[str, str]:
    """Return the figures of a log that matter, formatted, by a short name; only those that the log has."""
    found: dict[str, str] = {}

    def add(name: str, pattern: str, *keys: str) -> None:
        values = [logs[key] for key in keys if isinstance(logs.get(key), (int, float))]
        if len(values) == len(keys):
            found[name] = pattern.format(*values)

    add("loss", "{:.4f}", "loss")
    add("accuracy", "{:.2f}", "accuracy")
    add("accuracy", "{:.2f}", "rewards/accuracies")
    add("margin", "{:+.3f}", "margin")
    add("margin", "{:+.3f}", "rewards/margins")
    add("weight", "{:.2f}", "wpo/weight_mean")
    add("win prob", "{:.2f}", "win_prob/chosen")
    if "logratios/chosen" in logs:
        add("log-ratios", "{:+.2f} {:+.2f}", "logratios/chosen", "logratios/rejected")
    elif (beta := getattr(args, "beta", None)) and "rewards/chosen" in logs:
        found["log-ratios"] = "{:+.2f} {:+.2f}".format(*(logs[f"rewards/{s}"] / beta for s in ("chosen", "rejected")))
    add("tokens/s", "{:,.0f}", "perf/tokens_per_second")
    return found


def step_line(logs: Mapping[str, Any], args: Any, state: Any, *, seconds_left: float | None) -> str | None:
    """Write a training step's log, or an evaluation's, as one aligned line; None for a log of another kind."""
    if "loss" in logs:
        figures, kind = few_figures(logs, args), "step"
        left = [] if seconds_left is None else [f"{duration(seconds_left)} left"]
    elif "eval_loss" in logs:
        figures = few_figures({key.removeprefix("eval_"): value for key, value in logs.items()}, args)
        left, kind = [], "eval"
    else:
        return None
    head = f"{kind} {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
    return "  ".join([head, *(f"{name} {value:>{_WIDTHS.get(name, 7)}}" for name, value in figures.items()), *left])


_WIDTHS = {"loss": 7, "accuracy": 4, "margin": 7, "weight": 4, "win prob": 4, "log-ratios": 13, "tokens/s": 7}


def duration(seconds: float) -> str:
    """Write a time as its two largest units."""
    whole = round(seconds)
    units = [(whole // 86400, "d"), (whole % 86400 // 3600, "h"), (whole % 3600 // 60, "min"), (whole % 60, "s")]
    first = next((place for place, (count, _) in enumerate(units) if count), len(units) - 1)
    return " ".join(f"{count} {unit}" for count, unit in units[first : first + 2])


def print_few_figures(trainer: HookedTrainer) -> None:
    """Have transformers' own progress callbacks print lines of few figures, on a terminal and in a notebook.

    Their `on_log` is replaced, not the callbacks: `trainer.remove_callback(PrinterCallback)` goes on finding them.
    """
    for found, kind in progress_callbacks(trainer):
        callback = found
        if type(found) is ProgressCallback and not can_redraw():
            trainer.remove_callback(found)
            callback = ProgressLines()
            trainer.add_callback(callback)
        whole = callback.on_log
        new: Any = _Clock(callback, whole, _notebook_row if kind == "notebook" else _terminal_line)
        callback.on_log = new  # type: ignore[method-assign]


class ProgressLines(ProgressCallback):
    """Progress in a log file: a line a minute with rate and time left, and none for evaluations."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin at the step from which the run goes on."""
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = make_bar(state.max_steps, "Training", unit="steps", done=state.global_step)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Draw nothing."""


class _Clock:
    """An `on_log` that knows when the run has begun, to say how long it will take."""

    def __init__(self, callback: TrainerCallback, whole: Callable[..., None], write: Callable[..., bool]) -> None:
        self.callback, self.whole, self.write = callback, whole, write
        self.first: tuple[int, float] | None = None

    def __call__(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        now, step = time.monotonic(), state.global_step
        if self.first is None or step < self.first[0]:
            self.first = (step, now)
        done, taken = step - self.first[0], now - self.first[1]
        seconds_left = (state.max_steps - step) * taken / done if done else None
        if not state.is_world_process_zero or not self.write(self.callback, args, state, logs or {}, seconds_left):
            self.whole(args, state, control, logs=logs, **kwargs)


def _terminal_line(callback: Any, args: Any, state: Any, logs: dict[str, Any], seconds_left: float | None) -> bool:
    """Print the line; return whether the log has been dealt with."""
    if not sys.stdout.isatty():
        return False
    line = step_line(logs, args, state, seconds_left=seconds_left)
    if line is None:
        return False
    print_above_bars(line)
    return True


def _notebook_row(callback: Any, args: Any, state: Any, logs: dict[str, Any], seconds_left: float | None) -> bool:
    """Add a row to the notebook's table of steps; evaluations have rows of their own there."""
    if args.eval_strategy != "no" or "loss" not in logs or callback.training_tracker is None:
        return False
    figures = few_figures(logs, args)
    figures.pop("loss")
    row = {"Step": state.global_step, "Training Loss": logs["loss"]}
    callback.training_tracker.write_line(row | {name.capitalize(): value for name, value in figures.items()})
    return True
