"""Fuzzing: random inputs to everything that reads what others wrote, until the time is over.

    make fuzz                                  # two minutes
    make fuzz ARGS="--minutes 60 --seed 7"     # another seed, for an hour
    make fuzz ARGS="--only recipes,yaml"

Each target takes an input that hypothesis draws and checks what must hold for any: a user's mistake is a ValueError of
one line, everything else is a result with the stated property. The counts are printed at the end. A find is printed
with its smallest example, and the exit status is 1. The same seed, targets and number of rounds draw the same inputs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import hypothesis
import numpy as np
import yaml
from datasets import Dataset, disable_progress_bars
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

from prefopt.arguments import masked, without_secrets
from prefopt.candidates.formats import FORMATS, Context
from prefopt.candidates.pairs import select_pairs, win_probabilities
from prefopt.candidates.rankers.judge import verdict
from prefopt.candidates.records import check_record
from prefopt.candidates.shards import ShardPlan
from prefopt.cli import arguments_of
from prefopt.data import tokenize_pairs
from prefopt.data.rows import normalise_comparison, normalise_pair, normalise_prompt
from prefopt.files import content_hash, parse_yaml, write_json
from prefopt.recipes.recipe import load_settings, parse_settings, resolved_yaml
from prefopt.references.cache import ScoreCache, Scorer
from prefopt.scoring.plan import BatchPlan, GroupLengths
from tests.tiny import tiny_tokenizer

CLASSES = arguments_of("wpo")
KEYS = sorted({name for cls in CLASSES for name in cls.__dataclass_fields__})
FOLDER = Path(tempfile.mkdtemp(prefix="prefopt-fuzz-"))
TOKENIZERS = {style: tiny_tokenizer(style) for style in (None, "llama3", "chatml", "zephyr")}

# --- What is drawn

words = st.sampled_from(
    ["", " ", "a", "blue", "é", "𝄞", "\n", "\x00", "<|eot_id|>", "[INST]", "Human:", "</think>", "[[A]]"]
)
texts = st.one_of(st.text(max_size=20), st.lists(words, max_size=5).map("".join))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
roles = st.sampled_from(["user", "assistant", "system", "tool", "", "human"])
messages = st.fixed_dictionaries({"role": roles, "content": texts})
conversations = st.lists(messages, max_size=4)
responses = st.one_of(texts, conversations, values)


def columns(names: dict[str, Any]) -> Any:
    """Draw a row with some of the named columns, and now and then one of another name or kind."""
    optional = {name: st.one_of(kind, kind, kind, values) for name, kind in names.items()}
    rows = st.fixed_dictionaries({}, optional=optional)
    return st.one_of(
        rows, rows, st.builds(lambda row, more: {**more, **row}, rows, st.dictionaries(texts, values, max_size=2))
    )


numbers = st.one_of(st.floats(), st.integers(-5, 5), st.none(), st.lists(st.floats(), max_size=3))
pair_rows = columns(
    {
        "prompt": responses,
        "chosen": responses,
        "rejected": responses,
        "messages": conversations,
        "tools": values,
        "chat_template_kwargs": values,
        "margin": numbers,
        "chosen_win_prob": numbers,
        "score_chosen": numbers,
        "row_id": texts,
        "responses": st.lists(responses, max_size=3),
        "scores": st.lists(numbers, max_size=3),
    }
)
candidates = columns(
    {
        "text": texts,
        "source": texts,
        "k": st.integers(),
        "finish_reason": st.sampled_from(["stop", "length", None, "x"]),
        "num_tokens": st.integers(),
        "scores": st.dictionaries(texts, numbers, max_size=2),
    }
)
records = columns(
    {
        "prompt_id": texts,
        "prompt": responses,
        "candidates": st.lists(candidates, max_size=3),
        "tables": st.dictionaries(texts, st.lists(st.lists(numbers, max_size=3), max_size=3), max_size=1),
    }
)
format_rows = columns(
    dict.fromkeys(
        (
            "prompt",
            "chosen",
            "rejected",
            "query",
            "query_id",
            "instruction",
            "response",
            "golden",
            "text",
            "sample_0",
            "sample_1",
            "generate_0",
            "generate_1",
            "prompt_id",
        ),
        responses,
    )
    | {
        "responses": st.lists(responses, max_size=3),
        "completions": st.lists(values, max_size=3),
        "rm_scores": numbers,
        "score": numbers,
        "scores": st.lists(numbers, max_size=3),
        "candidates": st.lists(candidates, max_size=3),
    }
)
yaml_words = st.sampled_from(
    [
        "beta",
        "loss_type",
        "a",
        "x",
        ": ",
        ":",
        "- ",
        "[",
        "]",
        "{",
        "}",
        ",",
        "\n",
        "\n  ",
        "&a ",
        "*a",
        "<<: ",
        "!!int ",
        "!!timestamp ",
        "|",
        ">",
        "'",
        '"',
        "#",
        "@",
        "%",
        "`",
        "?",
        "---",
        "...",
        "1",
        "0x",
        "1e400",
        ".inf",
        ".nan",
        "2001-12-14",
        "no",
        "null",
        "\t",
        "=",
        "\x07",
    ]
)
yaml_texts = st.one_of(
    st.lists(yaml_words, max_size=25).map("".join), st.text(max_size=40), values.map(lambda v: yaml.safe_dump(v))
)
keys = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from(["torch_dtype", "warmup_ratio", "rpo_alpha", "base_recipe", "env", "streaming"]),
    texts,
)
typed = st.one_of(
    texts,
    yaml_texts,
    st.sampled_from(["1", "0.5", "true", "none", "nan", "inf", "[1, 2]", "{a: 1}", "-1", "1e999", "auto"]),
)
command_words = st.lists(
    st.one_of(
        st.builds(lambda key, value: f"--{key}={value}", keys, typed),
        st.builds(lambda key: f"--{key}", keys),
        typed,
        st.sampled_from(["--config", "--", "-", "quickstart", "--help", "llama3/wpo"]),
    ),
    max_size=6,
)
secret_configs = st.dictionaries(
    st.one_of(st.sampled_from(["token", "hub_token", "api_key", "HF_TOKEN", "password", "model_init_kwargs"]), texts),
    st.one_of(
        st.just("s3cr3t-value"), st.dictionaries(st.sampled_from(["token", "a"]), st.just("s3cr3t-value")), values
    ),
    max_size=4,
)

# --- What must hold


def one_line(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function; return its result, or None after a ValueError of one line that is not too long to read."""
    try:
        return function(*arguments)
    except ValueError as error:
        message = str(error)
        assert message.strip(), "a message must say something"
        assert "Traceback" not in message
        assert len(message) < 5000, f"{len(message)} characters of message"
        return None


