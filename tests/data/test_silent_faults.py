"""Rows that would train on the wrong tokens without a word: each is a fault with a reason, or read as it is meant."""

import json
import time

import pytest
from datasets import Dataset

from prefopt.candidates.prompts import PromptSet, tokenize
from prefopt.data import (
    BadRow,
    DataArguments,
    DataSource,
    load_datasets,
    tokenize_comparisons,
    tokenize_pairs,
    tokenize_prompts,
)
from prefopt.data.rows import METHOD_COLUMNS, REFERENCE_COLUMNS, normalise_comparison, normalise_pair, normalise_prompt
from prefopt.files import write_jsonl
from prefopt.recipes import build, read_recipe
from prefopt.recipes.arguments import DatasetArguments
from tests.tiny import CHAT_TEMPLATES, tiny_tokenizer

CHAT = tiny_tokenizer("llama3")
PLAIN = tiny_tokenizer(None)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


U, A, B, S = turn("user", "Hi"), turn("assistant", "Blue."), turn("assistant", "Red."), turn("system", "Be brief.")
GOOD = {"prompt": [U], "chosen": [A], "rejected": [B]}


def fault_of(row, tokenizer=CHAT, tokenize=tokenize_pairs, good=GOOD):
    """Why `row` is dropped (None if it is kept), and what was found."""
    _, report = tokenize(Dataset.from_list([good, row]), tokenizer, max_length=None)
    ((reason, (_, detail)),) = list(report.examples.items()) or [(None, (0, ""))]
    return reason, detail


NO_ANSWER, REPEATS = "completion does not end with an assistant turn", "completion repeats the prompt"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": [U], "chosen": [U], "rejected": [U, A]}, NO_ANSWER),
        ({"prompt": None, "chosen": [S, U], "rejected": [S, U, A]}, "missing field"),
        ({"prompt": [U], "chosen": [A, U], "rejected": [B]}, NO_ANSWER),
        ({"prompt": [U], "chosen": [A], "rejected": [B, turn("user", "And then?")]}, NO_ANSWER),
        ({"prompt": [U], "chosen": [turn("user", "Hi "), A], "rejected": [turn("user", "Hi "), B]}, REPEATS),
        ({"prompt": [U], "chosen": [turn("user", "Hello"), A], "rejected": [B]}, REPEATS),
        ({"prompt": [U], "chosen": [S, U, A], "rejected": [S, U, B]}, REPEATS),
        ({"prompt": [S], "chosen": [U, A], "rejected": [turn("user", "Ho"), B]}, REPEATS),
        ({"prompt": [U, A], "chosen": [turn("user", "More"), A], "rejected": [turn("user", "More"), B]}, None),
    ],
)
def test_a1_only_answers_are_scored(row, reason):
    if row["prompt"] is None:
        row = {name: row[name] for name in ("chosen", "rejected")}
        with pytest.raises(BadRow, match=NO_ANSWER):
            normalise_pair(row)
        return
    assert fault_of(row)[0] == reason
    if reason is not None:
        with pytest.raises(BadRow, match=reason):
            normalise_comparison({**row, "responses": [row["chosen"], row["rejected"]], "scores": [1.0, 0.0]})


@pytest.mark.parametrize("role", ["human", "User", "gpt", "Assistant", "SYSTEM"])
def test_a1_a_role_under_another_name_is_a_fault(role):
    other = {**GOOD, "prompt": [turn("critic", "x")]}  # a role that a template may know
    reason, detail = fault_of({**GOOD, "prompt": [turn(role, "Hi")]}, good=other)
    assert reason == "wrong type" and f"the role {role!r}, which must be" in detail


def test_a1_an_empty_turn_among_answers_is_a_fault():
    chosen = [turn("assistant", " "), turn("user", "And?"), A]
    assert fault_of({**GOOD, "chosen": chosen}) == ("empty completion", "one of its assistant turns is empty")
    assert fault_of({**GOOD, "chosen": [*chosen[1:][::-1], turn("assistant", "")]})[0] == "empty completion"


