"""Every YAML file in the repository: recipes parse strictly and make configs, accelerate configs load."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from trl import ModelConfig

from prefopt.cli import COMMANDS, METHODS, arguments_of, method_of
from prefopt.files import read_json
from prefopt.launch import launch_words, split_launch_settings
from prefopt.memory import Launch
from prefopt.recipes import build, locate, packaged_names
from prefopt.recipes.recipe import Recipe, load_settings, parse_settings
from prefopt.run import adapter_config, batch_sizes, check_adapter_keys

ROOT = Path(__file__).parents[2]
# pipelines and studies name stages and runs, not one command's keys; their own tests read them
RECIPES = [
    name
    for name in packaged_names("training_configs")
    if not name.startswith(("fragments/", "pipelines/")) and not name.endswith("_study")
]
ACCELERATE = packaged_names("accelerate_configs")
PAPERS = {
    "mistral": {
        "beta": 0.01,
        "learning_rate": 5e-7,
        "num_train_epochs": 1,
        "max_length": 1024,
        "max_prompt_length": 512,
        "global_batch_size": 128,
    },
    "llama3_instruct": {
        "beta": 0.01,
        "learning_rate": 1e-6,
        "num_train_epochs": 2,
        "max_length": 2048,
        "max_prompt_length": 1800,
    },
    "llama3/wpo_hb_v2": {
        "dataset_name": "wzhouad/llama3-ultrafeedback-hybrid-v2",
        "seed": 1,
        "learning_rate": 1e-6,
        "max_length": 2048,
    },
    "gemma2/wpo_hb": {
        "model_name_or_path": "google/gemma-2-9b-it",
        "seed": 1,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 1,
    },
    "mistral/sppo": {
        "beta": 1e-3,
        "learning_rate": 5e-7,
        "optim": "rmsprop",
        "lr_scheduler_type": "linear",
        "global_batch_size": 64,
        "num_train_epochs": 1,
        "schedule_epochs": 18,
    },
    "llama3/sppo": {"schedule_epochs": 6, "num_train_epochs": 1},
    "gemma2/sppo": {"schedule_epochs": 1},
    "llama3/wpo_hb": {"dataset_name": "wzhouad/llama3-ultrafeedback-hybrid"},
    "mistral/wpo_hb": {"dataset_name": "wzhouad/zephyr-ultrafeedback-hybrid"},
    "llama-7b/adversarial_reward_model": {"warmup_type": "log", "warmup_steps": 100, "lr_scheduler_type": "linear"},
    "qwen2.5-0.5b/multi_reference_saferlhf_qlora": {
        "weight_decay": 0.01,
        "lora_init": "gaussian",
        "lora_r": 32,
        "lora_alpha": 16,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    },
    "qwen2.5-0.5b/multi_reference_mrpo": {
        "mode": "harmonic",
        "weighting": "arwc",
        "normalize": "none",
        "clip_to_anchor": 0.1,
        "beta": 0.1,
        "lora_r": 8,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "cosine",
        "global_batch_size": 8,
    },
    "gemma2/sppo_27b": {"beta": 1e-3, "per_device_train_batch_size": 1, "global_batch_size": 64, "max_length": 1024},
}


def read(name, *words):
    recipe_name, settings = load_settings([str(locate(name, "training_configs")), *words])
    _, settings = split_launch_settings(settings)
    method = method_of(settings)
    if importlib.util.find_spec(COMMANDS[method].module) is None:
        pytest.skip(f"{method} is not part of this version")
    classes = arguments_of(method)
    return parse_settings(recipe_name, settings, classes), classes


def test_the_folders_are_those_of_the_checkout():
    assert {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")} == set(ACCELERATE)
    assert (ROOT / "training_configs" / "llama3" / "wpo.yaml").read_text() == locate(
        "llama3/wpo", "training_configs"
    ).read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    recipe, classes = read(name)
    assert recipe.notices == []  # our own recipes use today's keys
    check_adapter_keys(recipe)
    wanted = recipe.values.get("global_batch_size", 1)
    for processes in [count for count in (1, 2, 4, 5, 8, 16) if wanted % count == 0]:
        recipe.values.update(use_cpu=True, **batch_sizes(recipe.values, classes[0], processes))
        config = build(Recipe(name, recipe.values), classes)[0]
        if "global_batch_size" in recipe.values:
            total = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
            assert total == wanted
    assert not config.push_to_hub


@pytest.mark.parametrize("name", [name for name in RECIPES if "/" in name])
def test_values_carry_their_source(name):
    path = locate(name, "training_configs")
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        key = line.split(":")[0]
        if (
            not line
            or line.startswith(("#", " ", "-"))
            or key in ("base_recipe", "method", "output_dir", "hub_model_id")
            or line.rstrip().endswith(":")
        ):
            continue
        assert "# " in line, f"{path}, line {number}: {line!r} does not say where its value comes from"


@pytest.mark.parametrize(("name", "expected"), PAPERS.items())
def test_papers_settings(name, expected):
    values = read(name)[0].values
    assert {key: values[key] for key in expected} == expected


def test_the_initial_weights_of_an_adapter_are_those_of_the_recipe():
    settings = ModelConfig(use_peft=True, lora_target_modules=["q_proj"])
    assert adapter_config(settings).init_lora_weights is True
    assert adapter_config(settings, init="gaussian").init_lora_weights == "gaussian"


def test_quantised_recipes_keep_the_papers_batches_and_data():
    plain, quantised = read("llama3/wpo")[0].values, read("llama3/wpo_qlora")[0].values
    changed = {key for key in quantised if plain.get(key) != quantised[key]}
    assert {key for key in changed if not key.startswith("lora_")} == {
        "use_peft", "load_in_4bit", "bnb_4bit_quant_type", "dtype", "learning_rate", "optim", "output_dir",
        "hub_model_id",
    }  # fmt: skip


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_config(name):
    path = locate(name, "accelerate_configs")
    load_config_from_file(str(path))
    launch = Launch.read(path)
    assert launch.batch_keys == ()
    values = yaml.safe_load(path.read_text())
    if launch.zero_stage == 3:
        own = values["deepspeed_config"].get("deepspeed_config_file")
        if own is None:
            assert values["deepspeed_config"]["zero3_save_16bit_model"] is True
        else:
            zero = read_json(ROOT / own)["zero_optimization"]
            assert zero["stage3_gather_16bit_weights_on_model_save"] is True
            assert not zero["zero_quantized_weights"] and not zero["zero_quantized_gradients"]
    assert (launch.mixed_precision == "no") == (launch.use_cpu or name.endswith("fp32"))


def test_the_named_configs_are_there():
    assert {
        "single_gpu", "multi_gpu", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_offload", "fsdp2",
        "deepspeed_zero3_multinode", "deepspeed_zero3_hpz", "fsdp2_hsdp", "deepspeed_zero3_fp32", "cpu_zero3_2ranks",
        "cpu_zero2_2ranks", "cpu_ddp_2ranks",
    } <= set(ACCELERATE)  # fmt: skip
    assert {"mistral", "llama3_instruct", "llama3/wpo", "gemma2/wpo_hb_qlora", "mistral/wpo_hb"} <= set(RECIPES)


@pytest.mark.parametrize(
    "name",
    ["llama3/wpo", "llama3/wpo.yaml", "training_configs/llama3/wpo.yaml", "./training_configs/llama3/wpo"],
)
def test_packaged_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate(name, "training_configs").read_text().startswith("# Llama3-Instruct-8B-WPO-FP")


def test_a_file_beside_us_wins_over_a_packaged_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "single_gpu").write_text("mine")
    assert locate("single_gpu", "accelerate_configs") == Path("single_gpu")


def test_unknown_names_give_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean deepspeed_zero3\?"):
        locate("deepspeed_zer3", "accelerate_configs")
    with pytest.raises(ValueError, match=r"packaged ones: .*fsdp2"):
        locate("xyz", "accelerate_configs")


def test_every_script_is_a_command():
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    expected = {f"run_{name}".replace("-", "_") for name in (*METHODS, "pipeline")}
    expected |= {name.replace("-", "_") for name in COMMANDS if name not in (*METHODS, "pipeline")}
    assert scripts == expected
    for path in (ROOT / "scripts").glob("*.py"):
        named = path.stem.removeprefix("run_").replace("_", "-")
        assert f'script("{named}")' in path.read_text()


def environment_of(name, *words):
    """What accelerate's launcher hands to the processes of a config that it has read and checked."""
    given = dict(zip(words[::2], words[1::2]))
    flags = launch_words({"accelerate_config": name, **given})
    args = accelerate_launch.launch_command_parser().parse_args([*flags, "script.py"])
    args, defaults, _ = accelerate_launch._validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)  # as `launch_command` does
    return prepare_multi_gpu_env(args) if args.use_fsdp else prepare_deepspeed_cmd_env(args)[1]


