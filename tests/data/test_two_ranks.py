"""Two processes: the first fills the cache, the second reads it; sets that live in memory work as well."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from prefopt.files import write_jsonl

RANK = """
import json, os, sys
import prefopt.data.tokenization as module
from accelerate import PartialState
from datasets import Dataset
from prefopt.data import DataArguments, DataSource, load_datasets, tokenize_pairs
from tests.tiny import tiny_tokenizer

state = PartialState(cpu=True)
calls, original = [], module.RowTokenizer.tokenize_batch
def counted(self, batch, **settings):
    calls.append(1)
    return original(self, batch, **settings)
module.RowTokenizer.tokenize_batch = counted
folder = sys.argv[1]
train, test = load_datasets(DataArguments([DataSource(folder + "/rows.jsonl")], test_split_size=0.2))
ids, report = tokenize_pairs(train, tiny_tokenizer(None), max_length=32)
from_disk = len(calls)
memory = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * 3)
small, _ = tokenize_pairs(memory, tiny_tokenizer(None), max_length=32)
with open(f"{folder}/{state.process_index}.json", "w") as file:
    json.dump([state.num_processes, from_disk, ids.to_list(), report.table(), len(test), small.to_list()], file)
"""


@pytest.mark.slow
def test_the_second_rank_reads_what_the_first_has_tokenised(tmp_path):
    write_jsonl(
        tmp_path / "rows.jsonl", [{"prompt": f"p{k}", "chosen": f" c{k}", "rejected": f" r{k}"} for k in range(20)]
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }
    root = str(Path(__file__).resolve().parents[2])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path)],
            cwd=root,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first[0] == second[0] == 2
    assert (first[1], second[1]) == (1, 0)  # batches tokenised by each
    assert first[2:] == second[2:] and len(first[2]) == 16 and len(first[5]) == 3
