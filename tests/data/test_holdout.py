"""What makes two prompts the same, and that every hold-out keeps them together."""

import pytest
from datasets import Dataset

from prefopt.data import DataArguments, DataSource, hold_out, load_datasets, tokenize_pairs
from prefopt.data.holdout import fill_with_prompts, prompt_identity, prompt_name
from prefopt.files import write_jsonl
from prefopt.trainers.reference_data import hold_out_by_prompt
from tests.tiny import tiny_tokenizer

VARIANTS = ["What colour is a rose?", "what colour is a  rose?", " What colour\nis a rose? "]
ROWS = [
    {"prompt": prompt, "chosen": f" a{place}", "rejected": f" b{place}"}
    for place, prompt in enumerate([*VARIANTS, *(f"question {number}" for number in range(9))])
]


def test_white_space_case_and_form_do_not_matter_and_roles_do():
    turns = [[{"role": "user", "content": prompt}] for prompt in VARIANTS]
    assert len({prompt_identity(prompt) for prompt in [*VARIANTS, *turns]}) == 1
    assert prompt_identity([{"role": "system", "content": VARIANTS[0]}]) != prompt_identity(VARIANTS[0])
    assert len({prompt_name({"prompt": prompt}).same for prompt in VARIANTS}) == 1
    assert len({prompt_name({"prompt": prompt}).exact for prompt in VARIANTS}) == 3


@pytest.mark.parametrize("seed", range(6))
def test_no_hold_out_divides_variants_of_a_prompt(tmp_path, seed):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    tokenizer = tiny_tokenizer(None)
    tokenised, _ = tokenize_pairs(Dataset.from_list(ROWS), tokenizer, max_length=64)
    args = DataArguments([DataSource(str(tmp_path / "rows.jsonl"))], test_split_size=4, seed=seed)
    splits = [
        [[row["prompt"] for row in part] for part in load_datasets(args)],
        [[row["prompt"] for row in part] for part in hold_out(Dataset.from_list(ROWS), 4, seed=seed)],
        [
            [tokenizer.decode(row["prompt_ids"], skip_special_tokens=True) for row in part]
            for part in hold_out_by_prompt(tokenised, 4, seed, tokenizer)
        ],
    ]
    for kept, held in splits:
        assert not {prompt_identity(prompt) for prompt in kept} & {prompt_identity(prompt) for prompt in held}
        assert len(kept) + len(held) == 12


def test_prompts_without_variants_are_held_out_as_ever():
    """Seeded splits of existing runs: the rows that were held out before white space and case were ignored."""
    rows = Dataset.from_list([{"prompt": f"question {number}"} for number in range(20)])
    held = hold_out(rows, 5, seed=42)[1]["prompt"]
    assert [int(prompt.split()[1]) for prompt in held] == [0, 7, 9, 17, 19]


def test_parts_are_filled_prompt_by_prompt():
    prompts = list("aabbbcd")
    assert fill_with_prompts(prompts, [2, 3], "bacd") == [[2, 3, 4], [0, 1, 5]]
    assert fill_with_prompts(prompts, [1, 1, 1], "dc") == [[6], [5], []]
