"""Reference scores that come with the data and are no numbers end in one sentence, in every trainer that reads
them."""

import pytest

from prefopt.data import tokenize_pairs
from tests.tiny import tiny_tokenizer
from tests.trainers import test_multi_reference as multi_reference
from tests.trainers.pairs import make_trainer, preference_rows

VALUES = {
    "nested": [[-3.0]],
    "nested deeper": [[[-3.0], [-2.0]]],
    "text": "-3",
    "texts": ["-3"],
    "empty": [],
    "boolean": True,
    "mapping": {"a": 1.0},
    "nothing": None,
    "nothing in a list": [None],
    "not finite": float("-inf"),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("tokenised", [False, True])
def test_scores_of_one_reference_that_are_no_numbers(tmp_path, name, tokenised):
    rows = preference_rows(6)
    if tokenised:
        rows, _ = tokenize_pairs(rows, tiny_tokenizer("llama3"), max_length=None)
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        rows = rows.add_column(column, [VALUES[name]] * 6)
    with pytest.raises(ValueError, match="of the train"):
        make_trainer(tmp_path, "DPO", rows=rows, precompute_ref_log_probs=True, ref_logps_dir=str(tmp_path))


@pytest.mark.parametrize("column", ["ref_chosen_logps", "ref_rejected_counts"])
@pytest.mark.parametrize(
    "value", [[[-3.0], [-2.0], [-1.0]], "-3", ["-3", "-2", "-1"], [], [True, True, True], [float("nan")] * 3, None]
)
def test_scores_of_several_references_that_are_no_numbers(tmp_path, column, value):
    rows = multi_reference.scored_pairs(6).remove_columns(column).add_column(column, [value] * 6)
    with pytest.raises(ValueError, match="of the train"):
        multi_reference.trainer(tmp_path, rows)
