"""Activation checkpointing: what `checkpointing` means for a run, and how a model is switched to it.

A config keeps "auto" until a trainer knows model, sharding, data and card; then `settle_mode` replaces it by the mode
that `prefopt.memory` finds cheapest. `TrainingArguments` has a boolean and options of its own for the same thing, and
transformers reads those: they always agree with `checkpointing`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from prefopt.memory import Recomputation

MODES = ("auto", "none", "every_n", "selective", "all")
DEFAULT_N = 2
"""n of "every_n" where `gradient_checkpointing_kwargs` names none."""

_aten = torch.ops.aten
KEPT = (
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._flash_attention_forward.default,
)
"""Operations whose results selective checkpointing keeps: nearly all of a layer's arithmetic."""


def selective_contexts() -> Any:
    """Return contexts of forward and recomputation that keep matrix products and attention, for `context_fn`.

    Only norms and activations are recomputed then: more memory, less time.
    """
    return create_selective_checkpoint_contexts(list(KEPT))


def read_aliases(args: Any) -> None:
    """Replace "auto" by what `gradient_checkpointing` and `selective_checkpointing` say, before transformers does.

    Raises:
        ValueError: they contradict `checkpointing`.
    """
    newer = vars(args).get("activation_checkpointing")  # its name since transformers 5.20
    given = args.gradient_checkpointing if newer is None else newer
    if args.selective_checkpointing and args.checkpointing != "selective":
        if not given:
            raise ValueError(
                "`selective_checkpointing` chooses what `gradient_checkpointing` keeps: turn that on as well, or "
                "write `checkpointing: selective`."
            )
        args.checkpointing = "selective" if args.checkpointing == "auto" else args.checkpointing
    if given is None:
        pass
    elif args.checkpointing == "auto":
        args.checkpointing = "all" if given else "none"
    elif given != (args.checkpointing != "none"):
        raise ValueError(
            f"`checkpointing: {args.checkpointing}` and `gradient_checkpointing: {str(given).lower()}` contradict "
            "each other: drop one of them."
        )
    _write(args, vars(args).get("activation_checkpointing_kwargs") or args.gradient_checkpointing_kwargs)


def read_options(args: Any) -> None:
    """Have `checkpointing` and the options of `gradient_checkpointing_kwargs` agree; after transformers has read them.

    Raises:
        ValueError: the options cannot work with it.
    """
    options = dict(args.gradient_checkpointing_kwargs or {})
    if args.checkpointing in ("auto", "all") and options.get("every_n_layers", 1) > 1:
        args.checkpointing = "every_n"
    if args.checkpointing == "every_n":
        options.setdefault("every_n_layers", DEFAULT_N)
    elif args.checkpointing == "selective" and options.get("use_reentrant"):
        raise ValueError(
            "`checkpointing: selective` cannot be re-entrant: leave `use_reentrant: true` out of "
            "`gradient_checkpointing_kwargs`."
        )
    elif args.checkpointing == "selective" and (unused := sorted(set(options) - {"use_reentrant"})):
        raise ValueError(f"`checkpointing: selective` does not read {', '.join(unused)}: leave it out.")
    _write(args, options or None)


def settle_mode(args: Any, way: Recomputation) -> None:
    """Replace "auto" by what was chosen."""
    options = dict(args.gradient_checkpointing_kwargs or {})
    if way.mode == "every_n":
        options["every_n_layers"] = way.every
    args.checkpointing = way.mode
    _write(args, options or None)


def make_reentrant(args: Any) -> None:
    """Checkpoint re-entrantly, as ZeRO-3 needs it with an adapter.

    Raises:
        ValueError: `checkpointing` is selective.
    """
    if args.checkpointing == "selective":
        raise ValueError(
            "ZeRO-3 with an adapter needs re-entrant checkpointing, which cannot be selective: choose another mode of "
            "`checkpointing`."
        )
    _write(args, {**(args.gradient_checkpointing_kwargs or {}), "use_reentrant": True})


def recomputation_of(args: Any) -> Recomputation:
    """Return what a config recomputes; "auto" counts as "all"."""
    options = args.gradient_checkpointing_kwargs or {}
    mode = "all" if args.checkpointing == "auto" else args.checkpointing
    return Recomputation(mode, options.get("every_n_layers", DEFAULT_N) if mode == "every_n" else 1)


def checkpoint_selectively(model: Any) -> None:
    """Switch a transformers model that checkpoints already to keeping matrix products and attention.

    A config holds no function, so that transformers cannot be given the contexts through one.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": selective_contexts})


def _write(args: Any, options: Any) -> None:
    # "auto" stays undecided (None), so that a copy of the config is as undecided. transformers 5.23 reads the second
    # name of each, of which the first is a copy
    enabled = None if args.checkpointing == "auto" else args.checkpointing != "none"
    args.gradient_checkpointing = args.activation_checkpointing = enabled
    args.gradient_checkpointing_kwargs = args.activation_checkpointing_kwargs = options
