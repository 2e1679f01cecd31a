"""Checks of what was saved."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open


def check_saved_shapes(folder: Path) -> None:
    """Make sure that no tensor saved in `folder` is empty, as a model sharded by ZeRO-3 is when it was not gathered.

    Raises:
        RuntimeError: a tensor has no elements.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as saved:
            empty = [name for name in saved.keys() if 0 in saved.get_slice(name).get_shape()]
        if empty:
            raise RuntimeError(
                f"{path} was saved without the weights of {len(empty)} tensor(s), {empty[0]} among them. "
                "Under ZeRO-3 set `zero3_save_16bit_model: true` in the accelerate config."
            )
