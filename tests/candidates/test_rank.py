import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from prefopt.arguments import names_without_effect
from prefopt.candidates.pairs import score_differences
from prefopt.candidates.rank import FLAG_ALIASES, RankArguments, run
from prefopt.candidates.records import make_candidate, make_record, read_records, write_records
from tests.candidates.ranking import judge_server, records, save_reward_model
from tests.models.test_pair_ranker import save_published, tiny_ranker

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data" / "alpaca_candidates.jsonl.gz"

LENGTHS = """
import os
from pathlib import Path

def score(prompt, candidates):
    seen = Path({folder!r}) / "seen"
    with open(seen, "a") as file:
        file.write(prompt + "\\n")
    if os.environ.get("STUMBLE") and prompt.endswith("(4)"):
        raise RuntimeError("stumbled")
    return [len(text) + 0.25 for text in candidates]
"""


@pytest.fixture
def candidates(tmp_path):
    write_records(tmp_path / "in" / "candidates.parquet", records())
    return tmp_path / "in"


@pytest.fixture
def lengths(tmp_path):
    (tmp_path / "lengths.py").write_text(LENGTHS.format(folder=str(tmp_path)))
    return f"{tmp_path}/lengths.py:score"


def arguments(candidates, output, ranker, model, **more):
    return RankArguments(str(candidates), str(output), ranker, str(model), **{"shard_size": 2, **more})


def test_scores_are_added_and_everything_else_stays(candidates, lengths, tmp_path):
    path = run(arguments(candidates, tmp_path / "out", "function", lengths))
    before, after = read_records(candidates), read_records(path.parent)
    assert path == tmp_path / "out" / "candidates.parquet" and len(after) == 6
    for old, new in zip(before, after):
        for one, other in zip(old["candidates"], new["candidates"]):
            assert other["scores"] == {"score": len(one["text"]) + 0.25}
            assert {**other, "scores": {}} == one
        assert new["prompt"] == old["prompt"] and new["tables"] == {}
    with pytest.raises(ValueError, match=r"candidates\.parquet is there already"):
        run(arguments(candidates, tmp_path / "out", "function", lengths, output_format="jsonl"))
    report = json.loads((path.parent / "report.json").read_text())
    assert report["counts"] == {"prompts": 6, "answers": 18} and report["score name"] == "score"


def test_a_second_ranker_joins_the_first_and_a_table_brings_mean_scores(candidates, lengths, tmp_path, capsys):
    run(arguments(candidates, tmp_path / "one", "function", lengths))
    model = save_published(tiny_ranker(), tmp_path)
    path = run(
        arguments(tmp_path / "one", tmp_path / "two", "pair-rm", model, score_name="pairs", output_format="jsonl")
    )
    for record in read_records(path):
        table = np.array(record["tables"]["pairs"])
        assert table.shape == (3, 3) and (np.diagonal(table) == 0).all() and np.abs(table).max() > 1e-3
        scores = [candidate["scores"] for candidate in record["candidates"]]
        assert [sorted(score) for score in scores] == [["pairs", "score"]] * 3
        np.testing.assert_allclose([score["pairs"] for score in scores], score_differences(table).mean(axis=1))
    with pytest.raises(ValueError, match="has scores named 'pairs' already"):
        run(arguments(tmp_path / "two", tmp_path / "three", "pair-rm", model, score_name="pairs"))