def as_json(value: Any) -> str:
    """Write a value as JSON; NaN and infinity are no JSON."""
    return json.dumps(value, allow_nan=False)


def rows(row: dict[str, Any]) -> None:
    """A row is normalised to plain JSON, the same on a second pass, or is a bad row."""
    for normalise in (normalise_pair, normalise_prompt, normalise_comparison):
        clean = one_line(normalise, row)
        if clean is not None:
            json.dumps(clean)
            if normalise is not normalise_comparison:
                again = one_line(normalise, clean)
                assert again is None or again.get("row_id") == clean.get("row_id"), (
                    "another identity on the second pass"
                )


def templates(drawn: tuple[str | None, bool, int, int | None, str, list[tuple[Any, Any, Any]]]) -> None:
    """Every row is kept or dropped with a reason, and what is kept fits in max_length and scores something."""
    style, as_messages, max_length, max_prompt_length, mode, triples = drawn
    as_turn = (
        (lambda text, role: [{"role": role, "content": text}]) if as_messages and style else (lambda text, role: text)
    )
    data = Dataset.from_list(
        [
            {"prompt": as_turn(p, "user"), "chosen": as_turn(c, "assistant"), "rejected": as_turn(r, "assistant")}
            for p, c, r in triples
        ]
    )

    def tokenised() -> Any:
        return tokenize_pairs(
            data, TOKENIZERS[style], max_length=max_length, max_prompt_length=max_prompt_length, truncation_mode=mode
        )

    result = one_line(tokenised)
    if result is None:
        return
    kept, report = result
    assert report.rows_in == len(triples) == report.rows_kept + report.rows_dropped
    assert len(kept) == report.rows_kept
    for row in kept:
        for side in ("chosen", "rejected"):
            ids = row[f"{side}_ids"]
            assert ids and len(row["prompt_ids"]) + len(ids) <= max_length
        assert row["chosen_ids"] != row["rejected_ids"], "a pair without a difference"


