"""torch's `fully_shard` on two CPU ranks around the model and our forward: sharded parameters, the plain model's gradients.

Accelerate turns an FSDP configuration into plain DDP on a CPU, so its own config can only be tried on GPUs.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from prefopt.scoring.layouts import PackedLayout, PaddedLayout
from prefopt.scoring.logprobs import install_scoring, score_completions
from tests.scoring.helpers import plain_logps, random_groups
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow
GROUPS = random_groups(8, seed=4)
LAYOUTS = {"padded": PaddedLayout(0), "packed": PackedLayout(0)}


def rank_main(rank: int, store: str, layout: str, tied: bool) -> None:
    """Score every second group on each rank, and compare the reduced gradient with the whole batch's."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
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
    dist.destroy_process_group()
    os._exit(0)  # threads of torch now and then abort an interpreter that is torn down


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_sharded_ranks_have_the_plain_gradient(layout, tied, tmp_path):
    mp.spawn(rank_main, args=(str(tmp_path / "store"), layout, tied), nprocs=2, join=True)
