"""Writes the tables of docs/scaling.md: what a step, its gathers, its plan and a checkpoint cost on 1 to 1,000 GPUs.

python docs/scaling.py            (after a change of the plan, of `prefopt.memory` or of an assumption below)
python docs/scaling.py --check    (exit status 1 where docs/scaling.md is out of date)

The numbers are arithmetic on the real code (`BatchPlan`, `optimizer_bytes`) and on the assumptions below; none of them
was measured on a cluster.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.steps import draw_lengths  # noqa: E402
from prefopt.memory import optimizer_bytes  # noqa: E402
from prefopt.scoring.plan import BatchPlan, GroupLengths  # noqa: E402

PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- {}: written by docs/scaling.py -->", "<!-- end of {} -->"

# the assumptions, which the page states
PARAMETERS = 8.03e9
LAYERS = 32
GPUS_PER_NODE = 8
FLOPS = 550e12  # of a GPU in a step's matrix products: 70 % of a measured rate of 790 TFLOP/s
WITHIN_NODE, BETWEEN_NODES = 300e9, 40e9  # bytes/s that a GPU receives
HOP = 5e-6  # seconds that each rank adds to a ring
PAIR_TOKENS = 819  # UltraFeedback: 190 + 327 + 302
WRITER, STORAGE = 2e9, 20e9  # bytes/s of one process, and of the file system
SIZES = (1, 8, 64, 256, 1000)
GB = 1e9


def imbalance(ranks: int, pairs_per_rank: int, *, steps: int = 4) -> float:
    """Return by how much the heaviest rank of a step exceeds the mean, in tokens, averaged over some steps."""
    pairs = ranks * pairs_per_rank * steps
    drawn = draw_lengths("ultrafeedback", pairs, max_length=2048, seed=0)
    lengths = [GroupLengths(p + c + r, p + max(c, r), 2, c) for p, c, r in drawn]
    plan = BatchPlan(lengths, groups_per_micro_batch=pairs_per_rank, world_size=ranks, max_tokens_per_row=10**9)
    excess = 0.0
    for step in range(steps):
        loads = [sum(lengths[i].packed for batch in rank for i in batch.indices) for rank in plan.step(0, step)]
        excess += max(loads) / (sum(loads) / ranks) - 1
    return excess / steps


def compute_seconds(pairs: float) -> float:
    """Return the seconds of a step with this many pairs on a GPU: 6N a token for the policy, 2N for the reference."""
    return 8 * PARAMETERS * PAIR_TOKENS * pairs / FLOPS


def gather_bytes(ranks: int) -> float:
    """Return what a GPU receives for a micro-batch where all is sharded over `ranks`.

    The policy's bf16 weights for forward and for backward, the reference's once, and its part of the gradients' sum.
    """
    return (ranks - 1) / ranks * 2 * PARAMETERS * (2 + 1 + 1)


def collective_seconds(received: float, ranks: int, calls: int) -> float:
    """Return the seconds of ring collectives that receive so many bytes in so many calls."""
    rate = WITHIN_NODE if ranks <= GPUS_PER_NODE else BETWEEN_NODES
    return received / rate + calls * (ranks - 1) * HOP


def gathers() -> str:
    """Per micro-batch: everything sharded over all GPUs, or over the GPUs of a node."""
    rows = [
        "| GPUs | received, GB | sharded over all, s | within nodes, s | gradients between nodes, s a step "
        "| pairs that hide it: all / node |"
    ]
    rows.append("|---|---|---|---|---|---|")
    calls = 4 * LAYERS
    for ranks in SIZES:
        node = min(ranks, GPUS_PER_NODE)
        flat = collective_seconds(gather_bytes(ranks), ranks, calls)
        inside = collective_seconds(gather_bytes(node), node, calls)
        nodes = max(1, ranks // GPUS_PER_NODE)
        # an all-reduce of the float32 shard of a GPU, there and back
        between = 0.0
        if nodes > 1:
            between = collective_seconds(
                2 * (nodes - 1) / nodes * 4 * PARAMETERS / node, nodes + GPUS_PER_NODE, LAYERS
            )
        pairs = [seconds / compute_seconds(1) for seconds in (flat, inside)]
        rows.append(
            f"| {ranks:,} | {gather_bytes(ranks) / GB:.0f} | {flat:.2f} | {inside:.2f} | {between:.2f} | "
            f"{pairs[0]:.1f} / {pairs[1]:.1f} |"
        )
    return "\n".join(rows)


def balance() -> str:
    """How much longer the heaviest rank of a step computes than the mean."""
    shares = (1, 2, 4, 8)
    rows = ["| GPUs | " + " | ".join(f"{pairs} a GPU" for pairs in shares) + " |", "|---|" + "---|" * len(shares)]
    for ranks in SIZES[1:]:
        cells = [f"{imbalance(ranks, pairs):.0%}" for pairs in shares]
        rows.append(f"| {ranks:,} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def batch() -> str:
    """A fixed global batch, as the papers' recipes have it, and 8 pairs a GPU."""
    rows = [
        "| GPUs | pairs a GPU of a batch of 128 | s a step, computing | pairs/s | 8 a GPU: pairs a step | pairs/s |"
    ]
    rows.append("|---|---|---|---|---|---|")
    for ranks in SIZES:
        share = 128 / ranks
        cells = "| below 1: not possible | | |"
        if share >= 1:
            cells = f"| {share:.0f} | {compute_seconds(share):.2f} | {128 / compute_seconds(share):.0f} |"
        rows.append(f"| {ranks:,} {cells} {8 * ranks:,} | {8 * ranks / compute_seconds(8):,.0f} |")
    return "\n".join(rows)


def checkpoints() -> str:
    """Bytes and seconds of a checkpoint: weights by one process, optimizer state by all."""
    weights = 2 * PARAMETERS
    states = (optimizer_bytes("adamw_torch_fused") + 4) * PARAMETERS  # moments, and the float32 master copy
    rows = [
        "| GPUs | weights, GB | optimizer, GB | s to write weights | s to write states | 1 % of the time: one in |"
    ]
    rows.append("|---|---|---|---|---|---|")
    for ranks in SIZES:
        by_all = states / min(ranks * WRITER, STORAGE)
        total = weights / WRITER + by_all
        rows.append(
            f"| {ranks:,} | {weights / GB:.0f} | {states / GB:.0f} | {weights / WRITER:.0f} | {by_all:.0f} | "
            f"{100 * total / 60:.0f} min |"
        )
    return "\n".join(rows)


TABLES = {"batch": batch, "gathers": gathers, "balance": balance, "checkpoints": checkpoints}


def written(page: str) -> str:
    """Return the page with all tables written anew."""
    for name, make in TABLES.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}\n{make()}\n{end}{after}"
    return page


def main() -> int:
    """Write the tables, or check that they are those of today's code."""
    page = PAGE.read_text()
    new = written(page)
    if "--check" in sys.argv[1:]:
        return int(new != page)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
