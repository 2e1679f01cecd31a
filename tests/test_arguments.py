"""Settings of commands: what a field declares is what is checked, printed and hashed."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pytest

from prefopt.arguments import (
    HubArguments,
    ServerArguments,
    changed_keys,
    check_settings,
    check_together,
    default_of,
    missing,
    names_without_effect,
    setting,
    setting_changes,
)


@dataclass
class Sampling:
    backend: str = setting("local", "Where answers come from.", choices=("local", "server"))
    model: str | None = setting(None, "The model.", required=True)
    top_p: float = setting(1.0, "Nucleus.", above=0, at_most=1)
    samples: int | None = setting(None, "Answers to each prompt.", at_least=1)
    stop: list[str] = setting(help="Strings that end an answer.", factory=list)
    address: str = setting("here", "The server.", only_for={"backend": ("server",)}, decides_result=False)

    def __post_init__(self):
        check_settings(self)


@dataclass
class Served(ServerArguments):
    backend: str = "local"


def test_good_settings():
    assert Sampling(model="m").stop == []
    assert Sampling(model="m", backend="server", address="there", top_p=0.5, samples=1).samples == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "model is missing: set it in the recipe or with --model."),
        ({"model": ""}, missing("model")),
        ({"model": "m", "backend": "cloud"}, "backend must be one of local, server, not 'cloud'."),
        ({"model": "m", "top_p": 0}, "top_p is 0; it must be above 0."),
        ({"model": "m", "top_p": 1.5}, "top_p is 1.5; it must be at most 1."),
        ({"model": "m", "top_p": math.nan}, "top_p is nan; it must be above 0."),
        ({"model": "m", "samples": 0}, "samples is 0; it must be at least 1."),
        ({"model": "m", "address": "there"}, "address is only read with backend server, and that is 'local'."),
    ],
)
def test_bad_settings(given, message):
    with pytest.raises(ValueError, match=r".") as error:
        Sampling(**given)
    assert str(error.value) == message


def test_a_mixin_names_the_selectors_of_all_its_users():
    check_settings(ServerArguments(concurrency=2))  # has neither a backend nor a ranker
    with pytest.raises(ValueError, match="concurrency is only read with backend server"):
        check_settings(Served(concurrency=2))
    check_settings(Served(concurrency=2, backend="server"))


def test_two_that_need_each_other():
    check_together(Sampling(model="m", samples=2), "model", "samples")
    with pytest.raises(ValueError, match="model and samples belong together"):
        check_together(Sampling(model="m"), "model", "samples")


def test_defaults_are_made_anew():
    fields = {field.name: field for field in dataclasses.fields(Sampling)}
    assert default_of(fields["top_p"]) == 1.0
    assert default_of(fields["stop"]) == [] and default_of(fields["stop"]) is not default_of(fields["stop"])


def test_what_does_not_decide_a_result():
    assert names_without_effect(Sampling) == {"address"}
    assert names_without_effect(HubArguments, ServerArguments) >= {"push_to_hub", "base_url", "retries"}
    assert "output_format" not in names_without_effect(HubArguments)


def test_what_differs_between_two_runs():
    before, now = {"beta": 0.1, "seed": 1, "top_p": None}, {"beta": 0.2, "seed": 2, "model": "m"}
    assert changed_keys(before, now) == ["beta", "seed", "model"]
    assert setting_changes(before, now, {"seed"}) == ["beta was 0.1 and is 0.2", "model was None and is 'm'"]


def test_a_bound_of_zero_counts():
    with pytest.raises(ValueError, match="retries is -1; it must be at least 0"):
        check_settings(ServerArguments(retries=-1))
