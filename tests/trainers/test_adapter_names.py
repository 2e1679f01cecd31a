"""An adapter may be called like any module of the model, or like a part of PEFT's own names."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from prefopt.references.fingerprints import module_fingerprint
from tests.tiny import tiny_model
from tests.trainers.pairs import make_trainer, preference_rows

NAMES = ["lora", "base", "layers", "model", "q_proj", "lora_A", "re"]


def adapted(name, seed=0, **changes):
    model = tiny_model(seed=1)
    torch.manual_seed(seed)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **changes}
    return get_peft_model(model, LoraConfig(**settings), adapter_name=name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cached", [False, True])
def test_the_reference_is_the_adapter_as_it_was_given(tmp_path, name, cached):
    model = adapted(name, modules_to_save=["embed_tokens"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scores = {"precompute_ref_log_probs": cached, "ref_logps_dir": str(tmp_path / "scores")}
    run = make_trainer(tmp_path, "DPO", model=model, rows=preference_rows(8), max_steps=2, **scores)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    after = model.state_dict()
    own, frozen = (
        [key for key in after if f"lora_B.{adapter}.weight" in key or f"modules_to_save.{adapter}.weight" in key]
        for adapter in (name, "ref")
    )
    assert len(own) == len(frozen) == 5
    for mine, copy in zip(own, frozen):
        assert torch.equal(after[copy], before[mine]) and not torch.equal(after[mine], before[mine])
    run.save_model(str(tmp_path / "saved"))
    model.set_adapter(name)
    again = PeftModel.from_pretrained(tiny_model(seed=1), tmp_path / "saved" / name)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("name", NAMES)
def test_the_fingerprint_is_of_this_adapter_alone(name):
    model = adapted(name)
    plain, mine = (module_fingerprint(model, model.config, adapter=each) for each in (None, name))
    assert plain == module_fingerprint(tiny_model(seed=1), model.config) != mine
    other = adapted(name, seed=1)
    assert module_fingerprint(other, other.config, adapter=name) != mine
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    assert module_fingerprint(model, model.config, adapter=name) == mine


@pytest.mark.parametrize("name", ["ref", "weight", "bias"])
def test_names_that_cannot_be_kept_apart_or_saved_are_rejected(tmp_path, name):
    with pytest.raises(ValueError, match=rf"called '{name}'.*another `adapter_name`"):
        make_trainer(tmp_path, "DPO", model=adapted(name))
