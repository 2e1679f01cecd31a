"""What a card says about prefopt, in one command: is it right (part a), and how fast is it (part b)?

    python benchmarks/gpu.py                         # both parts, about ten minutes; findings in outputs/gpu
    python benchmarks/gpu.py a --out results         # one part
    python benchmarks/gpu.py --dry_run               # every group on a CPU with tiny shapes, about a minute
    python benchmarks/gpu.py --table outputs/gpu     # the tables of docs/performance.md from the findings
    python benchmarks/gpu.py --plot docs/images/gpu.png outputs/gpu

Checks come in order of value, grouped into processes under a time limit; each finding is a JSON line that is written
as soon as it is known, so that a check that hangs or dies costs its own group at most. What a group leaves of its
time, later ones may use; one with less than 15 s is left out, with a line that says so. The exit status is 1 where a
finding of part a is wrong.

Models are built from configs with random weights: nothing is downloaded. A card with 120 GiB or more runs the 8B
shape whole; a smaller one 8 and 16 of its layers at full width, and `--table` extrapolates t32 = t16 + 2 (t16 - t8)
and says so.

A machine without a network needs wheels of what it lacks beside torch, triton, numpy and pyarrow: transformers, trl,
peft, accelerate, datasets with dill, multiprocess and xxhash, huggingface_hub with httpx2, httpcore2, anyio and h11,
tokenizers, safetensors, regex, psutil, scipy, pandas, pyyaml, filelock, jinja2, rich; in the versions of
constraints.txt. The checks of fused layers and QLoRA want liger-kernel and bitsandbytes, and are skipped without.
`pip download --no-deps --dest wheels NAME==VERSION ...` collects them; `--wheels FOLDER` installs what is there before
anything starts, and `--dry_run` on that machine says whether it suffices.

On a CPU (`--dry_run`) the same functions run with the device "cpu". What needs a card is then replaced or skipped, and
nothing else:
- variable-length attention uses the CPU's flash kernels (tests/scoring/test_attention.py runs the CUDA backend on an
  emulation of its two operators, and on fake CUDA tensors);
- FlexAttention runs uncompiled, forward only; torch.compile uses its "eager" backend;
- fused layers (Triton kernels) and QLoRA (bitsandbytes) are skipped;
- peak memory is the process's, and the profiler counts CPU time.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "src"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from benchmarks.on_gpu import findings  # noqa: E402

GROUPS = {  # part -> group -> seconds; each is a function of on_gpu/right.py or on_gpu/fast.py
    "a": {"kernels": 130, "trainers": 80, "options": 90},
    "b": {"step_prefopt": 100, "step_trl": 110, "step_recipes": 65, "attention_speed": 55},
}
LEAST = 15  # seconds with which a group is still started


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="a, b (default: both), or the findings to draw")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "outputs/gpu")), help="folder of findings"
    )
    parser.add_argument("--only", nargs="+", default=None, help="these groups only")
    parser.add_argument("--dry_run", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--wheels", type=Path, default=None, help="folder of wheels to install first")
    parser.add_argument("--table", action="store_true", help="print the tables of findings")
    parser.add_argument("--plot", type=Path, default=None, help="draw the steps of findings here")
    parser.add_argument("--group", default=None, help=argparse.SUPPRESS)  # in the processes that this script starts
    return parser.parse_args(argv)


def run_part(part: str, args: argparse.Namespace) -> None:
    """Run the groups of a part one after the other, each in a process of its own."""
    spare = 0.0
    for group, limit in GROUPS[part].items():
        if args.only and group not in args.only:
            continue
        allowed = limit + spare
        note = findings.Findings(args.out, part, group, dry_run=args.dry_run)
        if allowed < LEAST:
            note.put("group", ok=False, error=f"left out: {allowed:.0f} s are left")
            continue
        start = time.monotonic()
        error = run_group(part, group, args, allowed)
        seconds = time.monotonic() - start
        spare = allowed - seconds
        note.put("group", ok=error is None, seconds=seconds, **({} if error is None else {"error": error}))


def run_group(part: str, group: str, args: argparse.Namespace, seconds: float) -> str | None:
    """Run a group in a process of its own; return why it ended early, or None."""
    command = [sys.executable, str(Path(__file__).resolve()), part, "--group", group, "--out", str(args.out)]
    command += ["--dry_run"] if args.dry_run else []
    log = args.out / f"{group}.log"
    with log.open("w") as file:
        child = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=child_environment(), start_new_session=True
        )
        try:
            status = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # what it compiles in processes of its own as well
            child.wait()
            return f"stopped after {seconds:.0f} s; see {log.name}"
    if status == 0:
        return None
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"exit status {status}: {lines[-1] if lines else 'no output'}"[:500]


def child_environment() -> dict[str, str]:
    """The environment of a group's process."""
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    return {**defaults, **os.environ, "PREFOPT_STARTED": str(time.time())}


def run_child(args: argparse.Namespace) -> None:
    """Run one group in this process."""
    (part,) = args.what
    if part == "a":
        from benchmarks.on_gpu import right as module
    else:
        from benchmarks.on_gpu import fast as module
    from benchmarks.on_gpu.common import Card

    card = Card.dry() if args.dry_run else Card.present()
    getattr(module, args.group)(findings.Findings(args.out, part, args.group, dry_run=args.dry_run), card)


def install(wheels: Path) -> None:
    """Install all wheels of a folder, without dependencies and without a network."""
    files = sorted(str(file) for file in wheels.glob("*.whl"))
    if not files:
        raise SystemExit(f"gpu.py: {wheels} holds no wheel (*.whl).")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", *files], check=True)


def main(argv: list[str] | None = None) -> int:
    """Run the parts, or draw what they found."""
    args = parse(argv)
    if args.table or args.plot:
        found = findings.read([Path(each) for each in args.what] or [args.out])
        if args.table:
            print(findings.tables(found))
        if args.plot:
            findings.draw(found, args.plot)
        return 0
    if args.group:
        run_child(args)
        return 0
    if unknown := set(args.what) - set(GROUPS):
        raise SystemExit(f"gpu.py: there is no part {', '.join(sorted(unknown))}; the parts are a and b.")
    if args.wheels:
        install(args.wheels)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / findings.FILE).unlink(missing_ok=True)
    for part in args.what or GROUPS:
        run_part(part, args)
    wrong = [found for found in findings.read([args.out]) if not found["ok"] and found["part"] == "a"]
    print(f"{args.out / findings.FILE}: {len(wrong)} finding(s) of part a are wrong.")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
