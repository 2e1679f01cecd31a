"""Findings of a card as JSON lines: written as soon as each is known, read back as tables and a figure.

A finding has `part`, `group`, `check`, `ok` (false: wrong, or it ended in an `error`), `seconds`, and figures of its
own. A check that cannot run where it is has `skipped`, the reason.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.step_throughput import table
from benchmarks.steps import figures

FILE = "findings.jsonl"
LAYERS = 32  # of the 8B shape, which smaller cards extrapolate to


class Findings:
    """Writes the findings of one group.

    Args:
        folder: where `FILE` is.
        part, group: who writes.
        dry_run: said in every finding, so that a dry run cannot be taken for a card.
    """

    def __init__(self, folder: Path, part: str, group: str, *, dry_run: bool) -> None:
        self.file = folder / FILE
        self.common = {"part": part, "group": group, "dry_run": dry_run}

    def put(self, check: str, **values: Any) -> None:
        """Append a finding and print it."""
        line = json.dumps({**self.common, "check": check, **values}, default=str)
        with self.file.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    @contextmanager
    def finding(self, check: str) -> Iterator[dict[str, Any]]:
        """Write what the body puts into the values that it gets; an exception becomes the finding's `error`."""
        values: dict[str, Any] = {}
        start = time.perf_counter()
        try:
            yield values
        except Exception as error:  # out of memory is a finding as well
            values |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
        values.setdefault("ok", True)
        self.put(check, **values, seconds=time.perf_counter() - start)


def read(paths: list[Path]) -> list[dict[str, Any]]:
    """Read the findings of files, or of the folders that hold them."""
    files = [path / FILE if path.is_dir() else path for path in paths]
    return [json.loads(line) for file in files for line in file.read_text().splitlines() if line.strip()]


# ---- tables


