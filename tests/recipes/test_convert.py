"""Values of recipes: what each type takes, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from transformers.trainer_utils import IntervalStrategy

from prefopt.recipes.convert import Text, convert, unknown_key


@dataclass
class Source:
    path: str
    fraction: float = 1.0


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, int, 3),
        (3.0, int, 3),
        ("1e6", int, 1_000_000),  # YAML 1.1 reads 1e6 as text
        (Text("8"), int, 8),
        ("1e-6", float, 1e-6),
        (1, float, 1.0),
        (True, bool, True),
        ("no", bool, False),
        (Text("True"), bool, True),
        (Text("0"), bool, False),
        (Text("8"), str, "8"),
        (Text("true"), str, "true"),
        (5, str, "5"),
        (None, int | None, None),
        (Text("none"), int | None, None),
        (Text("4"), int | None, 4),
        (False, IntervalStrategy | str, "no"),  # `eval_strategy: no` without quotes
        ("steps", IntervalStrategy | str, "steps"),
        (True, Literal["yes", "no"], "yes"),
        (Text("auto"), int | str | None, "auto"),
        (Text("8"), int | str | None, 8),
        ("sigmoid", list[str], ["sigmoid"]),
        (Text("sigmoid, sft"), list[str], ["sigmoid", "sft"]),
        (Text("[1, 0.5]"), list[float], [1.0, 0.5]),
        ([Text("a"), Text("b")], list[str], ["a", "b"]),
        ([Text("a"), Text("b")], str | list[str] | None, ["a", "b"]),
        (Text("{a: 1.0, b: 0.5}"), dict[str, float], {"a": 1.0, "b": 0.5}),
        (Text("{use_reentrant: false}"), dict[str, Any] | str | None, {"use_reentrant": False}),
        ([{"path": "x", "fraction": 1}], list[Source], [Source("x", 1.0)]),
        (0.1, float | int | None, 0.1),
        (20, float | int | None, 20),
    ],
)
def test_accepts(value, kind, expected):
    result = convert(value, kind)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ("many", int, "expected a whole number, found 'many'"),
        (1.5, int, "expected a whole number, found 1.5"),
        (True, int, "expected a whole number, found True"),
        (True, float, "expected a number, found True"),
        ([1], float, "expected a number"),
        (math.nan, float, "expected a number, found nan"),
        (Text("nan"), float | None, "expected a number, found 'nan'"),
        ("perhaps", bool, "expected true or false, found 'perhaps'"),
        (1, bool, "expected true or false, found 1"),
        (True, str, "expected text, found True"),
        (None, int, "expected a whole number, found nothing"),
        ({"a": 1}, list[str], "expected a list"),
        ([1], dict[str, float], "expected a mapping"),
        ("epochs", IntervalStrategy | str, "expected one of no, steps, epoch; found 'epochs'"),
        (True, IntervalStrategy | str, "expected one of no, steps, epoch; found True"),
        ([{"pth": "x"}], list[Source], "unknown key 'pth'; did you mean 'path'?"),
        ([{"fraction": 1}], list[Source], "path is missing"),
        ([{"path": "x", "fraction": "half"}], list[Source], "fraction: expected a number, found 'half'"),
        ("many", int | None, "expected a whole number"),
    ],
)
def test_refuses(value, kind, message):
    with pytest.raises(ValueError, match=r".*") as error:
        convert(value, kind)
    assert message in str(error.value)


def test_choices():
    assert convert(Text("float32"), str | None, ["float32", "bfloat16"]) == "float32"
    with pytest.raises(ValueError, match="expected one of float32, bfloat16; found 'float33'"):
        convert("float33", str | None, ["float32", "bfloat16"])


def test_long_choices_name_the_nearest():
    names = [f"optimizer_{letter}" for letter in "abcdefghijklmnop"]
    with pytest.raises(ValueError, match="found 'optimiser_c'; did you mean 'optimizer_c'"):
        convert("optimiser_c", str, names)


def test_unknown_key_without_a_near_one():
    assert unknown_key("zzz", ["beta"]) == "unknown key 'zzz'"
