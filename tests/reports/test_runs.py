"""Reports of training runs: what stands on the page, from runs that ended, were interrupted, or were continued."""

from __future__ import annotations

import re

import pytest

from prefopt.cli import main
from prefopt.files import write_json
from prefopt.intervals import t_interval, wilson_interval
from prefopt.reports.records import log_history, read_run
from prefopt.reports.runs import CURVES, distinct_names, moving_mean, series, window, write_report
from tests.browser import evaluate, screenshot
from tests.reports.runs import HOSTILE, evaluation_entry, log_entry, write_lines, write_run


def pages(folder) -> tuple[str, str]:
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def test_a_run_on_one_page(tmp_path):
    run = write_run(tmp_path / "run")
    assert write_report([run]) == run / "report.md"
    text, html = pages(run)
    assert "**run**: wpo, finished after 60 steps." in text
    assert "| beta | 0.1 | 0.01 |" in text and "the packaged recipe llama3/wpo" in text
    assert "| train | 210 | 200 | 10 | 3 | messages |" in text and "| train | empty data | 10 |" in text
    low, high = wilson_interval(90, 100)
    assert f"| rewards/accuracies | 0.9 [{low:.3f}, {high:.3f}] |" in text, "the rows of the set, by Wilson"
    first, last = (
        [log_entry(step)["loss"] for step in steps] for steps in (range(1, 6), range(56, 61))
    )  # window: a twentieth of 60 is below 5
    ends = [f"{sum(v) / 5:.4g} [{t_interval(v)[0]:.4g}, {t_interval(v)[1]:.4g}]" for v in (first, last)]
    assert f"| loss | {ends[0]} → {ends[1]} |" in text
    assert "| learning_rate | 0.0009857 → 0.0001429 |" in text, "nothing is averaged that has no noise"
    assert "> *policy*, step 0: answer 0" in text and "> *policy*, step 60: answer 60" in text
    assert "> *reference*: first" in text
    assert "NVIDIA H100 80GB HBM3" in text and "| torch | 2.13.0 |" in text and "321.5" in text
    assert "| hardware | run |" in text and "| package | run |" in text
    logged = sum(any(name in log_entry(1) for name in curve.metrics) for curve in CURVES)
    assert html.count("<figure>") == logged + 2, "every curve that was logged, and two of the evaluations"
    assert html.count("<polygon") > 10


def test_evaluations_of_the_trained_model_are_shown(tmp_path):
    """What `prefopt evaluate` leaves in a run's `evaluation` folder; a damaged file is left out."""
    figure = {"value": 0.612, "low": 0.58, "high": 0.643, "interval": "wilson", "count": 900}
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    place = runs[0] / "evaluation" / "a" / f"held out {HOSTILE[:4]}" / "evaluation.json"
    write_json(
        place, {"kind": "pairs", "model": "a", "figures": {"accuracy": figure, "ece": {**figure, "value": None}}}
    )
    (runs[1] / "evaluation" / "cut").mkdir(parents=True)
    (runs[1] / "evaluation" / "cut" / "evaluation.json").write_text('{"figures": {"acc')
    main(["report", *map(str, runs), "--output_dir", str(tmp_path / "both")])
    text, _ = pages(tmp_path / "both")
    assert "| held out &lt;img | accuracy | 0.612 [0.58, 0.643] | – |" in text
    assert "| held out &lt;img | ece | – | – |" in text


def test_nothing_is_fetched_and_nothing_acts(tmp_path):
    run = write_run(tmp_path / "run", name=HOSTILE)
    write_report([run])
    text, html = pages(run)
    assert "<img" not in html and "<script" not in html and "\x1b" not in text + html
    outside = re.sub(r"```.*?```", "", text, flags=re.S)  # in a block of code nothing acts
    assert "<img" not in outside and "https://evil" not in outside and "![" not in outside
    assert not re.search(r"(?:src|href)=(?!\"data:,\")|@import|url\(", html.replace("src=https://evil", ""))
    assert "default-src 'none'" in html