def test_a1_a_string_prompt_that_no_turn_holds_is_a_fault():
    whole = {"chosen": [U, A], "rejected": [U, B]}
    assert fault_of({**whole, "prompt": "Talk like a pirate."}, good={**GOOD, "prompt": "Hi"})[0] == (
        "prompt that is in no turn"
    )
    for prompt in ("Hi", "  hi\n", "<user> Hi <assistant>", ""):
        assert normalise_pair({**whole, "prompt": prompt})["prompt"] == [U]


def test_a4_half_a_character_costs_one_row():
    half = json.dumps([turn("user", "Hi \ud83d")])
    for row in ({"prompt": half}, {"tools": json.dumps([declared("mail\ud83d", "to")])}):
        texts = {**{name: json.dumps(value) for name, value in GOOD.items()}, "tools": None}
        assert "half a character, '\\ud83d'" in fault_of({**texts, **row}, good=texts)[1]


def test_a1_a_string_prompt_at_the_beginning_of_both_answers_is_a_repetition():
    prompt = "Which colour has the sky at noon?"
    row = {"prompt": prompt, "chosen": prompt + " Blue.", "rejected": prompt + " Red."}
    with pytest.raises(BadRow, match=REPEATS):
        normalise_pair(row)
    assert normalise_pair({**row, "rejected": "Red."})["chosen"].endswith("Blue.")


@pytest.mark.parametrize("field", ["prompt", "chosen", "messages", "responses"])
def test_a4_conversations_as_strings(field):
    as_text = json.dumps([U])
    if field == "prompt":
        assert normalise_pair({**GOOD, "prompt": as_text}) == normalise_pair(GOOD)
        assert normalise_prompt({"prompt": as_text})["prompt"] == [U]
    elif field == "chosen":
        whole = {"chosen": json.dumps([U, A]), "rejected": json.dumps([U, B], indent=1)}
        assert normalise_pair(whole) == normalise_pair(GOOD)
    elif field == "messages":
        row = {"messages": json.dumps([U, A]), "rejected_response": "Red."}
        assert normalise_pair(row) == normalise_pair(GOOD)
    else:
        row = {"prompt": as_text, "responses": [json.dumps([A]), json.dumps([B])], "scores": [1.0, 0.0]}
        assert normalise_comparison(row)["responses"] == [[A], [B]]


@pytest.mark.parametrize(
    "text",
    [
        str([U]),
        "[{'content': 'Hi', 'role': 'user'}\n {'content': 'Blue.', 'role': 'assistant'}]",
        '[{"role": "user", "content": "Hi"',
        "array([{'role': 'user', 'content': 'Hi'}], dtype=object)",
        '[{"from": "human", "value": "Hi"}]',
    ],
)
def test_a4_what_looks_like_a_conversation_and_is_none_is_a_bad_row(text):
    for row in ({**GOOD, "prompt": text}, {"prompt": "Hi", "chosen": text, "rejected": "b"}):
        with pytest.raises(BadRow, match=r"conversation that is a string|wrong type"):
            normalise_pair(row)


def test_a4_other_text_in_brackets_stays_text():
    texts = (
        "[1] see the list",
        "{'a': 1}",
        "[{'x': 5}]",
        '{"city": "Köln"}',
        '[{"value": 5}] Add them.',
        '{"role": "x"} is?',
    )
    for text in texts:
        assert normalise_prompt({"prompt": text})["prompt"] == text


DROPS_REASONING = CHAT_TEMPLATES["llama3"].replace(
    "m['content'] | trim",
    "(m['content'].split('</think>') | last | trim) if m['role'] == 'assistant' else m['content']",
)
THOUGHT = "<think>The sky is clear.</think>Blue."


def reasoning_tokenizer():
    tokenizer = tiny_tokenizer("llama3")
    tokenizer.chat_template = DROPS_REASONING
    return tokenizer


@pytest.mark.parametrize(
    "chosen",
    [
        [turn("assistant", THOUGHT)],
        [turn("assistant", THOUGHT), turn("user", "Sure?"), turn("assistant", "Yes.")],
        [turn("assistant", "Blue.", reasoning_content="The sky is clear.")],
    ],
)
def test_a3_reasoning_that_the_template_deletes_is_a_fault(chosen):
    reason, detail = fault_of({**GOOD, "chosen": chosen}, reasoning_tokenizer())
    assert reason == "text lost in the chat template"
    assert "clear." in detail and "chat_template" in detail


