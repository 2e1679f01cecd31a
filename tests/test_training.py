"""Training from a recipe, in this process: what is kept, how it continues, and which models it starts from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt import training
from prefopt.cli import arguments_of, main
from prefopt.data import RowTokenizer
from prefopt.files import read_jsonl, write_jsonl
from prefopt.recipes import build, read_recipe
from prefopt.run import batch_sizes
from tests.tiny import tiny_model
from tests.tiny_runs import pair_rows, tiny_recipe, write_model, write_pairs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data"), {"train": 12, "test": 4})


def run(recipe, *words, command="wpo", capsys=None):
    status = main([command, str(recipe), *words])
    assert status == 0, capsys.readouterr().err if capsys else status
    return yaml.safe_load(recipe.read_text())["output_dir"]


def history(folder):
    with open(f"{folder}/trainer_state.json") as file:
        return {entry["step"]: entry["loss"] for entry in json.load(file)["log_history"] if "loss" in entry}


def test_the_report_and_the_card_that_a_run_leaves(tmp_path, model, data, capsys):
    """The page shows the recipe, the curves, the evaluation and the samples; the model card the figures."""
    settings = {"dataset_test_split": "test", "sample_completions": 2, "max_steps": 3, "eval_strategy": "steps"}
    recipe = tiny_recipe(tmp_path, model, data, eval_steps=2, **settings)
    folder = tmp_path / "out"
    run(recipe, capsys=capsys)
    assert f"The report is in {folder / 'report.html'}." in capsys.readouterr().out
    page, card = (folder / "report.md").read_text(), (folder / "README.md").read_text()
    assert "**out**: wpo, finished after 3 steps." in page and "| learning_rate | 1e-06 | 0.001 |" in page
    assert "| eval_steps | – | 2 |" in page
    assert "| train | 12 | 12 | 0 | 0 | messages |" in page and "| eval | 4 | 4 |" in page
    figures = json.loads((folder / "eval_results.json").read_text())
    assert f"| loss | {figures['eval_loss']:.4g} |" in page and f"| eval_loss | {figures['eval_loss']:.4g} |" in card
    assert [row["step"] for row in read_jsonl(folder / "samples.jsonl")] == [0, 0, 2, 2, 3, 3]
    assert "*policy*, step 0:" in page and "*policy*, step 3:" in page and "*reference*:" in page
    assert "<svg" in (folder / "report.html").read_text()
    logged = [line["loss"] for line in read_jsonl(folder / "log.jsonl") if "loss" in line]
    assert logged == list(history(folder).values())
    assert "| train | 12 | 12 | 0 | 0 |" in card and "| lr_scheduler_type | linear |" in card
    assert 'pipeline("text-generation", model="out")' in card and "huggingface.co/papers" not in card


def test_samples_need_held_out_rows_before_anything_is_written(tmp_path, model, tmp_path_factory, capsys):
    data = write_pairs(tmp_path_factory.mktemp("train-only"), {"train": 8})
    assert main(["wpo", str(tiny_recipe(tmp_path, model, data, sample_completions=2))]) == 2
    error = capsys.readouterr().err
    assert "Completions are sampled for held-out prompts" in error and not (tmp_path / "out").exists()


def test_what_is_kept_and_printed(tmp_path, model, data, capsys):
    recipe = tiny_recipe(tmp_path, model, data, do_eval=True, torch_dtype="float32", global_batch_size=4)
    folder = tmp_path / "out"
    run(recipe, capsys=capsys)
    printed = capsys.readouterr()
    assert "train: 12 rows read, 12 kept, 0 dropped, 0 cut" in printed.out
    assert "⟦" in printed.out  # one decoded sample with the scored tokens marked
    assert printed.err.count("torch_dtype is an older key; read as dtype: float32") == 1
    assert f"The model is in {folder}" in printed.out
    names = {path.name for path in folder.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "README.md",
        "recipe.yaml",
        "package_versions.json",
    } <= names
    assert {"train_results.json", "eval_results.json", "trainer_state.json"} <= names
    assert json.loads((folder / "eval_results.json").read_text())["eval_samples_per_second"] > 0
    assert "WPO" in (folder / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)


def same(one, other):
    return one == other or str(one) == str(other)  # 0 is 0.0; devices and configs compare by what they say


def test_the_resolved_recipe_is_the_same_run(tmp_path, model, data, capsys):
    recipe = tiny_recipe(tmp_path, model, data, global_batch_size=4)
    run(recipe, "--learning_rate=0.002", capsys=capsys)
    written = tmp_path / "out" / "recipe.yaml"
    resolved = yaml.safe_load(written.read_text())
    assert resolved["learning_rate"] == 0.002
    assert resolved["max_weight"] == 1.0  # a default of the method
    assert "gradient_accumulation_steps" not in resolved  # follows from the global batch
    again = read_recipe([str(written)], arguments_of("wpo"))
    assert again.notices == []
    first = read_recipe([str(recipe), "--learning_rate=0.002"], arguments_of("wpo"))
    for ours, theirs in zip(build(first, arguments_of("wpo")), build(again, arguments_of("wpo"))):
        differing = {key for key, value in vars(ours).items() if not same(vars(theirs)[key], value)}
        assert differing == set()
    first_losses = history(tmp_path / "out")
    assert main(["wpo", str(written), "--output_dir", str(tmp_path / "again")]) == 0
    assert history(tmp_path / "again") == first_losses


@pytest.mark.parametrize("killed", ["before it saved", "while it saved"])
def test_resumed_equals_uninterrupted(tmp_path, model, data, capsys, killed):
    recipe = tiny_recipe(tmp_path, model, data, max_steps=4, save_strategy="steps", save_steps=2)
    whole = run(recipe, "--output_dir", str(tmp_path / "whole")) and tmp_path / "whole"
    folder = tmp_path / "out"
    run(recipe)
    for name in ("model.safetensors", "trainer_state.json"):
        (folder / name).unlink()
    if killed == "before it saved":
        shutil.rmtree(folder / "checkpoint-4")
    else:
        for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json"):
            (folder / "checkpoint-4" / name).unlink()
    run(recipe, "--resume_from_checkpoint", "true", capsys=capsys)
    assert history(folder) == history(whole)
    ours, theirs = load_file(folder / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_rows_that_changed_since_the_checkpoint_stop_the_command(tmp_path, model, data, capsys):
    folder = Path(shutil.copytree(data, tmp_path / "rows"))
    recipe = tiny_recipe(tmp_path, model, folder, max_steps=4, save_strategy="steps", save_steps=2)
    run(recipe)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    (tmp_path / "out" / "model.safetensors").unlink()
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[1:]))
    words = ["wpo", str(recipe), "--resume_from_checkpoint", "true"]
    assert main(words) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "checkpoint-2 was made, this has changed: the training data" in told and "resume_changed" in told
    assert not (tmp_path / "out" / "checkpoint-4").exists()
    assert main([*words, "--resume_changed", "true"]) == 0


def test_resuming_a_run_that_is_through_changes_nothing(tmp_path, model, data, capsys):
    """In the middle of an epoch, too, where Trainer alone takes one more step each time."""
    recipe = tiny_recipe(
        tmp_path, model, data, max_steps=4, save_strategy="steps", save_steps=2, lr_scheduler_type="constant"
    )
    folder = tmp_path / "out"
    run(recipe)
    losses, weights = history(folder), load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()  # as if killed after the last checkpoint
    run(recipe, "--resume_from_checkpoint", "true", capsys=capsys)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert history(folder) == losses
    again = load_file(folder / "model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_a_launchers_precision_does_not_win_in_silence(tmp_path, model, data, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert main(["wpo", str(tiny_recipe(tmp_path, model, data, bf16=False))]) == 2
    assert "bf16: false, but the accelerate config says mixed_precision: bf16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_resuming_before_the_first_checkpoint_starts_at_the_beginning(tmp_path, model, data, capsys):
    run(tiny_recipe(tmp_path, model, data), "--resume_from_checkpoint", capsys=capsys)
    assert "holds no checkpoint yet" in capsys.readouterr().err


def test_overwriting(tmp_path, model, data, capsys):
    recipe = tiny_recipe(tmp_path, model, data, max_steps=1)
    run(recipe)
    first = history(tmp_path / "out")
    run(recipe, "--overwrite_output_dir", "--beta", "0.5", capsys=capsys)
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["beta"] == 0.5
    assert history(tmp_path / "out").keys() == first.keys()


@pytest.mark.parametrize(
    ("values", "processes", "expected"),
    [
        ({"global_batch_size": 128, "per_device_train_batch_size": 2}, 8, (2, 8)),  # the papers' machine
        ({"global_batch_size": 128, "per_device_train_batch_size": 2}, 1, (2, 64)),
        (
            {"global_batch_size": 64, "per_device_train_batch_size": 8},
            16,
            (4, 1),
        ),  # more processes than the batch has room for
        ({"global_batch_size": 60, "per_device_train_batch_size": 8}, 5, (6, 2)),
        ({"global_batch_size": 8}, 1, (8, 1)),  # the config's own default
    ],
)
def test_global_batch(values, processes, expected):
    sizes = batch_sizes(values, arguments_of("wpo")[0], processes)
    assert (sizes["per_device_train_batch_size"], sizes["gradient_accumulation_steps"]) == expected


def test_a_global_batch_that_does_not_divide():
    with pytest.raises(
        ValueError, match=r"64 cannot be divided evenly over 6 processes \(64 = 6 x 10 \+ 4\).*60 or 66"
    ):
        batch_sizes({"global_batch_size": 64}, arguments_of("wpo")[0], 6)


def test_more_processes_than_pairs_in_a_step():
    with pytest.raises(ValueError, match=r"4 on 6 processes leaves 4/6 of a pair for each.*6 = 1 per device") as error:
        batch_sizes({"global_batch_size": 4}, arguments_of("wpo")[0], 6)
    assert "Use at most 4 processes" in str(error.value)


def test_all_ranks_start_from_the_same_checkpoint(monkeypatch):
    monkeypatch.setattr(training, "world_size", lambda: 2)
    monkeypatch.setattr(training, "gather_object", lambda mine: [*mine, ("b", None)])
    monkeypatch.setattr(training.socket, "gethostname", lambda: "a")
    training.check_same_start(None)
    with pytest.raises(
        ValueError, match=r"on a, would start from checkpoint-8, and another, on b, from the beginning"
    ):
        training.check_same_start("out/checkpoint-8")


def test_nodes_must_see_the_folder_of_the_first_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "world_size", lambda: 2)
    monkeypatch.setattr(training, "SHARED_FOLDER_WAIT", 0.0)
    monkeypatch.setattr(training, "gather_object", lambda mine: [("a", True), ("b", mine[0][1])])
    (tmp_path / "recipe.yaml").touch()
    written = (tmp_path / "recipe.yaml").stat().st_mtime_ns
    monkeypatch.setattr(training, "broadcast_object_list", lambda _: [written])
    training.check_shared(tmp_path)
    for folder in (tmp_path / "other", tmp_path):  # nothing there, or the recipe of an earlier run
        monkeypatch.setattr(training, "broadcast_object_list", lambda _: [written + 1])
        with pytest.raises(ValueError, match=r"b does not see what a has written to output_dir .*save_strategy: 'no'"):
            training.check_shared(folder)


@pytest.mark.parametrize("command", ["wpo", "reward-model"])
def test_each_row_is_visited_once(tmp_path, model, data, capsys, monkeypatch, command):
    """Read, templated, encoded, cut and counted in one map; the trainer takes the result as it is."""
    mapped, read = [], []
    whole, one = datasets.Dataset.map, RowTokenizer.read

    def map_rows(dataset, *args, **options):
        mapped.append(len(dataset))
        return whole(dataset, *args, **options)

    def read_row(self, row, *args):
        read.append(str(row))
        return one(self, row, *args)

    monkeypatch.setattr(datasets.Dataset, "map", map_rows)
    monkeypatch.setattr(RowTokenizer, "read", read_row)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    mixer = {str(data / "train.jsonl"): 0.5, str(data / "test.jsonl"): 1.0}
    recipe = tiny_recipe(
        tmp_path, model, data, method=None, dataset_name=None, dataset_mixer=mixer, test_split_size=3, do_eval=True
    )
    if command == "reward-model":
        recipe.write_text(recipe.read_text().replace("max_prompt_length: 48", "pooling: last"))
    run(recipe, command=command, capsys=capsys)
    printed = capsys.readouterr().out
    assert "train: 7 rows read, 7 kept" in printed and "eval: 3 rows read, 3 kept" in printed
    assert mapped == [6, 4]  # half of the first source, all of the second
    assert len(read) == len(set(read)) == 10


def test_dropped_rows_are_written_with_their_reasons(tmp_path, model, capsys):
    rows = pair_rows(12)
    rows[3]["chosen"], rows[7]["chosen"] = rows[3]["rejected"], None
    write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = tiny_recipe(tmp_path, model, tmp_path / "rows.jsonl", max_steps=1)
    run(recipe, capsys=capsys)
    lines = read_jsonl(tmp_path / "out" / "dropped.jsonl")
    assert [(line["set"], line["row"], line["reason"]) for line in lines] == [
        ("train", 3, "identical completions"),
        ("train", 7, "missing field"),
    ]
    assert lines[1]["detail"] == "`chosen` is missing" and len(lines[0]["row_id"]) == 16
    write_jsonl(tmp_path / "rows.jsonl", pair_rows(12))
    run(recipe, "--overwrite_output_dir", "true", capsys=capsys)
    assert not (tmp_path / "out" / "dropped.jsonl").exists()


def test_one_file_has_no_test_split(tmp_path, model, data, capsys):
    recipe = tiny_recipe(
        tmp_path, model, data, dataset_test_split="test_prefs", do_eval=True, eval_strategy="steps", eval_steps=1
    )
    run(recipe, f"--dataset_name={data / 'train.jsonl'}", capsys=capsys)
    assert "There are no evaluation rows" in capsys.readouterr().err
    assert not (tmp_path / "out" / "eval_results.json").exists()


def test_a_file_in_a_mixer_trains_whole(tmp_path, model, data, capsys):
    mixer = {str(data / "train.jsonl"): 0.5, str(data / "test.jsonl"): 1.0}
    splits = ["train_prefs", "test_prefs"]
    recipe = tiny_recipe(tmp_path, model, data, dataset_name=None, dataset_mixer=mixer, dataset_splits=splits)
    run(recipe, capsys=capsys)
    assert "train: 10 rows read" in capsys.readouterr().out  # 6 of 12 and 4 of 4


def test_held_out_rows_stay_out_of_training_without_evaluation(tmp_path, model, data, capsys):
    run(tiny_recipe(tmp_path, model, data, do_eval=False, test_split_size=3), capsys=capsys)
    printed = capsys.readouterr().out
    assert "train: 9 rows read" in printed
    assert "eval:" not in printed
    assert not (tmp_path / "out" / "eval_results.json").exists()


def test_held_out_rows_are_evaluated(tmp_path, model, data, capsys):
    recipe = tiny_recipe(tmp_path, model, data, do_eval=True, test_split_size=3)
    run(recipe, capsys=capsys)
    assert "eval: 3 rows read" in capsys.readouterr().out


def test_several_evaluation_sets(tmp_path, model, data, capsys):
    recipe = tiny_recipe(
        tmp_path, model, data, eval_datasets={"first": str(data), "second": {"path": str(data), "split": "train"}}
    )
    run(recipe, capsys=capsys)
    metrics = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert {"eval_first_rewards/accuracies", "eval_second_rewards/accuracies"} <= set(metrics)


def test_a_reference_of_its_own(tmp_path, model, data, capsys):
    other = tmp_path / "other"
    tiny_model(seed=1).save_pretrained(other)
    run(tiny_recipe(tmp_path, model, data), f"--ref_model_name_or_path={other}", capsys=capsys)
    with open(tmp_path / "out" / "trainer_state.json") as file:
        first = json.load(file)["log_history"][0]
    assert first["rewards/chosen"] != 0  # the policy is not its own reference


def test_the_recipes_chat_template(tmp_path, model, data, capsys):
    template = "{% for m in messages %}!{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    run(tiny_recipe(tmp_path, model, data, chat_template=template), capsys=capsys)
    assert "prompt\n!question" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template


def test_lora(tmp_path, model, data, capsys):
    run(tiny_recipe(tmp_path, model, data, use_peft=True, lora_r=2, lora_target_modules="q_proj"), capsys=capsys)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert saved
    assert all("q_proj.lora_" in name for name in saved)


def test_an_adapter_is_trained_on_from_where_it_is(tmp_path, model, data, capsys):
    torch.manual_seed(3)
    trained = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    trained.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "adapter")
    run(tiny_recipe(tmp_path, tmp_path / "adapter", data), capsys=capsys)
    assert "is an adapter: it is trained on" in capsys.readouterr().err
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    change = max((after[name] - before[name]).abs().max().item() for name in before)
    assert 0 < change < 0.05
    with open(tmp_path / "out" / "trainer_state.json") as file:
        assert json.load(file)["log_history"][0]["rewards/chosen"] == 0  # its frozen copy is the reference


def test_nothing_is_pushed_without_a_login(tmp_path, model, data, capsys, monkeypatch):
    monkeypatch.setattr("prefopt.training.get_token", lambda: None)
    run(tiny_recipe(tmp_path, model, data, push_to_hub=True, hub_model_id="me/model"), capsys=capsys)
    assert "Not pushed: no hub login was found" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_pushing_comes_after_everything_is_on_disk(tmp_path, model, data, monkeypatch):
    seen = []

    def push(trainer, *args, **kwargs):
        seen.append(
            (trainer.args.hub_model_id, (tmp_path / "out" / "model.safetensors").exists(), trainer.args.push_to_hub)
        )

    monkeypatch.setattr("transformers.Trainer.push_to_hub", push)
    run(tiny_recipe(tmp_path, model, data, push_to_hub=True, hub_model_id="me/model", hub_token="t"))
    assert seen == [("me/model", True, False)]
    assert "hub_token" not in (tmp_path / "out" / "recipe.yaml").read_text()


def test_a_librarys_error_in_mid_training_keeps_its_traceback(tmp_path, model, data, monkeypatch):
    def fail_with_value(*args, **kwargs):
        return int("x" * 3)

    monkeypatch.setattr("torch.optim.AdamW.step", fail_with_value)
    with pytest.raises(RuntimeError, match="an error of a library"):
        main(["wpo", str(tiny_recipe(tmp_path, model, data, optim="adamw_torch"))])
