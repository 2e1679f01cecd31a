"""The benchmark for a card: its dry run, what a group that dies costs, and the tables and figure of its findings."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from benchmarks import gpu
from benchmarks.on_gpu import findings
from benchmarks.steps import Setting


def step(library="prefopt", seconds=1.0, *, ok=True, **more) -> dict:
    """A finding of one setting whose steps all took as long."""
    setting = asdict(Setting(library=library, size="8b", device="cuda", dtype="bfloat16", **more))
    common = {"part": "b", "group": "steps", "check": library, "dry_run": False, "ok": ok, "setting": setting}
    if not ok:
        return common | {"error": "OutOfMemoryError: CUDA out of memory"}
    return common | {
        "step_seconds": [seconds] * 3,
        "step_processor_seconds": [seconds] * 3,
        "step_tokens": [6000] * 3,
        "flops_per_token": 1e10,
        "peak_bytes": 2**36,
        "compile_seconds": 0.0,
        "update_remedy": "none",
        "start_to_first_step": 41.0,
        "losses": [0.7],
    }


DEVICE = {
    "part": "a",
    "group": "kernels",
    "check": "device",
    "ok": True,
    "dry_run": False,
    "name": "H200",
    "matrix_flops": 7e14,
    "seconds": 1.0,
}


def test_a_smaller_card_extrapolates_to_all_layers():
    """t32 = t16 + 2 (t16 - t8): 0.9 s and 0.5 s make 1.7 s, TRL's 2.7 and 1.5 make 5.1."""
    found = [DEVICE]
    for library, times in (("prefopt", (0.5, 0.9)), ("trl", (1.5, 2.7))):
        found += [step(library, seconds, layers=layers) for layers, seconds in zip((8, 16), times)]
    rows = {row["library"]: row for row in findings.steps_of(found) if row["shape"] == "8b, extrapolated"}
    assert rows["prefopt"]["step_ms"] == pytest.approx(1700)
    assert rows["prefopt"]["pairs_per_second"] == pytest.approx(8 / 1.7)
    assert rows["trl"]["step_ms"] == pytest.approx(5100)
    assert rows["prefopt"]["speedup_over_best_trl"] == pytest.approx(3.0)


def test_a_step_is_compared_with_the_best_of_trls_with_the_same_lengths_and_precision():
    found = [
        DEVICE,
        step(seconds=1.0),
        step(seconds=1.0, precision="recipes"),
        step("trl", 4.0, micro_batch=2),
        step("trl", 3.0, micro_batch=4),
        step("trl", ok=False),
        step("trl", 2.0, lengths="hh"),
    ]
    ours, recipes, *others = findings.steps_of(found)
    assert ours["speedup_over_best_trl"] == 3.0
    assert "speedup_over_best_trl" not in recipes  # TRL was not measured in this precision
    assert ours["fraction_of_matrix_rate"] == pytest.approx(6000 * 1e10 / 7e14)
    assert [row.get("error", "") for row in others][2].startswith("OutOfMemory")


def test_tables_and_figure_come_from_the_findings_alone(tmp_path, capsys):
    profile = {**DEVICE, "part": "b", "check": "profile", "milliseconds_by_kind": {"attention": 5.0, "optimizer": 9.0}}
    memory = {**DEVICE, "part": "b", "check": "memory", "peak_gib": 75.5}
    memory |= {"estimated_gib": {"weights": 15.0}, "estimated_sum_gib": 80.25}
    wrong = {**DEVICE, "check": "attention", "ok": False, "error": "RuntimeError: no kernel"}
    skipped = {**DEVICE, "check": "QLoRA", "skipped": "bitsandbytes is not installed"}
    lines = [DEVICE, wrong, skipped, step(seconds=0.8), step("trl", 2.4), profile, memory]
    (tmp_path / findings.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert gpu.main(["--table", str(tmp_path), "--plot", str(tmp_path / "steps.png")]) == 0
    text = capsys.readouterr().out
    for cell in (
        "**wrong**: RuntimeError: no kernel",
        "skipped: bitsandbytes is not installed",
        "| H200 | 8b | ultrafeedback | prefopt | 8 |",
        "| optimizer | 9.0 |\n| attention | 5.0 |",
        "| memory | 75.50 | 80.25 | 15.00 |",
    ):
        assert cell in text
    assert "dry run" not in text
    assert (tmp_path / "steps.png").stat().st_size > 1000


def test_a_group_that_hangs_costs_its_own_time_only(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu.GROUPS, "b", {"attention_speed": 0.5, "step_trl": 0.0})
    monkeypatch.setattr(gpu, "LEAST", 0.4)
    assert gpu.main(["b", "--dry_run", "--out", str(tmp_path)]) == 0
    hung, left_out = findings.read([tmp_path])
    assert (hung["group"], hung["ok"]) == ("attention_speed", False)
    assert hung["error"].startswith("stopped after")
    assert left_out["error"].startswith("left out")


def test_an_error_in_a_check_is_its_finding(tmp_path):
    written = findings.Findings(tmp_path, "a", "kernels", dry_run=False)
    with written.finding("first") as values:
        values["figure"] = 3
        raise RuntimeError("no kernel image")
    with written.finding("second"):
        pass
    first, second = findings.read([tmp_path])
    assert (first["ok"], first["figure"], first["error"]) == (False, 3, "RuntimeError: no kernel image")
    assert second["ok"]


def test_parts_keep_to_their_time():
    """A card is lent for a quarter of an hour: 300 s for what must be right, 330 s for what must be fast."""
    assert sum(gpu.GROUPS["a"].values()) <= 300
    assert sum(gpu.GROUPS["b"].values()) <= 330


@pytest.mark.slow
def test_every_group_runs_on_a_cpu(tmp_path):
    """All checks of both parts, with tiny shapes; the limits of the groups are those of a card, stretched here."""
    groups = {part: dict.fromkeys(names, 600) for part, names in gpu.GROUPS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "GROUPS", groups)
        assert gpu.main(["--dry_run", "--out", str(tmp_path)]) == 0
    found = findings.read([tmp_path])
    assert [f"{each['check']}: {each.get('error')}" for each in found if not each["ok"]] == []
    assert {each["check"] for each in found if "skipped" in each} <= {"fused layers", "QLoRA"}
    assert {each["group"] for each in found if each["check"] == "group"} == {
        n for names in groups.values() for n in names
    }
    rows = findings.steps_of(found)
    assert {row["library"] for row in rows} == {"prefopt", "trl"}
    assert all("speedup_over_best_trl" in row for row in rows)
    first = [row["losses"][0] for row in rows if row["lengths"] == "ultrafeedback" and row["precision"] == "plain"]
    assert first == pytest.approx([first[0]] * len(first), abs=2e-3)  # the same weights, pairs and order
    assert "A dry run on a CPU" in findings.tables(found)
