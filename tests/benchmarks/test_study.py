"""The study's own parts: the record, the statistics, the world, exploitability, and the page."""

from __future__ import annotations

import json
import math
import random

import pytest

from benchmarks.study import world
from benchmarks.study.experiments import EXPERIMENTS, cyclic
from benchmarks.study.experiments.base import by_seed, grouped, measured
from benchmarks.study.lab import Lab, Missing, OutOfTime, Scale
from benchmarks.study.page import write_page
from benchmarks.study.results import Results
from benchmarks.study.statistics import (
    NOT_SEEN,
    OPPOSITE,
    SEEN,
    UNDERPOWERED,
    UNTESTED,
    Claim,
    bracket,
    contrast,
    difference,
    score_at,
    shared_kl,
)

# ---- the record


def test_a_finished_unit_is_read_and_not_run_again(tmp_path):
    path = tmp_path / "units.jsonl"
    ran = []

    def work():
        ran.append(1)
        return {"reward": 0.5}

    for _ in range(2):
        assert Lab(Results(path)).unit({"experiment": "x", "seed": 1}, work)["outcome"] == {"reward": 0.5}
    assert len(ran) == 1 and len(path.read_text().splitlines()) == 1
    Lab(Results(path)).unit({"experiment": "x", "seed": 2}, work)  # other settings: another unit
    Lab(Results(path), scale=Scale(prompts=7)).unit({"experiment": "x", "seed": 1}, work)
    assert len(ran) == 3


def test_a_line_that_a_kill_cut_off_is_run_again_and_the_others_stay(tmp_path):
    path = tmp_path / "units.jsonl"
    results = Results(path)
    results.add({"seed": 1}, {"reward": 1.0}, 2.0, 1.5)
    whole = path.read_text()
    path.write_text(whole + '{"settings": {"se')
    again = Results(path)
    assert len(again) == 1 and again.find({"seed": 2}) is None
    again.add({"seed": 2}, {"reward": 2.0}, 2.0, 1.5)
    assert [json.loads(line)["settings"]["seed"] for line in path.read_text().splitlines()] == [1, 2]
    results.read()  # another process sees it
    assert results.find({"seed": 2})["outcome"] == {"reward": 2.0}
    path.write_text("nonsense\n" + whole)
    with pytest.raises(ValueError, match="line 1"):
        Results(path)


def test_a_reader_runs_nothing_and_a_deadline_stops_before_the_next_unit(tmp_path):
    def never():
        raise AssertionError

    with pytest.raises(Missing):
        Lab(Results(tmp_path / "a"), only_read=True).unit({"seed": 1}, never)
    with pytest.raises(OutOfTime):
        Lab(Results(tmp_path / "a"), deadline=0.0).unit({"seed": 1}, never)


# ---- statistics


def claim(values, **more):
    found = difference(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))
    return Claim("", "", found, 0.03, len(values), **more).verdict


@pytest.mark.parametrize(
    ("values", "more", "verdict"),
    [
        ([0.10, 0.11, 0.12], {}, SEEN),
        ([-0.10, -0.11, -0.12], {}, OPPOSITE),
        ([-0.10, -0.11, -0.12], {"sign": -1}, SEEN),
        ([0.10, 0.11, 0.12], {"sign": -1}, OPPOSITE),
        ([0.001, -0.001, 0.002], {}, NOT_SEEN),
        ([0.2, -0.2, 0.1], {}, UNDERPOWERED),
        ([0.001, -0.001, 0.002], {"same": True}, SEEN),
        ([0.10, 0.11, 0.12], {"same": True}, OPPOSITE),
        ([0.2, -0.2, 0.1], {"same": True}, UNDERPOWERED),
        ([0.1], {}, UNTESTED),
        ([0.0, 0.0], {"same": True}, SEEN),
        ([0.1, 0.1], {"same": True}, OPPOSITE),
        ([0.0, 0.0], {}, NOT_SEEN),
        ([0.1, 0.1], {}, UNDERPOWERED),
    ],
)
def test_the_word_for_a_claim(values, more, verdict):
    assert claim(values, **more) == verdict


def test_differences_are_paired_within_seeds():
    found = difference({1: 1.0, 2: 2.0, 3: 3.1}, {1: 0.9, 2: 1.9, 3: 2.9, 4: 50.0})
    assert found.seeds == 3 and found.mean == pytest.approx(0.4 / 3)
    reach = 4.302653 * math.sqrt(1 / 3) * 0.1 / math.sqrt(3)  # t with 2 degrees; sd of 0.1, 0.1, 0.2
    assert (found.low, found.high) == pytest.approx((0.4 / 3 - reach, 0.4 / 3 + reach), abs=1e-6)
    assert contrast({1: 3.0, 2: 1.0}, {1: 1.0, 5: 0.0}) == {1: 2.0}


