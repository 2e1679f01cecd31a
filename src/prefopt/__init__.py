"""Preference optimization of language models: WPO, SPPO, GPO, adversarial and multi-reference methods."""

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> module; imported when first used, so that `import prefopt` stays fast and pulls in no training backend
_PUBLIC = {
    "RRHFTrainer": "prefopt.trainers.rrhf",
    "RRHFConfig": "prefopt.trainers.rrhf",
    "GeneralPreferenceTrainer": "prefopt.trainers.general_preference",
    "GeneralPreferenceConfig": "prefopt.trainers.general_preference",
    "AdversarialRewardTrainer": "prefopt.trainers.reward",
    "AdversarialRewardConfig": "prefopt.trainers.reward",
    "RewardTrainer": "prefopt.trainers.reward",
    "RewardConfig": "prefopt.trainers.reward",
    "MultiReferenceDPOTrainer": "prefopt.trainers.multi_reference",
    "MultiReferenceDPOConfig": "prefopt.trainers.multi_reference",
    "SPPOTrainer": "prefopt.trainers.sppo",
    "SPPOConfig": "prefopt.trainers.sppo",
    "DPOConfig": "prefopt.trainers.dpo",
    "DPOTrainer": "prefopt.trainers.dpo",
    "WPOConfig": "prefopt.trainers.wpo",
    "WPOTrainer": "prefopt.trainers.wpo",
}
_MODULES = ("losses",)

__all__ = [*sorted(_PUBLIC), *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"prefopt.{name}")
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'prefopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
