"""Run a script under FSDP2 on CPU ranks: `accelerate launch --config_file CONFIG fsdp2_on_cpu.py SCRIPT WORDS...`.

accelerate applies FSDP on GPUs only; here it does so on gloo ranks as well, and nothing else is changed. What matters
for the tests is printed: each file of weights that a rank opens, and how many parts the reference is sharded in.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from prefopt.trainers import reference

torch.set_num_threads(1)
_make_state = AcceleratorState.__init__


def make_state(self, *args, fsdp_plugin=None, **kwargs):
    _make_state(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and "fsdp_plugin" not in self.__dict__:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
    if "fsdp_plugin" in self.__dict__:
        self.distributed_type = DistributedType.FSDP


def report_reads() -> None:
    from transformers import modeling_utils

    open_file = modeling_utils.safe_open

    def opened(path, *args, **kwargs):
        print(f"rank {os.environ['RANK']} reads {Path(path).name}", flush=True)
        return open_file(path, *args, **kwargs)

    modeling_utils.safe_open = opened


def report_shards() -> None:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    shard = reference.shard

    def sharded(module, accelerator):
        wrapped = shard(module, accelerator)
        parts = sum(isinstance(part, FSDPModule) for part in wrapped.modules())
        layers = all(isinstance(layer, FSDPModule) for layer in wrapped.get_decoder().layers)
        frozen = not any(parameter.requires_grad for parameter in wrapped.parameters())
        split = all(
            isinstance(p, DTensor) and p.device.type == "cpu" and p.to_local().numel() < p.numel()
            for p in wrapped.parameters()
        )
        print(f"rank {os.environ['RANK']} reference: {parts} parts, {layers=}, {frozen=}, {split=}", flush=True)
        return wrapped

    reference.shard = sharded


if __name__ == "__main__":
    AcceleratorState.__init__ = make_state
    report_reads()
    report_shards()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