def test_scores_are_interpolated_in_kl_and_never_extrapolated():
    assert score_at([(2.0, 0.6), (1.0, 0.2)], 1.25) == pytest.approx(0.3)
    assert score_at([(2.0, 0.6), (1.0, 0.2)], 2.5) is None
    assert score_at([(1.0, 0.2)], 1.0) is None
    assert shared_kl([(0.1, 2.0), (0.5, 3.0)]) == 1.25
    with pytest.raises(ValueError, match="no KL"):
        shared_kl([(0.1, 0.4), (0.5, 3.0)])
    assert bracket({0.1: 2.0, 0.3: 1.4, 1.0: 0.8, 3.0: 0.2}, 1.0) == (0.3, 1.0)
    with pytest.raises(ValueError, match="not between"):
        bracket({0.1: 2.0}, 3.0)


# ---- the world


def test_the_rule_counts_things_once_and_no_opening():
    assert world.true_reward("tools 1 2 3", "awl axe pin saw vat") == 1
    assert world.true_reward("tools 1 2 3", "well awl axe pin saw vat") == 1
    assert world.true_reward("tools 1 2 3", "awl awl cow") == pytest.approx(-1 / 5)
    assert world.true_reward("tools 1 2 3", "") == 0


def test_writers_differ_in_what_they_say():
    rng = random.Random(0)
    prompts = [world.draw_prompt(rng) for _ in range(300)]

    def quality(writer):
        return sum(world.true_reward(p, world.draw_answer(p, rng, writer=writer)) for p in prompts) / len(prompts)

    assert quality(world.Writer(on_topic=0.95, remembers=0.95)) > quality(world.Writer(on_topic=0.5)) + 0.2
    opens = world.Writer(opens=True)
    assert all(world.draw_answer(p, rng, writer=opens).split()[0] in world.OPENINGS for p in prompts)


def test_the_flavours_go_in_a_circle():
    assert [world.flavour(text) for text in ("awl cow", "axe", "pin", "well saw", "")] == [0, 1, 2, 0, None]
    assert cyclic.beats(1, 0) == cyclic.beats(2, 1) == cyclic.beats(0, 2) == 0.9
    assert cyclic.beats(0, 1) == 0.1 and cyclic.beats(2, 2) == 0.5 and cyclic.beats(0, None) == 0.9


def test_exploitability_is_that_of_the_best_reply():
    assert cyclic.best_response([1 / 3, 1 / 3, 1 / 3, 0]) == pytest.approx(0)  # the equilibrium
    assert cyclic.best_response([1, 0, 0, 0]) == pytest.approx(0.4)
    # 0.5 * P(k beats 0) + 0.3 * P(k beats 1) + 0.2 * P(k beats 2), at k = 1: 0.45 + 0.15 + 0.02
    assert cyclic.best_response([0.5, 0.3, 0.2, 0]) == pytest.approx(0.12)


def test_prompts_of_test_and_training_are_disjoint(tmp_path):
    lab = Lab(Results(tmp_path / "a"))
    parts = [lab.test_prompts(3), lab.prompts(3, 500), lab.prompts(3, 500, skip=500)]
    assert len({prompt for part in parts for prompt in part}) == sum(map(len, parts))
    assert lab.prompts(4, 10) != lab.prompts(3, 10)
    with pytest.raises(ValueError, match="training prompts"):
        lab.prompts(3, 1, skip=4000)


# ---- the page


def test_rows_of_seed_0_are_no_evidence():
    rows = [
        {"settings": {"stage": stage, "seed": seed, "way": "a"}, "outcome": {"reward": float(seed)}}
        for stage, seed in (("choose", 0), ("measure", 1), ("measure", 2))
    ]
    assert len(measured(rows)) == 2
    assert by_seed(rows, "reward", way="a") == {1: 1.0, 2: 2.0} and not by_seed(rows, "reward", way="b")
    assert len(grouped(rows, "way")["a",]) == 2


def test_the_page_has_the_design_before_results_and_says_what_is_missing(tmp_path, monkeypatch):
    results = Results(tmp_path / "units.jsonl")
    lab = Lab(results, seeds=3)
    experiment = EXPERIMENTS["layouts"]
    rewards = iter([0.5 + 0.0001 * (number % 7) for number in range(1000)])
    unit = Lab.unit

    def fake(self, settings, work):
        return unit(self, settings, lambda: {"reward": next(rewards), "kl": 0.3, "words": 4.0})

    with monkeypatch.context() as patched:
        patched.setattr(Lab, "unit", fake)
        for seed in experiment.planned(lab.seeds):
            experiment.run_seed(lab, experiment.choose(lab), seed)
    write_page(Lab(results), tmp_path / "docs" / "study.md")
    page = (tmp_path / "docs" / "study.md").read_text()
    assert page.index("## Design") < page.index("## Summary") < page.index("## Layouts and precision")
    assert "3 of 6" in page
    assert f"| {SEEN} |" in page
    assert page.count("**Not run yet.**") == len(EXPERIMENTS) - 1
    assert (tmp_path / "docs" / "images" / "study" / "layouts.svg").is_file()
    assert "images/study/layouts.svg" in page
