"""What the groups share: the device, small models, pairs, and timing."""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.steps import draw_lengths, make_dataset
from prefopt.scoring.layouts import Group

WHOLE_8B_GIB = 120  # of a card that holds the 8B shape, its reference, gradients and optimizer


@dataclass(frozen=True)
class Card:
    """The device that is checked, and how large the checks are."""

    device: str
    gib: float

    @classmethod
    def present(cls) -> Card:
        """Return the machine's first GPU."""
        if not torch.cuda.is_available():
            raise SystemExit("gpu.py: there is no CUDA device; `--dry_run` runs everything with tiny shapes on a CPU.")
        torch.set_float32_matmul_precision("highest")
        return cls("cuda", torch.cuda.get_device_properties(0).total_memory / 2**30)

    @classmethod
    def dry(cls) -> Card:
        """Return the CPU, for a dry run."""
        torch.set_num_threads(1)
        return cls("cpu", 0.0)

    @property
    def is_dry(self) -> bool:
        """Whether this is a dry run."""
        return self.device == "cpu"

    def pick(self, on_card: Any, on_cpu: Any) -> Any:
        """Return the first on a card, the second in a dry run."""
        return on_cpu if self.is_dry else on_card

    def synchronize(self) -> None:
        """Wait until the device has done its work."""
        if not self.is_dry:
            torch.cuda.synchronize()

    def median_seconds(self, function: Callable[[], Any], *, repeat: int = 5, warm: int = 2) -> float:
        """Time a function: the median of some calls, after some that do not count."""
        times = []
        for _ in range(warm + repeat):
            self.synchronize()
            start = time.perf_counter()
            function()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[warm:])

    def free(self) -> None:
        """Give back the memory of what is no longer used."""
        gc.collect()
        if not self.is_dry:
            torch.cuda.empty_cache()

    def why_not(self, package: str) -> str | None:
        """Return why what needs a card and this package is skipped, or None."""
        if self.is_dry:
            return "needs a card"
        return None if importlib.util.find_spec(package) else f"{package} is not installed"

    # ---- small models and data

    def small_model(self, kind: str = "llama", *, dtype: str = "float32", attention: str = "sdpa", **more: Any) -> Any:
        """Build a model of two layers with random weights, the same for every dtype."""
        shape = self.pick(
            {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128, "vocab_size": 32000},
            {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "vocab_size": 256},
        )
        shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        shape |= {"max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = AutoConfig.for_model(kind, **{**shape, **more})
        torch.manual_seed(0)  # on the CPU, where every dtype draws the same numbers
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
        return model.to(self.device, getattr(torch, dtype))

    @property
    def vocab_size(self) -> int:
        """Words of the small models."""
        return self.pick(32000, 256)

    def pairs(self, count: int, seed: int = 0) -> Any:
        """Return tokenised pairs for the small models."""
        lengths = draw_lengths("ultrafeedback", count, max_length=self.pick(1024, 48), seed=seed)
        return make_dataset(lengths, vocab_size=self.vocab_size, references=None, seed=seed)

    def groups(self, count: int, seed: int = 0) -> list[Group]:
        """Return the same pairs as groups, for a layout."""
        rows = self.pairs(count, seed)
        return [Group(row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])) for row in rows]


def to_device(batch: dict[str, Any], device: str) -> dict[str, Any]:
    """Move a collated batch."""
    return {name: value.to(device) for name, value in batch.items()}


def error_of(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the relative error, as the norm of the difference over the norm."""
    exact = exact.double()
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()
