"""A run that is resumed with other data, tokenizer, template, policy or reference stops and says what has changed."""

import json

import pytest
from peft import LoraConfig

from prefopt.trainers.checkpoints import FILES_RECORD
from prefopt.trainers.saving import METHOD_STATE_FILE
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers import test_multi_reference as multi_reference
from tests.trainers.pairs import make_trainer, preference_rows

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}


def run(tmp_path, *, rows=None, model=None, reference=None, tokenizer=None, **settings):
    options = {"ref_model": reference} if reference is not None else {}
    trainer = make_trainer(
        tmp_path, "DPO", model=model or tiny_model(seed=1), rows=rows or preference_rows(16),
        trainer_options=options, **{**SAVING, **settings},
    )  # fmt: skip
    if tokenizer is not None:
        trainer.processing_class = tokenizer
    return trainer


def resume(trainer):
    return trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")


def changed_rows():
    rows = preference_rows(16).to_list()
    rows[5]["chosen"][0]["content"] += " indeed"
    return preference_rows(16).from_list(rows)


def other_template():
    tokenizer = tiny_tokenizer("llama3")
    tokenizer.chat_template += " "
    return tokenizer


CHANGES = {
    "the training data": lambda: {"rows": changed_rows()},
    "the chat template": lambda: {"tokenizer": other_template()},
    "the tokenizer": lambda: {"tokenizer": tiny_tokenizer("chatml")},
    "the model that is trained": lambda: {"model": tiny_model(seed=2), "reference": tiny_model(seed=3)},
    "the reference": lambda: {"reference": tiny_model(seed=4)},
}


def counted(model, readings):
    """The model, which adds to `readings` whenever all of its weights are read for a fingerprint."""
    read = model.state_dict

    def state_dict(*args, keep_vars=False, **kwargs):
        readings.extend([model] if keep_vars else [])
        return read(*args, keep_vars=keep_vars, **kwargs)

    model.state_dict = state_dict
    return model


@pytest.mark.parametrize("own", [False, True], ids=["the policy is the reference", "another reference"])
def test_cached_scores_and_the_comparison_read_the_weights_once(tmp_path, own):
    cached = {"precompute_ref_log_probs": True, "ref_logps_dir": str(tmp_path / "scores")}
    readings = []
    policy, reference = (counted(tiny_model(seed=seed), readings) for seed in (1, 3))
    run(tmp_path, model=policy, reference=reference if own else None, **cached).train()
    assert readings == ([reference, policy] if own else [policy])
    with pytest.raises(ValueError, match="this has changed: the model that is trained"):
        resume(run(tmp_path, model=tiny_model(seed=2), reference=tiny_model(seed=3) if own else None, **cached))
    if own:
        with pytest.raises(ValueError, match="this has changed: the reference"):
            resume(run(tmp_path, reference=tiny_model(seed=4), **cached))


@pytest.mark.parametrize("what", CHANGES)
def test_what_has_changed_is_named_before_anything_is_trained(tmp_path, what, capsys):
    run(tmp_path, reference=tiny_model(seed=3)).train()
    changes = {"reference": tiny_model(seed=3), **CHANGES[what]()}
    trainer = run(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"checkpoint-2 was made.*{what}.*`resume_changed: true`") as raised:
        resume(trainer)
    assert trainer.state.global_step == 0
    assert [name for name in CHANGES if name in str(raised.value).split(". ")[0]] == [what] or what == "the tokenizer"
    allowed = run(tmp_path, resume_changed=True, **{**changes, **CHANGES[what]()})
    resume(allowed)
    assert allowed.state.global_step == 4 and what in capsys.readouterr().err


def test_a_reference_that_has_come_or_gone_is_a_change(tmp_path):
    run(tmp_path).train()
    with pytest.raises(ValueError, match="checkpoint-2 was made, this has changed: the reference"):
        resume(run(tmp_path, reference=tiny_model(seed=3)))
    run(tmp_path, reference=tiny_model(seed=3)).train()
    with pytest.raises(ValueError, match="checkpoint-2 was made, this has changed: the reference"):
        resume(run(tmp_path))


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_the_same_run_continues_without_a_word(tmp_path, adapter, cached, capsys):
    settings = {"precompute_ref_log_probs": cached, "ref_logps_dir": str(tmp_path / "scores")}
    options = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])} if adapter else {}

    def trainer():
        return make_trainer(
            tmp_path, "DPO", model=tiny_model(seed=1), rows=preference_rows(16), trainer_options=options,
            **SAVING, **settings,
        )  # fmt: skip

    trainer().train()
    resume(trainer())
    assert "changed" not in capsys.readouterr().err


def test_a_checkpoint_of_before_is_resumed_with_a_warning(tmp_path, capsys):
    run(tmp_path).train()
    path = tmp_path / "out" / "checkpoint-2" / METHOD_STATE_FILE
    state = json.loads(path.read_text())
    assert len(state.pop("origin")) == 4  # the reference is the model that is trained
    path.write_text(json.dumps(state))
    (path.parent / FILES_RECORD).unlink()
    trainer = run(tmp_path, rows=changed_rows())
    resume(trainer)
    assert trainer.state.global_step == 4 and "does not say which data" in capsys.readouterr().err


def test_given_scores_of_several_references_are_compared(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    multi_reference.trainer(tmp_path, **settings).train()
    other = multi_reference.scored_pairs(seed=1)
    with pytest.raises(ValueError, match="the reference"):
        multi_reference.trainer(tmp_path, other, **settings).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )
