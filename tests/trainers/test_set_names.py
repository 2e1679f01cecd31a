"""Training and evaluation sets share no namespace: an evaluation set may be called "train" in every trainer."""

import pytest

from tests.trainers import test_adversarial as adversarial
from tests.trainers import test_multi_reference as multi_reference
from tests.trainers.comparisons import dataset
from tests.trainers.pairs import make_trainer, preference_rows


@pytest.mark.parametrize("late", [False, True])
def test_cached_scores_of_an_evaluation_set_called_train_stay_with_it(tmp_path, late):
    sets = {"train": preference_rows(3, seed=1), "test": preference_rows(5, seed=2)}
    settings = {"precompute_ref_log_probs": True, "ref_logps_dir": str(tmp_path / "scores")}
    options = {} if late else {"eval_dataset": sets}
    run = make_trainer(tmp_path, rows=preference_rows(8), trainer_options=options, **settings)
    ids = list(run.train_dataset["row_id"])
    metrics = run.evaluate(sets if late else None)
    assert len(ids) == 8 and list(run.train_dataset["row_id"]) == ids
    if not late:
        assert {name: len(each) for name, each in run.eval_dataset.items()} == {"train": 3, "test": 5}
        assert not set(run.eval_dataset["train"]["row_id"]) & set(ids)
    assert {"eval_train_loss", "eval_test_loss"} <= set(metrics)
    assert run.tokenization_reports["train"].rows_in == 8


@pytest.mark.parametrize("prefix", ["train", "eval", "test"])
def test_the_prefix_of_an_evaluation_names_no_training_set(tmp_path, prefix):
    run = make_trainer(tmp_path, rows=preference_rows(8))
    run.evaluate(preference_rows(3, seed=1), metric_key_prefix=prefix)
    assert run.tokenization_reports["train"].rows_in == 8


def test_a_number_is_no_name_and_a_list_no_set(tmp_path):
    with pytest.raises(ValueError, match="An evaluation set is called 1: its name must be a string"):
        make_trainer(tmp_path, rows=preference_rows(8), trainer_options={"eval_dataset": {1: preference_rows(3)}})
    run = make_trainer(tmp_path, rows=preference_rows(8))
    with pytest.raises(ValueError, match=r"The eval set is a list; pass a datasets.Dataset"):
        run.evaluate(preference_rows(3).to_list())


def test_several_references_hold_out_training_rows_only(tmp_path):
    sets = {name: multi_reference.scored_pairs(count, seed=count) for name, count in (("train", 10), ("eval", 6))}
    run = multi_reference.trainer(tmp_path, evaluation=sets, weighting="vaw", validation_rows=4)
    assert len(run.train_dataset) == 8
    assert {name: len(each) for name, each in run.eval_dataset.items()} == {"train": 10, "eval": 6}
    weights = run.weighting.state_dict()
    run.evaluate({"train": sets["train"]})
    assert len(run.train_dataset) == 8 and run.weighting.state_dict() == weights
    named = multi_reference.trainer(tmp_path, evaluation=sets, weighting="vaw", validation_set="train")
    assert len(named.train_dataset) == 12 and named.weighting.state_dict() != weights


def test_an_evaluation_set_called_train_needs_no_adversarial_rows(tmp_path):
    human = dataset(adversarial.HUMAN)
    run = adversarial.make(tmp_path, evaluation={"train": human, "eval": human})
    assert run.data.reports["train"].rows_in == len(adversarial.ROWS)
    assert {name: len(each) for name, each in run.eval_dataset.items()} == {"train": 12, "eval": 12}
    run.evaluate(human, metric_key_prefix="train")
    assert run.data.reports["train"].rows_in == len(adversarial.ROWS)
