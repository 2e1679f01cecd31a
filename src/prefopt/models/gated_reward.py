"""ArmoRM's architecture: many objectives of an answer, weighed by a gate that reads the prompt.

It reads the published checkpoint as it is, without the Python code beside it, which transformers 5 cannot import.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

ARCHITECTURE = "LlamaForRewardModelWithGating"
"""Name of the architecture in the checkpoint's config.json."""

ASSISTANT_TURN = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
"""End of the prompt under Llama 3's template: the gate reads the first of these tokens, where they stand last.

The published code looks for the two line feeds after them too, which other tokenizers join with what follows.
"""


@dataclass
class GatedRewardOutput(ModelOutput):
    """Output of one forward.

    Attributes:
        rewards: (N, K) of the objectives.
        gates: (N, K) their weights.
        score: (N,) the weighted sum.
    """

    rewards: Tensor | None = None
    gates: Tensor | None = None
    score: Tensor | None = None


class Gate(nn.Module):
    """softmax(MLP(h) / temperature) * logit_scale: a weight for each objective from the prompt's last state."""

    def __init__(self, width: int, objectives: int, *, hidden: int, num_hidden: int, temperature: float) -> None:
        super().__init__()
        widths = [width, *[hidden] * num_hidden, objectives]
        self.layers = nn.ModuleList(nn.Linear(first, second) for first, second in pairwise(widths))
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.temperature = temperature

    def forward(self, states: Tensor) -> Tensor:
        """Map (N, H) to (N, K)."""
        *hidden, last = self.layers
        for layer in hidden:
            states = layer(states).relu()
        return (last(states) / self.temperature).softmax(dim=1) * self.logit_scale[0]


class GatedRewardModel(LlamaPreTrainedModel):
    """score(x, y) = sum over objectives k of gate_k(x) (R(x, y) M)_k, with R linear in the answer's last state.

    M is the stored `reward_transform_matrix`, which takes the correlation with length out of the objectives.

    Reference: arXiv 2406.12845 and the code beside RLHFlow/ArmoRM-Llama3-8B-v0.1, whose names of weights these are.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        objectives = getattr(config, "num_objectives", 19)
        self.model = LlamaModel(config)
        self.regression_layer = nn.Linear(config.hidden_size, objectives, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(objectives), requires_grad=False)
        self.gating = Gate(
            config.hidden_size,
            objectives,
            hidden=getattr(config, "gating_hidden_dim", 1024),
            num_hidden=getattr(config, "gating_n_hidden", 3),
            temperature=getattr(config, "gating_temperature", 10),
        )
        self.gate_pattern: list[int] = []
        self.post_init()

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype
    ) -> GatedRewardModel:
        """Load a checkpoint in the published layout.

        Raises:
            ValueError: weights are missing.
        """
        read: Any = cls.from_pretrained
        model, report = read(path, config=LlamaConfig.from_pretrained(path), dtype=dtype, output_loading_info=True)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{path} lacks {len(missing)} weights of an {ARCHITECTURE}, such as {missing[0]}.")
        model.gate_pattern = tokenizer(ASSISTANT_TURN, add_special_tokens=False)["input_ids"]
        return model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> GatedRewardOutput:
        """Score conversations.

        Args:
            input_ids: (N, T), padded on the right; each ends with the turn to be scored.
            attention_mask: (N, T), 0 at padding.

        Raises:
            ValueError: a row has no assistant turn, because it was cut.
        """
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        rows = torch.arange(len(hidden), device=hidden.device)
        rewards = self.regression_layer(hidden[rows, attention_mask.sum(1) - 1])
        gates = self.gating(hidden[rows, self._gate_positions(input_ids.tolist())])
        return GatedRewardOutput(rewards, gates, (gates * (rewards @ self.reward_transform_matrix)).sum(dim=1))

    def _gate_positions(self, rows: Sequence[list[int]]) -> list[int]:
        pattern, found = self.gate_pattern, []
        for ids in rows:
            starts = range(len(ids) - len(pattern), -1, -1)
            start = next((start for start in starts if ids[start : start + len(pattern)] == pattern), None)
            if start is None:
                raise ValueError(
                    f"A conversation has no {ASSISTANT_TURN!r} left, where this model reads the prompt: raise "
                    "`max_length`, or leave out such long answers."
                )
            found.append(start)
        return found
