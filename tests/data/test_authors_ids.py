"""Token ids against those that the authors' own code made (`tests/fixtures/authors_ids/make.py` ran it)."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from prefopt import DPOConfig, MultiReferenceDPOConfig
from prefopt.data import TextMode, Truncation, tokenize_pairs
from tests.fixtures.authors_ids.make import MAX_LENGTH, MAX_PROMPT_LENGTH, STRINGS, rows
from tests.tiny import tiny_tokenizer

THEIRS = json.loads((Path(__file__).parents[1] / "fixtures/authors_ids/ids.json").read_text())
MODES = {
    "wpo": TextMode("handbook", "trl09"),
    "simpo": TextMode("handbook", "trl09"),
    "sppo": TextMode("sppo", "sppo"),
    "strings": TextMode(special_tokens="trl09"),
}
CASES = [name for name in THEIRS if name.partition("/")[0] in MODES]


def ours(name, mode, truncation_mode="trl09"):
    code, _, style = name.partition("/")
    tokenizer = tiny_tokenizer(style)
    if code == "simpo":
        tokenizer.chat_template = THEIRS["simpo_template"]
    given = [dict(zip(("prompt", "chosen", "rejected"), row)) for row in STRINGS] if code == "strings" else rows()
    dataset, _ = tokenize_pairs(
        Dataset.from_list(given),
        tokenizer,
        max_length=MAX_LENGTH,
        max_prompt_length=MAX_PROMPT_LENGTH,
        truncation_mode=truncation_mode,
        on_bad_row="raise",
        text_mode=mode,
    )
    return [
        {side: [len(row["prompt_ids"]), row["prompt_ids"] + row[f"{side}_ids"]] for side in ("chosen", "rejected")}
        for row in dataset
    ]


def differing(name, *settings):
    return sum(found != made for found, made in zip(ours(name, *settings), THEIRS[name], strict=True))


def test_the_fixture_has_what_it_is_for():
    """A BOS that a template lacks, a second BOS and end token, an empty system turn, and every kind of cut."""
    tokenizer = tiny_tokenizer("chatml")
    start = THEIRS["wpo/chatml"][0]["chosen"][1]
    assert tokenizer.decode(start).startswith("<s><|im_start|>system\n<|im_end|>")
    assert THEIRS["sppo/llama3"][0]["chosen"][1][:2] == [1, 1]
    assert THEIRS["sppo/mistral"][0]["chosen"][1][-2:] == [2, 2]
    prompts, wholes = zip(*(row["chosen"] for row in THEIRS["wpo/mistral"]))
    assert MAX_PROMPT_LENGTH in prompts
    room = MAX_LENGTH - MAX_PROMPT_LENGTH
    assert any(len(ids) - n == room and n < MAX_PROMPT_LENGTH for n, ids in zip(prompts, wholes))
    assert any(ids[0] != 1 for ids in wholes), "a cut prompt loses its BOS"


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_the_authors_code(name):
    assert ours(name, MODES[name.partition("/")[0]]) == THEIRS[name]


@pytest.mark.parametrize(
    "name, settings",
    [
        ("wpo/zephyr", (TextMode("joint", "trl09"),)),
        ("wpo/zephyr", (TextMode("handbook", "template"),)),
        ("wpo/mistral", (TextMode("handbook", "trl09"), "keep_start")),
        ("sppo/mistral", (TextMode("sppo", "trl09"),)),
        ("sppo/llama3", (TextMode("joint", "sppo"),)),
        ("strings/zephyr", (TextMode(),)),
    ],
)
def test_each_switch_matters(name, settings):
    assert differing(name, *settings) > 0


def test_trl09_cuts_by_the_limits_alone():
    cut = Truncation(10, 4, "trl09").cut
    # 3 + 8 = 11: the prompt is short, and completions keep 10 - 4 = 6 all the same (7 in our own way)
    assert cut([1, 2, 3], [list(range(8)), [9, 9]], 1) == ([1, 2, 3], [list(range(6)), [9, 9]])
    # 6 + 5 = 11: four prompt tokens are left, and the BOS is not among them; then all fits
    assert cut([1, 2, 3, 4, 5, 6], [list(range(5))], 1) == ([3, 4, 5, 6], [list(range(5))])
    with pytest.raises(ValueError, match="needs max_length and max_prompt_length"):
        Truncation(10, None, "trl09")


def test_settings_reach_the_rows(tmp_path):
    args = DPOConfig(
        tmp_path, max_length=20, max_prompt_length=10, truncation_mode="trl09", special_tokens="trl09", use_cpu=True
    )
    assert args.text_mode == TextMode("joint", "trl09")
    with pytest.raises(ValueError, match="special_tokens must be one of"):
        DPOConfig(tmp_path, special_tokens="trl08", use_cpu=True)
    with pytest.raises(ValueError, match="needs max_length and max_prompt_length"):
        DPOConfig(tmp_path, truncation_mode="trl09", use_cpu=True)
    with pytest.raises(ValueError, match="must be left alone"):
        MultiReferenceDPOConfig(tmp_path, chat_rendering="sppo", use_cpu=True)


def test_a_template_that_takes_no_system_turn_gets_none():
    tokenizer = tiny_tokenizer("gemma2")
    dataset, report = tokenize_pairs(
        Dataset.from_list(rows()[:2]), tokenizer, max_length=None, text_mode=TextMode("handbook")
    )
    assert report.rows_kept == 2
    assert tokenizer.decode(dataset[0]["prompt_ids"]).startswith("<s><start_of_turn>user")
    assert tokenizer.decode(dataset[0]["chosen_ids"]).startswith("<start_of_turn>model\nBlue is")