def steps_of(findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each measured step; of two layer counts one more row, extrapolated to all layers."""
    rate = next((f["matrix_flops"] for f in findings if f["check"] == "device" and f["ok"]), None)
    gpu = next((f["name"] for f in findings if f["check"] == "device" and f["ok"]), "")
    rows = []
    for found in findings:
        if "setting" not in found:
            continue
        setting = found["setting"]
        row = {
            "gpu": gpu,
            "shape": setting["size"] + (f", {setting['layers']} layers" if setting["layers"] else ""),
            "layers": setting["layers"],
            "lengths": setting["lengths"],
            "library": setting["library"],
            "micro_batch": setting["micro_batch"],
            "checkpointing": found.get("recomputed", setting["checkpointing"]),
            "fused_layers": "yes" if setting["fused_layers"] else "no",
            "precision": setting["precision"],
            "pairs": setting["pairs"],
        }
        if found["ok"]:
            row |= figures([found], rate=rate) | {"update_remedy": found["update_remedy"]}
            row |= {"start_to_first_step": found["start_to_first_step"], "losses": found["losses"]}
        else:
            row["error"] = found["error"]
        rows.append(row)
    rows += _extrapolated(rows)
    for row in rows:
        best = min((other["step_ms"] for other in rows if _compares(row, other)), default=None)
        if best is not None and "step_ms" in row:
            row["speedup_over_best_trl"] = best / row["step_ms"]
    return rows


def _compares(row: dict[str, Any], other: dict[str, Any]) -> bool:
    same = all(row[name] == other[name] for name in ("shape", "lengths", "precision"))
    return other["library"] == "trl" and "step_ms" in other and same


def _extrapolated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Step times at all layers from those at 8 and 16: t32 = t16 + 2 (t16 - t8)."""
    made = []
    for row in rows:
        if row["layers"] != 16 or "step_ms" not in row:
            continue
        same = ("lengths", "library", "micro_batch", "checkpointing", "fused_layers", "precision")
        half = next((r for r in rows if r["layers"] == 8 and "step_ms" in r and _same(r, row, same)), None)
        if half is None:
            continue
        step = row["step_ms"] + (LAYERS - 16) / 8 * (row["step_ms"] - half["step_ms"])
        kept = {name: row[name] for name in (*same, "gpu", "pairs")}
        made.append(
            kept | {"shape": "8b, extrapolated", "layers": LAYERS, "step_ms": step}
            | {"pairs_per_second": 1000 * row["pairs"] / step}
        )  # fmt: skip
    return made


def _same(one: dict[str, Any], other: dict[str, Any], names: tuple[str, ...]) -> bool:
    return all(one[name] == other[name] for name in names)


STEP_COLUMNS = (
    ("gpu", "GPU", "{}"),
    ("shape", "shape", "{}"),
    ("lengths", "lengths", "{}"),
    ("library", "library", "{}"),
    ("micro_batch", "micro-batch", "{}"),
    ("checkpointing", "recomputed", "{}"),
    ("fused_layers", "fused layers", "{}"),
    ("precision", "precision", "{}"),
    ("update_remedy", "updates kept by", "{}"),
    ("step_ms", "ms/step", "{:.0f}"),
    ("pairs_per_second", "pairs/s", "{:.2f}"),
    ("unique_tokens_per_second", "unique tokens/s", "{:.0f}"),
    ("useful_tflops", "TFLOP/s", "{:.0f}"),
    ("fraction_of_matrix_rate", "of matrix rate", "{:.2f}"),
    ("peak_gib", "peak GiB", "{:.1f}"),
    ("start_to_first_step", "s to first step", "{:.0f}"),
    ("speedup_over_best_trl", "x TRL's best", "{:.2f}"),
)
ATTENTION_COLUMNS = (
    ("kernel", "attention", "{}"),
    ("tokens", "tokens", "{}"),
    ("forward_ms", "forward ms", "{:.2f}"),
    ("both_ms", "forward and backward ms", "{:.2f}"),
    ("exact_tflops", "TFLOP/s", "{:.0f}"),
    ("compile_seconds", "compile s", "{:.1f}"),
)
CHECK_COLUMNS = (
    ("group", "group", "{}"),
    ("check", "check", "{}"),
    ("result", "result", "{}"),
    ("seconds", "seconds", "{:.1f}"),
)


def result(found: dict[str, Any]) -> str:
    """Say in a few words how a check ended."""
    if "skipped" in found:
        return f"skipped: {found['skipped']}"
    return "right" if found["ok"] else f"**wrong**: {found.get('error', 'see the findings')}"


def tables(findings: list[dict[str, Any]]) -> str:
    """Return the tables of docs/performance.md: checks, steps, attention, profile and memory."""
    sections = []
    if any(found["dry_run"] for found in findings):
        sections.append("A dry run on a CPU: these figures say nothing about a GPU.")
    checks = [{**found, "result": result(found)} for found in findings if found["part"] == "a"]
    attention = [{**f, "kernel": f["check"]} for f in findings if f["group"] == "attention_speed" and "tokens" in f]
    for title, rows, columns in (
        ("Is it right?", checks, CHECK_COLUMNS),
        ("Steps", steps_of(findings), STEP_COLUMNS),
        ("Attention alone", attention, ATTENTION_COLUMNS),
    ):
        if rows:
            sections.append(f"**{title}**\n\n{table(rows, columns)}")
    for found in findings:
        if "milliseconds_by_kind" in found:
            kinds = sorted(found["milliseconds_by_kind"].items(), key=lambda item: -item[1])
            rows = [{"kind": kind, "ms": spent} for kind, spent in kinds]
            columns = (("kind", "kernels", "{}"), ("ms", "ms of one step", "{:.1f}"))
            sections.append(f"**Where a step's time goes**\n\n{table(rows, columns)}")
    if estimated := [found for found in findings if "estimated_gib" in found and found["ok"]]:
        rows = [{"check": f["check"], "sum": f["estimated_sum_gib"], "peak": f["peak_gib"]} for f in estimated]
        rows = [row | found["estimated_gib"] for row, found in zip(rows, estimated)]
        parts = [name for name in estimated[0]["estimated_gib"] if any(f["estimated_gib"][name] for f in estimated)]
        columns = [("check", "run", "{}"), ("peak", "measured peak, GiB", "{:.2f}"), ("sum", "estimate", "{:.2f}")]
        columns += [(name, name, "{:.2f}") for name in parts]
        sections.append(f"**Peak memory against the estimate**\n\n{table(rows, tuple(columns))}")
    return "\n\n".join(sections)


def draw(findings: list[dict[str, Any]], path: Path) -> None:
    """Draw pairs per second of every measured step, one panel for each length distribution."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in steps_of(findings) if "pairs_per_second" in row]
    if not rows:
        raise ValueError("The findings hold no step that was measured; run part b first.")
    names = list(dict.fromkeys(row["lengths"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(6 * len(names), 0.6 + 0.4 * len(rows)), squeeze=False)
    for axis, name in zip(axes[0], names):
        shown = [row for row in rows if row["lengths"] == name][::-1]
        labels = [
            f"{'TRL' if row['library'] == 'trl' else row['library']}, {row['shape']}, {row['micro_batch']} a batch, "
            f"recomputed: {row['checkpointing']}, {row['precision']}"
            for row in shown
        ]
        colours = ["tab:grey" if row["library"] == "trl" else "tab:blue" for row in shown]
        bars = axis.barh(labels, [row["pairs_per_second"] for row in shown], color=colours)
        axis.bar_label(bars, fmt="%.2f", padding=2)
        axis.tick_params(labelsize=7)
        axis.set(title=f"{name} lengths, {shown[0]['gpu'] or 'CPU'}", xlabel="pairs per second")
        axis.margins(x=0.15)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
