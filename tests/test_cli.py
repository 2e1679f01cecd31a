"""The commands: what they are called, what they print, and how scripts and launchers reach them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from prefopt import DPOConfig, RewardConfig, __version__, cli
from prefopt.files import read_jsonl
from prefopt.recipes import packaged_names
from prefopt.recipes.help import WITHOUT_EFFECT
from tests.tiny_runs import tiny_recipe, write_model, write_pairs

ROOT = Path(__file__).parents[1]
PRESENT = [name for name, command in cli.COMMANDS.items() if importlib.util.find_spec(command.module) is not None]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data"), {"train": 16, "test": 4})


def test_overview_lists_every_command(capsys):
    assert cli.main([]) == 0
    overview = capsys.readouterr().out
    assert all(f"\n  {name} " in overview for name in cli.COMMANDS)


def test_overview_and_version_need_no_torch():
    code = (
        "import sys; from prefopt.cli import main; main(['--help']); main(['--version']); print('torch' in "
        "sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith(f"{__version__}\nFalse\n")


def test_unknown_command(capsys):
    assert cli.main(["wop"]) == 2
    assert capsys.readouterr().err == "prefopt: error: unknown command 'wop'; did you mean 'wpo'?\n"


@pytest.mark.parametrize("name", PRESENT)
def test_every_command_is_there_and_explains_its_keys(name, capsys):
    assert callable(cli.function_of(name))
    assert cli.main([name, "--help", "all"]) == 0
    printed = capsys.readouterr().out
    assert cli.COMMANDS[name].summary in printed
    keys = {field.name for cls in cli.arguments_of(name) for field in dataclasses.fields(cls) if field.init}
    left_out = WITHOUT_EFFECT if cli.COMMANDS[name].is_method else set()
    assert {key for key in keys if f"  --{key}" in printed.replace(" (", "\n").splitlines()} == keys - left_out


def test_help_begins_with_the_methods_own_keys_and_is_short(capsys):
    assert cli.main(["wpo", "--help"]) == 0
    usual = capsys.readouterr().out
    keys = ("max_weight", "batch_layout", "dataset_name", "model_name_or_path", "learning_rate")
    own, shared, data, model, library = (usual.index(f"\n  --{key}") for key in keys)
    assert own < shared < data < model < library
    assert usual.index("example: prefopt wpo --model_name_or_path") < own
    assert usual.index("--beta") < shared  # declared anew, with the paper's default
    assert "--hub_always_push" not in usual and "`--help all`" in usual
    assert cli.main(["wpo", "--help", "all"]) == 0
    assert "--hub_always_push" in (everything := capsys.readouterr().out)
    assert len(usual.splitlines()) < 0.6 * len(everything.splitlines())
    assert "batch_layout (one of auto, packed, padded; default: auto)" in usual


@pytest.mark.parametrize(
    ("config_class", "values"),
    [
        (DPOConfig, {"label_smoothing_factor": 0.1, "batch_eval_metrics": True, "include_for_metrics": ["loss"],
                     "eval_do_concat_batches": False, "dataloader_in_order": False, "auto_find_batch_size": True,
                     "sync_ref_model": True, "f_divergence_type": "js_divergence", "activation_offloading": True,
                     "pad_token": "<pad>", "precompute_ref_batch_size": 4, "neftune_noise_alpha": 5.0}),
        (RewardConfig, {"center_rewards_coefficient": 0.1, "chat_template_path": "x", "eos_token": "</s>"}),
    ],
)  # fmt: skip
def test_help_leaves_out_what_raises(tmp_path, config_class, values):
    """And nothing else, but for settings that only mean something together with one of these."""
    for name, value in values.items():
        assert name in WITHOUT_EFFECT
        with pytest.raises(ValueError, match=name):
            config_class(str(tmp_path), use_cpu=True, bf16=False, **{name: value})


def test_recipes_are_listed_with_a_line_each(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        name for name in packaged_names("training_configs") if not name.startswith("fragments/")
    ]
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)
    assert any(line.startswith("llama3/wpo ") and "WPO on UltraFeedback" in line for line in lines)


@pytest.mark.parametrize("name", ["generate", "rank"])
def test_flags_of_older_scripts(name, capsys):
    assert cli.main([name, "--modle", "x"]) == 2
    assert "unknown key 'modle'" in capsys.readouterr().err
    assert cli.main([name, "--model", "nowhere", "--shard_size", "many"]) == 2
    assert "shard_size: expected a whole number" in capsys.readouterr().err  # so `--model` was understood


def test_one_process_tools_take_no_launcher(capsys):
    assert cli.main(["build-pairs", "--num_processes", "2"]) == 2
    assert "runs in one process: remove num_processes" in capsys.readouterr().err


def test_launching_hands_the_rest_of_the_words_on(tmp_path, model, data, monkeypatch):
    launched = []
    monkeypatch.setattr(cli, "launch", lambda settings, words: launched.append((settings, words)) or 7)
    recipe = tiny_recipe(tmp_path, model, data, accelerate_config="cpu_ddp_2ranks")
    assert cli.main(["wpo", str(recipe), "--num_processes=2", "--beta", "0.3"]) == 7
    settings = {"accelerate_config": "cpu_ddp_2ranks", "num_processes": "2"}
    assert launched == [(settings, ["wpo", str(recipe), "--beta", "0.3"])]


def test_mistakes_are_found_before_launching(tmp_path, model, data, monkeypatch, capsys):
    monkeypatch.setattr(cli, "launch", lambda *_: pytest.fail("launched"))
    recipe = tiny_recipe(tmp_path, model, data, beta="strong")
    assert cli.main(["wpo", str(recipe), "--num_processes=2"]) == 2
    assert "beta: expected a number" in capsys.readouterr().err


def test_after_a_launch_that_a_mistake_ended_all_of_them_are_listed(tmp_path, model, data, monkeypatch, capsys):
    monkeypatch.setattr(cli, "launch", lambda *_: 2)
    recipe = tiny_recipe(tmp_path, model, data, label_smoothing=7, lora_r=8)
    assert cli.main(["wpo", str(recipe), "--num_processes=2", "--accelerate_config=cpu_ddp_2ranks"]) == 2
    printed = capsys.readouterr().err
    assert "problems of this run:" in printed and "lora_r needs use_peft: true" in printed
    assert "label_smoothing must lie in" in printed


def test_another_process_waits_before_it_speaks(monkeypatch, capsys):
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    assert cli.main(["wop"]) == 2
    assert waited == [10]


def test_a_script_is_its_command(tmp_path, model, data, monkeypatch):
    recipe = tiny_recipe(tmp_path, model, data, max_steps=1)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts" / "run_wpo.py"), str(recipe), "--seed=3"])
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert leaving.value.code == 0
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["seed"] == 3
    assert str(ROOT / "scripts") not in sys.path  # scripts/evaluate.py must not stand before a package of that name


def command(*words, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    env = {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, timeout=300, check=False)


def losses(folder):
    with open(Path(folder) / "trainer_state.json") as file:
        return [entry["loss"] for entry in json.load(file)["log_history"] if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp_2ranks", "cpu_zero3_2ranks"])
def test_two_processes_by_our_own_launcher(tmp_path, model, data, config):
    recipe = tiny_recipe(tmp_path, model, data, global_batch_size=8, max_steps=3, do_eval=True, sample_completions=2)
    alone = command("-m", "prefopt", "wpo", str(recipe), "--output_dir", str(tmp_path / "alone"))
    assert alone.returncode == 0, alone.stderr
    words = ["-m", "prefopt", "wpo", str(recipe), "--num_processes", "2", "--accelerate_config", config]
    both = command(*words, DS_ACCELERATOR="cpu")
    assert both.returncode == 0, both.stderr
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)
    assert both.stdout.count("16 rows read") == 1  # one process prints
    samples = [read_jsonl(folder / "samples.jsonl") for folder in (tmp_path / "alone", tmp_path / "out")]
    assert [row["step"] for row in samples[1]] == [0, 0, 3, 3]
    assert samples[0] == samples[1], "all ranks complete the prompts together"
    assert "2 x CPU" in (tmp_path / "out" / "README.md").read_text()
    assert f"The model is in {tmp_path / 'out'}" in both.stdout


@pytest.mark.slow
def test_a_mistake_on_two_processes_is_still_one_line(tmp_path, model, data):
    recipe = tiny_recipe(tmp_path, model, data, beta=-1)
    words = ["-m", "prefopt", "wpo", str(recipe), "--num_processes", "2", "--accelerate_config", "cpu_ddp_2ranks"]
    result = command(*words)
    assert result.returncode == 2
    assert result.stderr.count("prefopt: error:") == 1
    assert "`beta` must be positive" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [["wpo", 5000 * "x"], ["wpo", "a\0b"], ["wpo", "~nobody-here"], ["wpo", "--base_recipe", 5000 * "x"]]
)
def test_names_that_no_file_can_have_are_one_line(words, capsys):
    assert cli.main(words) == 2
    message = capsys.readouterr().err
    assert message.startswith("prefopt: error: ") and "Traceback" not in message
