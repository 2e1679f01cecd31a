"""The rankers, one literal table: kind -> how it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from prefopt.candidates.rankers.base import Ranker

MODEL_RANKERS = ("reward-model", "pair-rm", "general-preference")  # those whose `path` is a model's folder


@dataclass(frozen=True)
class RankerOptions:
    """Everything that any ranker is made from; see `RankArguments` for what each means."""

    kind: str
    path: str
    device: torch.device
    dtype: str = "auto"
    max_length: int | None = None
    tokens_per_batch: int = 16384
    trust_remote_code: bool = False
    base_url: str = ""
    judge_template: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 64
    request_timeout: float = 600.0
    retries: int = 5

    @property
    def torch_dtype(self) -> torch.dtype:
        """The weights' dtype; "auto" follows the device."""
        if self.dtype != "auto":
            return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]
        if self.device.type == "cpu":
            return torch.float32
        return torch.float16 if self.kind == "pair-rm" else torch.bfloat16


def build_ranker(options: RankerOptions) -> Ranker:
    """Load the ranker that `options` describe.

    Raises:
        ValueError: there is no such ranker there.
    """
    return RANKERS[options.kind](options)


def _reward_model(options: RankerOptions) -> Ranker:
    from prefopt.candidates.rankers.reward import RewardRanker

    return RewardRanker(
        options.path,
        dtype=options.torch_dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        max_length=options.max_length,
        tokens_per_batch=options.tokens_per_batch,
    )


def _pair_rm(options: RankerOptions) -> Ranker:
    from prefopt.candidates.rankers.pair_rm import PairRMRanker

    return PairRMRanker(
        options.path, dtype=options.torch_dtype, device=options.device, tokens_per_batch=options.tokens_per_batch
    )


def _general_preference(options: RankerOptions) -> Ranker:
    from prefopt.candidates.rankers.general_preference import GeneralPreferenceRanker

    return GeneralPreferenceRanker(
        options.path,
        dtype=options.torch_dtype,
        device=options.device,
        max_length=options.max_length,
        tokens_per_batch=options.tokens_per_batch,
    )


def _function(options: RankerOptions) -> Ranker:
    from prefopt.candidates.rankers.function import FunctionRanker

    return FunctionRanker(options.path)


def _judge(options: RankerOptions) -> Ranker:
    from prefopt.candidates.backends.http import JsonClient
    from prefopt.candidates.rankers.judge import JudgeRanker

    return JudgeRanker(
        options.path,
        JsonClient(options.base_url, options.key_variable, options.request_timeout, options.retries),
        template=options.judge_template,
        concurrency=options.concurrency,
    )


RANKERS: dict[str, Callable[[RankerOptions], Ranker]] = {
    "reward-model": _reward_model,
    "pair-rm": _pair_rm,
    "general-preference": _general_preference,
    "function": _function,
    "judge": _judge,
}
