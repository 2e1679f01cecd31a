"""One training step on a CPU, side by side: prefopt against TRL's DPOTrainer on the same weights, pairs and order.

    python benchmarks/step_throughput.py                       # both length distributions, all of TRL's micro-batches
    python benchmarks/step_throughput.py --against /tmp/before/src     # another checkout of prefopt in the same turns

Every contender runs in a process of its own, in turns, and trains with `Trainer.train()`; a step's time is from one
step's begin to its end (where other work shares the machine, compare processor times). TRL is given each micro-batch
size that divides the batch, and its best one counts. Both take the same pairs in every optimizer step, so their losses
must agree. `steps.py` has the parts; `gpu.py` runs them on a card.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.steps import METHODS, SHAPES, Setting, environment, figures, matrix_rate, measure  # noqa: E402


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SHAPES), default="small")
    parser.add_argument(
        "--lengths", nargs="+", default=["ultrafeedback", "hh"], help="ultrafeedback, hh, or a file of length triples"
    )
    parser.add_argument("--method", choices=METHODS, default="wpo")
    parser.add_argument("--reference", choices=("live", "cached"), default="live")
    parser.add_argument(
        "--references",
        nargs="+",
        type=int,
        default=[1, 7],
        help="multi_reference: numbers of cached references to compare",
    )
    parser.add_argument("--pairs", type=int, default=8, help="pairs of one optimizer step")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of prompt + completion")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each run")
    parser.add_argument("--warmup", type=int, default=2, help="fewest steps before the timed ones")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender, in turns")
    parser.add_argument("--layouts", nargs="+", default=["packed"], choices=("packed", "padded"))
    parser.add_argument(
        "--trl_batch_sizes", nargs="*", type=int, default=None, help="default: every divisor of --pairs"
    )
    parser.add_argument("--prefopt_batch_sizes", nargs="+", type=int, default=None, help="default: --pairs")
    parser.add_argument("--checkpointing", action="store_true", help="recompute all layers, for both")
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="SRC", help="`src` folders of other checkouts, measured as well"
    )
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument("--plot", type=Path, default=None, help="draw pairs/s here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--setting", default=None, help=argparse.SUPPRESS)  # in the processes that this script starts
    return parser.parse_args(argv)


def contenders(args: argparse.Namespace, lengths: str) -> list[Setting]:
    """Every setting on one length distribution, those of prefopt first."""
    common = {name: getattr(args, name) for name in ("size", "method", "reference", "pairs", "max_length")}
    common |= {name: getattr(args, name) for name in ("steps", "warmup", "seed")} | {"lengths": lengths}
    first = Setting(**common, checkpointing="all" if args.checkpointing else "none")
    packed = [
        dataclasses.replace(first, layout=layout, micro_batch=size, source=source)
        for source in (None, *args.against)
        for layout in args.layouts
        for size in args.prefopt_batch_sizes or [args.pairs]
    ]
    if args.method == "multi_reference":  # which TRL does not have
        return [dataclasses.replace(packed[0], references=count) for count in args.references]
    sizes = args.trl_batch_sizes
    if sizes is None:
        sizes = [size for size in range(1, args.pairs + 1) if args.pairs % size == 0]
    return packed + [dataclasses.replace(first, library="trl", layout="padded", micro_batch=size) for size in sizes]


def compare(args: argparse.Namespace, lengths: str) -> list[dict]:
    """All contenders on one length distribution, in turns; one row of figures each."""
    settings = contenders(args, lengths)
    runs: list[list[dict]] = [[] for _ in settings]
    for _ in range(args.rounds):
        for setting, results in zip(settings, runs):
            if results and "error" in results[-1]:
                continue
            results.append(in_own_process(setting))
    rate = matrix_rate("cpu")
    rows = [summarise(setting, results, rate) for setting, results in zip(settings, runs)]
    rivals = [row for row in rows if row["library"] == "trl" and "step_ms" in row]
    best = min((row["step_ms"] for row in rivals), default=None)
    least = min((row["processor_ms"] for row in rivals), default=None)
    expected = next((r[0]["losses"] for s, r in zip(settings, runs) if s.library == "trl" and "losses" in r[0]), None)
    for row, results in zip(rows, runs):
        if "error" in row:
            continue
        if "references" in row or args.against:
            row["relative_step_time"] = row["step_ms"] / rows[0]["step_ms"]
            row["relative_processor_time"] = row["processor_ms"] / rows[0]["processor_ms"]
        if best is not None:
            row["speedup_over_best_trl"] = best / row["step_ms"]
            row["processor_speedup_over_best_trl"] = least / row["processor_ms"]
            row["largest_loss_difference"] = max(
                abs(a - b) / max(1.0, abs(b)) for a, b in zip(results[0]["losses"], expected)
            )
    return rows


def in_own_process(setting: Setting) -> dict:
    """Run one setting as this script does under `--setting`; an error becomes a figure (out of memory is one)."""
    command = [sys.executable, __file__, "--setting", json.dumps(dataclasses.asdict(setting))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(setting))
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"exit status {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def summarise(setting: Setting, results: list[dict], rate: float) -> dict:
    """The figures of one contender, beside what it is."""
    row = {
        "library": setting.library + (f" ({Path(setting.source).parent.name})" if setting.source else ""),
        "layout": setting.layout,
        "micro_batch": setting.micro_batch,
        "lengths": Path(setting.lengths).name,
        "size": setting.size,
        "method": setting.method,
        "reference": setting.reference,
        **({} if setting.references is None else {"references": setting.references}),
    }
    if "error" in results[-1]:
        return row | {"error": results[-1]["error"]}
    return row | figures(results, rate=rate)


COLUMNS = (  # field, heading, format
    ("lengths", "lengths", "{}"),
    ("library", "library", "{}"),
    ("layout", "layout", "{}"),
    ("micro_batch", "micro-batch", "{}"),
    ("references", "references", "{}"),
    ("step_ms", "ms/step", "{:.0f}"),
    ("processor_ms", "processor ms/step", "{:.0f}"),
    ("pairs_per_second", "pairs/s", "{:.2f}"),
    ("unique_tokens_per_second", "unique tokens/s", "{:.0f}"),
    ("useful_tflops", "TFLOP/s", "{:.3f}"),
    ("fraction_of_matrix_rate", "of matrix rate", "{:.2f}"),
    ("peak_gib", "peak GiB", "{:.2f}"),
    ("compile_seconds", "compile s", "{:.1f}"),
    ("speedup_over_best_trl", "x TRL's best", "{:.2f}"),
    ("relative_step_time", "time / first", "{:.3f}"),
    ("relative_processor_time", "processor time / first", "{:.3f}"),
    ("processor_speedup_over_best_trl", "x TRL's best, by processor", "{:.2f}"),
    ("largest_loss_difference", "relative loss difference", "{:.1e}"),
)


def table(rows: list[dict], columns: tuple[tuple[str, str, str], ...] = COLUMNS) -> str:
    """The rows as a Markdown table; columns that no row has are left out."""
    columns = tuple(column for column in columns if any(column[0] in row for row in rows))
    lines = ["| " + " | ".join(heading for _, heading, _ in columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [form.format(row[name]) if row.get(name) is not None else "" for name, _, form in columns]
        lines.append("| " + " | ".join(cells) + " |" + (f" {row['error']}" if "error" in row else ""))
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Pairs per second of every contender, one group of bars for each length distribution."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "pairs_per_second" in row]
    names = list(dict.fromkeys(row["lengths"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(4.5 * len(names), 3.2), squeeze=False)
    for axis, name in zip(axes[0], names):
        own = [row for row in rows if row["lengths"] == name]
        labels = [
            f"TRL, {row['micro_batch']} a batch"
            if row["library"] == "trl"
            else f"{row['library']} {row['layout']}, {row['micro_batch']} a batch"
            for row in own
        ]
        colours = ["tab:grey" if row["library"] == "trl" else "tab:blue" for row in own]
        bars = axis.barh(labels[::-1], [row["pairs_per_second"] for row in own][::-1], color=colours[::-1])
        axis.bar_label(bars, fmt="%.2f", padding=2)
        axis.set(title=f"{name} lengths", xlabel="pairs per second")
        axis.margins(x=0.3)  # room for the numbers
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> list[dict]:
    """Compare on every length distribution, print the table, write the JSON."""
    args = parse(argv)
    if args.setting:
        print(json.dumps(measure(Setting(**json.loads(args.setting)))))
        return []
    rows = [row for lengths in args.lengths for row in compare(args, lengths)]
    print(
        f"{args.method.upper()}, {args.size} on a CPU, {args.pairs} pairs a step, reference {args.reference}, "
        f"medians of {args.rounds} x {args.steps} steps\n"
    )
    print(table(rows))
    if args.plot:
        draw(rows, args.plot)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main()
