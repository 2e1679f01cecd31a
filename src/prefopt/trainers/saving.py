"""Saving of a trainer: tried before the first step, weights first, and continued only from what it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import save_torch_state_dict
from peft import PeftModel, get_peft_model_state_dict
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from prefopt import files
from prefopt._transformers import HookedTrainer
from prefopt.data.encoding import vocabulary_fingerprint
from prefopt.data.rows import REFERENCE_COLUMNS
from prefopt.memory import optimizer_bytes
from prefopt.progress import library_bars
from prefopt.references.fingerprints import rows_fingerprint
from prefopt.trainers.checkpoints import (
    POLICY,
    cannot_resume,
    check_origin,
    check_saved_shapes,
    check_space,
    checkpoint_to_resume,
    is_whole,
    one_line_about_storage,
    record_files,
    rotate_checkpoints,
    try_saving,
)
from prefopt.trainers.model_card import write_model_card
from prefopt.trainers.policy import weights_fingerprint

METHOD_STATE_FILE = "method_state.json"
"""File of a checkpoint that holds what `SavingTrainer.method_state` returns."""


class SavingTrainer(HookedTrainer):
    """A trainer whose checkpoints say what they were made from, and whose saving was tried before training."""

    _origin: dict[str, str] | None = None
    _policy_weights: str | None = None  # fingerprint of the model, where scoring has computed it before training

    # ---- what a checkpoint was made from

    def method_state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold beside model, optimizer and schedule (JSON values)."""
        return {"origin": self._origin} if self._origin else {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Restore what `method_state` returned."""

    def origin(self) -> dict[str, str]:
        """Return fingerprints of all that a run starts from, before it trains; all ranks call it."""
        rows: Any = self.train_dataset
        found = {
            "the training data": rows_fingerprint(rows, set(rows.column_names) - set(REFERENCE_COLUMNS)),
            "the tokenizer": vocabulary_fingerprint(self.processing_class),
            "the chat template": files.content_hash(self.processing_class.chat_template),
        }
        if self.state.global_step == 0:
            found[POLICY] = self._policy_weights or weights_fingerprint(self.model)
        return found

    def prepare_to_resume(self, checkpoint: str | bool | None) -> str | None:
        """Find the checkpoint to continue from, compare what it was made from, and restore the method's state.

        Args:
            checkpoint: a folder; True: the newest whole one of the output folder; None or False: none.

        Raises:
            ValueError: there is none, it is damaged, or it was made from other data or models.
        """
        if checkpoint is True:
            checkpoint = checkpoint_to_resume(Path(self.args.output_dir))
            if checkpoint is None:
                raise ValueError(f"There is no checkpoint in {self.args.output_dir} to resume from.")
        elif checkpoint and not is_whole(Path(checkpoint)):
            raise ValueError(cannot_resume(Path(checkpoint)))
        if not self._origin and self.train_dataset is not None and (self.args.save_strategy != "no" or checkpoint):
            self._origin = self.origin()
        if checkpoint:
            file = Path(checkpoint) / METHOD_STATE_FILE
            state = files.read_object(file, remedy="continue from another checkpoint") if file.exists() else {}
            before = state.get("origin")
            check_origin(str(checkpoint), before, self._origin or {}, may_change=self.args.resume_changed)
            if state:
                self.load_method_state(state)
        return checkpoint or None

    # ---- before training

    def _save_without_weights(self, folder: Path) -> None:
        """Save everything that is saved with the weights, and may fail."""
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel):
            for config in model.peft_config.values():
                config.save_pretrained(str(folder))
        else:
            model.save_pretrained(folder, state_dict={})
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)
        write_model_card(self, folder)
        files.write_json(folder / METHOD_STATE_FILE, self.method_state())

    def check_saving(self) -> None:
        """Raise a ValueError on all ranks where the model could not be saved after training."""
        self._raise_on_all_ranks(lambda: try_saving(Path(self.args.output_dir), self._save_without_weights))

    def check_space(self) -> None:
        """Raise a ValueError on all ranks where the disk has no room for the checkpoints that the run will keep."""
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)  # of ZeRO-3
        saved = [p for p in model.parameters() if p.requires_grad or not isinstance(model, PeftModel)]
        weights = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in saved)
        copies = 4 if self.keeps_float32_copies() else 0
        states = (optimizer_bytes(args.optim) + copies) * trained
        self._raise_on_all_ranks(lambda: check_space(args, weights, states, steps=self.state.max_steps))

    def _raise_on_all_ranks(self, check: Callable[[], None]) -> None:
        problem, cause = "", None
        if self.is_world_process_zero():
            try:
                check()
            except ValueError as error:
                problem, cause = str(error), error.__cause__
        (problem,) = broadcast_object_list([problem])
        if problem:
            raise ValueError(problem) from cause

    def keeps_float32_copies(self) -> bool:
        """Return whether a checkpoint has float32 copies of the weights, or under FSDP the weights twice."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    # ---- saving

    def after_model_saved(self, folder: Path) -> None:
        """Check that every tensor was saved whole (ZeRO-3 can write empty ones)."""
        if self.is_world_process_zero():
            check_saved_shapes(folder)

    def before_checkpoint(self, folder: Path) -> None:
        """Remove the mark of a whole checkpoint that an earlier run left, which was resumed from one before it."""
        if self.is_world_process_zero():
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)

    def after_weights_of_checkpoint(self, folder: Path) -> None:
        """Write the model card and the method's state, which may fail, only once the weights are on the disk."""
        self.create_model_card()
        if self.is_world_process_zero():
            files.write_json(folder / METHOD_STATE_FILE, self.method_state())

    def before_checkpoint_is_whole(self, folder: Path) -> None:
        """Record what the checkpoint holds."""
        record_files(folder)

    def after_checkpoint(self, folder: Path) -> None:
        """Remove older checkpoints, as `save_total_limit` says."""
        rotate_checkpoints(folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    def save_weights_alone(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        """Save the weights, as a config, tokenizer or argument could not be saved with them."""
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel):
            state_dict = get_peft_model_state_dict(model, state_dict=state_dict)
        save_torch_state_dict(state_dict if state_dict is not None else model.state_dict(), folder)
        print(f"The weights are in {folder}; what else belongs to the model could not be saved.", flush=True)

    @contextmanager
    def writing(self, folder: Path) -> Iterator[None]:
        """See `one_line_about_storage` and `library_bars`."""
        bars = library_bars(shown=not self.args.disable_tqdm)
        with bars, one_line_about_storage(folder, Path(self.args.output_dir)):
            yield

    def create_model_card(  # type: ignore[override]  # the arguments are those of TRL's trainers
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write a README.md with method, paper and settings into the output folder (main process only)."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            write_model_card(self, folder, model_name=model_name, dataset_name=dataset_name, tags=tags)
