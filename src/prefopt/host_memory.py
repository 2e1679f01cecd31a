"""Memory of a node beside that of its GPUs, estimated: what loading, offloading and saving take on the first node.

With N parameters of which T train, p bytes a weight, L processes on a node:

    loading     the weights before they reach a GPU, and the copy that becomes the reference:
                p N for each of them on every process, so L times, without sharding and under ZeRO-2;
                p N once under ZeRO-3, where the first rank of all reads one model after the other, and every weight
                is sharded as it comes;
                p N for each of them once under FSDP2 with `fsdp_cpu_ram_efficient_loading`, where the first rank of a
                node reads (L times without it), or, when the reference is on the GPUs, p N and 4 T for the float32
                weights that FSDP2 trains
    saving      the whole model on the first rank (float32 under FSDP2), then, under FSDP2, its optimizer states
    offloaded   L / processes of what DeepSpeed keeps here: 16-bit weights and gradients, masters, optimizer states

Loading and saving happen at different times. Not counted: Python and torch themselves (1 to 2 GiB a process), pinned
buffers, and files that the system keeps cached.
"""

from __future__ import annotations

from prefopt.hardware import GIB
from prefopt.memory import Memory, Run, optimizer_bytes


class HostMemory(Memory):
    """Bytes of a node's memory; loading and saving happen at different times."""

    @property
    def total(self) -> float:
        """Return the largest that is held at one time."""
        return max(self.parts["loading"], self.parts["saving"]) + self.parts["offloaded"]

    def table(self) -> str:
        """Write the parts as lines of text, in GiB."""
        lines = [f"  {name:<12}{size / GIB:>9.2f} GiB" for name, size in self.parts.items() if size]
        return "\n".join([*lines, f"  {'at one time':<12}{self.total / GIB:>9.2f} GiB"])


def estimate_host(run: Run, *, saves: bool = True) -> HostMemory:
    """Estimate the memory of the first node by the table in the module's docstring.

    Args:
        run: model, launch and precision.
        saves: whether checkpoints are written.
    """
    shape, launch, size = run.shape, run.launch, run.loaded_bytes
    models = 2 if run.keeps_reference else 1
    local = max(launch.processes // launch.machines, 1)
    copies = size * shape.parameters * models
    readers = 1 if launch.reads_once_a_node else local
    upcast = launch.fsdp and run.bf16 and size == 2
    if launch.zero_stage == 3:
        loading = float(size * shape.parameters)
    else:
        loading = readers * max(copies, size * shape.parameters + (4 * shape.trained if upcast else 0))
    held = 4 if upcast else size
    saving: float = held * shape.trained + size * (shape.parameters - shape.trained)
    if launch.fsdp:
        saving = max(saving, optimizer_bytes(run.optimizer) * shape.trained)
    # 16-bit weights and gradients, float32 masters and moments
    offloaded = (2 * shape.parameters * models if launch.offload_weights else 0) + (
        (6 + optimizer_bytes(run.optimizer)) * shape.trained if launch.offload_optimizer else 0
    )
    return HostMemory(
        {
            "loading": loading,
            "saving": saving if saves else size * shape.parameters,
            "offloaded": offloaded * local / launch.processes,
        }
    )