def test_a3_pairs_that_differ_in_their_reasoning_alone_are_not_called_identical():
    row = {
        "prompt": [U],
        "chosen": [turn("assistant", THOUGHT)],
        "rejected": [turn("assistant", "<think>x</think>Blue.")],
    }
    assert fault_of(row, reasoning_tokenizer())[0] == "text lost in the chat template"
    assert fault_of(row, CHAT)[0] is None  # a template that keeps it
    spaced = {**GOOD, "chosen": [turn("assistant", "  Blue,\n\n and  more. ")]}
    assert fault_of(spaced, CHAT)[0] is None  # templates trim


def test_a3_a_template_that_leaves_out_system_turns_or_tools():
    silent = tiny_tokenizer("llama3")
    silent.chat_template = CHAT_TEMPLATES["llama3"].replace("in messages", "in messages if m['role'] != 'system'")
    reason, detail = fault_of({**GOOD, "prompt": [S, U]}, silent)
    assert reason == "text lost in the chat template" and "leaves out system turns, such as 'Be brief.'" in detail
    knows_tools = tiny_tokenizer("llama3")
    knows_tools.chat_template = "{{ tools | tojson }}" + CHAT_TEMPLATES["llama3"].replace(
        "m['content'] | trim", "m['content'] ~ m['tool_calls']"
    )
    called = call("weather", {"city": "Rome"})
    for row in (
        {**GOOD, "chosen": [called]},
        {**GOOD, "prompt": [U, called, turn("tool", "12 °C")]},
        {**GOOD, "tools": [declared("weather", "city")]},
    ):
        good = {**GOOD, "tools": None}
        assert "does not show 'weather'" in fault_of(row, good=good)[1]
        assert fault_of(row, knows_tools, good=good)[0] is None


LAST_QUESTION = (
    "{{ bos_token }}{% set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}[INST] "
    "{% if m == last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }} {% endif %}"
    "{{ m['content'] }} [/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "row"),
    [
        ("{{ bos_token }}{{ strftime_now('%S.%f') }}" + CHAT_TEMPLATES["chatml"], GOOD),
        ("{% if not add_generation_prompt %}{{ 'Done. ' }}{% endif %}" + CHAT_TEMPLATES["llama3"], GOOD),
        (LAST_QUESTION, {"prompt": [S, U], "chosen": [A, turn("user", "Sure?"), A], "rejected": [B]}),
    ],
)
def test_a3_a_prompt_that_changes_with_the_answer_is_not_scored(template, row):
    tokenizer = tiny_tokenizer("llama3")
    tokenizer.chat_template = template
    good = {**GOOD, "prompt": [turn("user", "x")], "chat_template_kwargs": None}
    with pytest.raises(ValueError, match="prompt that the chat template changes once an answer follows"):
        tokenize_pairs(Dataset.from_list([{**good, **row}]), tokenizer, max_length=None, on_bad_row="raise")
    if template == LAST_QUESTION:
        assert fault_of({**row, "chosen": [A]}, tokenizer)[0] is None


@pytest.mark.parametrize("style", ["llama3", "chatml", "gemma2", "mistral", "zephyr"])
def test_a5_a_templated_string_is_not_templated_again(style):
    tokenizer = tiny_tokenizer(style)
    rendered = tokenizer.apply_chat_template([U], add_generation_prompt=True, tokenize=False)
    rows = Dataset.from_dict({"prompt": ["Hi", rendered]})
    prompts, report = tokenize_prompts(rows, tokenizer, max_length=None, template_strings=True)
    assert (
        report.dropped == {"templated already": 1} and "prompt_format: text" in report.examples["templated already"][1]
    )
    items = [{"prompt_id": str(n), "prompt": text, "row": n} for n, text in enumerate(rows["prompt"])]
    generated = tokenize(PromptSet(items=items), tokenizer, template=True, context=None)
    assert [skipped["reason"] for skipped in generated.skipped] == ["templated already"]
    as_text = tokenize(PromptSet(items=[dict(items[1])]), tokenizer, template=False, context=None)
    assert as_text.items[0]["prompt_ids"] == prompts["prompt_ids"][0]  # one BOS, one header


