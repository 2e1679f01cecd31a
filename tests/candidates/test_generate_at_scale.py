"""Real prompts on two processes: killed once and resumed, the result is that of an undisturbed run."""

import time
from pathlib import Path

import pytest

from prefopt.candidates.records import read_records
from prefopt.files import read_json, read_jsonl
from tests.candidates.folders import save_tiny
from tests.candidates.launching import kill_when, launch

PROJECT = Path(__file__).resolve().parents[2]
PROMPTS = PROJECT.parent / "shared" / "data" / "alpaca_candidates.jsonl.gz"


def start(model, output_dir):
    """Under the flag names of the SPPO scripts, where they have one."""
    flags = {"model": model, "prompts": PROMPTS, "pairs": 3, "maxlen": 12, "output_dir": output_dir}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return launch([PROJECT / "scripts" / "generate.py", *words], processes=2)


def finish(process):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    return output


@pytest.mark.slow
@pytest.mark.skipif(not PROMPTS.exists(), reason="the real prompts are not here")
def test_all_real_prompts_on_two_processes_killed_and_resumed(tmp_path):
    model = save_tiny(tmp_path / "model", max_position_embeddings=8192)
    started = time.monotonic()
    told = finish(start(model, tmp_path / "whole"))
    print(f"603 prompts x 3 answers on 2 processes: {time.monotonic() - started:.0f} s")
    assert "tokens/s" in told and "left" in told

    folder = tmp_path / "killed" / "generate_shards"
    kill_when(start(model, tmp_path / "killed"), lambda: len(list(folder.glob("*.json"))) >= 8, timeout=200)
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    total = len(list((tmp_path / "whole" / "generate_shards").glob("*.json")))
    assert 8 <= len(kept) < total
    assert not (tmp_path / "killed" / "candidates.parquet").exists()
    finish(start(model, tmp_path / "killed"))
    assert all((folder / name).stat().st_mtime_ns == moment for name, moment in kept.items())

    whole = read_records(tmp_path / "whole")
    assert read_records(tmp_path / "killed") == whole
    prompts = read_jsonl(PROMPTS)
    assert [record["prompt"] for record in whole] == [[{"role": "user", "content": row["prompt"]}] for row in prompts]
    assert [record["prompt_id"] for record in whole] == [row["prompt_id"] for row in prompts]
    assert {len(record["candidates"]) for record in whole} == {3}
    counts = read_json(tmp_path / "killed" / "report.json")["counts"]
    assert counts["answers"] == 1809
    assert counts["tokens"] == sum(c["num_tokens"] for record in whole for c in record["candidates"])