def test_truncated_answers_are_counted_and_told(candidates, tmp_path, capsys):
    save_reward_model(tmp_path / "rm")
    path = run(arguments(candidates, tmp_path / "out", "reward-model", tmp_path / "rm", max_length=24))
    counts = json.loads((path.parent / "report.json").read_text())["counts"]
    assert counts["truncated prompts"] > 0 and counts["answers"] == 18
    assert f"{counts['truncated prompts']} truncated prompts" in capsys.readouterr().out
    (tmp_path / "rm" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(ValueError, match=r"other settings.*fingerprint"):  # another template makes other scores
        run(arguments(candidates, tmp_path / "out", "reward-model", tmp_path / "rm", max_length=24))


def test_the_raw_prompt_is_read_unless_a_policy_template_is_asked_for(candidates, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def seen(prompt, candidates):\n    return [float(prompt.count('<|eot_id|>'))] * len(candidates)\n"
    )
    save_reward_model(tmp_path / "policy")
    raw = read_records(run(arguments(candidates, tmp_path / "raw", "function", f"{tmp_path}/mine.py:seen")))
    wrapped = arguments(
        candidates,
        tmp_path / "wrapped",
        "function",
        f"{tmp_path}/mine.py:seen",
        policy_template=str(tmp_path / "policy"),
    )
    counts = [
        [record["candidates"][0]["scores"]["seen"] for record in rows] for rows in (raw, read_records(run(wrapped)))
    ]
    assert counts == [[0, 0, 0, 1, 0, 0], [1, 1, 1, 2, 1, 1]]  # the fourth prompt holds the token as text


def test_a_failed_run_continues_and_redoes_no_finished_shard(candidates, lengths, tmp_path, monkeypatch):
    args = arguments(candidates, tmp_path / "out", "function", lengths)
    monkeypatch.setenv("STUMBLE", "1")
    with pytest.raises(ValueError, match=r"shard 2 of 3 failed \(RuntimeError: stumbled\)"):
        run(args)
    assert not (tmp_path / "out" / "candidates.parquet").exists()
    monkeypatch.delenv("STUMBLE")
    (tmp_path / "seen").unlink()
    run(args)
    assert len((tmp_path / "seen").read_text().splitlines()) == 2  # the last shard only


def test_half_written_shards_are_made_again(candidates, lengths, tmp_path):
    args = arguments(candidates, tmp_path / "out", "function", lengths)
    whole = run(args).read_bytes()
    shards = tmp_path / "out" / "rank_shards"
    cut = (shards / "00001.jsonl").read_text()
    (shards / "00001.jsonl").write_text(cut[: len(cut) // 2])
    (shards / "00002.json").unlink()
    (tmp_path / "seen").unlink()
    assert run(args).read_bytes() == whole
    assert len((tmp_path / "seen").read_text().splitlines()) == 4


def test_shards_of_another_run_are_refused(candidates, lengths, tmp_path, monkeypatch):
    run(arguments(candidates, tmp_path / "out", "function", lengths))
    (tmp_path / "other.py").write_text("def score(prompt, candidates):\n    return [0.0] * len(candidates)\n")
    with pytest.raises(ValueError, match=r"other settings.*fingerprint"):
        run(arguments(candidates, tmp_path / "out", "function", f"{tmp_path}/other.py:score"))
    monkeypatch.syspath_prepend(tmp_path)
    module = arguments(candidates, tmp_path / "module", "function", "lengths:score")
    run(module)
    (tmp_path / "lengths.py").write_text((tmp_path / "other.py").read_text())
    with pytest.raises(ValueError, match=r"other settings.*fingerprint"):
        run(module)
    (tmp_path / "lengths.py").write_text(LENGTHS.format(folder=str(tmp_path)))
    changed = records()
    changed[3]["candidates"][1]["text"] += "!"
    write_records(tmp_path / "changed.jsonl", changed)
    with pytest.raises(ValueError, match="other input rows"):
        run(arguments(tmp_path / "changed.jsonl", tmp_path / "out", "function", lengths))


def test_few_candidates_are_counted(tmp_path, lengths):
    rows = [make_record("none", "x", []), make_record("one", "y", [make_candidate("a", source="s")]), *records(2)]
    write_records(tmp_path / "in.jsonl", rows)
    path = run(arguments(tmp_path / "in.jsonl", tmp_path / "out", "function", lengths, shard_size=1))
    assert [len(record["candidates"]) for record in read_records(path)] == [0, 1, 3, 3]
    assert (
        json.loads((path.parent / "report.json").read_text())["counts"]["prompts with fewer than two candidates"] == 2
    )
    model = save_published(tiny_ranker(), tmp_path)
    paired = read_records(run(arguments(tmp_path / "in.jsonl", tmp_path / "pairs", "pair-rm", model)))
    assert paired[1]["tables"]["ranker"] == [[0.0]] and paired[1]["candidates"][0]["scores"]["ranker"] == 0.0


def test_a_score_that_is_not_finite_stops_the_run_and_names_the_row(candidates, tmp_path):
    (tmp_path / "bad.py").write_text("def score(prompt, candidates):\n    return [1.0, float('nan'), 0.0]\n")
    with pytest.raises(ValueError, match=r"'p0'.*candidate 1 the score nan"):
        run(arguments(candidates, tmp_path / "out", "function", f"{tmp_path}/bad.py:score"))
    assert not (tmp_path / "out" / "candidates.parquet").exists()


def test_a_judge_that_cannot_be_reached(candidates, tmp_path):
    with pytest.raises(ValueError, match="cannot be reached"):
        run(arguments(candidates, tmp_path / "out", "judge", "judge", base_url="http://127.0.0.1:9/v1", retries=0))
    with judge_server(lambda question: "[[A]]" if question.count("blue") % 2 else "[[B]]") as url:
        path = run(arguments(candidates, tmp_path / "out", "judge", "judge", base_url=url))
    assert set(read_records(path)[0]["tables"]) == {"judge"}


def test_the_hub_is_used_only_when_asked_and_last(candidates, lengths, tmp_path, monkeypatch):
    pushed = []

    def push(self, repository, private):
        assert (tmp_path / "out" / "candidates.parquet").exists()
        pushed.append((repository, private, self[0]["candidates"][0]["scores"]))

    monkeypatch.setattr(Dataset, "push_to_hub", push)
    run(arguments(candidates, tmp_path / "out", "function", lengths))
    assert pushed == []
    asked = {"push_to_hub": True, "hub_dataset_id": "me/ranked", "hub_private_repo": False}
    run(arguments(candidates, tmp_path / "out", "function", lengths, **asked))
    assert pushed == [("me/ranked", False, {"score": len(records()[0]["candidates"][0]["text"]) + 0.25})]


def test_arguments_are_checked():
    for settings, message in (
        ({"ranker": "rm"}, "ranker must be one of"),
        ({"model_name_or_path": ""}, "model_name_or_path is missing"),
        ({"max_length": 100}, "max_length is only read with ranker reward-model"),
        ({"ranker": "pair-rm", "tokens_per_batch": 0}, "at least 1"),
        ({"output_dir": "in"}, "is the folder of the candidates"),
        ({"push_to_hub": True}, "belong together"),
    ):
        values = {"candidates": "in", "output_dir": "out", "ranker": "judge", "model_name_or_path": "m", **settings}
        with pytest.raises(ValueError, match=message):
            RankArguments(**values)
    assert FLAG_ALIASES["model"] in RankArguments.__dataclass_fields__
    assert {"tokens_per_batch", "base_url", "retries", "push_to_hub"} <= names_without_effect(RankArguments)


def launch(candidates, output, model, processes, **environment):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
    ]
    command += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        "--module",
        "prefopt",
        "rank",
    ]
    command += [
        "--candidates",
        str(candidates),
        "--output_dir",
        str(output),
        "--ranker",
        "reward-model",
        "--model_name_or_path",
        str(model),
    ]
    command += ["--shard_size", "32", "--max_length", "256", "--output_format", "jsonl", "--tokens_per_batch", "8192"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="the candidate set is not there")
def test_real_prompts_on_two_processes_killed_and_resumed(tmp_path):
    """All 603 prompts: killed after some shards, resumed on two processes; and undisturbed in one. The same bytes."""
    with gzip.open(REAL, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = [
        make_record(
            row["prompt_id"],
            row["prompt"],
            [make_candidate(c["text"], source=c["model"]) for c in row["candidates"][:3]],
        )
        for row in rows
    ]
    write_records(tmp_path / "in.jsonl", found)
    save_reward_model(tmp_path / "rm")
    started = time.monotonic()
    first = launch(tmp_path / "in.jsonl", tmp_path / "killed", tmp_path / "rm", 2)
    shards = tmp_path / "killed" / "rank_shards"
    while len(list(shards.glob("0*.json"))) < 4:
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    finished = len(list(shards.glob("0*.json")))
    assert 4 <= finished < 19 and not (tmp_path / "killed" / "candidates.jsonl").exists()
    second = launch(tmp_path / "in.jsonl", tmp_path / "killed", tmp_path / "rm", 2)
    _, log = second.communicate(timeout=600)
    assert second.returncode == 0, log
    third = launch(tmp_path / "in.jsonl", tmp_path / "whole", tmp_path / "rm", 1)
    _, log = third.communicate(timeout=600)
    assert third.returncode == 0, log
    assert re.search(r"tokens/s", log)
    result = (tmp_path / "killed" / "candidates.jsonl").read_bytes()
    assert result == (tmp_path / "whole" / "candidates.jsonl").read_bytes()
    scores = [c["scores"]["rm"] for record in read_records(tmp_path / "killed") for c in record["candidates"]]
    assert len(scores) == 3 * 603 and np.std(scores) > 0.05
    print(
        f"ranking: 603 prompts, killed after {finished} of 19 shards and resumed: identical; "
        f"{time.monotonic() - started:.0f} s"
    )


def test_a_rankers_options_keep_their_bounds():
    """What a ranker declares of its options in its file holds for `prefopt rank` too."""
    known = RankArguments.__dataclass_fields__["tokens_per_batch"].metadata
    assert known["at_least"] == 1 and known["only_for"]["ranker"] == ("reward-model", "pair-rm", "general-preference")
    assert known.get("decides_result") is False and set(known) == {"help"}
