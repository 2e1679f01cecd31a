"""WPO under the shipped FSDP2 configs through the real script, on gloo ranks (`fsdp2_on_cpu`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.distributed.test_launch import (  # noqa: F401
    CHANGED,
    CONFIGS,
    another_model,
    check_complete,
    launch,
    single,
    trajectory,
    workspace,
)

pytestmark = pytest.mark.slow
RUNNER = Path(__file__).with_name("fsdp2_on_cpu.py")
CACHED = {"precompute_ref_log_probs": True}


def on_cpu(folder: Path, name: str, **changes) -> Path:
    """A shipped config for two CPU ranks."""
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    values |= {"use_cpu": True, "mixed_precision": "no", "num_processes": 2, "num_machines": 1, **changes}
    path = folder / f"accelerate-{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def live(workspace):  # noqa: F811
    return launch(workspace, "fsdp2", config=on_cpu(workspace, "fsdp2"), runner=RUNNER, layout="packed")


def test_fsdp2_trains_like_one_process(live, single):  # noqa: F811
    """12 steps over two epochs: losses to 1e-4, and the whole model is saved."""
    output, printed = live
    assert "Training on 2 processes as FSDPLlamaForCausalLM; batches: packed" in printed
    assert trajectory(output) == pytest.approx(trajectory(single), abs=1e-4)
    assert trajectory(output, "grad_norm") == pytest.approx(trajectory(single, "grad_norm"), rel=1e-3)
    check_complete(output, single)


def test_the_first_rank_alone_reads_the_weights_and_once(live):
    reads = [line for line in live[1].splitlines() if " reads " in line]
    assert reads == ["rank 0 reads model.safetensors"]


def test_the_reference_is_sharded_layer_by_layer(live):
    """Two layers, the embeddings, the head with the last norm (one part of two modules), and the model around them."""
    for rank in (0, 1):
        assert f"rank {rank} reference: 6 parts, layers=True, frozen=True, split=True" in live[1]


def test_a_resumed_run_equals_an_uninterrupted_one(workspace, live):  # noqa: F811
    output, _ = live
    whole = trajectory(output)
    again = {"resume_from_checkpoint": str(output / "checkpoint-8")}
    config = on_cpu(workspace, "fsdp2")
    output, _ = launch(workspace, "fsdp2", config=config, runner=RUNNER, layout="packed", **again)
    assert trajectory(output) == pytest.approx(whole, abs=1e-6)
    with another_model(workspace):
        _, errors = launch(workspace, "fsdp2", config=config, runner=RUNNER, layout="packed", fails=True, **again)
    assert CHANGED in errors


def test_cached_scores_of_a_model_that_one_rank_has_read(workspace, single):  # noqa: F811
    settings = {**CACHED, "ref_logps_dir": str(workspace / "fsdp2-scores")}
    config = on_cpu(workspace, "fsdp2")
    output, printed = launch(workspace, "fsdp2-cached", config=config, runner=RUNNER, layout="packed", **settings)
    assert "88 scored now" in printed
    assert trajectory(output) == pytest.approx(trajectory(single), abs=1e-4)


@pytest.mark.nightly
def test_hybrid_sharding_trains_like_one_process(workspace, single):  # noqa: F811
    """Two copies of the model on two ranks each; the first rank of the node reads it once."""
    parallel = {"parallelism_config_dp_replicate_size": 2, "parallelism_config_dp_shard_size": 2}
    parallel |= {"parallelism_config_tp_size": 1, "parallelism_config_cp_size": 1}
    config = on_cpu(workspace, "fsdp2_hsdp", num_processes=4, parallelism_config=parallel, main_process_port=0)
    output, printed = launch(workspace, "hsdp", config=config, ranks=4, runner=RUNNER, layout="packed")
    assert [line for line in printed.splitlines() if " reads " in line] == ["rank 0 reads model.safetensors"]
    assert "rank 3 reference: 6 parts, layers=True, frozen=True, split=True" in printed
    assert trajectory(output) == pytest.approx(trajectory(single), abs=1e-4)
    check_complete(output, single)
