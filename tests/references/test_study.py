"""Studies for real on the CPU: tiny references of several families on real pairs, one of them damaged; and a sweep
that is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from prefopt.files import read_json, write_jsonl
from tests.references.helpers import reference
from tests.tiny_runs import pair_rows

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SIZES = (96, 48, 96)
SEED = 0


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")
def test_a_damaged_reference_is_found_and_every_weighting_survives_it(tmp_path):
    """Four families with tokenizers of their own on real pairs, one seed; the figures of three seeds are in
    docs/multi_reference.md."""
    from benchmarks.multi_reference_study import WEIGHTINGS, logged_numbers_are_finite, prepare, sweep

    started = time.monotonic()
    models, pairs = prepare(tmp_path, DATA, ["own-qwen2", "llama", "mistral", "damaged"], steps=60, scale=2.0)
    common = {"seeds": [SEED], "grid": {"mode": ["multi_dpo", "harmonic"]}}
    clean = sweep(tmp_path, "clean", models, pairs, SIZES, **common)
    told = {Path(card.name).name: card for card in clean.health}
    for name, card in told.items():
        print(
            f"{name}: {card.nats_per_byte:.2f} nats per byte, accuracy {card.accuracy:.3f}; "
            f"{card.quarantine or 'healthy'}"
        )
    assert [name for name, card in told.items() if card.quarantine] == ["damaged"]
    assert read_json(tmp_path / "clean" / "study.json")["usable"] == models[:3]
    weightings = {
        f"{w}-{mode}": {"mode": mode, "weighting": w} for w in WEIGHTINGS[1:] for mode in ("multi_dpo", "harmonic")
    }
    accept = {"training": {"accept_outliers": True}, "baselines": False}
    accepted = sweep(tmp_path, "accepted", models, pairs, SIZES, **common, **accept, runs=weightings)
    assert len(accepted.multi) == 2 + len(weightings)
    before, after = ({run.name: run for run in study.multi} for study in (clean, accepted))
    lost = {}
    for mode in ("mode=multi_dpo", "mode=harmonic"):
        for measure in ("test", "own_init", "chosen_logps"):
            values = [getattr(runs[mode], measure)[SEED] for runs in (before, after)]
            print(f"{mode}: {measure} {values[0]:.3f} without the damaged reference, {values[1]:.3f} with it")
        lost[mode] = values[0] - values[1]  # nats on the chosen test answers
    assert lost["mode=harmonic"] > 10 and lost["mode=harmonic"] > 3 * lost["mode=multi_dpo"]
    # one reference decides the harmonic mixture, and it is the damaged one; weights cannot help
    assert after["mode=harmonic"].mean_influence("harmonic_dominance") > 0.95
    assert after["arwc-multi_dpo"].influences[0].weights["damaged"] > 0.3  # unsigned confidence is no quality
    numbers = sum(logged_numbers_are_finite(tmp_path / name) for name in ("clean", "accepted"))
    print(f"{numbers} logged numbers, all finite; {time.monotonic() - started:.0f} s")


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_where_it_was(tmp_path):
    """The real command, each training a process of its own; killed without warning while the second one is at work."""
    names = []
    for style, architecture in (("chatml", "qwen2"), ("llama3", "llama")):
        ref = reference(style, architecture)
        ref.model.save_pretrained(tmp_path / style)
        ref.tokenizer.save_pretrained(tmp_path / style)
        names.append(str(tmp_path / style))
    training = {
        "model_name_or_path": names[0],
        "references": names,
        "dtype": "float32",
        "reference_dtype": "float32",
        "max_length": 200,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    write_jsonl(tmp_path / "rows.jsonl", pair_rows(40))
    study = tmp_path / "study"
    recipe = {
        "run_dir": str(study),
        "training": training,
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "seeds": [0],
        "pool_rows": 30,
        "train_rows": 12,
        "validation_rows": 8,
        "test_rows": 8,
        "grid": {"mode": ["geometric"]},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "prefopt", "sweep", str(tmp_path / "sweep.yaml")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    first, second = (study / "runs" / f"single={style}" / "seed-0" for style in ("chatml", "llama3"))
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not (study / "logs" / f"{second.relative_to(study).as_posix().replace('/', '-')}.log").exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = (first / "eval_results.json").stat().st_mtime_ns
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert (first / "eval_results.json").stat().st_mtime_ns == written
    assert (second / "eval_results.json").is_file()
    assert "| mode=geometric | 1/1 |" in (study / "table.md").read_text()
    assert not list(study.rglob("*.safetensors"))