def test_hybrid_sharding_splits_a_model_over_a_node_and_copies_it_over_nodes():
    found = environment_of("fsdp2_hsdp", "num_machines", "4", "num_processes", "32")
    assert found["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
    assert (found["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"], found["PARALLELISM_CONFIG_DP_SHARD_SIZE"]) == ("4", "8")
    assert environment_of("fsdp2_hsdp")["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] == "2"
    with pytest.raises(ValueError, match="splits a model over 8 processes"):
        launch_words({"accelerate_config": "fsdp2_hsdp", "num_processes": "12"})


def test_the_second_partition_of_weights_reaches_deepspeed_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = environment_of("deepspeed_zero3_hpz", "main_process_ip", "127.0.0.1")
    assert read_json(found["ACCELERATE_DEEPSPEED_CONFIG_FILE"])["zero_optimization"]["zero_hpz_partition_size"] == 8
    monkeypatch.chdir(ROOT)
    words = launch_words({"accelerate_config": "deepspeed_zero3_hpz"})
    assert "--deepspeed_config_file" not in words  # the config's own path is right there
    for name, value in found.items():
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_")):
            monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()  # raises where the file and the accelerate config contradict each other
    assert plugin.zero_stage == 3 and plugin.zero3_init_flag
    assert plugin.deepspeed_config["zero_optimization"]["zero_quantized_gradients"] is False
