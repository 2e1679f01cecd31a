"""Children that share the shards of one run."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from prefopt.candidates import workers
from prefopt.candidates.shards import ShardFailed, ShardPlan

# each child starts an interpreter of its own, which takes seconds
pytestmark = pytest.mark.slow
ITEMS = [{"prompt_id": f"p{i}"} for i in range(6)]


def make_plan(folder):
    return ShardPlan(ITEMS, tool="test", settings={}, output_dir=folder, shard_size=1)


def work(folder, indices):
    """Top-level, as children need it. The file `mode` says what the second child does."""
    mode = (Path(folder) / "mode").read_text()
    if 1 in indices and mode == "dies":
        os._exit(7)
    if mode == "leaves a process behind":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", folder])

    def rows(shard):
        if shard.index == 1 and mode == "fails":
            raise RuntimeError("no more luck")
        print("visible:", os.environ.get(workers.VISIBLE), flush=True)
        return [{"prompt_id": item["prompt_id"], "pid": os.getpid()} for item in shard.items]

    make_plan(folder).work(indices, rows)


def run(folder, mode, **settings):
    (folder / "mode").write_text(mode)
    plan = make_plan(folder)
    workers.work_in_children(plan, work, str(folder), **{"workers": 2, "devices_each": 1, **settings})
    return plan


def left_behind(folder):
    return [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[-1:] == [str(folder)]]


def test_children_share_shards_and_devices_and_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv(workers.VISIBLE, "3,5,6,7")
    plan = run(tmp_path, "leaves a process behind", devices_each=2)
    rows = list(plan.rows())
    assert [row["prompt_id"] for row in rows] == [f"p{i}" for i in range(6)]
    assert len({row["pid"] for row in rows}) == 2
    outputs = [(tmp_path / "test_shards" / f"worker_{n}.out").read_text() for n in (0, 1)]
    assert ["visible: 3,5" in outputs[0], "visible: 6,7" in outputs[1]] == [True, True]
    assert os.environ[workers.VISIBLE] == "3,5,6,7"
    deadline = time.monotonic() + 20
    while left_behind(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)  # killed, and not yet gone
    assert left_behind(tmp_path) == []
    with pytest.raises(ValueError, match="asks for 6 accelerators, but there are 4"):
        run(tmp_path, "x", workers=3, devices_each=2)


def test_a_shard_that_fails_in_a_child_fails_the_run(tmp_path):
    with pytest.raises(ShardFailed, match=r"shard 1 of 6 failed \(RuntimeError: no more luck\)"):
        run(tmp_path, "fails")
    assert "Traceback" in (tmp_path / "test_shards" / "00001.log").read_text()
    assert len(list(run(tmp_path, "ok").rows())) == 6


def test_a_child_that_dies_fails_the_run(tmp_path):
    with pytest.raises(ShardFailed, match=r"a worker ended with status 7; its output is .*worker_1\.out"):
        run(tmp_path, "dies")