@pytest.mark.parametrize("style", ["llama3", "chatml", "gemma2", "mistral", "zephyr"])
def test_a5_a_templated_pair_of_strings_ends_once(style):
    tokenizer = tiny_tokenizer(style)
    question = tokenizer.apply_chat_template([U], add_generation_prompt=True, tokenize=False)
    row = {"prompt": question}
    for name, answer in (("chosen", A), ("rejected", B)):
        row[name] = tokenizer.apply_chat_template([U, answer], tokenize=False)[len(question) :]
    (from_text,) = tokenize_pairs(Dataset.from_list([row]), tokenizer, max_length=None)[0]
    (from_messages,) = tokenize_pairs(Dataset.from_list([GOOD]), tokenizer, max_length=None)[0]
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert from_text[name] == from_messages[name]


def test_a5_messages_that_hold_the_template_are_faults():
    for bad in (
        {**GOOD, "prompt": [turn("user", "<|start_header_id|>user<|end_header_id|>\n\nHi")]},
        {**GOOD, "chosen": [turn("assistant", "Blue.<|eot_id|>")]},
    ):
        assert fault_of(bad)[0] == "templated already"
    html = {**GOOD, "chosen": [turn("assistant", "<s>struck</s> out")]}
    assert fault_of(html)[0] is None


NUMBERS = [*METHOD_COLUMNS, *REFERENCE_COLUMNS]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", NUMBERS)
def test_a8_every_number_column_is_checked(column, value):
    row = {"prompt": "Hi", "chosen": " a", "rejected": " b", column: 0.5}
    assert normalise_pair(row)[column] == 0.5
    with pytest.raises(BadRow, match=f"number not finite: `{column}`"):
        normalise_pair({**row, column: value})
    ids = {"prompt_ids": [1], "chosen_ids": [3], "rejected_ids": [4]}
    rows = [{**ids, column: 0.5}, {**ids, "chosen_ids": [5], column: value}]
    _, report = tokenize_pairs(Dataset.from_list(rows), PLAIN, max_length=None)
    assert report.dropped == {"number not finite": 1}
    if column in REFERENCE_COLUMNS:
        with pytest.raises(BadRow, match="number not finite"):
            normalise_pair({**row, column: [0.5, value]})


def test_a8_comparisons_too():
    row = {"prompt": "Hi", "responses": ["a", "b"], "scores": [1.0, 0.0], "margin": float("nan")}
    with pytest.raises(BadRow, match="number not finite: `margin` is nan"):
        normalise_comparison(row)
    tokenised = {"prompt_ids": [1], "response_ids": [[2], [3]], "scores": [1.0, 0.0]}
    rows = [{**tokenised, "margin": 1.0}, {**tokenised, "margin": float("inf")}]
    _, report = tokenize_comparisons(Dataset.from_list(rows), PLAIN, max_length=None)
    assert report.dropped == {"number not finite": 1}


@pytest.mark.parametrize(("value", "read"), [(True, True), (0, False), (None, False), ("false", None), (2, None)])
def test_a8_a_mark_is_true_or_false(value, read):
    row = {"prompt": "Hi", "responses": ["a", "b"], "scores": [1.0, 0.0], "is_adversarial": value}
    if read is not None:
        assert normalise_comparison(row)["is_adversarial"] is read
        return
    with pytest.raises(BadRow, match="wrong type: `is_adversarial` is neither true nor false"):
        normalise_comparison(row)


def call(name, arguments):
    return turn("assistant", "", tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}}])


def declared(name, *properties):
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"properties": {name: {} for name in properties}}},
    }


def arguments_of(row):
    return row["chosen"][0]["tool_calls"][0]["function"]["arguments"]


