"""What torch.compile has done in this process so far: FlexAttention compiles a kernel when a row length is new to it."""

from __future__ import annotations

import sys


def compiled_so_far() -> dict[str, float]:
    """`perf/compiled_graphs` and `perf/compile_seconds` of this process; empty where nothing was compiled.

    A count that still grows after the first steps means that shapes keep changing.
    """
    utils = sys.modules.get("torch._dynamo.utils")  # imported by the first compilation
    if utils is None or not (graphs := utils.counters["stats"]["unique_graphs"]):
        return {}
    seconds = sum((metrics.duration_us or 0) for metrics in utils.get_compilation_metrics()) / 1e6
    return {"perf/compiled_graphs": float(graphs), "perf/compile_seconds": seconds}