def plan(drawn: tuple[list[tuple[int, int]], int, int, int, int | None, int, bool]) -> None:
    """Each group is used once an epoch over all ranks, rows fit, and all ranks run equally many micro-batches."""
    sizes, per_batch, micro_batches, world_size, capacity, seed, shuffle = drawn
    lengths = [
        GroupLengths(packed=prompt + rest, longest=prompt + rest, completions=2, first_scored=rest)
        for prompt, rest in sizes
    ]
    common = {
        "groups_per_micro_batch": per_batch,
        "micro_batches": micro_batches,
        "world_size": world_size,
        "seed": seed,
    }
    plans = [
        one_line(lambda rank: BatchPlan(lengths, rank=rank, shuffle=shuffle, max_tokens_per_row=capacity, **common), r)
        for r in range(world_size)
    ]
    if plans[0] is None:
        return
    used: Counter[int] = Counter()
    counts = set()
    for one in plans:
        batches = [batch for [batch] in one]
        counts.add(len(batches))
        for batch in batches:
            if not batch.is_filler:
                used.update(batch.indices)
            for row in batch.rows if capacity else ():
                assert sum(lengths[i].packed for i in row) <= capacity
    assert used == Counter(range(len(sizes))) and counts == {len(plans[0])}


def record_files(record: dict[str, Any]) -> None:
    """A record of candidates is complete after the check, and checking it again changes nothing."""
    clean = one_line(check_record, record, "record 1")
    if clean is not None:
        again = check_record(clean, "record 1")
        assert json.dumps(again, default=str) == json.dumps(clean, default=str)
        as_json([candidate["scores"] for candidate in clean["candidates"]])


def converters(drawn: tuple[str, str, list[dict[str, Any]], bool]) -> None:
    """What a converter reads and writes is JSON without NaN."""
    source, target, found, as_messages = drawn
    context = Context(columns=["response", "responses"], as_messages=as_messages, golden={"a": "b"})
    read, write = FORMATS[source].read, FORMATS[target].write
    assert read is not None and write is not None
    rows_read = one_line(lambda: list(read(found, context)))
    if rows_read and source not in ("records",):  # which passes rows on as they are, to be checked by their reader
        as_json(rows_read)
        if FORMATS[source].kind == FORMATS[target].kind:
            as_json(one_line(lambda: list(write(rows_read, context))))


def judge_answers(reply: str) -> None:
    """A reply holds one verdict or none."""
    found = verdict(reply)
    marks = sum(reply.count(f"[[{letter}]]") for letter in "ABC")
    assert found is None or (marks >= 1 and math.isfinite(found))
    assert marks or found is None


def pair_choice(drawn: tuple[list[str], list[float], str]) -> None:
    """Pairs name two candidates, with probabilities between 0 and 1."""
    answers, scores, policy = drawn
    pairs = one_line(lambda: select_pairs(answers, scores[: len(answers)], policy=policy))
    for pair in pairs or ():
        assert pair.chosen != pair.rejected
        assert 0 <= pair.chosen_win_prob <= 1 and 0 <= pair.rejected_win_prob <= 1
    one_line(win_probabilities, scores)