def test_a10_null_arguments_are_kept_and_those_of_other_tools_are_not():
    weather = {"city": "Köln", "unit": None}
    row = {"prompt": [U], "chosen": [call("weather", weather)], "rejected": [B]}
    assert arguments_of(normalise_pair(row)) == weather
    tools = [declared("weather", "city", "unit"), declared("mail", "to")]
    mixed = {**row, "chosen": [call("weather", {**weather, "to": None})], "tools": tools}
    assert arguments_of(normalise_pair(mixed)) == weather
    assert arguments_of(normalise_pair({**mixed, "tools": json.dumps(tools)})) == weather


REPLACED = "{{ 'x' * 100 }}"


@pytest.mark.parametrize(
    "settings",
    [
        {"chat_template": REPLACED},
        {"padding": "max_length", "max_length": 9999},
        {"return_tensors": "pt"},
        {"tokenize": False},
        {"continue_final_message": True},
        {"add_generation_prompt": False},
        {"messages": []},
        {"eos_token": "x"},
    ],
)
def test_c1_rows_may_not_set_the_parameters_of_the_function(settings):
    for given in (settings, json.dumps(settings)):
        with pytest.raises(BadRow, match=f"may not set {sorted(settings)[0]}"):
            normalise_pair({**GOOD, "chat_template_kwargs": given})
    assert normalise_pair({**GOOD, "chat_template_kwargs": {"enable_thinking": False}})["chat_template_kwargs"]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"words": "x" * 60_000, "budget": 32_768, "share": 0.5, "deep": [{"a": [1]}]}, True),
        ({"words": "x" * 70_000}, False),
        ({"words": ["x" * 30_000] * 3}, False),
        ({"w" * 70_000: 1}, False),
        ({"many": list(range(20_000))}, False),
        ({"times": 10**12}, False),
        ({"times": -(10**400)}, False),
        ({"times": float("inf")}, False),
        ({"times": float("nan")}, False),
        (json.loads('{"a":' * 40 + "1" + "}" * 40), False),
    ],
)
def test_c1_the_values_of_a_rows_settings_are_limited(settings, kept):
    row = {**GOOD, "chat_template_kwargs": settings}
    if kept:
        assert normalise_pair(row)["chat_template_kwargs"] == settings
        return
    with pytest.raises(BadRow, match="template setting that is too large") as caught:
        normalise_pair(row)
    assert len(caught.value.detail) < 120


def test_c1_a_template_that_fails_or_does_not_end_costs_one_row(monkeypatch):
    monkeypatch.setattr("prefopt.data.encoding.RENDER_SECONDS", 0.5)
    tokenizer = tiny_tokenizer("llama3")
    tokenizer.chat_template = (
        "{% if hops %}{% for a in range(hops) %}{% for b in range(hops) %}{% endfor %}{% endfor %}{% endif %}"
        "{% if divide is defined %}{{ 1 // divide }}{% endif %}" + CHAT_TEMPLATES["llama3"]
    )
    rows = [
        {**GOOD, "chat_template_kwargs": json.dumps(each)} for each in ({"hops": 99999}, {"divide": 0}, {"hops": 2})
    ]
    start = time.monotonic()
    kept, report = tokenize_pairs(Dataset.from_list(rows), tokenizer, max_length=None)
    assert time.monotonic() - start < 20
    assert report.dropped == {"refused by the chat template": 2} and len(kept) == 1


def test_d_wrong_types_inside_are_bad_rows():
    for content in ([{"type": "text", "text": 5}], [{"type": "text", "text": ["x"]}]):
        with pytest.raises(BadRow, match="a text part of `chosen` is not text"):
            normalise_pair({**GOOD, "chosen": [turn("assistant", content)]})
    strings = {"prompt": "Hi", "chosen": " a", "rejected": " b"}
    for value in ([[-1.0], [-2.0]], ["x"], {"a": 1}):
        with pytest.raises(BadRow, match="`ref_chosen_logps` is not a number"):
            normalise_pair({**strings, "ref_chosen_logps": value})
    for scores in ([[1.0], [0.0]], 3.0, "high", {"a": 1}):
        with pytest.raises(BadRow, match="`scores` is not a list of numbers"):
            normalise_comparison({"prompt": "Hi", "responses": ["a", "b"], "scores": scores})


@pytest.mark.parametrize("prompt", ["", "  ", "\n", [turn("user", " ")]])
def test_d_a_blank_prompt_is_a_bad_row(prompt):
    chosen, rejected = ([A], [B]) if isinstance(prompt, list) else (" a", " b")
    with pytest.raises(BadRow, match="empty prompt"):
        normalise_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    with pytest.raises(BadRow, match="empty prompt"):
        normalise_comparison({"prompt": prompt, "responses": [chosen, rejected], "scores": [1, 0]})


ORCA = {"system": "Be brief.", "question": "Which colour is it?", "chosen": "Blue.", "rejected": "Red."}
ALPACA = {"instruction": "Translate.", "input": "Guten Tag", "chosen": "Hello", "rejected": "Bye"}
WHOLE = {"instruction": "Hi", "chosen": [U, A], "rejected": [U, B]}


@pytest.mark.parametrize(
    ("row", "column"),
    [
        (ORCA, "system"),
        ({name: ORCA[name] for name in ("question", "chosen", "rejected")}, "question"),
        (ALPACA, "instruction"),
        ({**ALPACA, "prompt": "Translate."}, "input"),
        ({**GOOD, "context": "Once upon a time."}, "context"),
        ({"Query": "what?", "chosen": "a", "rejected": "b"}, "Query"),
        ({"user_question": "what?", "question_id": "7f", "chosen": "a", "rejected": "b"}, "user_question"),
        ({"messages": [turn("user", "what?")], "chosen": "a", "rejected": "b"}, "messages"),
        ({"messages": [turn("user", [{"type": "text", "text": "x?"}])], "chosen": "a", "rejected": "b"}, "messages"),
        ({"conversations": [{"from": "human", "value": "x?"}], "chosen": "a", "rejected": "b"}, "conversations"),
        ({**GOOD, "systemPrompt": "Be brief."}, "systemPrompt"),
        (
            {"prompt": "p", "system_prompt": "Be brief.", "responses": ["a", "b"], "scores": [1.0, 0.0]},
            "system_prompt",
        ),
    ],
)
def test_a2_an_unused_column_that_belongs_to_the_prompt_stops_the_run(tmp_path, row, column):
    tokenise = tokenize_comparisons if "responses" in row else tokenize_pairs
    with pytest.raises(ValueError, match=f"text in the column '{column}' that nothing reads.*`columns: "):
        tokenise(Dataset.from_list([row]), CHAT, max_length=None)
    if "responses" not in row:
        write_jsonl(tmp_path / "rows.jsonl", [row])
        with pytest.raises(ValueError, match=rf"rows.jsonl' .*'{column}'"):
            load_datasets(DataArguments([DataSource(str(tmp_path / "rows.jsonl"))]))


def test_a2_text_of_the_last_rows_alone_stops_the_run_too():
    rows = [
        {"prompt": f"Hi {n}", "chosen": "a", "rejected": "b", "system": "" if n < 200 else "x"} for n in range(250)
    ]
    with pytest.raises(ValueError, match="text in the column 'system' that nothing reads"):
        tokenize_pairs(Dataset.from_list(rows), PLAIN, max_length=None)


def test_a2_columns_that_say_nothing_new_are_left_alone():
    rows = [{**WHOLE, "system": "", "input": None}, {**WHOLE, "system": None, "input": " "}]
    assert fault_of(rows[0], good=rows[1])[0] is None


@pytest.mark.parametrize(
    ("row", "columns", "prompt"),
    [
        (
            ORCA,
            {"prompt": "question", "system": "system"},
            [turn("system", "Be brief."), turn("user", ORCA["question"])],
        ),
        ({**ORCA, "system": ""}, {"prompt": "question", "system": "system"}, [turn("user", ORCA["question"])]),
        (ALPACA, {"prompt": ["instruction", "input"]}, "Translate.\n\nGuten Tag"),
        ({**ALPACA, "input": ""}, {"prompt": ["instruction", "input"]}, "Translate."),
        (WHOLE, {"prompt": "instruction"}, [U]),
        ({**WHOLE, "system": "Be brief."}, {"prompt": "instruction", "system": "system"}, [S, U]),
        ({**ORCA, "context": "x"}, {"prompt": "question", "system": None, "context": None}, ORCA["question"]),
        ({"q": "Hi", "good": "a", "bad": "b"}, {"prompt": "q", "chosen": "good", "rejected": "bad"}, "Hi"),
    ],
)
def test_a2_common_layouts_are_read_by_mapping_alone(tmp_path, row, columns, prompt):
    write_jsonl(tmp_path / "rows.jsonl", [row])
    rows, _ = load_datasets(DataArguments([DataSource(str(tmp_path / "rows.jsonl"), columns=columns)]))
    assert rows[0]["prompt"] == prompt
    if isinstance(prompt, list):
        assert rows[0]["chosen"][0]["role"] == "assistant"


