"""Preference optimization of language models: WPO, SPPO, GPO, adversarial and multi-reference methods."""

import importlib
from typing import Any

__version__ = "0.2.0.dev0"

# module -> public names; imported on first use, so that `import prefopt` stays fast and pulls in no backend
_PUBLIC = {
    "prefopt.trainers.dpo": ("DPOConfig", "DPOTrainer"),
    "prefopt.trainers.general_preference": ("GeneralPreferenceConfig", "GeneralPreferenceTrainer"),
    "prefopt.trainers.multi_reference": ("MultiReferenceDPOConfig", "MultiReferenceDPOTrainer"),
    "prefopt.trainers.reward": (
        "AdversarialRewardConfig",
        "AdversarialRewardTrainer",
        "RewardConfig",
        "RewardTrainer",
    ),
    "prefopt.trainers.rrhf": ("RRHFConfig", "RRHFTrainer"),
    "prefopt.trainers.samples": ("SampleCompletionsCallback",),
    "prefopt.trainers.sppo": ("SPPOConfig", "SPPOTrainer"),
    "prefopt.trainers.wpo": ("WPOConfig", "WPOTrainer"),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [*sorted(_MODULE_OF), "losses"]


def __getattr__(name: str) -> Any:
    if name == "losses":
        return importlib.import_module("prefopt.losses")
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'prefopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
