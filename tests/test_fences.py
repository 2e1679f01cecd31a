"""Canaries: what `prefopt._transformers` and `prefopt._trl` rely on beyond the documentation is still there.

A failure says which name of which library changed, and what breaks with it. Most read signatures or source, since the
point is to name the change; that the uses work is tested where they are used.
"""

from __future__ import annotations

import contextlib
import inspect
from types import SimpleNamespace

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear, log_softmax
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer
from transformers.trainer_callback import DefaultFlowCallback

from prefopt import _transformers, _trl
from tests.tiny import tiny_model
from tests.trainers.pairs import make_trainer


def must(holds: bool, library, what: str, breaks: str) -> None:
    assert holds, f"{library.__name__} {library.__version__}: {what}. It breaks {breaks}."


def parameters_of(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def source_of(function) -> str:
    return " ".join(inspect.getsource(function).split())


# ---- transformers' Trainer


def test_the_trainer_patches_the_policy_with_ligers_layers():
    must(
        parameters_of(_transformers.apply_liger_kernel) == ["model", "kernel_config"]
        and "apply_liger_kernel(self.model, self.args.liger_kernel_config)" in source_of(Trainer.train),
        transformers,
        "`Trainer.train` does not apply liger's layers as `apply_liger_kernel(model, config)`",
        "`use_liger_kernel`: policy and reference would have different layers",
    )


def test_the_trainer_reads_checkpointing_from_its_config_when_it_trains():
    must(
        "args.activation_checkpointing" in source_of(Trainer.train),
        transformers,
        "`Trainer.train` does not read `activation_checkpointing` and its options",
        "`checkpointing`: nothing, or everything, would be recomputed",
    )


def test_the_flow_callback_comes_first(tmp_path):
    trainer = make_trainer(tmp_path)
    callbacks = trainer.callback_handler.callbacks
    must(
        isinstance(callbacks[0], DefaultFlowCallback),
        transformers,
        "`callback_handler.callbacks` does not begin with DefaultFlowCallback",
        "`HookedTrainer.add_early_callback`: a step would be checked before it is known what is logged and saved",
    )
    assert callbacks[1].trainer is trainer


def test_the_trainer_moves_batches_with_a_method_of_its_own():
    must(
        parameters_of(Trainer._prepare_inputs) == ["self", "inputs"]
        and "self._prepare_inputs(inputs)" in source_of(Trainer.training_step),
        transformers,
        "`Trainer._prepare_inputs` is gone, or `training_step` does not call it",
        "`HookedTrainer.to_device`",
    )


def test_parts_of_a_batch_are_moved_one_by_one_and_cast_under_deepspeed():
    must(
        parameters_of(Trainer._prepare_input) == ["self", "data"]
        and "self._prepare_input(inputs)" in source_of(Trainer._prepare_inputs),
        transformers,
        "`Trainer._prepare_input` is gone, or `_prepare_inputs` does not call it",
        "`HookedTrainer._prepare_input`: cached scores would be rounded to bf16",
    )


def test_a_checkpoint_is_written_by_one_method_and_saves_the_model_through_save_model(tmp_path):
    source = source_of(Trainer._save_checkpoint)
    must(
        parameters_of(Trainer._save_checkpoint) == ["self", "model", "trial"]
        and parameters_of(Trainer.save_model) == ["self", "output_dir", "_internal_call"]
        and "self.save_model(output_dir, _internal_call=True)" in source,
        transformers,
        "`Trainer._save_checkpoint` or `save_model` has other parameters",
        "`HookedTrainer.before_checkpoint` and `after_model_saved`",
    )
    must(
        "_get_output_dir" in source and parameters_of(Trainer._get_output_dir) == ["self", "trial"],
        transformers,
        "`Trainer._get_output_dir` does not name the folder of checkpoints",
        "`HookedTrainer.before_checkpoint`: files would be written into another folder than the checkpoint",
    )
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    folders = []
    trainer.before_checkpoint = folders.append
    trainer.train()
    must(
        len(folders) == 1 and (folders[0] / "trainer_state.json").is_file(),
        transformers,
        f"a checkpoint is not written to {folders}",
        "`HookedTrainer.before_checkpoint`",
    )


def test_the_rng_state_is_the_last_of_all_ranks_and_the_trainers_state_comes_after_it():
    source = source_of(Trainer._save_checkpoint)
    must(
        parameters_of(Trainer._save_rng_state) == ["self", "output_dir"]
        and 0 < source.find("self._save_optimizer_and_scheduler(") < source.find("self._save_rng_state(")
        and source.find("self._save_rng_state(") < source.find("self.state.save_to_json("),
        transformers,
        "`Trainer._save_checkpoint` does not write optimizer, RNG state and trainer state in this order",
        "the rule that a checkpoint with a trainer state is whole",
    )


def test_epochs_are_run_by_a_method_and_end_on_should_training_stop():
    source = source_of(Trainer._inner_training_loop)
    must(
        "self._run_epoch(" in source and "if self.control.should_training_stop: break" in source,
        transformers,
        "`Trainer._inner_training_loop` does not run epochs through `_run_epoch`",
        "a run that is resumed at its last step: it would train one step more",
    )


def test_the_loss_may_be_scaled_by_the_trainer():
    must(
        hasattr(Trainer, "loss_is_scaled_for_ga") and "self.loss_is_scaled_for_ga" in source_of(Trainer.training_step),
        transformers,
        "`Trainer.loss_is_scaled_for_ga` is not read by `training_step`",
        "the normalisation of losses: they would be divided by the accumulation steps once more",
    )


# ---- transformers' models


def test_a_config_says_and_takes_the_attention_implementation():
    config = tiny_model().config
    must(
        getattr(config, "_attn_implementation", None) in ("sdpa", "eager"),
        transformers,
        "`config._attn_implementation` does not hold the attention that was loaded",
        "`attention_of`",
    )
    _transformers.set_attention(config, "eager")
    model = _transformers.model_from_config(type(tiny_model()), config)
    must(
        _transformers.attention_of(model.config) == "eager",
        transformers,
        "`config._attn_implementation` does not decide the attention of a new model",
        "`set_attention`",
    )
    must(
        set(config.to_dict()) & {"_name_or_path"} == {"_name_or_path"},
        transformers,
        "`config.to_dict()` does not list `_name_or_path`",
        "`CONFIG_BOOKKEEPING`: fingerprints of a model in memory would depend on where it was loaded from",
    )


def test_models_are_made_from_a_config_and_initialise_one_module():
    for name, signature in (("_from_config", ["config", "kwargs"]), ("_init_weights", ["self", "module"])):
        must(
            parameters_of(getattr(PreTrainedModel, name)) == signature,
            transformers,
            f"`PreTrainedModel.{name}` has other parameters",
            "models with heads",
        )


def test_renamings_of_a_load_are_remembered_by_the_model(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name.replace("model.", "old."): w for name, w in weights.items()}, tmp_path / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, key_mapping={r"^old\.": "model."})
    conversions = model._weight_conversions
    must(
        bool(conversions) and any(r"^old\." in each.source_patterns for each in conversions),
        transformers,
        "`model._weight_conversions` does not hold the `key_mapping` of the load",
        "`drop_weight_conversions`: reward models of others would be saved under their old names",
    )
    _transformers.drop_weight_conversions(model, [r"^old\."])
    assert not any(r"^old\." in each.source_patterns for each in model._weight_conversions)


