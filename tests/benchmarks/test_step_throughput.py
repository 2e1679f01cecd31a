"""The benchmark's own parts: lengths, order, figures; and one run of it, small enough for any machine."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict

import matplotlib.pyplot as plt
import pytest

from benchmarks.step_throughput import contenders, draw, main, parse, summarise, table
from benchmarks.steps import Setting, draw_lengths, figures, make_clock, step_order


def test_lengths_have_the_means_that_they_are_named_for():
    lengths = draw_lengths("ultrafeedback", 20_000, max_length=10**6, seed=0)
    means = [statistics.mean(column) for column in zip(*lengths)]
    assert means == pytest.approx([190, 327, 302], rel=0.03)
    assert all(p + max(c, r) <= 512 for p, c, r in draw_lengths("hh", 2000, max_length=512, seed=0))


def test_lengths_come_from_a_file(tmp_path):
    (tmp_path / "lengths.jsonl").write_text("[3, 4, 5]\n[6, 7, 8]\n")
    assert draw_lengths(str(tmp_path / "lengths.jsonl"), 3, max_length=100, seed=0) == [
        (3, 4, 5),
        (6, 7, 8),
        (3, 4, 5),
    ]


def test_both_libraries_see_each_pair_once():
    order = step_order(20, Setting(pairs=4))
    assert sorted(order) == list(range(20))


def run(step_seconds, **more):
    return {
        "setting": asdict(Setting()),
        "step_seconds": step_seconds,
        "step_processor_seconds": step_seconds,
        "step_tokens": [100] * len(step_seconds),
        "flops_per_token": 60,
        "peak_bytes": 2**30,
        "compile_seconds": 0.0,
        **more,
    }


def test_figures_are_medians_over_all_steps_of_all_runs(tmp_path):
    """Steps of 1, 2 and 3 s over two runs: median 2 s, so 8 pairs are 4 pairs/s; 60 * 100 / 2 s = 3,000 FLOP/s."""
    row = summarise(Setting(), [run([1.0, 2.0, 3.0])] * 2, rate=6000.0)
    assert row["pairs_per_second"] == 4.0
    assert row["fraction_of_matrix_rate"] == pytest.approx(0.5)
    assert "| ultrafeedback | prefopt | packed | 8 | 2000 | 2000 | 4.00 |" in table([row])
    draw([row, row | {"lengths": "hh", "pairs_per_second": 19.24}], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    for axis in plt.gcf().axes:
        (number,) = axis.texts
        assert number.get_window_extent().x1 < axis.get_window_extent().x1, "it runs into the frame"


def test_one_slow_step_changes_no_column():
    calm, stalled = figures([run([2.0] * 5)]), figures([run([2.0] * 4 + [500.0])])
    assert stalled == calm


def test_another_checkout_takes_part_in_the_turns():
    settings = contenders(parse(["--against", "/tmp/before/src", "--trl_batch_sizes", "1", "2"]), "hh")
    assert [(s.library, s.source, s.micro_batch) for s in settings] == [
        ("prefopt", None, 8),
        ("prefopt", "/tmp/before/src", 8),
        ("trl", None, 1),
        ("trl", None, 2),
    ]
    row = summarise(settings[1], [run([1.0])], rate=1.0)
    assert row["library"] == "prefopt (before)"


def test_steps_are_timed_once_nothing_compiles(monkeypatch):
    """Compilations until the fourth step: the fifth and sixth compile nothing, and the seventh is timed first."""
    from types import SimpleNamespace

    done = {"steps": 0}
    monkeypatch.setattr("benchmarks.steps.count_compilations", lambda: lambda: min(done["steps"], 4))
    clock = make_clock(Setting(steps=2, warmup=2), now=lambda: 0.0)
    control = SimpleNamespace(should_training_stop=False)
    while not control.should_training_stop:
        clock.on_step_begin(None, None, control)
        done["steps"] += 1
        clock.on_step_end(None, None, control)
    assert (clock.warm, len(clock.times)) == (6, 8)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "wpo", "sppo"])
def test_a_small_run_agrees_with_trl(method, tmp_path):
    """Losses agree to float32 rounding, step by step, and every figure is there; how fast it is, is not asked of a
    shared machine."""
    out = tmp_path / "figures.json"
    options = ["--size", "tiny", "--steps", "2", "--warmup", "1", "--rounds", "1"]
    options += ["--lengths", "hh", "--trl_batch_sizes", "4"]
    rows = main([*options, "--method", method, "--layouts", "packed", "padded", "--json", str(out)])
    assert json.loads(out.read_text()) == rows
    assert [row["library"] for row in rows] == ["prefopt", "prefopt", "trl"]
    for row in rows:
        assert row["largest_loss_difference"] < 1e-5
        assert row["pairs_per_second"] > 0 and row["peak_gib"] > 0
