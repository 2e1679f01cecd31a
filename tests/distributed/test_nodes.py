"""Two nodes on loopback, each with a launcher, a working folder and a data cache, train as one process does."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from prefopt import files
from tests.distributed.test_launch import (  # noqa: F401
    CONFIGS,
    ROOT,
    check_complete,
    launch,
    single,
    trajectory,
    workspace,
)

pytestmark = pytest.mark.slow
NODES = (0, 1)


def free_port() -> str:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return str(held.getsockname()[1])


def on_cpu(path: Path, name: str, **changes) -> Path:
    """A shipped config for two CPU ranks on two nodes; every other setting stays."""
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) | {"use_cpu": True, "mixed_precision": "no"}
    path.write_text(yaml.safe_dump(values | {"num_processes": 2} | changes))
    return path


def environment(node: Path) -> dict[str, str]:
    quiet = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    paths = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "HF_DATASETS_CACHE": str(node / "cache")}
    return {**os.environ, **quiet, **paths}


def finish(nodes: list[subprocess.Popen]) -> list[str]:
    """Wait for both nodes, end the other if one hangs, and return what they printed."""
    try:
        printed = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(text[-4000:] for text in printed)
    return printed


def train(recipe: Path, config: Path, folders: list[Path], *words: str) -> list[str]:
    """Run `prefopt wpo RECIPE` as two nodes, each in its own folder; what each printed."""
    shared = ["--accelerate_config", str(config), "--num_machines", "2", "--num_processes", "2"]
    port = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    return finish(
        [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "prefopt",
                    "wpo",
                    str(recipe),
                    *words,
                    *shared,
                    *port,
                    "--machine_rank",
                    str(n),
                ],
                cwd=folders[n],
                env=environment(folders[n]),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for n in NODES
        ]
    )


def two_folders(place: Path) -> list[Path]:
    folders = [place / f"node-{n}" for n in NODES]
    for folder in folders:
        folder.mkdir(parents=True)
    return folders


def recipe_of(single: Path, path: Path, **changes) -> Path:  # noqa: F811
    """The recipe of the run on one process with half the accumulation, and other settings changed."""
    values = yaml.safe_load(single.with_suffix(".yaml").read_text())
    path.write_text(yaml.safe_dump(values | {"gradient_accumulation_steps": 2} | changes))
    return path


def check_same_run(output: Path, single: Path) -> None:  # noqa: F811
    assert trajectory(output) == pytest.approx(trajectory(single), abs=1e-4)
    check_complete(output, single)


@pytest.mark.nightly
def test_zero3_on_two_nodes(workspace, single, tmp_path):  # noqa: F811
    """The shipped config for several nodes, then resumed in the second epoch; the nodes share data and output."""
    output, config = tmp_path / "out", on_cpu(tmp_path / "zero3.yaml", "deepspeed_zero3_multinode")
    recipe = recipe_of(single, tmp_path / "recipe.yaml", output_dir=str(output), batch_layout="packed")
    folders = two_folders(tmp_path)
    first, second = train(recipe, config, folders)
    assert "Training on 2 processes as DeepSpeedEngine (ZeRO-3)" in first
    assert "The model is in" in first
    assert "The model is in" not in second
    check_same_run(output, single)
    shards = {path.name for path in output.glob("checkpoint-8/global_step8/*optim_states.pt")}
    assert len(shards) == 2
    whole = trajectory(output)
    train(recipe, config, folders, "--resume_from_checkpoint", str(output / "checkpoint-8"))
    assert trajectory(output) == pytest.approx(whole, abs=1e-6)


@pytest.mark.nightly
def test_hpz_with_a_live_reference(workspace, single, tmp_path):  # noqa: F811
    """The shipped DeepSpeed config in float32 on two ranks, which count as a node of two."""
    own = files.read_json(CONFIGS / "deepspeed_zero3_hpz.json")
    own["bf16"]["enabled"], own["zero_optimization"]["zero_hpz_partition_size"] = False, 2
    files.write_json(tmp_path / "hpz.json", own)
    values = yaml.safe_load((CONFIGS / "deepspeed_zero3_hpz.yaml").read_text())
    values["deepspeed_config"]["deepspeed_config_file"] = str(tmp_path / "hpz.json")
    values |= {"use_cpu": True, "num_processes": 2, "num_machines": 1, "main_process_port": 0}
    config = tmp_path / "hpz.yaml"
    config.write_text(yaml.safe_dump(values))
    output, printed = launch(workspace, "hpz", config=config, layout="packed")
    assert "reference: live, DeepSpeedEngine (ZeRO-3)" in printed
    check_same_run(output, single)


def test_ddp_on_two_nodes_of_a_slurm_job(workspace, single, tmp_path):  # noqa: F811
    """train.slurm under an `srun` that starts both nodes here, each with its copy of model and data; one writes."""
    folders = two_folders(tmp_path)
    for folder in folders:
        shutil.copytree(workspace / "model", folder / "model")
        shutil.copytree(workspace / "data", folder / "data")
    output = tmp_path / "out"
    paths = {"model_name_or_path": "model", "dataset_name": "data", "output_dir": str(output)}
    recipe = recipe_of(single, tmp_path / "recipe.yaml", **paths)
    tools = tmp_path / "bin"
    tools.mkdir()
    run = 'cd "$NODES/node-$n" && SLURM_PROCID=$n HF_DATASETS_CACHE=$PWD/cache "$@"'
    for name, line in {
        "scontrol": "echo 127.0.0.1; echo 127.0.0.2",
        "prefopt": f'exec "{sys.executable}" -m prefopt "$@"',
        "srun": f"while [[ $1 == --* ]]; do shift; done; for n in 0 1; do ({run}) & done; wait -n; wait -n",
    }.items():
        files.write_text(tools / name, f"#!/usr/bin/env bash\nset -e\n{line}\n")
        (tools / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "node-[0-1]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "NODES": str(tmp_path),
        "MAIN_PORT": free_port(),
        "ACCELERATE_CONFIG": str(on_cpu(tmp_path / "ddp.yaml", "multi_gpu", num_machines=2)),
        "PATH": f"{tools}:{os.environ['PATH']}",
    }
    command = ["bash", str(ROOT / "examples" / "slurm" / "train.slurm"), "wpo", str(recipe), "--seed", "42"]
    done = subprocess.run(
        command, env=environment(tmp_path) | slurm, cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert done.stdout.count("The model is in") == 1
    check_same_run(output, single)
    for folder in folders:  # nothing but what was there, and the node's own cache
        assert {path.name for path in folder.iterdir()} == {"model", "data", "cache"}
        assert list((folder / "cache").rglob("*.arrow"))
    whole = trajectory(output)
    again = ["--resume_from_checkpoint", str(output / "checkpoint-8"), "--seed", "42"]
    train(recipe, Path(slurm["ACCELERATE_CONFIG"]), folders, *again)
    assert trajectory(output) == pytest.approx(whole, abs=1e-6)
