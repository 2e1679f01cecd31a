"""A study's page from runs that are made up: which runs are compared, what is missing, what is refused."""

import csv

import pytest

from prefopt.cli import main
from prefopt.evaluation.study import (
    HEALTH_FILE,
    PICTURE,
    ROWS_FILE,
    STUDY_FILE,
    TABLE_FILE,
    VERDICT_FILE,
    conclude,
    read_study,
    report_study,
)
from prefopt.files import read_json, write_json

# validation and test accuracy of each seed; b is best on test but never on validation
RUNS = {
    "single=own": ("own", [(0.60, 0.60), (0.58, 0.60), (0.60, 0.62)]),
    "single=b": ("b", [(0.50, 0.90), (0.59, 0.61), (0.50, 0.90)]),
    "geometric": (None, [(0.70, 0.65), (0.70, 0.67), (0.70, 0.66)]),
    "harmonic": (None, [(0.40, 0.50), (0.40, 0.52), (0.40, 0.51)]),
}


def card(name, **changes):
    return {
        "name": name,
        "rows": 100,
        "accuracy": 0.6,
        "accuracy_low": 0.5,
        "accuracy_high": 0.7,
        "ties": 0.0,
        "confidence_mean": 0.3,
        "confidence_median": 0.2,
        "confidence_p99": 1.0,
        "nats_per_token": 2.0,
        "nats_per_byte": 1.0,
        "not_prefix": 0,
        "batched_vs_single": 1e-7,
        "remarks": [],
        "quarantine": "",
        **changes,
    }


def write_study(folder, runs=RUNS, seeds=(0, 1, 2)):
    for name, (_, results) in runs.items():
        for seed, (validation, test) in zip(seeds, results):
            place = folder / "runs" / name / f"seed-{seed}"
            metrics = {
                "eval_validation_accuracies/reference_free": validation,
                "eval_test_accuracies/reference_free": test,
            }
            write_json(
                place / "eval_results.json",
                {**metrics, "eval_test_accuracies/own_init": 0.7, "eval_test_logps/chosen": -250.0},
            )
            names = ("spread", "effective_number", "harmonic_dominance")
            write_json(place / "trainer_state.json", {"log_history": [{f"references/{n}": 1.5 for n in names}]})
    told = [
        {"name": name, "kind": "x", "reference": reference, "settings": {}} for name, (reference, _) in runs.items()
    ]
    write_json(
        folder / STUDY_FILE,
        {"policy": "own", "anchor": "own", "references": ["own", "b"], "seeds": list(seeds), "runs": told},
    )
    write_json(folder / HEALTH_FILE, [card("own"), card("b"), card("bad", quarantine="9 nats per byte")])
    return folder


def test_the_verdict_is_about_runs_that_validation_chooses(tmp_path):
    """Geometric wins on validation. Singles: own, b, own with 0.60, 0.61, 0.62 on test; differences 0.05, 0.06,
    0.04."""
    verdict = conclude(read_study(write_study(tmp_path)))
    assert verdict.chosen == {
        "multi": dict.fromkeys(range(3), "geometric"),
        "single": {0: "single=own", 1: "single=b", 2: "single=own"},
    }
    assert verdict.minus_single.mean == pytest.approx(0.05) and verdict.minus_single.verdict == "helps"
    assert verdict.minus_own.mean == pytest.approx((0.05 + 0.07 + 0.04) / 3)
    assert verdict.per_run["harmonic"][0].mean == pytest.approx(-0.10)
    assert verdict.per_run["harmonic"][0].verdict == "hurts"
    assert verdict.lines[0].startswith("multi-reference minus best single: +0.0500") and verdict.lines[0].endswith(
        ": helps"
    )
    assert verdict.lines[1].endswith(": helps")


def test_where_several_do_not_help_a_single_one_is_recommended(tmp_path):
    runs = {name: value for name, value in RUNS.items() if name != "geometric"}
    verdict = conclude(read_study(write_study(tmp_path, runs)))
    assert verdict.lines[0].endswith(": hurts")
    assert "a single reference, single=own" in verdict.lines[2]


def test_the_page_the_table_and_the_numbers(tmp_path, capsys):
    assert main(["evaluate", "--study", str(write_study(tmp_path))]) == 0
    told = capsys.readouterr().out
    page = (tmp_path / TABLE_FILE).read_text()
    for text in (told, page):
        assert "QUARANTINED bad: 9 nats per byte." in text
        assert "| geometric | 3/3 | 0.6600 | 0.7000 | 0.7000 | -250 | +0.0500" in text
        assert "minus own initialisation" in text
    rows = list(csv.DictReader((tmp_path / ROWS_FILE).open()))
    assert len(rows) == 12 and rows[0]["run"] == "single=own" and float(rows[0]["test_accuracy"]) == 0.60
    numbers = read_json(tmp_path / VERDICT_FILE)
    assert numbers["runs"]["harmonic"]["minus_best_single"]["verdict"] == "hurts"
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG") and PICTURE in page


def test_runs_that_are_not_done_are_named_and_left_out(tmp_path):
    runs = {**RUNS, "harmonic": (None, []), "single=b": ("b", RUNS["single=b"][1][:1])}
    study = read_study(write_study(tmp_path, runs))
    verdict = report_study(tmp_path, plots=False)
    assert [run.name for run in study.multi] == ["geometric"]
    assert verdict.minus_single.seeds == 1 and verdict.minus_single.verdict == "no evidence"
    assert "Not done, or failed: harmonic." in (tmp_path / TABLE_FILE).read_text()
    assert read_json(tmp_path / VERDICT_FILE)["minus_best_single"]["low"] is None


def test_what_is_no_study_is_refused_in_one_line(tmp_path, capsys):
    assert main(["evaluate", "--study", str(tmp_path)]) == 2
    assert "is no study" in capsys.readouterr().err
    write_study(tmp_path, {name: (reference, []) for name, (reference, _) in RUNS.items()})
    assert main(["evaluate", "--study", str(tmp_path)]) == 2
    assert "no run of this study is done" in capsys.readouterr().err
    assert main(["evaluate", "--study", str(tmp_path), "--answers", "x"]) == 2
    assert "by itself" in capsys.readouterr().err


def test_a_study_shows_names_literally(tmp_path):
    """Names of runs come from recipes: no tag, image or cell of theirs acts on the page."""
    hostile = "<img src=x>![y](z)|"
    report_study(write_study(tmp_path, {**RUNS, hostile: RUNS["geometric"]}), plots=False)
    page = (tmp_path / TABLE_FILE).read_text()
    assert "<img" not in page and "![" not in page and r"&lt;img src=x&gt;!\[y\](z)\|" in page