def test_classes_list_expected_float32_and_tied_weights():
    for name in ("_keys_to_ignore_on_load_unexpected", "_keep_in_fp32_modules", "_tied_weights_keys"):
        must(hasattr(PreTrainedModel, name), transformers, f"`PreTrainedModel.{name}` is gone", "models with heads")


# ---- datasets


def test_a_data_set_has_a_fingerprint():
    import datasets

    rows = Dataset.from_list([{"a": 1}, {"a": 2}])
    must(
        isinstance(rows._fingerprint, str) and rows._fingerprint != rows.select([0])._fingerprint,
        datasets,
        "`Dataset._fingerprint` does not tell data sets apart",
        "the caches of tokenised rows and of their lengths",
    )


# ---- TRL


def test_the_log_prob_kernel_takes_and_returns_what_we_pass_and_read():
    names = ["ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping"]
    must(
        parameters_of(_trl.ChunkedLogProbFunction.forward) == [*names, "logit_scale", "outputs"],
        trl,
        "`ChunkedLogProbFunction.forward` has other parameters",
        "the scoring path",
    )
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 6, 3])
    outputs = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    logps, entropy, log_sum_sq, mean_logits, is_top1 = _trl.ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, 5, None, 1.0, outputs
    )
    logits = linear(hidden, weight)
    everything = log_softmax(logits, dim=-1)
    with contextlib.suppress(AssertionError):
        torch.testing.assert_close(logps, everything.gather(1, targets[:, None])[:, 0])
        torch.testing.assert_close(entropy, -(everything.exp() * everything).sum(-1))
        torch.testing.assert_close(log_sum_sq, (2 * everything).logsumexp(-1))
        torch.testing.assert_close(mean_logits, logits.mean(-1))
        assert is_top1.bool().tolist() == (logits.argmax(-1) == targets).tolist()
        return
    must(False, trl, "`ChunkedLogProbFunction` returns other quantities", "log-probs, WPO's weights and metrics")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("create_model_from_path", ["model_id", "architecture", "kwargs"]),
        ("disable_dropout_in_model", ["model"]),
        ("get_config_model_id", ["config"]),
        ("maybe_gather_lm_head_ctx", ["params"]),
        ("prepare_deepspeed", ["model", "accelerator"]),
        ("prepare_fsdp", ["model", "accelerator"]),
    ],
)
def test_helpers_of_trl_take_what_we_pass(name, parameters):
    must(
        parameters_of(getattr(_trl, name)) == parameters,
        trl,
        f"`{name}` has other parameters",
        "loading, or wrapping a reference",
    )


