"""The Slurm example, with stand-ins for Slurm's commands and for accelerate that show how they were called."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from prefopt.cli import arguments_of
from prefopt.launch import launch_words, split_launch_settings
from prefopt.pipelines.commands import Commands
from prefopt.pipelines.run import read_pipeline
from prefopt.pipelines.self_play import stages_of
from prefopt.recipes.recipe import load_settings, parse_settings

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "examples" / "slurm"


@pytest.fixture
def cluster(tmp_path):
    """A job on two nodes of eight GPUs, where srun runs its command once a node."""
    programs = {
        "scontrol": "echo node-a; echo node-b",
        "srun": 'while [[ $1 == --* ]]; do shift; done; for n in 0 1; do SLURM_PROCID=$n "$@"; done',
        "accelerate": 'printf "%q " accelerate "$@"; echo',
        "prefopt": 'printf "%q " prefopt "$@"; echo',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    return {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_the_launcher_starts_accelerate_on_every_node(cluster):
    words = ["sppo", "llama3/sppo", "--beta=0.001", "--output_dir=runs/with space/train"]
    done = subprocess.run([SLURM / "all_nodes.sh", *words], env=cluster, capture_output=True, text=True, check=True)
    for rank, line in enumerate(done.stdout.splitlines()):
        called = shlex.split(line)
        settings = dict(zip(called[2:14:2], called[3:14:2]))
        assert called[:2] == ["accelerate", "launch"] and called[14:] == ["--module", "prefopt", *words]
        assert settings == {
            "--config_file": "accelerate_configs/deepspeed_zero3_multinode.yaml",
            "--num_machines": "2",
            "--num_processes": "16",
            "--machine_rank": str(rank),
            "--main_process_ip": "node-a",
            "--main_process_port": "29500",
        }
        assert (ROOT / settings["--config_file"]).exists()
    assert rank == 1


def test_the_job_runs_the_pipeline_with_the_launchers(cluster):
    done = subprocess.run(
        ["bash", SLURM / "self_play.slurm", "pipelines/sppo_gemma2_9b", "--num_iterations", "2"],
        env=cluster,
        capture_output=True,
        text=True,
        check=True,
    )
    called = shlex.split(done.stdout)
    assert called[:5] == ["prefopt", "pipeline", "pipelines/sppo_gemma2_9b", "--num_iterations", "2"]

    arguments, loop, _ = read_pipeline(*load_settings(called[2:]))
    stages = {stage.name: stage for stage in stages_of(loop, Commands(Path(arguments.run_dir), arguments.launchers))}
    train, rank = stages["iteration-2/train"].command, stages["iteration-2/rank"].command
    assert train[:2] == ("examples/slurm/all_nodes.sh", "sppo")
    assert rank[:4] == (
        "env",
        "ACCELERATE_CONFIG=accelerate_configs/multi_gpu.yaml",
        "examples/slurm/all_nodes.sh",
        "rank",
    )
    assert not any("num_processes" in word or "accelerate_config" in word for word in (*train[1:], *rank[3:]))
    assert stages["iteration-2/generate"].command[:2] == ("prefopt", "generate")


def test_the_training_job_starts_one_command_on_every_node(cluster):
    words = ["wpo", "llama3/wpo", "--output_dir", "/disk/with space"]
    job = ["bash", SLURM / "train.slurm", *words]
    done = subprocess.run(job, env=cluster, capture_output=True, text=True, check=True)
    for rank, line in enumerate(done.stdout.splitlines()):
        called = shlex.split(line)
        assert called[:5] == ["prefopt", *words]
        name, settings = load_settings(called[2:])
        launcher, settings = split_launch_settings(settings)
        assert launcher == {
            "accelerate_config": "deepspeed_zero3_multinode",
            "num_machines": "2",
            "num_processes": "16",
            "machine_rank": str(rank),
            "main_process_ip": "node-a",
            "main_process_port": "29500",
        }
        assert Path(launch_words(launcher)[1]).is_file()
        values = parse_settings(name, settings, arguments_of("wpo")).values
        assert (values["output_dir"], values["resume_from_checkpoint"]) == ("/disk/with space", True)
    assert rank == 1


@pytest.mark.parametrize("script", sorted(SLURM.iterdir()), ids=lambda path: path.name)
def test_every_script_is_valid_bash(script):
    subprocess.run(["bash", "-n", script], check=True)
