"""The names that we use of TRL beyond what its documentation lists, in one place: a TRL release can break this file only."""

from trl.kernels import ChunkedLogProbFunction
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import (
    create_model_from_path,
    disable_dropout_in_model,
    get_config_model_id,
    maybe_gather_lm_head_ctx,
)

LOGPROB_CHUNK_SIZE = 32768
"""Vocabulary columns of one tile of the log-prob kernel (TRL's own default)."""

CPU_LOGPROB_TILE = 2**18
"""Elements of a tile on a CPU: the kernel passes over it many times there, so it has to fit into the cache, and small ones cost calls."""

__all__ = [
    "CPU_LOGPROB_TILE",
    "LOGPROB_CHUNK_SIZE",
    "ChunkedLogProbFunction",
    "create_model_from_path",
    "disable_dropout_in_model",
    "get_config_model_id",
    "maybe_gather_lm_head_ctx",
    "prepare_deepspeed",
    "prepare_fsdp",
]
