"""What users get wrong, end to end: one line that says what, where and how to mend it; status 2; nothing left behind.

Weights must not be loaded before a mistake that they do not show is found: the loader is replaced by one that fails.
"""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from prefopt import (
    GeneralPreferenceConfig,
    GeneralPreferenceTrainer,
    MultiReferenceDPOConfig,
    MultiReferenceDPOTrainer,
    RewardConfig,
    RewardTrainer,
    RRHFConfig,
    RRHFTrainer,
    WPOConfig,
    WPOTrainer,
)
from prefopt.cli import main
from prefopt.data import DataArguments, DataSource, load_datasets
from tests.tiny import tiny_model, tiny_tokenizer, write_checkpoint
from tests.tiny_runs import pair_rows, tiny_recipe, write_model, write_pairs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data"), {"train": 6, "test": 2})


@pytest.fixture
def no_weights(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", load)


def without_template(folder: Path, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = None
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def without_pad_and_end(folder: Path, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token = None
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def write(name: str, text: str):
    def prepare(folder: Path, model: Path) -> None:
        (folder / name).write_text(text)

    return prepare


def earlier_run(folder: Path, model: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "recipe.yaml").write_text("beta: 3\n")
    (folder / "out" / "model.safetensors").write_text("precious")


def earlier_checkpoint(folder: Path, model: Path) -> None:
    write_checkpoint(folder / "out" / "checkpoint-7")
    (folder / "out" / "recipe.yaml").write_text("beta: 3\nlearning_rate: 1.0\n")


def without(*parts: str, name: str = "model"):
    """Copy the model without some of its weights, or under other names."""

    def prepare(folder: Path, model: Path) -> None:
        shutil.copytree(model, folder / name)
        weights = load_file(folder / name / "model.safetensors")
        kept = {key: value for key, value in weights.items() if not any(part in key for part in parts)}
        save_file(kept, folder / name / "model.safetensors", metadata={"format": "pt"})

    return prepare


def adapter(damage=None):
    """Save an adapter on the model, and damage its weights."""

    def prepare(folder: Path, model: Path) -> None:
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder / "adapter")
        AutoTokenizer.from_pretrained(model).save_pretrained(folder / "adapter")
        path = folder / "adapter" / "adapter_model.safetensors"
        weights = damage(load_file(path)) if damage else {}
        path.unlink()
        if weights:
            save_file(weights, path)

    return prepare


def mixed_forms(folder: Path, model: Path) -> None:
    write_pairs(folder / "mixed", {"train": 3})
    write_pairs(folder / "mixed", {"test": 3}, messages=False)


def other_tokenizer(folder: Path, model: Path) -> None:
    tiny_model().save_pretrained(folder / "other")
    tiny_tokenizer("chatml").save_pretrained(folder / "other")


ROW = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
SCORED = '{{"prompt": "a", "chosen": "b", "rejected": "c", "ref_chosen_logps": {score}, "ref_rejected_logps": -4.5}}\n'
# name: (what the recipe says, how the folder is prepared, what the line must contain)
CASES = {
    "unknown key": ({"learning_rte": 1}, None, ["recipe.yaml, line", "unknown key 'learning_rte'", "'learning_rate'"]),
    "wrong type": ({"beta": "strong"}, None, ["recipe.yaml, line", "beta: expected a number, found 'strong'"]),
    "wrong choice": ({"lr_scheduler_type": "cosin"}, None, ["lr_scheduler_type", "cosine"]),
    "no model": ({"model_name_or_path": None}, None, ["model_name_or_path is missing"]),
    "missing model": ({"model_name_or_path": "./nowhere"}, None, ["model_name_or_path './nowhere'"]),
    "empty model folder": ({"model_name_or_path": "{folder}"}, None, ["holds no model"]),
    "no data": ({"dataset_name": None}, None, ["dataset_name, datasets, dataset_mixer"]),
    "missing data": ({"dataset_name": "{folder}/no.jsonl"}, None, ["no.jsonl", "no such file"]),
    "empty data": ({"dataset_name": "{folder}/rows.jsonl"}, write("rows.jsonl", ""), ["rows.jsonl", "empty"]),
    "wrong columns": (
        {"dataset_name": "{folder}/rows.jsonl"},
        write("rows.jsonl", '{"question": "a", "answer": "b"}\n'),
        ["rows.jsonl", "chosen"],
    ),
    "broken data": ({"dataset_name": "{folder}/rows.jsonl"}, write("rows.jsonl", "{not json\n"), ["rows.jsonl"]),
    "no usable row": (
        {"dataset_name": "{folder}/rows.jsonl"},
        write("rows.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "b"}\n'),
        ["No row of the train set can be used"],
    ),
    "unknown split": ({"dataset_train_split": "trian"}, None, ["no split 'trian'", "train"]),
    "no chat template": ({"model_name_or_path": "{folder}/model"}, without_template, ["chat template"]),
    "no pad token": (
        {"model_name_or_path": "{folder}/model", "dataset_name": "{folder}/rows.jsonl"},
        lambda folder, model: (without_pad_and_end(folder, model), write("rows.jsonl", ROW)(folder, model)),
        ["pad token"],
    ),
    "prompt as long as everything": ({"max_prompt_length": 96}, None, ["max_prompt_length", "96"]),
    "beta not positive": ({"beta": 0}, None, ["beta", "positive"]),
    "no output folder": ({"output_dir": None}, None, ["output_dir is missing"]),
    "another model in the folder": (
        {},
        earlier_run,
        ["already holds a trained model: replace it with --overwrite_output_dir"],
    ),
    "resuming another model": ({"resume_from_checkpoint": True}, earlier_run, ["a trained model of other settings"]),
    "another run in the folder": (
        {},
        earlier_checkpoint,
        ["reached step 7: continue it with --resume_from_checkpoint"],
    ),
    "resuming another run": (
        {"resume_from_checkpoint": True},
        earlier_checkpoint,
        ["other settings", "learning_rate was 1.0"],
    ),
    "overwriting the model": (
        {"model_name_or_path": "{folder}/model/", "output_dir": "{folder}", "overwrite_output_dir": True},
        without_template,
        ["overwrite_output_dir would remove model_name_or_path"],
    ),
    "adapter of no model": (
        {"model_name_or_path": "{folder}/adapter"},
        lambda folder, model: LoraConfig(base_model_name_or_path="./nowhere").save_pretrained(folder / "adapter"),
        ["model_name_or_path './nowhere'"],
    ),
    "resuming and overwriting": (
        {"resume_from_checkpoint": True, "overwrite_output_dir": True},
        None,
        ["give one of them"],
    ),
    "no such checkpoint": ({"resume_from_checkpoint": "{folder}/x"}, None, ["holds no whole checkpoint"]),
    "adapter on the head": (
        {"use_peft": True, "lora_target_modules": ["q_proj", "lm_head"]},
        None,
        ["recipe.yaml, line", "lm_head", "lora_modules_to_save"],
    ),
    "adapter settings without adapter": ({"lora_r": 8}, None, ["lora_r needs use_peft: true"]),
    "no pairs in a batch": (
        {"per_device_train_batch_size": 0},
        None,
        ["per_device_train_batch_size` must be at least 1"],
    ),
    "no accumulation step": (
        {"gradient_accumulation_steps": 0},
        None,
        ["gradient_accumulation_steps` must be at least 1"],
    ),
    "negative learning rate": ({"learning_rate": -1}, None, ["learning_rate"]),
    "beta without end": ({"beta": float("inf")}, None, ["beta", "positive"]),
    "compressed data cut short": (
        {"dataset_name": "{folder}/rows.jsonl.gz"},
        lambda folder, model: (folder / "rows.jsonl.gz").write_bytes(gzip.compress(1000 * ROW.encode())[:60]),
        ["rows.jsonl.gz", "could not be read"],
    ),
    "uncompressed data under a compressed name": (
        {"dataset_name": "{folder}/rows.jsonl.gz"},
        write("rows.jsonl.gz", ROW),
        ["rows.jsonl.gz", "could not be read"],
    ),
    "uneven batch": ({"global_batch_size": 0}, None, ["global_batch_size must be at least 1, not 0"]),
    "two batch sizes": (
        {"global_batch_size": 8, "gradient_accumulation_steps": 2},
        None,
        ["two ways to say one thing"],
    ),
    "attention that needs a GPU": ({"attn_implementation": "flash_attention_2"}, None, ["needs a GPU"]),
    "reference with another tokenizer": (
        {"ref_model_name_or_path": "{folder}/other"},
        other_tokenizer,
        ["ref_model_name_or_path", "has another tokenizer than model_name_or_path"],
    ),
    "settings of another adapter": (
        {"model_name_or_path": "{folder}/adapter", "use_peft": True, "lora_r": 3},
        adapter(dict),
        ["recipe.yaml, line", "lora_r is 3, and the adapter", "has 2: remove it"],
    ),
    "WPO without weights": ({"use_weighting": False}, None, ["use_weighting"]),
    "evaluation rows of another form": (
        {"dataset_name": "{folder}/mixed", "dataset_test_split": "test", "do_eval": True},
        mixed_forms,
        ["The train set holds messages and the eval set strings"],
    ),
    "streamed data": ({"dataset_streaming": True}, None, ["dataset_streaming", "only False is possible"]),
    "reference scores of other data": (
        {"precompute_ref_log_probs": True, "dataset_name": "{folder}/rows.jsonl"},
        write("rows.jsonl", SCORED.format(score='-3.5, "ref_chosen_counts": 9')),
        ["ref_chosen_logps of 9 tokens and 2 tokens to score", "other data"],
    ),
    "reference scores that are none": (
        {"precompute_ref_log_probs": True, "dataset_name": "{folder}/rows.jsonl"},
        write("rows.jsonl", SCORED.format(score="3.5")),
        ["has ref_chosen_logps 3.5, which is no sum of log-probs"],
    ),
    "scores of several references": (
        {"precompute_ref_log_probs": True, "dataset_name": "{folder}/rows.jsonl"},
        write("rows.jsonl", SCORED.format(score="[-3.5, -4.0]")),
        ["scores of several references", "multi-reference-dpo"],
    ),
    "reference scores for some rows": (
        {"precompute_ref_log_probs": True, "dataset_name": "{folder}/rows.jsonl"},
        write("rows.jsonl", SCORED.format(score="-3.5") + SCORED.format(score="null").replace('"a"', '"d"')),
        ["ref_chosen_logps"],
    ),
}
# mistakes that only the weights show
LOADED_CASES = {
    "missing weights": ({"model_name_or_path": "{folder}/model"}, without("layers.1.mlp.up"), ["lacks 1 weights"]),
    "missing weights of the reference": (
        {"ref_model_name_or_path": "{folder}/other"},
        without("layers.1", name="other"),
        ["other lacks 9 weights", "model.layers.1.input_layernorm.weight"],
    ),
    "weights of another shape": (
        {"model_init_kwargs": {"hidden_size": 64, "ignore_mismatched_sizes": True}},
        None,
        ["in another shape"],
    ),
    "unknown keyword of the model": ({"model_init_kwargs": {"foo": 1}}, None, ["cannot be loaded", "'foo'"]),
    "adapter without weights": (
        {"model_name_or_path": "{folder}/adapter"},
        adapter(),
        ["adapter holds an adapter_config.json, but no weights"],
    ),
    "adapter of another model": (
        {"model_name_or_path": "{folder}/adapter"},
        adapter(lambda weights: {name.replace("layers.1", "layers.7"): each for name, each in weights.items()}),
        ["adapter does not fit the model", "layers.1.self_attn.q_proj"],
    ),
    "adapter of another shape": (
        {"ref_model_name_or_path": "{folder}/adapter"},
        adapter(lambda weights: {name: each[:, :1].clone() for name, each in weights.items()}),
        ["adapter does not fit the model", "size mismatch"],
    ),
}


# the model in the folder has no chat template either; the attention's package is not installed
TWO_MISTAKES = ("overwriting the model",)


@pytest.mark.parametrize("name", CASES)
def test_bad_recipe(name, tmp_path, model, data, capsys, request):
    changes, prepare, expected = CASES[name]
    if prepare is not None:
        prepare(tmp_path, model)
    request.getfixturevalue("no_weights")  # after `prepare`, which may need a model
    filled = {
        key: value.format(folder=tmp_path) if isinstance(value, str) else value for key, value in changes.items()
    }
    recipe = tiny_recipe(tmp_path, model, data, **filled)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    assert main(["wpo", str(recipe)]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in printed if line.startswith("prefopt: error: ")]
    assert len(errors) == (2 if name in TWO_MISTAKES else 1)
    assert not any("Traceback" in line for line in printed)
    for words in expected:
        assert words in errors[0], errors[0]
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", LOADED_CASES)
def test_bad_weights(name, tmp_path, model, data, capfd):
    changes, prepare, expected = LOADED_CASES[name]
    if prepare is not None:
        prepare(tmp_path, model)
    filled = {
        key: value.format(folder=tmp_path) if isinstance(value, str) else value for key, value in changes.items()
    }
    assert main(["wpo", str(tiny_recipe(tmp_path, model, data, **filled))]) == 2
    printed = capfd.readouterr().err
    (line,) = [line for line in printed.splitlines() if line.startswith("prefopt: error: ")]
    assert not [words for words in expected if words not in line], line
    assert "Traceback" not in printed and not (tmp_path / "out").exists()


def test_an_adapter_may_be_the_reference(tmp_path, model, data):
    adapter(dict)(tmp_path, model)
    recipe = tiny_recipe(tmp_path, model, data, ref_model_name_or_path=str(tmp_path / "adapter"))
    assert main(["wpo", str(recipe)]) == 0


def test_all_mistakes_are_shown_at_once(tmp_path, model, data, capsys, no_weights):
    """As many lines as `prefopt check` finds problems, the same ones."""
    changes = {"learning_rte": 1, "beta": "strong", "lora_r": 8, "dataset_name": f"{tmp_path}/no.jsonl"}
    recipe = str(tiny_recipe(tmp_path, model, data, **changes))
    assert main(["wpo", recipe]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prefopt: error: ")]
    for words in ("unknown key 'learning_rte'", "beta: expected a number", "lora_r needs use_peft", "no.jsonl"):
        assert sum(words in line for line in errors) == 1, words
    assert main(["check", recipe]) == 2
    problems = capsys.readouterr().out.split("problems:")[1].strip().splitlines()
    assert sorted(line.strip(" -") for line in problems) == sorted(
        line.removeprefix("prefopt: error: ") for line in errors
    )
    assert not (tmp_path / "out").exists()


def test_good_recipe_does_load_weights(tmp_path, model, data, no_weights):
    with pytest.raises(AssertionError, match="weights were loaded"):
        main(["wpo", str(tiny_recipe(tmp_path, model, data))])


def test_missing_recipe(capsys):
    assert main(["wpo", "no/such/recipe.yaml"]) == 2
    assert "no/such/recipe.yaml is neither a file nor one of the packaged" in capsys.readouterr().err


def test_several_gpus_without_a_launcher(tmp_path, model, data, capsys, monkeypatch, no_weights):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    recipe = tiny_recipe(tmp_path, model, data, use_cpu=None)
    assert main(["wpo", str(recipe)]) == 2
    line = capsys.readouterr().err
    assert "4 GPUs are visible" in line
    assert "--num_processes 4" in line
    assert not (tmp_path / "out").exists()


def test_policy_and_reference_are_one_object(tmp_path, model, data):
    policy = AutoModelForCausalLM.from_pretrained(model)
    train, _ = load_datasets(DataArguments(train=[DataSource(str(data))]))
    args = WPOConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none")
    tokenizer = AutoTokenizer.from_pretrained(model)
    with pytest.raises(ValueError, match="same object"):
        WPOTrainer(policy, ref_model=policy, args=args, train_dataset=train, processing_class=tokenizer)


def other_view(policy):
    twin = tiny_model()
    twin.load_state_dict(policy.state_dict(), assign=True)
    return twin


def tied(policy):
    twin = tiny_model()
    twin.model.embed_tokens = policy.model.embed_tokens
    return twin


@pytest.mark.parametrize(
    ("adapted", "reference"), [(False, tied), (False, other_view), (True, lambda policy: policy.get_base_model())]
)
def test_policy_and_reference_share_weights(tmp_path, model, adapted, reference):
    """The reference would be frozen with the policy, or move with it."""
    policy = AutoModelForCausalLM.from_pretrained(model)
    if adapted:
        policy = get_peft_model(policy, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    args = WPOConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none")
    rows = Dataset.from_list(pair_rows(2))
    with pytest.raises(ValueError, match=r"`ref_model` shares .*embed_tokens.* with `model`"):
        WPOTrainer(policy, reference(policy), args, train_dataset=rows, processing_class=tiny_tokenizer())
    assert all(each.requires_grad for name, each in policy.named_parameters() if not adapted or "lora" in name)


TRAINERS = [
    (WPOTrainer, WPOConfig),
    (MultiReferenceDPOTrainer, MultiReferenceDPOConfig),
    (RewardTrainer, RewardConfig),
    (GeneralPreferenceTrainer, GeneralPreferenceConfig),
    (RRHFTrainer, RRHFConfig),
]


@pytest.mark.parametrize(("trainer_class", "config_class"), TRAINERS)
@pytest.mark.parametrize(
    ("model", "words"), [(None, "`model` is None: give a hub name"), (3, "`model` is of type int")]
)
def test_no_model(tmp_path, trainer_class, config_class, model, words):
    args = config_class(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match=words):
        trainer_class(model, args=args, train_dataset=Dataset.from_list(pair_rows(2)))


def test_a_path_is_a_folder(tmp_path, model):
    args = WPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = WPOTrainer(Path(model), args=args, train_dataset=Dataset.from_list(pair_rows(2)))
    assert type(trainer.model).__name__ == "LlamaForCausalLM"


def test_a_library_error_while_preparing_is_one_line_too(tmp_path, model, data, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{broken")
    recipe = tiny_recipe(tmp_path, model, data, model_name_or_path=str(tmp_path / "model"))
    assert main(["wpo", str(recipe)]) == 2
    printed = capsys.readouterr().err
    assert "model_name_or_path" in printed.splitlines()[-1]
    assert "Traceback" not in printed


def test_the_traceback_can_be_had(monkeypatch):
    monkeypatch.setenv("PREFOPT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown command"):
        main(["wop"])


def test_recipe_written_beside_the_model_is_never_half_there(tmp_path, model, data, monkeypatch, capsys):
    """A failure of the trainer itself (weights are loaded by then) leaves no folder either."""

    def fail(self, *args, **kwargs):
        raise ValueError("the trainer cannot be built")

    monkeypatch.setattr(WPOTrainer, "_choose_layout", fail)  # transformers has made output_dir by then
    recipe = tiny_recipe(tmp_path, model, data)
    assert main(["wpo", str(recipe)]) == 2
    assert "the trainer cannot be built" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert yaml.safe_load(recipe.read_text())["output_dir"] == str(tmp_path / "out")


def gpt2(folder, **settings):
    tokenizer = tiny_tokenizer("llama3")
    config = AutoConfig.for_model(
        "gpt2", n_embd=16, n_layer=1, n_head=2, **{"vocab_size": len(tokenizer), "n_positions": 512, **settings}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_positions": 24}, "learned 24 positions: set `max_length` to at most 24"),
        ({"vocab_size": 100}, "but the model has 100 embeddings"),
    ],
)
@pytest.mark.parametrize("command", ["wpo", "reward-model", "check"])
def test_ids_and_lengths_beyond_the_models_tables(tmp_path, data, capsys, monkeypatch, settings, words, command):
    """Found before weights are loaded: in training they are an IndexError, on a GPU a device assertion."""
    gpt2(tmp_path / "model", **settings)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    recipe = tiny_recipe(tmp_path, tmp_path / "model", data, method=None if command == "reward-model" else "wpo")
    if command == "reward-model":
        recipe.write_text(recipe.read_text().replace("max_prompt_length: 48", "pooling: last"))
    assert main([command, str(recipe)]) == 2
    printed = capsys.readouterr()
    assert words in printed.err + printed.out
    assert "Traceback" not in printed.err
