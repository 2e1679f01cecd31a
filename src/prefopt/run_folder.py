"""The folder of a training run: whose it is, whether it may be written, and where to continue."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer import TRAINER_STATE_NAME

from prefopt.files import write_json, write_text
from prefopt.trainers.saving import is_whole, last_checkpoint

RECIPE_FILE = "recipe.yaml"
# beside weights and checkpoints; a leftover would describe another model (an adapter's config) or another run (its figures)
LEFT_BY_RUNS = (
    TRAINER_STATE_NAME,
    "config.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "train_results.json",
    "eval_results.json",
    "all_results.json",
)
VERSIONS_FILE = "package_versions.json"
PACKAGES = (
    "prefopt",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "peft",
    "deepspeed",
    "tokenizers",
    "numpy",
)
OPTIONAL_PACKAGES = ("bitsandbytes", "flash-attn", "liger-kernel", "vllm", "kernels")

# settings that may differ between a run and its continuation: where it writes, what it reports, how long it goes on
FREE_TO_CHANGE = frozenset(
    {
        "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "method", "env",
        "num_train_epochs", "max_steps", "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision",
        "report_to", "run_name", "project", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node",
        "logging_strategy", "logging_steps", "logging_first_step", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "do_eval",
        "per_device_eval_batch_size", "save_strategy", "save_steps", "save_total_limit", "dataset_num_proc", "ddp_timeout",
        "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    }
)  # fmt: skip


def find_start(output_dir: Path, resume: bool | str | None, overwrite: bool, resolved: str) -> str | None:
    """Where a run may start: the checkpoint to continue from, or `None` for the beginning.

    Args:
        output_dir: the run's folder; it need not exist.
        resume: the path of a checkpoint, or true for the last one in `output_dir` (from the beginning if there is none yet).
        overwrite: whether another run in `output_dir` may be replaced.
        resolved: this run's resolved recipe (YAML).

    Raises:
        ValueError: the folder cannot be one, or holds another run, or the run to continue had other settings.
    """
    there = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"output_dir {output_dir}: {there} is a file; name a folder.")
    if not os.access(there, os.W_OK):
        raise ValueError(f"output_dir {output_dir} cannot be made or written: {there} is not yours to write to.")
    if resume and overwrite:
        raise ValueError(
            "resume_from_checkpoint continues a run and overwrite_output_dir replaces it: give one of them."
        )
    last = last_checkpoint(output_dir)
    if isinstance(resume, str) and resume.lower() not in ("true", "false"):
        if not is_whole(Path(resume)):
            raise ValueError(
                f"resume_from_checkpoint: {resume} holds no whole checkpoint (no readable trainer_state.json)."
            )
        _check_same_run(Path(resume).parent, resolved)
        return resume
    has_model, same, resumes = _has_model(output_dir), _same_run(output_dir, resolved), str(resume).lower() == "true"
    if resumes:
        if last is not None:
            _check_same_run(output_dir, resolved)
            return last
        if same or not has_model:
            return None
    elif overwrite or not holds_run(output_dir) or (same and last is None and not has_model):
        return None
    what = f"a run that reached step {_step(last)}" if last else "a trained model" if has_model else "another run"
    advice = "continue it with --resume_from_checkpoint true, " if last else ""
    if resumes:
        what += " of other settings, without a checkpoint to continue from"
    raise ValueError(
        f"output_dir {output_dir} already holds {what}: {advice}replace it with --overwrite_output_dir true, or choose another "
        "output_dir."
    )


def holds_run(output_dir: Path) -> bool:
    """Whether a training run has left anything in `output_dir`."""
    return (
        (output_dir / RECIPE_FILE).exists()
        or (output_dir / TRAINER_STATE_NAME).exists()
        or any(output_dir.glob("checkpoint-*"))
        or _has_model(output_dir)
    )


def open_folder(output_dir: Path, resolved: str, *, overwrite: bool) -> None:
    """Make the folder this run's: with `overwrite`, remove what an earlier run left; write the recipe and the versions."""
    if overwrite:
        for checkpoint in output_dir.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        for name in LEFT_BY_RUNS:
            (output_dir / name).unlink(missing_ok=True)
        for weights in output_dir.glob("*.safetensors"):
            weights.unlink()
    write_text(output_dir / RECIPE_FILE, resolved)
    write_json(output_dir / VERSIONS_FILE, package_versions())


def package_versions() -> dict[str, str]:
    """The versions of Python and of every package that decides what a run computes."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES + OPTIONAL_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            assert name in OPTIONAL_PACKAGES, f"{name} is not installed"
    return versions


def _step(checkpoint: str) -> int:
    """The number at the end of a checkpoint's name; -1 for a folder that only looks like one."""
    number = checkpoint.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _has_model(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or (folder / "adapter_config.json").exists()


def _differences(folder: Path, resolved: str) -> list[str] | None:
    """What differs between the recipe in `folder` and `resolved`; `None` when the folder has no recipe."""
    written = folder / RECIPE_FILE
    if not written.is_file():
        return None
    before: dict[str, Any] = yaml.safe_load(written.read_text(encoding="utf-8")) or {}
    now: dict[str, Any] = yaml.safe_load(resolved) or {}
    keys = [
        key for key in dict.fromkeys([*before, *now]) if key not in FREE_TO_CHANGE and before.get(key) != now.get(key)
    ]
    return [f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys]


def _same_run(folder: Path, resolved: str) -> bool:
    return _differences(folder, resolved) == []


def _check_same_run(folder: Path, resolved: str) -> None:
    differences = _differences(folder, resolved)
    if differences:
        shown = "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more" if len(differences) > 3 else "")
        raise ValueError(f"{folder} holds a run with other settings, which cannot be continued: {shown}.")
