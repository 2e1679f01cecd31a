"""Uses of names that TRL's documentation does not list, in one place: a release of TRL can break this file only.

Each has the reason why it is taken from there. `tests/test_fences.py` checks every one of them against the installed
TRL and says what changed.
"""

import sys
from typing import Any

# log-probs, entropy and mean logits tile by tile, forward and backward: (N, V) logits are never in memory as a whole
from trl.kernels import ChunkedLogProbFunction

# wrap a frozen model as the policy is wrapped; accelerate's `prepare` would make DeepSpeed build an optimizer for it
from trl.models.utils import prepare_deepspeed, prepare_fsdp

# loading as TRL's trainers do it, so that a swap changes nothing: `create_model_from_path` (class from the config,
# dtype by name), `disable_dropout_in_model`, `get_config_model_id` (name or folder of a loaded model); and
# `maybe_gather_lm_head_ctx`, which gathers the LM head's weight under ZeRO-3
from trl.trainer.utils import (
    create_model_from_path,
    disable_dropout_in_model,
    get_config_model_id,
    maybe_gather_lm_head_ctx,
)


def is_log_completions(callback: Any) -> bool:
    """Return whether a callback is TRL's `LogCompletionsCallback`, without importing its module."""
    module = sys.modules.get("trl.trainer.callbacks")
    return module is not None and isinstance(callback, module.LogCompletionsCallback)


LOGPROB_CHUNK_SIZE = 32768
"""Vocabulary columns of one tile of the log-prob kernel (TRL's own default)."""

CPU_LOGPROB_TILE = 2**18
"""Elements of a tile on a CPU: the kernel passes over it many times, so it must fit into the cache."""

__all__ = [
    "CPU_LOGPROB_TILE",
    "LOGPROB_CHUNK_SIZE",
    "ChunkedLogProbFunction",
    "create_model_from_path",
    "disable_dropout_in_model",
    "get_config_model_id",
    "is_log_completions",
    "maybe_gather_lm_head_ctx",
    "prepare_deepspeed",
    "prepare_fsdp",
]
