"""Shards: resuming, refusing foreign work, failing with a log, sharing among processes."""

import io
import json
import textwrap

import pytest

from prefopt.candidates.shards import Processes, Progress, ShardFailed, ShardPlan, duration, run_shards, shard_seed
from prefopt.files import locked, read_json
from tests.candidates.launching import kill_when, launch

ITEMS = [{"prompt_id": f"p{i}", "prompt": f"question {i} 你好"} for i in range(7)]


class Worker:
    """Doubles nothing, remembers which shards it was asked for."""

    def __init__(self, fail_at=None):
        self.seen, self.fail_at = [], fail_at

    def __call__(self, shard):
        self.seen.append(shard.index)
        if shard.index == self.fail_at:
            raise RuntimeError("out of luck")
        shard.count("tokens", 10 * len(shard.items))
        return [{"prompt_id": item["prompt_id"], "seed": shard.seed} for item in shard.items]


def run(folder, work, **changes):
    kwargs = {"tool": "generate", "settings": {"temperature": 0.7}, "output_dir": folder, "shard_size": 2, "seed": 3}
    return run_shards(**{"items": ITEMS, "work_fn": work, **kwargs, **changes}, processes=Processes())


def test_rows_come_in_input_order_with_a_seed_for_each_shard(tmp_path):
    plan = run(tmp_path, Worker())
    rows = list(plan.rows())
    assert [row["prompt_id"] for row in rows] == [item["prompt_id"] for item in ITEMS]
    assert [row["seed"] for row in rows] == [shard_seed(3, i // 2) for i in range(7)]
    assert len({row["seed"] for row in rows}) == 4
    assert plan.counts()["tokens"] == 70
    assert shard_seed(3, 0) != shard_seed(4, 0) and 0 <= shard_seed(3, 0) < 2**31


def test_finished_shards_are_not_made_again(tmp_path):
    first = list(run(tmp_path, Worker()).rows())
    second = Worker()
    assert list(run(tmp_path, second).rows()) == first
    assert second.seen == []


def test_a_failed_shard_fails_the_run_and_the_next_run_continues(tmp_path):
    worker = Worker(fail_at=2)
    with pytest.raises(ShardFailed, match=r"shard 2 of 4 failed \(RuntimeError: out of luck\)") as caught:
        run(tmp_path, worker)
    log = tmp_path / "generate_shards" / "00002.log"
    assert str(log) in str(caught.value)
    assert "out of luck" in log.read_text() and "Traceback" in log.read_text()
    assert worker.seen == [0, 1, 2]  # it does not go on after a failure
    again = Worker()
    plan = run(tmp_path, again)
    assert again.seen == [2, 3]
    assert not log.exists()
    assert len(list(plan.rows())) == 7


def test_half_written_shards_are_made_again(tmp_path):
    run(tmp_path, Worker())
    folder = tmp_path / "generate_shards"
    (folder / "00000.json").unlink()  # killed between data and manifest
    data = folder / "00001.jsonl"
    data.write_text(data.read_text()[:-9])  # cut off
    (folder / "00002.json").write_text('{"tool": "gen')  # a manifest cut off
    (folder / "00003.jsonl").unlink()
    (folder / ".00003.jsonl.abc.partial").write_text("{")
    worker = Worker()
    plan = run(tmp_path, worker)
    assert worker.seen == [0, 1, 2, 3]
    assert [row["prompt_id"] for row in plan.rows()] == [item["prompt_id"] for item in ITEMS]
    assert not list(folder.glob(".*.partial"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"settings": {"temperature": 1.0}}, r"temperature was 0\.7 and is 1\.0"),
        ({"settings": {"temperature": 0.7, "model_revision": "b"}}, r"model_revision was None and is 'b'"),
        ({"seed": 4}, "seed was 3 and is 4"),
        ({"shard_size": 3}, "this run has 3 shards|shard_size was 2 and is 3"),
        ({"items": [*ITEMS[:1], {"prompt_id": "q", "prompt": "other"}, *ITEMS[2:]]}, "row 'p1' there, 'q' now"),
        ({"items": [{**ITEMS[0], "prompt": "changed"}, *ITEMS[1:]]}, "same ids, other content"),
        ({"items": ITEMS[:6]}, "this run has 3 shards"),
        ({"items": [*ITEMS, {"prompt_id": "p7", "prompt": "one more"}]}, "1 rows there, 2 now"),
    ],
)
def test_other_work_is_refused_untouched(tmp_path, changes, reason):
    run(tmp_path, Worker())
    folder = tmp_path / "generate_shards"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    worker = Worker()
    with pytest.raises(ValueError, match=reason) as caught:
        run(tmp_path, worker, **changes)
    assert str(folder) in str(caught.value) and "another output_dir" in str(caught.value)
    assert worker.seen == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("content", ['{"epoch": 3}', "[1, 2]", '{"tool": "rank", "settings": {}}'])
def test_a_foreign_manifest_is_refused(tmp_path, content):
    folder = tmp_path / "generate_shards"
    folder.mkdir()
    (folder / "00001.json").write_text(content)
    with pytest.raises(ValueError, match="not a manifest of `prefopt generate`"):
        run(tmp_path, Worker())
    assert (folder / "00001.json").read_text() == content