def yaml_files(text: str) -> None:
    """YAML is plain values, with an end, or a ValueError that names the document."""
    try:
        value, lines = parse_yaml(text, "THE-NAME")
    except ValueError as error:
        assert str(error).startswith("THE-NAME") and "\n" not in str(error), str(error)
        return
    assert all(isinstance(line, int) for line in lines.values())
    repr(value)


def recipes(drawn: tuple[dict[str, Any], str]) -> None:
    """A recipe is read, and its resolved form reads back as itself; or one line names the file."""
    given, text = drawn
    path = FOLDER / "recipe.yaml"
    path.write_text(text if text else yaml.safe_dump(given, allow_unicode=True), encoding="utf-8", errors="replace")
    before = dict(os.environ)
    recipe = one_line(lambda: parse_settings(*load_settings([str(path)]), CLASSES))
    os.environ.clear()
    os.environ.update(before)
    if recipe is not None and recipe.values:
        path.write_text(resolved_yaml(recipe, CLASSES), encoding="utf-8")
        again = parse_settings(*load_settings([str(path)]), CLASSES)
        kept = {key: again.values.get(key) for key in recipe.values}
        wanted = without_secrets(dict(recipe.values))
        assert all(repr(kept[key]) == repr(wanted[key]) for key in wanted if wanted[key] is not None)


def command_lines(typed_words: list[str]) -> None:
    """Words are settings or a mistake of one line."""
    before = dict(os.environ)
    one_line(lambda: parse_settings(*load_settings(typed_words), CLASSES))
    os.environ.clear()
    os.environ.update(before)


def secrets(config: dict[str, Any]) -> None:
    """No secret key survives, nothing else is lost, and masking twice is masking once."""
    shown = without_secrets(config)

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            assert not {"token", "hub_token", "api_key", "HF_TOKEN", "password"} & {
                k for k, v in value.items() if isinstance(v, str)
            }
            for item in value.values():
                walk(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)

    walk(shown)
    assert without_secrets(shown) == shown or "nan" in repr(shown)
    text = masked(repr(config))
    assert masked(text) == text


def manifests(drawn: tuple[int, int, bytes, Any]) -> None:
    """A damaged manifest of shards or of cached scores is made again, or named; it is never believed."""
    which, position, noise, value = drawn
    items = [{"prompt_id": str(number)} for number in range(4)]
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        shards = ShardPlan(items, tool="fuzz", settings={"a": 1}, output_dir=folder, shard_size=2)
        shards.work(shards.pending(), lambda shard: [dict(row) for row in shard.items])
        cache = ScoreCache(folder, Scorer("m", "w", "t", "float32"))
        cache.add(b"0" * 16, logps=-1.0, tokens=2, num_bytes=3, length=4)
        cache.flush()
        path = [
            shards.manifest_path(0),
            shards.data_path(0),
            cache.folder / "manifest.json",
            next(cache.folder.glob("*.npz")),
        ][which]
        content = path.read_bytes()
        if value is not None and which in (0, 2):
            write_json(path, value)
        else:
            cut = position % (len(content) + 1)
            path.write_bytes(content[:cut] + noise + content[cut + len(noise) :])
        damaged = path.read_bytes() != content

        def reading() -> Any:
            pending = shards.pending()
            return pending, ScoreCache(folder, Scorer("m", "w", "t", "float32")).lookup([b"0" * 16])

        result = one_line(reading)
        if result is not None and damaged and which == 1:
            assert 0 in result[0], "damaged rows were believed"


# --- Running


@dataclass(frozen=True)
class Target:
    """One kind of input: how it is drawn, what must hold, and how many are drawn in a round."""

    check: Callable[[Any], None]
    inputs: Any
    a_round: int = 200