def test_helpers_of_trl_do_what_we_call_them_for(tmp_path):
    dropout = nn.Sequential(nn.Dropout(0.5))
    _trl.disable_dropout_in_model(dropout)
    must(dropout[0].p == 0, trl, "`disable_dropout_in_model` leaves dropout on", "`disable_dropout`")
    named = _trl.get_config_model_id(SimpleNamespace(_name_or_path="some/model"))
    must(named == "some/model", trl, "`get_config_model_id` reads another attribute", "tokenizers and model cards")
    tiny_model().save_pretrained(tmp_path)
    loaded = _trl.create_model_from_path(str(tmp_path), dtype="bfloat16", device_map=None)
    must(loaded.dtype == torch.bfloat16, trl, "`create_model_from_path` takes no dtype by name", "loading")
    weight = nn.Parameter(torch.ones(2))
    with _trl.maybe_gather_lm_head_ctx(weight, None):
        must(
            weight.shape == (2,), trl, "`maybe_gather_lm_head_ctx` changes weights of one process", "the scoring path"
        )


# ---- what is printed and logged


def test_logs_are_printed_by_callbacks_with_on_log(tmp_path):
    trainer = make_trainer(tmp_path)
    kinds = [kind for _, kind in _transformers.progress_callbacks(trainer)]
    must(kinds == ["terminal"], transformers, "no callback of a known class prints logs", "the line of a step")
    names = ["self", "args", "state", "control", "logs", "kwargs"]
    for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
        must(
            parameters_of(callback.on_log) == names,
            transformers,
            f"`{callback.__name__}.on_log` has other parameters",
            "`prefopt.trainers.console`",
        )
    must(
        "self.training_bar.write(" in source_of(transformers.ProgressCallback.on_log),
        transformers,
        "`ProgressCallback` has no `training_bar` that writes above the bar",
        "`prefopt.trainers.console`",
    )


def test_the_tensorboard_callback_keeps_its_writer():
    source = source_of(transformers.integrations.TensorBoardCallback)
    must(
        "self.tb_writer = self._SummaryWriter(" in source,
        transformers,
        "`TensorBoardCallback.tb_writer` is not its writer",
        "samples in TensorBoard",
    )


def test_trls_callback_of_completions_reads_what_we_give_it():
    source = source_of(trl.LogCompletionsCallback)
    must(
        'self.eval_dataset["prompt"]' in source and "self.freq or state.eval_steps" in source,
        trl,
        "`LogCompletionsCallback` reads its prompts from elsewhere than `eval_dataset`, or its frequency",
        "`BaseTrainer.add_callback`, which gives it prompts",
    )
    must(
        trl.LogCompletionsCallback.__module__ == "trl.trainer.callbacks",
        trl,
        "`LogCompletionsCallback` lives in another module",
        "`_trl.is_log_completions`",
    )
