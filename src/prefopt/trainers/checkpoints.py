"""Checks of what was saved: models with every tensor whole, and checkpoints that a killed run had finished writing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from prefopt import files
from prefopt.launch import print_on_main


def last_checkpoint(folder: Path) -> str | None:
    """Find the newest checkpoint in `folder` that was written to its end; newer ones are named on stderr.

    A run that is killed while it saves leaves a checkpoint without its optimizer or its schedule, and transformers
    would continue from that without a word.
    """
    for checkpoint in reversed(sort_checkpoints(str(folder))):
        if is_whole(Path(checkpoint)):
            return checkpoint
        print_on_main(f"{checkpoint} was not written to its end, so it is left out.")
    return None


def is_whole(checkpoint: Path) -> bool:
    """Check that a checkpoint was written to its end: its last file, the trainer's state, is there and readable."""
    try:
        files.read_json(checkpoint / TRAINER_STATE_NAME)
    except (OSError, ValueError):
        return False
    return True


def check_origin(
    checkpoint: str, saved: Mapping[str, str] | None, now: Mapping[str, str], *, may_change: bool
) -> None:
    """Check that a run continues from what its checkpoint was made from.

    Args:
        checkpoint: its folder.
        saved: name -> fingerprint of data, tokenizer, template, policy and reference; None in checkpoints of before.
        now: the same of this run.
        may_change: print what has changed instead of raising.

    Raises:
        ValueError: something has changed; the message names it.
    """
    if saved is None:
        print_on_main(f"{checkpoint} does not say which data and models it was made from: they are not compared.")
        return
    changed = [name for name in saved if name in now and saved[name] != now[name]]
    if changed and may_change:
        print_on_main(f"Since {checkpoint} was made, this has changed: {', '.join(changed)}.")
    elif changed:
        raise ValueError(
            f"Since {checkpoint} was made, this has changed: {', '.join(changed)}. Restore it, start afresh in "
            "another `output_dir`, or continue with the change by `resume_changed: true`."
        )


def check_saved_shapes(folder: Path) -> None:
    """Check that no tensor saved in `folder` is empty, as those of a ZeRO-3 model are when they were not gathered.

    Raises:
        RuntimeError: a tensor has no elements.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as saved:
            names = saved.keys()
            empty = [name for name in names if 0 in saved.get_slice(name).get_shape()]
        if empty:
            raise RuntimeError(
                f"{path} was saved without the weights of {len(empty)} tensor(s), {empty[0]} among them. "
                "Under ZeRO-3 set `zero3_save_16bit_model: true` in the accelerate config."
            )