READ = [name for name, form in FORMATS.items() if form.read is not None]
WRITTEN = [name for name, form in FORMATS.items() if form.write is not None]
triples = st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=12)
TARGETS = {
    "rows": Target(rows, pair_rows),
    "templates and truncation": Target(
        templates,
        st.tuples(
            st.sampled_from([None, "llama3", "chatml", "zephyr"]),
            st.booleans(),
            st.integers(2, 60),
            st.none() | st.integers(1, 40),
            st.sampled_from(["keep_start", "keep_end"]),
            triples,
        ),
        a_round=8,
    ),
    "plan": Target(
        plan,
        st.tuples(
            st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=30),
            st.integers(1, 4),
            st.integers(1, 3),
            st.integers(1, 4),
            st.none() | st.integers(1, 200),
            st.integers(0, 9),
            st.booleans(),
        ),
        a_round=100,
    ),
    "records": Target(record_files, records),
    "manifests": Target(
        manifests,
        st.tuples(st.integers(0, 3), st.integers(0, 10_000), st.binary(max_size=12), st.none() | values),
        a_round=60,
    ),
    "converters": Target(
        converters,
        st.tuples(st.sampled_from(READ), st.sampled_from(WRITTEN), st.lists(format_rows, max_size=3), st.booleans()),
    ),
    "judges' answers": Target(judge_answers, texts),
    "pair choice": Target(
        pair_choice,
        st.tuples(
            st.lists(texts, max_size=4),
            st.lists(st.floats(), min_size=4, max_size=4),
            st.sampled_from(["best_worst", "best_random", "x"]),
        ),
    ),
    "yaml": Target(yaml_files, yaml_texts),
    "recipes": Target(recipes, st.tuples(st.dictionaries(keys, values, max_size=4), st.just("") | yaml_texts)),
    "command lines": Target(command_lines, command_words),
    "secrets": Target(secrets, secret_configs),
}


def run_round(name: str, target: Target, seed: int, counts: Counter[str]) -> str | None:
    """Draw one round of a target's inputs; return the description of a find, if there is one."""
    last: list[Any] = [None]

    @hypothesis.seed(seed)
    @settings(
        max_examples=target.a_round,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(target.inputs)
    def check(drawn: Any) -> None:
        counts[name] += 1
        last[0] = drawn
        target.check(drawn)

    try:
        check()
    except HypothesisException:
        raise
    except Exception as error:
        where = f"{type(error).__name__}: {' '.join(str(error).split())}"
        frames = [
            f"{Path(f.filename).name}:{f.lineno}"
            for f in traceback.extract_tb(error.__traceback__)
            if "prefopt" in f.filename or "fuzz" in f.filename
        ]
        return f"{name} (seed {seed}): {where[:300]}\n    at {' > '.join(frames[-5:])}\n    with {last[0]!r:.600}"
    return None


def main() -> int:
    """Fuzz all targets in turn until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets, separated by commas: " + ", ".join(TARGETS))
    options = parser.parse_args()
    disable_progress_bars()
    np.seterr(all="ignore")  # scores near the largest float overflow, as they must
    names = [name.strip() for name in options.only.split(",") if name.strip()] or list(TARGETS)
    counts: Counter[str] = Counter()
    finds: dict[str, str] = {}
    begin, round_number = time.monotonic(), 0
    while time.monotonic() - begin < options.minutes * 60 and len(finds) < len(names):
        for name in names:
            if name not in finds and time.monotonic() - begin < options.minutes * 60:
                seed = int(content_hash(options.seed, name, round_number)[:8], 16)
                found = run_round(name, TARGETS[name], seed, counts)
                if found is not None:
                    finds[name] = found
                    print(f"FOUND {found}", flush=True)
        round_number += 1
    for name in names:
        print(f"{name:<26} {counts[name]:>10,} inputs   {'FOUND' if name in finds else 'ok'}")
    seconds = time.monotonic() - begin
    print(f"{'in all':<26} {counts.total():>10,} inputs in {seconds:.0f} s, seed {options.seed}, {len(finds)} finds")
    return 1 if finds else 0


if __name__ == "__main__":
    sys.exit(main())
