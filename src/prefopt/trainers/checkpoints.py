"""Saving that is tried before training, checkpoints that are whole or named as damaged, and errors of a full disk.

A checkpoint is whole when training can continue from it as if it had not stopped: its last file, the trainer's state,
is there, with optimizer and schedule, and its files are those that were written.
"""

from __future__ import annotations

import functools
import math
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from prefopt import files
from prefopt.files import user_path
from prefopt.hardware import GIB
from prefopt.launch import print_on_main
from prefopt.progress import library_bars

FILES_RECORD = "checkpoint_files.json"
"""File of a checkpoint that lists its files with their sizes, and the SHA-256 of weights and of all small files."""

SMALL_FILE = 2**26  # bytes
LARGEST_CHECKED = 2**32  # bytes of optimizer states whose checksums every rank computes before it resumes

POLICY = "the model that is trained"
"""Name of the policy's fingerprint, which a model that has been trained does not give."""
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")  # torch, FSDP, FSDP sharded, DeepSpeed


# ---- which checkpoint to continue from


def checkpoints_of(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder` by their steps; a `checkpoint-best` that a user has copied is none."""
    named = {path: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in folder.glob("*")}
    steps = {path: int(name[1]) for path, name in named.items() if name and path.is_dir()}
    return sorted(steps, key=lambda path: steps[path])


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint, or of one that lies elsewhere the link to it."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
    else:
        shutil.rmtree(checkpoint)


def rotate_checkpoints(written: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beside the one that has just been written, until `limit` are left.

    Those of later steps, which a run has left that was continued from an earlier one, go first.

    Args:
        written: the new checkpoint, which is kept.
        limit: how many are kept; None keeps all.
        best: another one that is kept.
    """
    if not limit:
        return
    all_of_them = checkpoints_of(written.parent)
    later = all_of_them[all_of_them.index(written) + 1 :]
    kept = {written, Path(best)} if best is not None else {written}
    others = [path for path in (*later, *all_of_them) if path not in kept]
    for checkpoint in list(dict.fromkeys(others))[: max(len(all_of_them) - max(limit, len(kept)), 0)]:
        remove_checkpoint(checkpoint)


def last_checkpoint(folder: Path) -> str | None:
    """Find the newest whole checkpoint in `folder`; newer ones are named on stderr, with what is wrong with them."""
    for checkpoint in reversed(checkpoints_of(folder)):
        damage = damage_of(checkpoint)
        if damage is None:
            return str(checkpoint)
        print_on_main(f"{checkpoint} {damage}, so it is left out.")
    return None


def checkpoint_to_resume(folder: Path) -> str | None:
    """Find the newest whole checkpoint in `folder`; None where none was written to its end.

    Raises:
        ValueError: there are checkpoints that were, and training cannot continue from any of them.
    """
    if (found := last_checkpoint(folder)) is not None:
        return found
    for checkpoint in reversed(checkpoints_of(folder)):
        if _was_finished(checkpoint):
            raise ValueError(cannot_resume(checkpoint))
    return None


def cannot_resume(checkpoint: Path) -> str:
    """Describe why training cannot continue from a damaged checkpoint, what would be lost, and what to do instead."""
    return (
        f"resume_from_checkpoint: {checkpoint} holds no whole checkpoint: it {damage_of(checkpoint)}. Continuing from "
        "it would begin the optimizer and the learning-rate schedule anew. Start another run from its weights "
        f"(model_name_or_path: {checkpoint}, another output_dir), or replace this one with overwrite_output_dir."
    )


def is_whole(checkpoint: Path) -> bool:
    """Check that training can continue from a checkpoint as if it had not stopped."""
    return damage_of(checkpoint) is None


def damage_of(checkpoint: Path) -> str | None:
    """Describe what keeps training from continuing from a checkpoint; None where it is whole."""
    if not _was_finished(checkpoint):
        return f"was not written to its end (no readable {TRAINER_STATE_NAME})"
    if (damaged := _damaged_file(checkpoint)) is not None:
        return f"is damaged: {damaged}"
    if not _holds(checkpoint, "*.safetensors", "pytorch_model*", "global_step*"):
        return "has no weights"
    if not _holds(checkpoint, *_OPTIMIZERS):
        return "has no optimizer state (`save_only_model`, or files are missing)"
    if not _holds(checkpoint, "scheduler.pt", "global_step*"):  # DeepSpeed's own schedule is part of its states
        return "has no learning-rate schedule (scheduler.pt is missing)"
    return None


def _holds(folder: Path, *patterns: str) -> bool:
    return any(path for pattern in patterns for path in folder.glob(pattern))


def _was_finished(checkpoint: Path) -> bool:
    try:
        state = files.read_json(checkpoint / TRAINER_STATE_NAME)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(state, dict) and isinstance(state.get("global_step"), int)


def _damaged_file(checkpoint: Path) -> str | None:
    """Name the first file that is not what was written, with the reason."""
    try:
        record: Any = files.read_json(checkpoint / FILES_RECORD)
    except FileNotFoundError:
        record = {}  # of a release that wrote none: what follows finds files that were cut off
    except (OSError, ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not all(isinstance(each, dict) and "size" in each for each in record.values()):
        return f"{FILES_RECORD} cannot be read"
    for name, written in record.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != written["size"]:
            return f"{name} has {path.stat().st_size:,} bytes of {written['size']:,}"
        if "sha256" in written and _hash_of(path, path.stat().st_mtime_ns) != written["sha256"]:
            return f"{name} is not what was written (its SHA-256 differs)"
    for path in sorted(checkpoint.rglob("*")):
        if path.suffix in (".pt", ".pth") and (fault := _zip_fault(path, path.stat().st_mtime_ns)):
            return f"{path.relative_to(checkpoint)} {fault}"
        if path.suffix == ".safetensors":
            try:
                safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                return f"{path.name} cannot be read ({error})"
    return None


@functools.lru_cache(maxsize=4096)
def _hash_of(path: Path, modified: int) -> str:
    """Hash a file once, although a run checks its checkpoint where it plans and where it loads."""
    return files.file_hash(path)


@functools.lru_cache(maxsize=4096)
def _zip_fault(path: Path, modified: int) -> str | None:
    """Describe what is wrong with a file that torch has saved, which torch would read whatever its checksums say."""
    if not zipfile.is_zipfile(path):
        return "is cut off"
    if path.stat().st_size > LARGEST_CHECKED:
        return None
    try:
        with zipfile.ZipFile(path) as saved:
            broken = saved.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        broken = str(error)
    return None if broken is None else f"is not what was written ({broken} differs from its checksum)"


def record_files(checkpoint: Path) -> None:
    """Write what a checkpoint holds so far, so that damage is found before training continues from it."""
    record = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name not in (FILES_RECORD, TRAINER_STATE_NAME):
            written: dict[str, Any] = {"size": path.stat().st_size}
            if path.suffix == ".safetensors" or path.stat().st_size <= SMALL_FILE:
                written["sha256"] = files.file_hash(path)
            record[str(path.relative_to(checkpoint))] = written
    files.write_json(checkpoint / FILES_RECORD, record)


# ---- what can be known before training


def try_saving(folder: Path, save: Callable[[Path], Any]) -> None:
    """Have `save` write into a new folder inside `folder`, which is removed again.

    Raises:
        ValueError: it cannot; nothing has been trained yet.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        silence = library_bars(shown=False)  # the bar of weights that are not written
        with silence, tempfile.TemporaryDirectory(dir=folder, prefix=".try-saving-") as trial:
            save(Path(trial))
    except Exception as error:
        if isinstance(error, OSError) or files.storage_fault(error, folder) is not None:
            fault = files.storage_fault(error, folder) if folder.is_dir() else None
            raise ValueError(
                f"{fault or f'{folder} cannot be written: {error}.'} Nothing is trained that could not be saved; once "
                "it can be written, the same command with --resume_from_checkpoint true continues."
            ) from error
        reason = " ".join(str(error).split())
        advice = (
            " Set `model.generation_config`, or edit generation_config.json in the model's folder."
            if "generation" in reason.lower()
            else ""
        )
        raise ValueError(
            f"The model could not be saved after training, so it is not trained: {reason}{advice}"
        ) from error


def check_space(args: Any, weights: float, states: float, *, steps: int) -> None:
    """Raise a ValueError where a run's checkpoints and its model would not fit on the disk of its output folder.

    Args:
        args: the trainer's config.
        weights: bytes of what is saved of the model.
        states: bytes of the optimizer's states.
        steps: optimizer steps of the run.
    """
    every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * steps)
    saves = {"no": 0, "steps": steps // every, "epoch": math.ceil(args.num_train_epochs)}.get(args.save_strategy, 1)
    # an old checkpoint is removed after a new one was written
    kept = min(saves, args.save_total_limit + 1) if args.save_total_limit else saves
    needed = kept * (weights + (0 if args.save_only_model else states)) + weights
    folder = user_path(args.output_dir)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    # of a run that continues: its checkpoints are counted again, or replaced
    free = shutil.disk_usage(there).free
    free += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if needed > free:
        raise ValueError(
            f"{folder} has {free / GIB:.3g} GiB free, and the run will keep {needed / GIB:.3g} GiB ({kept} "
            "checkpoints and the model): free some space, choose another output_dir, or set a smaller "
            "`save_total_limit`, a "
            "larger `save_steps` or `save_only_model`."
        )


# ---- saving


@contextmanager
def one_line_about_storage(folder: Path, output_dir: Path) -> Iterator[None]:
    """Turn errors of the disk while `folder` is written into one line on what is missing and how to continue.

    An unfinished checkpoint is removed: nobody can continue from it, and it takes the space of the next one.

    Raises:
        OSError: the disk is full, the folder was removed or may not be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
        fault = files.storage_fault(error, folder, size)
        if fault is None:
            raise
        if folder != output_dir:
            shutil.rmtree(folder, ignore_errors=True)
        last = last_checkpoint(output_dir) if output_dir.is_dir() else None
        advice = (
            f"continue from {last} with --resume_from_checkpoint true"
            if last
            else "start the run again: there is no earlier checkpoint to continue from"
        )
        raise OSError(f"{fault} Make room, or the folder writable, then {advice}.") from error


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
    changed = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    # a reference that has come or gone is a change; a policy that cannot be compared is none
    changed = [name for name in changed if name != POLICY or (name in saved and name in now)]
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
