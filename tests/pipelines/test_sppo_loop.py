"""The self-play loop for real, on the CPU: a tiny chat model plays against itself under a rule."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from prefopt import cli
from prefopt.files import read_json
from prefopt.pipelines.stages import Runner
from prefopt.pipelines.state import RunLock, marked_sessions
from tests.pipelines.toy import ROOT, environment, forked, make_game, stages, words

pytestmark = pytest.mark.slow
# one small iteration, and a checkpoint every other step
SMALL = [
    "--num_iterations=1",
    "--training.num_train_epochs=2",
    "--training.save_strategy=steps",
    "--training.save_steps=2",
    "--sampling.shard_size=8",
    "--sampling.batch_size=16",
    "--evaluation.num_samples=2",
]


@pytest.fixture(scope="module")
def small_game(tmp_path_factory):
    folder = tmp_path_factory.mktemp("game") / "start"
    make_game(folder, prompts=48, held_out=16)
    return folder


def test_three_iterations_raise_the_rules_win_rate(tmp_path):
    """`prefopt pipeline` as typed: each iteration wins more often against the base; then nothing is left to do."""
    start, run_dir = tmp_path / "start", tmp_path / "run"
    make_game(start)
    command = [sys.executable, "-m", "prefopt", "pipeline", *words(start, run_dir)]
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    found = [read_json(run_dir / f"iteration-{t}" / "evaluate" / "evaluation.json") for t in (1, 2, 3)]
    rates = [0.5, *(evaluation["win_rates"]["base"]["win_rate"] for evaluation in found)]
    print(
        f"\nSPPO, win rate against base by iteration: {[round(r, 3) for r in rates[1:]]} in "
        f"{time.monotonic() - began:.0f} s"
    )
    assert all(before < after for before, after in pairwise(rates))
    assert found[2]["win_rates"]["base"]["low"] > 0.6 and found[1]["win_rates"]["previous"]["win_rate"] > 0.5
    assert found[2]["preference"]["accuracy"] > 0.7
    report = (run_dir / "report.md").read_text()
    assert "Best so far: **iteration 3**" in report and "## Iteration 2" in report
    assert (run_dir / "iteration-3" / "report" / "progress.svg").exists()
    again = subprocess.run([*command, "--dry_run"], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert again.stdout.count("  done\n") == 24, again.stdout
    changed = subprocess.run(
        [*command, "--dry_run", "--evaluation.min_win_rate=0.9"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert changed.stdout.count("again (changed: min_win_rate was None and is 0.9)") == 3
    assert changed.stdout.count("maybe (if the outcome of") == 3 and changed.stdout.count("  done\n") == 18


def test_a_kill_in_every_stage_changes_nothing(small_game, tmp_path):
    """Each stage is killed once at a random moment, with its runner or after it; the outcome is the same."""
    whole, killed = tmp_path / "whole", tmp_path / "run"
    forked(run, small_game, killed)
    killed.rename(whole)  # answers are signed with the path of their model
    undisturbed = read_json(whole / "state.json")["stages"]
    rng = random.Random()
    for name, record in undisturbed.items():
        delay = rng.uniform(0, record["seconds"])
        status = run_until_killed(small_game, killed, name, delay, with_stage=rng.random() < 0.5)
        print(f"{name}: killed after {delay:.1f} s of about {record['seconds']:.1f} s ({status})")
    forked(run, small_game, killed)
    outcome = read_json(killed / "state.json")["stages"]
    for name, record in undisturbed.items():
        assert outcome[name]["status"] == "done"
        assert {file: entry[2] for file, entry in outcome[name]["files"].items()} == {
            file: entry[2] for file, entry in record["files"].items()
        }, name


def run(start, run_dir):
    Runner(stages(start, run_dir, *SMALL), run_dir).run()


def run_until_killed(start, run_dir, name, delay, *, with_stage):
    """Run, and kill the runner (with the stage, as a machine's failure would, or alone) `delay` s into a stage."""
    log = run_dir / "logs" / f"{name.replace('/', '-')}.log"
    child = os.fork()
    if child == 0:
        os.setsid()
        try:
            run(start, run_dir)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 300
    while not log.exists() and time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return "had ended before"
        time.sleep(0.01)
    time.sleep(delay)
    if with_stage:
        for session in marked_sessions(RunLock(run_dir).mark):
            with suppress(ProcessLookupError):
                os.killpg(session, signal.SIGKILL)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "with its stage" if with_stage else "the runner alone"


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gpo", ["--training.loss_type=gpo", "--training.beta=1.0"]),
        ("dpo", ["--training.method=dpo", "--training.loss_type=sigmoid", "--training.beta=0.5"]),
        ("wpo", ["--training.method=wpo", "--training.loss_type=sigmoid", "--training.beta=0.5"]),
        ("sppo, reference scored before", ["--precompute_references=true"]),
        ("sppo against the base", ["--num_iterations=2", "--reference=base"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_methods_run_in_the_same_loop(small_game, tmp_path, method, settings):
    """One small iteration each, every stage in a process of its own; better than the base already."""
    given = {
        word.split("=")[0]: word
        for word in [*SMALL, "--training.num_train_epochs=6", "--training.save_strategy=no", *settings]
    }
    for stage in stages(small_game, tmp_path / "run", *given.values()):
        forked(cli.main, list(stage.command[1:]))
    last = sorted((tmp_path / "run").glob("iteration-*"))[-1]
    rate = read_json(last / "evaluate" / "evaluation.json")["win_rates"]["base"]["win_rate"]
    print(f"\n{method}: win rate against base {rate:.3f}")
    assert rate > 0.5


VLLM = ROOT / ".venv-vllm" / "bin" / "python"


@pytest.mark.skipif(not VLLM.exists(), reason=".ci/vllm_env.sh has not been run")
def test_the_loop_with_vllm(tmp_path, small_game_for_vllm):
    """Sampling in an environment of its own, through `launchers`; everything else here."""
    launcher = f"env VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 {VLLM} -m prefopt"
    more = [
        f"--launchers={{generate: '{launcher}', answers: '{launcher}'}}",
        "--sampling.backend=vllm",
        "--sampling.enforce_eager=true",
    ]
    kept = [word for word in SMALL if "batch_size" not in word]
    settings = [
        *kept,
        *more,
        "--sampling.max_model_len=128",
        "--sampling.dtype=float32",
        "--training.num_train_epochs=6",
    ]
    given = {word.split("=")[0]: word for word in settings}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((ROOT / "examples/self_play/recipe.yaml").read_text().replace("  batch_size: 128\n", ""))
    typed = words(small_game_for_vllm, tmp_path / "run", *given.values())
    command = [sys.executable, "-m", "prefopt", "pipeline", str(recipe), *typed[1:]]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    rate = read_json(tmp_path / "run/iteration-1/evaluate/evaluation.json")["win_rates"]["base"]["win_rate"]
    print(f"\nSPPO sampled with vLLM: win rate against base {rate:.3f}")
    assert rate > 0.5


@pytest.fixture(scope="module")
def small_game_for_vllm(tmp_path_factory):
    """The CPU engine takes heads of at least 32."""
    folder = Path(tmp_path_factory.mktemp("vllm")) / "start"
    make_game(folder, prompts=48, held_out=16, head_dim=32)
    return folder