def test_runs_side_by_side(tmp_path, capsys):
    runs = [write_run(tmp_path / name, learning_rate=rate) for name, rate in (("a", 1e-3), ("b", 2e-3))]
    assert main(["report", *map(str, runs), "--output_dir", str(tmp_path / "both")]) == 0
    assert "report: 2 runs -> " in capsys.readouterr().out
    text, html = pages(tmp_path / "both")
    assert text.startswith("# a beside b\n")
    assert "| key | a | b |\n| --- | --- | --- |\n| learning_rate | 0.001 | 0.002 |\n\n" in text
    assert "| metric | a | b |" in text and "| loss | " in text and ">a: chosen</text>" in html
    assert not (runs[0] / "report.md").exists()


def test_an_interrupted_run_and_a_continued_one(tmp_path):
    run = write_run(tmp_path / "run", steps=23, finished=False)
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 24, "loss": 0.')  # killed while it wrote
    write_report([run])
    assert "not finished: its last log is of step 23 of 60." in pages(run)[0]
    lines = [{"step": 0, "max_steps": 60}, *map(log_entry, range(1, 24)), {"step": 20, "max_steps": 60}]
    write_lines(run / "log.jsonl", [*lines, *(log_entry(step, shift=1.0) for step in range(21, 31))])
    steps, losses = series(read_run(run, "run"), "loss")
    assert steps == list(range(1, 31))
    assert losses[19] < 1 and losses[20] == log_entry(21, shift=1.0)["loss"], "steps after 20 were trained again"


