"""FSDP2 on two CPU ranks around the model and the scoring path, by torch and by accelerate's own preparation.

Under an FSDP configuration on a CPU accelerate wraps into DDP, so its config file itself can only be tried on GPUs;
the
function that it calls there runs here on gloo.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import PartialState
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from prefopt.references.fingerprints import module_fingerprint
from prefopt.scoring.layouts import PackedLayout, PaddedLayout
from prefopt.scoring.logprobs import install_scoring, score_completions
from prefopt.trainers.checkpointing import checkpoint_selectively
from prefopt.trainers.sharding import keep_float32_under_fsdp2
from tests.scoring.helpers import plain_logps, random_groups
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow
GROUPS = random_groups(8, seed=4)
LONG_GROUPS = random_groups(4, seed=4, longest=90)
LAYOUTS = {"padded": PaddedLayout(0), "packed": PackedLayout(0)}


def start(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)


def leave() -> None:
    dist.destroy_process_group()
    os._exit(0)  # threads of torch now and then abort an interpreter that is torn down


def sharded_by_torch(rank: int, store: str, layout: str, tied: bool) -> None:
    """Score every second group on each rank, and compare the reduced gradient with the whole batch's."""
    start(rank, store)
    plain = tiny_model("llama", tie_word_embeddings=tied)
    (plain_logps(plain, GROUPS).sin().sum() / 2).backward()  # FSDP averages over ranks
    model = tiny_model("llama", tie_word_embeddings=tied)
    install_scoring(model)
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batch = LAYOUTS[layout].collate([GROUPS[rank::2]])
    score_completions(model, batch, alignment="sampled").logps.sin().sum().backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        assert isinstance(p, DTensor) and p.to_local().numel() < p.numel(), name
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-4, atol=1e-5, msg=name)
    leave()


def recomputed(rank: int, store: str) -> None:
    """Recompute layers in each way under FSDP2, and compare the reduced gradient with the whole batch's."""
    start(rank, store)
    plain = tiny_model("llama")
    (plain_logps(plain, GROUPS).sin().sum() / 2).backward()
    mesh = dist.init_device_mesh("cpu", (2,))
    for mode in ("every_n", "selective", "all"):
        model = tiny_model("llama").train()
        install_scoring(model)
        # in Trainer's order: before the model is wrapped, and what is selective after it
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2 if mode == "every_n" else 1)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if mode == "selective":
            checkpoint_selectively(model)
        batch = LAYOUTS["packed"].collate([GROUPS[rank::2]])
        score_completions(model, batch).logps.sin().sum().backward()
        for (name, p), q in zip(model.named_parameters(), plain.parameters()):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-4, atol=1e-5, msg=f"{mode}: {name}")
    leave()


def hashed_by_its_holder(rank: int, store: str, expected: str) -> None:
    """Hash a model that the first rank alone holds, and one that is sharded."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    start(rank, store)
    PartialState(cpu=True)
    model = tiny_model("llama", seed=1)
    held = model if rank == 0 else tiny_model("llama").to("meta")
    assert module_fingerprint(held, held.config) == expected
    for layer in model.model.layers:
        fully_shard(layer, mesh=dist.init_device_mesh("cpu", (2,)))
    assert module_fingerprint(model, model.config) == expected
    leave()


def prepared_by_accelerate(rank: int, store: str, layout: str) -> None:
    """Score under accelerate's FSDP2 with `mixed_precision: bf16`, and compare with a float32 model."""
    from accelerate.utils.dataclasses import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    start(rank, store)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        state_dict_type="FULL_STATE_DICT",
    )
    plugin.set_mixed_precision("bf16")
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh={("fsdp",): dist.init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))},
        parallelism_config=SimpleNamespace(fsdp_dim_names=["fsdp"]),
        mixed_precision="bf16",
        is_main_process=rank == 0,
        device=torch.device("cpu"),
        process_index=rank,
    )
    keep_float32_under_fsdp2(accelerator)
    exact = plain_logps(tiny_model("llama"), LONG_GROUPS)
    rounded = plain_logps(tiny_model("llama").bfloat16(), LONG_GROUPS)
    model = tiny_model("llama")
    install_scoring(model)
    model = fsdp2_prepare_model(accelerator, model)
    scores = score_completions(model, LAYOUTS[layout].collate([LONG_GROUPS]), alignment="sampled")
    assert scores.logps.dtype == scores.counts.dtype == scores.mean_aligned_logps.dtype == torch.float32
    assert scores.counts.tolist() == [len(tokens) for group in LONG_GROUPS for tokens in group.completions]
    # weights and activations are rounded to bf16, the sums of hundreds of nats are not
    assert (scores.logps - exact).abs().max() <= 2 * (rounded - exact).abs().max() + 1e-2
    scores.logps.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert plugin.mixed_precision_policy.reduce_dtype == torch.float32
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16
    leave()


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_sharded_ranks_have_the_plain_gradient(layout, tied, tmp_path):
    mp.spawn(sharded_by_torch, args=(str(tmp_path / "store"), layout, tied), nprocs=2, join=True)


def test_a_model_that_one_rank_holds_has_its_own_fingerprint(tmp_path):
    model = tiny_model("llama", seed=1)
    expected = module_fingerprint(model, model.config)
    mp.spawn(hashed_by_its_holder, args=(str(tmp_path / "store"), expected), nprocs=2, join=True)


def test_layers_that_run_again_have_the_plain_gradient(tmp_path):
    mp.spawn(recomputed, args=(str(tmp_path / "store"),), nprocs=2, join=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_and_gradients_stay_float32_under_accelerates_bf16(layout, tmp_path):
    mp.spawn(prepared_by_accelerate, args=(str(tmp_path / "store"), layout), nprocs=2, join=True)
