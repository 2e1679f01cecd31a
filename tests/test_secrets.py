"""Secrets stay in memory: no file of a run, no message and no printed config holds one."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import yaml

from prefopt import DPOConfig, RewardConfig, RRHFConfig, WPOConfig
from prefopt.arguments import is_secret, masked, remember_secrets, without_secrets
from prefopt.cli import arguments_of, main
from prefopt.recipes import read_recipe
from prefopt.recipes.recipe import resolved_yaml
from prefopt.trainers.sft import SFTConfig
from tests.tiny_runs import tiny_recipe, write_model, write_pairs

SECRET = 'a"quite/secret-Schlüssel'


@pytest.mark.parametrize(
    "key",
    ["token", "hub_token", "--hub-token", "HF_TOKEN", "api_key", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "password",
     "db_password", "Authorization", "use_auth_token", "push_to_hub_token", "client_secret", "accessToken", "hubToken",
     "openaiApiKey", "api_keys", "hub_tokens", "secrets", "credential", "OPENAI_API_KEY_2", "Set-Cookie", "basic_auth",
     "X-Amz-Signature", "pwd", "azure_account_key"],
)  # fmt: skip
def test_keys_that_hold_secrets(key):
    assert is_secret(key)


@pytest.mark.parametrize(
    "key",
    ["eos_token", "pad_token", "image_token", "key_variable", "max_tokens_per_row", "tokens_per_batch", "row_id_key",
     "max_new_tokens", "secretary", "keys", "tokens", "num_tokens", "eos_tokens", "author", "design", "adam_beta2"],
)  # fmt: skip
def test_keys_that_hold_none(key):
    assert not is_secret(key)


def test_configs_at_any_depth():
    config = {
        "model_init_kwargs": {"token": SECRET, "dtype": "auto"},
        "stages": [{"api_key": SECRET, "env": ({"HF_TOKEN": SECRET},)}],
        "words": ["prefopt", "--hub_token", SECRET, "--hub-token=" + "abcdef", "--beta", "0.1"],
        "base_url": "https://me:word@host:80/v1",
        "eos_token": "</s>",
        "token": True,
        "hub_token": None,
    }
    shown = without_secrets(config)
    assert shown == {
        "model_init_kwargs": {"dtype": "auto"},
        "stages": [{"env": ({},)}],
        "words": ["prefopt", "--hub_token", "***", "--hub-token=***", "--beta", "0.1"],
        "base_url": "https://***@host:80/v1",
        "eos_token": "</s>",
        "token": True,  # the login of this machine: no secret
        "hub_token": None,
    }
    assert config["model_init_kwargs"]["token"] == SECRET  # the config itself is unchanged


def test_texts(monkeypatch):
    remember_secrets({"judge": [{"api_key": SECRET}]})
    monkeypatch.setenv("WANDB_API_KEY", "of-the-environment")
    echoed = json.dumps({"error": f"bad key {SECRET}"}), json.dumps({"error": SECRET}, ensure_ascii=False)
    for text in (SECRET, *echoed, "in of-the-environment", "hf_" + 30 * "a", "Bearer abc.def", "--hub_token=xyz12"):
        assert "***" in masked(f"failed: {text}!")
        assert not {"quite", "secret-Schl", "environment", "aaaa", "abc.def", "xyz12"} & set(masked(text).split())
    assert SECRET not in masked(f"x{SECRET}x") and "quite" not in masked(" ".join(echoed))
    assert masked("{token: abc, dtype: auto}") == "{token: ***, dtype: auto}"
    assert (
        masked("eos_token=</s> beta=0.1 hub_token: expected text")
        == "eos_token=</s> beta=0.1 hub_token: expected text"
    )


@pytest.mark.parametrize(
    "secret",
    ["github_pat_11ABCDEFG0abcdefghij_klm", "glpat-abcdefghij1234567890", "AIzaSyA1234567890abcdefghijklmnopqrstuv",
     "gsk_abcdefghijklmnopqrstuvwxyz", "nvapi-abcdefghijklmnopqrstuvwxyz", "r8_abcdefghijklmnopqrstuvwxyz",
     "api_org_abcdefghijklmnopqrst", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abcDEF123"],
)  # fmt: skip
def test_values_that_give_themselves_away(secret):
    assert masked(f"in {secret}, say") == "in ***, say"
    assert without_secrets({"model": [secret]}) == {"model": ["***"]}


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://me:p@ss@host/x", "https://***@host/x"),
        ("https://me:pa/ss@host/x", "https://***@host/x"),
        ("s3://AKIAABCDEFGHIJKLMNOP:word@bucket", "s3://***@bucket"),
        ("https://host:80/x@main", "https://host:80/x@main"),
        ("git+https://github.com/x/y@main", "git+https://github.com/x/y@main"),
        ("https://host/x?sig=abcdef", "https://host/x?sig=***"),
    ],
)
def test_passwords_within_addresses(address, shown):
    assert masked(f"at {address} now") == f"at {shown} now"


def test_secrets_below_a_secret_key_and_numbers_are_noted():
    remember_secrets({"api_keys": ["first-value", {"second": "second-value"}], "password": 73519246, "token": True})
    assert masked("first-value, second-value, 73519246, True") == "***, ***, ***, True"
    assert masked(r"password='it\'s mine'!") == "password=***!"
    assert masked("Authorization: Basic bWU6d29yZA==") == "Authorization: Basic ***"


@pytest.mark.parametrize("config_class", [DPOConfig, WPOConfig, RewardConfig, RRHFConfig, SFTConfig])
def test_trainer_configs(tmp_path, config_class):
    args = config_class(
        str(tmp_path), hub_token=SECRET, model_init_kwargs={"token": SECRET, "dtype": "auto"}, use_cpu=True, bf16=False
    )
    for shown in (
        repr(args),
        str(args),
        str(args.to_dict()),
        str(args.to_sanitized_dict()),
        pickle.dumps(args).decode("latin1"),
    ):
        assert "secret-" not in shown
    loaded = pickle.loads(pickle.dumps(args))
    assert (loaded.hub_token, loaded.model_init_kwargs, loaded.output_dir) == (None, {"dtype": "auto"}, str(tmp_path))
    for twin in (copy.copy(args), copy.deepcopy(args), args):
        assert (twin.hub_token, twin.model_init_kwargs["token"]) == (SECRET, SECRET)  # in memory they are needed


def test_resolved_recipe():
    words = [
        "--model_init_kwargs",
        "{token: some-secret, dtype: auto}",
        "--hub_token",
        "another-secret",
        "--output_dir",
        "x",
    ]
    recipe = read_recipe(words, arguments_of("dpo"))
    assert recipe.values["model_init_kwargs"]["token"] == "some-secret"
    text = resolved_yaml(recipe, arguments_of("dpo"))
    assert "secret" not in text
    assert yaml.safe_load(text)["model_init_kwargs"] == {"dtype": "auto"}


@pytest.mark.parametrize(
    "words",
    [
        ["--hub_token", "some-secret", "more"],
        ["--model_init_kwargs", "{token: some-secret"],
        ["--hub_token=some-secret", "--ref_model_name_or_path", "some-secret"],
        ["--hub_tokn", "x", "--hub_token=some-secret"],
        ["--model_init_kwargs", "{accessToken: some-secret, dtype: x}", "--ref_model_name_or_path", "some-secret"],
        ["--hub_token", "[some-secret, 1]", "--beta", "some-secret"],
    ],
)
def test_messages(words, capsys):
    assert main(["wpo", "--model_name_or_path", "./nowhere", "--dataset_name", "x", "--output_dir", "o", *words]) == 2
    printed = capsys.readouterr().err
    assert "prefopt: error: " in printed and "some-secret" not in printed


def test_no_file_of_a_run_holds_one(tmp_path, capfd):
    model = write_model(tmp_path / "model")
    data = write_pairs(tmp_path / "data", {"train": 6, "test": 2})
    recipe = tiny_recipe(
        tmp_path, model, data, hub_token="hub-secret", model_init_kwargs={"token": "init-secret"}, max_steps=1,
        save_strategy="steps", save_steps=1, report_to=["tensorboard"],
    )  # fmt: skip
    assert main(["wpo", str(recipe)]) == 0
    printed = capfd.readouterr()
    assert "secret" not in printed.out + printed.err
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files) and any("events" in path.name for path in files)
    assert not [path for path in files if b"-secret" in path.read_bytes()]