def test_a_run_of_another_program_has_its_checkpoint_only(tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-20"
    history = [*map(log_entry, range(1, 21)), evaluation_entry(20)]
    write_json(checkpoint / "trainer_state.json", {"log_history": history, "global_step": 20})
    assert log_history(tmp_path / "run", []) == history
    write_report([tmp_path / "run"])
    assert "not finished: its last log is of step 20." in pages(tmp_path / "run")[0]


def test_a_run_that_has_logged_nothing_yet(tmp_path):
    run = write_run(tmp_path / "run", steps=0, finished=False)
    for name in ("log.jsonl", "samples.jsonl", "run.json"):
        (run / name).unlink()
    write_report([run])
    assert "Nothing has been logged." in pages(run)[0] and "<figure>" not in pages(run)[1]


@pytest.mark.parametrize("damaged", ["run.json", "package_versions.json", "eval_results.json", "recipe.yaml"])
def test_a_damaged_file_costs_its_section_only(tmp_path, damaged):
    run = write_run(tmp_path / "run")
    (run / damaged).write_text("{")
    write_report([run])
    assert "| loss |" in pages(run)[0]


def test_what_is_no_run(tmp_path, capsys):
    write_run(tmp_path / "run")
    (tmp_path / "loop" / "iteration-1").mkdir(parents=True)
    for folders, message in (
        ([tmp_path / "absent"], "holds no training run"),
        ([tmp_path / "run", tmp_path / "loop"], "is a run of `prefopt pipeline`: report it alone"),
        ([], "run_dir is missing"),
    ):
        assert main(["report", *map(str, folders)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_names_tell_folders_apart(tmp_path):
    folders = [tmp_path / "x" / "train", tmp_path / "y" / "train"]
    assert distinct_names(folders) == ["x/train", "y/train"]
    assert distinct_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert len(set(distinct_names([tmp_path, tmp_path]))) == 2


def test_a_moving_mean_and_its_interval():
    """By hand: the middle of 1, 2, 6 has the mean 3 and sd sqrt(7); t_{2} at 97.5 % is 4.3027."""
    means, lows, highs = moving_mean([1.0, 2.0, 6.0], 3)
    assert means == pytest.approx([1.5, 3.0, 4.0])
    assert highs[1] - 3.0 == pytest.approx(4.302653 * 7**0.5 / 3**0.5, rel=1e-5) and lows[1] == pytest.approx(
        6.0 - highs[1]
    )
    assert moving_mean([0.9, 1.0, 1.0], 3, 1.0)[2] == [1.0, 1.0, 1.0], "a share cannot exceed 1"
    assert [window(count) for count in (1, 14, 15, 100, 1000)] == [1, 1, 5, 5, 50]


MEASURE = """(() => {
  const box = e => {
    const r = e.getBoundingClientRect();
    return [r.left, r.top + scrollY, r.right, r.bottom + scrollY];
  };
  const apart = (a, b) => a[2] <= b[0] + .5 || b[2] <= a[0] + .5 || a[3] <= b[1] + .5 || b[3] <= a[1] + .5;
  const clashes = boxes => boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => !apart(a, b)).map(b => [a, b]));
  const figures = [...document.querySelectorAll('figure')];
  return {
    requests: performance.getEntriesByType('resource').map(entry => entry.name),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    blocks: clashes([...document.body.children].map(box).filter(b => b[2] > b[0] && b[3] > b[1])),
    figures: figures.map(figure => ({
      box: box(figure),
      lines: [...figure.querySelectorAll('.line')].map(box),
      texts: clashes([...figure.querySelectorAll('text')].map(box)),
      outside: [...figure.querySelectorAll('text, path, polygon, circle')].map(box).filter(b =>
        b[0] < box(figure)[0] || b[1] < box(figure)[1] || b[2] > box(figure)[2] || b[3] > box(figure)[3]),
    })),
    between: clashes(figures.map(box)),
  } })()"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 500])  # no window of headless Chromium is narrower
def test_the_page_in_a_browser(tmp_path, width):
    """No request, no empty figure, nothing overlapping or cut off, on a screen and on a telephone."""
    from PIL import Image

    runs = [
        write_run(tmp_path / name, steps=steps, finished=False) for name, steps in (("a long name", 60), ("b", 41))
    ]
    page = write_report(runs).with_suffix(".html")
    found = evaluate(page, MEASURE, tmp_path, width=width, height=2000)
    assert found["requests"] == [] and found["overflow"] <= 0
    assert found["blocks"] == [] and found["between"] == []
    assert len(found["figures"]) == 15
    for figure in found["figures"]:
        assert figure["texts"] == [] and figure["outside"] == []
        assert figure["lines"] and all(right - left > 0.3 * width / 3 for left, _, right, _ in figure["lines"])
    screenshot(page, tmp_path / "page.png", width=width, height=int(found["figures"][-1]["box"][3]) + 50)
    picture = Image.open(tmp_path / "page.png").convert("RGB")
    for figure in found["figures"]:
        colours = picture.crop(tuple(map(int, figure["box"]))).getcolors(1 << 24)
        assert sum(count for count, (r, g, b) in colours if max(r, g, b) - min(r, g, b) > 90) > 100, "no line is drawn"


def test_facts_of_a_real_run_say_what_differs(tmp_path):
    """See tests/test_training.py for the page that a command leaves at its end."""
    from prefopt.cli import arguments_of
    from prefopt.recipes.recipe import read_recipe
    from prefopt.run import resolved_recipe
    from prefopt.training import differences

    classes = arguments_of("wpo")
    recipe = read_recipe(["llama3/wpo", "--learning_rate", "2e-7", "--output_dir", "out", "--seed", "3"], classes)
    found = differences(recipe, classes, resolved_recipe(recipe, classes))
    assert found["baseline"] == "llama3/wpo"
    assert found["differences"].keys() == {"learning_rate", "seed"} and found["differences"]["seed"][1] == 3
    own = read_recipe(["--model_name_or_path", "m", "--dataset_name", "d", "--beta", "0.2"], classes)
    found = differences(own, classes, resolved_recipe(own, classes))
    assert found["baseline"] is None and found["differences"]["beta"] == [0.01, 0.2]
    assert found["differences"].keys() == {"model_name_or_path", "dataset_name", "beta"}
