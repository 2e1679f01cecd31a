"""Uses of names that transformers does not document, in one place: a release of transformers can break this file only.

Each has the reason why the public interface does not do. `tests/test_fences.py` checks every one of them against the
installed transformers and says what changed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

# what Trainer does to the policy for `use_liger_kernel`, for the reference; transformers documents the setting only
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from prefopt.waiting import announced_wait

__all__ = [
    "CONFIG_BOOKKEEPING",
    "HookedTrainer",
    "apply_liger_kernel",
    "attention_of",
    "class_members",
    "drop_weight_conversions",
    "initialise",
    "model_from_config",
    "progress_callbacks",
    "set_attention",
    "share_tied_weights",
    "tensorboard_writer",
]

CONFIG_BOOKKEEPING = ("_attn_implementation", "_name_or_path")
"""Keys of a config in memory about how and from where it was loaded; nothing that a model computes depends on them."""


NOTEBOOK_CALLBACK = "NotebookProgressCallback"
"""The class of transformers.utils.notebook that shows a run in a notebook."""


class HookedTrainer(Trainer):
    """transformers' Trainer with public names for the moments at which it calls no callback."""

    movable: tuple[type, ...] = (torch.Tensor,)  # parts of a batch with a `to` method; all others stay as they are

    # a subclass has settings and models that Trainer's own annotations do not allow for
    args: Any
    model: Any
    processing_class: Any
    eval_dataset: Any

    def before_checkpoint(self, folder: Path) -> None:
        """Run on every rank before anything is written to the checkpoint `folder`."""

    def after_model_saved(self, folder: Path) -> None:
        """Run on every rank after model and tokenizer were written to `folder`."""

    def after_weights_of_checkpoint(self, folder: Path) -> None:
        """Run on every rank after the model was written to the checkpoint `folder`, before the optimizer's state."""

    def before_checkpoint_is_whole(self, folder: Path) -> None:
        """Run on the main process when only the trainer's state is missing from the checkpoint `folder`."""

    def after_checkpoint(self, folder: Path) -> None:
        """Run on the main process of each node that saves once the checkpoint `folder` is whole: remove older ones."""

    def save_weights_alone(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        """Run on a rank that could not save config, weights and tokenizer as usual."""

    def writing(self, folder: Path) -> AbstractContextManager[None]:
        """Return the context in which a model or a checkpoint is written to `folder`."""
        return nullcontext()

    def add_early_callback(self, callback: TrainerCallback) -> None:
        """Have `callback` called before those of users and trackers.

        `add_callback` appends, and then trackers would log a step before the callback has seen it. The first place is
        that of transformers' own flow callback, which decides at the end of a step whether it is logged or saved.
        """
        self.callback_handler.callbacks.insert(1, callback)

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device, as `training_step` does before the loss is computed."""
        return self._prepare_inputs(batch)

    def _prepare_input(self, data: Any) -> Any:
        # Trainer would cast every float of a batch to DeepSpeed's dtype, which rounds cached scores and weights of
        # tokens to bf16, and would wait for each copy to end
        if isinstance(data, self.movable):
            moved: Any = data
            return moved.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See `Trainer.save_model`; a checkpoint passes `_internal_call`, so that it is not pushed to the hub."""
        folder = Path(output_dir or self.args.output_dir)
        with nullcontext() if _internal_call else self.writing(folder):
            super().save_model(output_dir, _internal_call)
            self.after_model_saved(folder)
        if _internal_call:
            self.args.save_total_limit = None  # after the arguments were saved; see `_save_checkpoint`
            self.after_weights_of_checkpoint(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # `save_pretrained` writes configs first, and one that it rejects must not cost the weights
        try:
            super()._save(output_dir, state_dict)
        except (OSError, RuntimeError, SafetensorError):  # of the disk, which would not take the weights either
            raise
        except Exception:
            self.save_weights_alone(Path(output_dir or self.args.output_dir), state_dict)
            raise

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # no event comes before a checkpoint: `on_save` comes after its last file
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = Path(self._get_output_dir(trial=trial)) / name
        # Trainer would remove any folder called checkpoint-*, whoever made it, by the times of files
        limit = self.args.save_total_limit
        try:
            with self.writing(folder):
                self.before_checkpoint(folder)
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            self.after_checkpoint(folder)

    def _save_rng_state(self, output_dir: str) -> None:
        # the last that every rank writes; the main process writes the trainer's state after it, which therefore proves
        # that the checkpoint is whole only if all ranks have arrived here
        super()._save_rng_state(output_dir)
        with announced_wait("the other ranks to write their part of the checkpoint"):
            self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            self.before_checkpoint_is_whole(Path(output_dir))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # a run resumed at its last step would train one step more: the end is tested after a step only
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)


def progress_callbacks(trainer: Trainer) -> list[tuple[Any, str]]:
    """Return the callbacks with which Trainer prints logs, each with "terminal" or "notebook".

    The list of callbacks has no public reader; and the notebook's class can be imported only where IPython is.
    """
    kinds = {PrinterCallback: "terminal", ProgressCallback: "terminal"}
    callbacks = trainer.callback_handler.callbacks
    named = [(callback, kinds.get(type(callback))) for callback in callbacks]
    notebook = [(callback, "notebook") for callback in callbacks if type(callback).__name__ == NOTEBOOK_CALLBACK]
    return [(callback, kind) for callback, kind in named if kind is not None] + notebook


def tensorboard_writer(trainer: Trainer) -> Any:
    """Return the SummaryWriter of the run's TensorBoard callback; None without one, or before training."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            return callback.tb_writer
    return None


def attention_of(config: PretrainedConfig) -> str:
    """Return the attention that a model was loaded with; the public `attn_implementation` only sets it."""
    return config._attn_implementation


def set_attention(config: PretrainedConfig, implementation: str) -> None:
    """Set the attention of a config from which a model is made; `set_attn_implementation` needs the model."""
    config._attn_implementation = implementation


def model_from_config(model_class: Any, config: PretrainedConfig) -> Any:
    """Make a model with random weights in the config's dtype; only Auto classes have a public `from_config`."""
    return model_class._from_config(config)


def initialise(model: PreTrainedModel, module: nn.Module) -> None:
    """Initialise one module as its model does; `init_weights` initialises the whole model."""
    model._init_weights(module)


def drop_weight_conversions(model: PreTrainedModel, patterns: Collection[str]) -> None:
    """Save under the present names the weights whose names were mapped from `patterns` on loading.

    `save_pretrained` undoes every renaming of the load, `key_mapping` included, and would restore the old names.
    """
    conversions: Any = model._weight_conversions or []
    kept: Any = [each for each in conversions if not set(each.source_patterns) & set(patterns)]
    model._weight_conversions = kept


def share_tied_weights(model: PreTrainedModel, like: Any) -> None:
    """Tie the weights that the class `like` ties; a class says so in a private attribute only."""
    model._tied_weights_keys = like._tied_weights_keys


def class_members(
    parent: type[PreTrainedModel], *, not_expected: Sequence[str], in_float32: Sequence[str]
) -> dict[str, Any]:
    """Return class attributes of a new model class, beside those of its `parent`.

    Args:
        parent: base class of the new one.
        not_expected: patterns of weights in a checkpoint that are skipped without a warning.
        in_float32: modules kept in float32 by a 16-bit load, which also spares them from quantization; without it only
            the last module of a model would be spared.
    """
    return {
        "_keys_to_ignore_on_load_unexpected": [*not_expected, *(parent._keys_to_ignore_on_load_unexpected or [])],
        "_keep_in_fp32_modules": [*(parent._keep_in_fp32_modules or []), *in_float32],
    }