def test_a2_a_recipe_maps_columns_of_every_source(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [ORCA])
    write_jsonl(tmp_path / "other.jsonl", [{"prompt": "Hi", "chosen": "a", "rejected": "b"}])
    mapping = {"prompt": "question", "system": "system"}
    path, other = str(tmp_path / "train.jsonl"), str(tmp_path / "other.jsonl")
    args = DatasetArguments(
        datasets=[DataSource(path)], columns=mapping, eval_datasets={"x": path, "y": DataSource(other, columns=[])}
    )
    assert args.resolve(evaluates=True, seed=0).train[0].columns == mapping
    assert [source.train[0].columns for _, source in args.named_evaluations()] == [mapping, []]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"dataset_name: {path}\ncolumns: {{prompt: [question, system]}}\n")
    (built,) = build(read_recipe([str(recipe)], [DatasetArguments]), [DatasetArguments])
    assert built.resolve(evaluates=False, seed=0).train[0].columns == {"prompt": ["question", "system"]}
    with pytest.raises(ValueError, match="columns maps to 'promt', which nothing reads"):
        load_datasets(DataArguments([DataSource(path, columns={"promt": "question"})]))
    with pytest.raises(ValueError, match="has no column 'questions'"):
        load_datasets(DataArguments([DataSource(path, columns={"prompt": "questions"})]))


def test_a2_the_system_column_of_ms_swifts_form_is_read_by_mapping(tmp_path):
    row = {"system": "Be brief.", "messages": [U, A], "rejected_response": "Red."}
    with pytest.raises(ValueError, match="the column 'system'"):
        tokenize_pairs(Dataset.from_list([row]), CHAT, max_length=None)
    write_jsonl(tmp_path / "rows.jsonl", [row])
    rows, _ = load_datasets(DataArguments([DataSource(str(tmp_path / "rows.jsonl"), columns={"system": "system"})]))
    assert (rows[0]["prompt"], rows[0]["chosen"], rows[0]["rejected"]) == ([S, U], [A], [B])


def test_a1_a_dialogue_as_text_that_ends_with_a_human_turn():
    row = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Blue.", "rejected": " Red.\n\nHuman: And then?"}
    with pytest.raises(BadRow, match=NO_ANSWER):
        normalise_pair(row)
    with pytest.raises(BadRow, match=NO_ANSWER):
        normalise_pair({name: row["prompt"] + row[name] for name in ("chosen", "rejected")})
    assert normalise_pair({**row, "rejected": row["rejected"] + "\n\nAssistant: Green."})
    assert normalise_pair({**row, "prompt": "Quote one."})  # no dialogue


def test_a1_turns_of_others_inside_an_answer_are_not_scored():
    row = {**GOOD, "chosen": [A, turn("user", "Sure?"), turn("assistant", "Yes.")]}
    _, report = tokenize_pairs(Dataset.from_list([GOOD, row]), CHAT, max_length=None)
    assert report.skipped_turns == 1 and "only the assistant's are scored" in report.table()
    assert "turns of others" not in tokenize_pairs(Dataset.from_list([GOOD]), CHAT, max_length=None)[1].table()


@pytest.mark.parametrize("style", ["llama3", "chatml", "gemma2", "zephyr"])
def test_a5_a_question_about_special_tokens_is_a_question(style):
    text = "What does <|eot_id|> mean, and <|im_start|>, <start_of_turn>, <s> or <|user|>?"
    row = {**GOOD, "prompt": [turn("user", text)]}
    assert fault_of(row, tiny_tokenizer(style))[0] is None