@pytest.mark.parametrize(
    "damage",
    [
        {"settings": None},
        {"settings": ["x"]},
        {"counts": None},
        {"counts": [1]},
        {"counts": {"tokens": "many"}},
        {"row_ids": 3},
        {"seconds": "long"},
        {"seconds": None},
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, damage):
    run(tmp_path, Worker())
    path = sorted((tmp_path / "generate_shards").glob("*.json"))[1]
    path.write_text(json.dumps({**read_json(path), **damage}))
    with pytest.raises(ValueError, match=rf"{path.name}: damaged, as its `{next(iter(damage))}` is"):
        run(tmp_path, Worker())
    path.unlink()
    run(tmp_path, Worker())


def test_notes_do_not_bind(tmp_path):
    run(tmp_path, Worker(), notes={"batch_size": 8})
    worker = Worker()
    run(tmp_path, worker, notes={"batch_size": 16})
    assert worker.seen == []
    assert read_json(tmp_path / "generate_shards" / "00000.json")["notes"] == {"batch_size": 8}


def test_a_second_command_is_kept_out(tmp_path):
    plan = ShardPlan(ITEMS, tool="generate", settings={}, output_dir=tmp_path, shard_size=2)
    with locked(plan.folder), pytest.raises(ValueError, match="another command is at work"):
        run(tmp_path, Worker())
    run(tmp_path, Worker())


def test_work_that_loses_rows_fails(tmp_path):
    with pytest.raises(ShardFailed, match="1 rows out of 2"):
        run(tmp_path, lambda shard: [{}])


def test_no_rows_and_bad_shard_size(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        run(tmp_path, Worker(), items=[])
    with pytest.raises(ValueError, match="shard_size is 0"):
        run(tmp_path, Worker(), shard_size=0)
    assert not list(tmp_path.iterdir())


def test_progress_tells_speed_and_time_left():
    now, done = [0.0], [(10, 1000)]
    stream = io.StringIO()
    progress = Progress("generate", 100, lambda: done[0], world=2, every=10, stream=stream, clock=lambda: now[0])
    now[0] = 5.0
    progress.advance(rows=1, tokens=100)
    assert stream.getvalue() == ""  # too soon
    now[0] = 10.0
    progress.advance(rows=4, tokens=400)  # this process 5 rows and 500 tokens, its peer as much
    assert stream.getvalue() == "generate: 20 of 100 rows (20%), 100 tokens/s, 1 min left\n"
    done[0] = (30, 3000)
    progress.start_shard()
    now[0] = 20.0
    assert progress.line() == "generate: 30 of 100 rows (30%), 100 tokens/s, 1 min left"
    assert [duration(s) for s in (4, 60, 3599, 12000)] == ["4 s", "1 min", "1 h 0 min", "3 h 20 min"]


SCRIPT = """
    import json, os, sys, time
    from prefopt.candidates.shards import run_shards
    folder, fail, hold = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    rank = int(os.environ.get("RANK", 0))
    def work(shard):
        if shard.index == fail:
            raise RuntimeError("broken shard")
        time.sleep(600 if shard.index >= hold else 0.2)
        return [{"prompt_id": i["prompt_id"], "rank": rank, "seed": shard.seed} for i in shard.items]
    items = [{"prompt_id": f"p{i}"} for i in range(30)]
    plan = run_shards(items, work, tool="test", settings={}, output_dir=folder, shard_size=3, seed=1)
    if rank == 0:
        print("ROWS", json.dumps(list(plan.rows())))
"""


def start(tmp_path, folder, fail=-1, hold=99, processes=2):
    """`fail`: the shard whose work raises; `hold`: the first shard whose work does not end."""
    script = tmp_path / "work.py"
    script.write_text(textwrap.dedent(SCRIPT))
    return launch([script, folder, fail, hold], processes=processes)


def rows_of(output):
    return json.loads(next(line for line in output.splitlines() if line.startswith("ROWS"))[5:])


@pytest.mark.slow
def test_two_processes_share_the_shards_are_killed_and_continue(tmp_path):
    whole = start(tmp_path, tmp_path / "whole")
    rows = rows_of(whole.communicate(timeout=120)[0])
    assert {row["rank"] for row in rows} == {0, 1}
    assert [row["prompt_id"] for row in rows] == [f"p{i}" for i in range(30)]

    killed = start(tmp_path, tmp_path / "killed", hold=4)
    folder = tmp_path / "killed" / "test_shards"
    kill_when(killed, lambda: len(list(folder.glob("*.json"))) == 4)
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert len(kept) == 4
    resumed = start(tmp_path, tmp_path / "killed", processes=1)
    again = rows_of(resumed.communicate(timeout=120)[0])
    assert [(r["prompt_id"], r["seed"]) for r in again] == [(r["prompt_id"], r["seed"]) for r in rows]
    assert all((folder / name).stat().st_mtime_ns == time_ns for name, time_ns in kept.items())

    broken = start(tmp_path, tmp_path / "broken", fail=5)
    output = broken.communicate(timeout=120)[0]
    assert broken.returncode != 0
    assert "shard 5 of 10 failed (RuntimeError: broken shard)" in output and "ROWS" not in output
    assert "broken shard" in (tmp_path / "broken" / "test_shards" / "00005.log").read_text()
