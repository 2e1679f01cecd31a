"""The rankers, one literal table: kind -> class. Each declares its options in its own file.

`prefopt rank` has the options of all of them; one that the chosen ranker does not read raises when it is set.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch

from prefopt.arguments import only_read_with
from prefopt.candidates.rankers.base import ModelOptions, Ranker
from prefopt.candidates.rankers.function import FunctionRanker
from prefopt.candidates.rankers.general_preference import GeneralPreferenceRanker
from prefopt.candidates.rankers.judge import JudgeRanker
from prefopt.candidates.rankers.pair_rm import PairRMRanker
from prefopt.candidates.rankers.reward import RewardRanker

RANKERS: dict[str, type[Ranker]] = {
    "reward-model": RewardRanker,
    "pair-rm": PairRMRanker,
    "general-preference": GeneralPreferenceRanker,
    "function": FunctionRanker,
    "judge": JudgeRanker,
}
# those whose `path` is a model's folder
MODEL_RANKERS = tuple(kind for kind, ranker in RANKERS.items() if issubclass(ranker.options, ModelOptions))


def _settings() -> list[tuple[str, Any, Any]]:
    """Return the options of all rankers once each, as `make_dataclass` takes them, with the rankers that read them."""
    fields: dict[str, tuple[Any, dataclasses.Field[Any], list[str]]] = {}
    for kind, ranker in RANKERS.items():
        hints = get_type_hints(ranker.options)
        for declared in dataclasses.fields(ranker.options):
            fields.setdefault(declared.name, (hints[declared.name], declared, []))[2].append(kind)
    return [
        (name, hint, only_read_with(declared, ranker=readers)) for name, (hint, declared, readers) in fields.items()
    ]


RankerSettings: Any = dataclasses.make_dataclass("RankerSettings", _settings())
RANKER_SETTINGS = tuple(declared.name for declared in dataclasses.fields(RankerSettings))


@dataclass
class _Choice:
    kind: str
    path: str
    device: torch.device


@dataclass
class RankerOptions(RankerSettings, _Choice):
    """Everything that a ranker is made from: kind, path, device, and the options of its kind (others are ignored)."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The weights' dtype; "auto" follows the device."""
        if self.dtype != "auto":
            return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]
        return torch.float32 if self.device.type == "cpu" else RANKERS[self.kind].accelerated_dtype


# recorded by the ranker's fingerprint or in another way
_RECORDED = ("dtype", "max_length", "model_revision", "trust_remote_code", "judge_template")


def deciding_options(kind: str, args: Any) -> dict[str, Any]:
    """Return the options of a ranker that decide its scores and have been set, for the record of a result."""
    return {
        declared.name: getattr(args, declared.name)
        for declared in dataclasses.fields(RANKERS[kind].options)
        if declared.metadata.get("decides_result", True)
        and declared.name not in _RECORDED
        and getattr(args, declared.name) != declared.default
    }


def build_ranker(options: RankerOptions) -> Ranker:
    """Load the ranker that `options` describe.

    Raises:
        ValueError: there is no such ranker there.
    """
    return RANKERS[options.kind](options)
