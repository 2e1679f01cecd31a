"""The general preference model: responses become vectors, and a skew-symmetric product of two is their preference."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging
from transformers.utils.generic import ModelOutput
from transformers.utils.hub import cached_file

from prefopt._transformers import share_tied_weights
from prefopt.files import read_json
from prefopt.losses.reward import general_preference_score
from prefopt.models.heads import RECORD, Float32Linear, HeadedModel
from prefopt.scoring.logprobs import token_logps

logger = logging.get_logger(__name__)

SCALE_GATES = ("softmax", "scaled_softmax")


@dataclass
class GeneralPreferenceOutput(ModelOutput):
    """Output of one forward for each completion; float32.

    Attributes:
        embeddings: (C, d).
        scales: (C, d/2) from the prompt head, None without one.
        logps: (C,) summed log-probabilities of the tokens that were asked for, None unless asked.
    """

    embeddings: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    logps: torch.Tensor | None = None


def preference_table(
    embeddings: torch.Tensor, scales: torch.Tensor | None = None, *, temperature: float
) -> torch.Tensor:
    """Compute the R x R table of logits that each response of one prompt beats each other.

    T_ij = s(i > j) / tau, s = sum_k scale_k (v_i[2k] v_j[2k+1] - v_i[2k+1] v_j[2k]); T is antisymmetric, T_ii = 0, and
    P(i beats j) = sigmoid(T_ij).

    Args:
        embeddings: (R, d) of the responses.
        scales: (d/2,) of their prompt, or (R, d/2) with one row per response, in which case row i scales line i (the
            rows of one prompt are equal, as they are read before the response begins); None for a model without
            prompt head.
        temperature: tau of the trained model (`GeneralPreferenceModel.temperature`).

    Returns:
        (R, R), the dtype of the embeddings.

    Reference: arXiv 2410.02197.
    """
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must have shape (R, d), got {tuple(embeddings.shape)}.")
    count, dim = embeddings.shape
    first = embeddings[:, None].expand(count, count, dim).reshape(-1, dim)
    second = embeddings[None].expand(count, count, dim).reshape(-1, dim)
    if scales is not None:
        scales = scales.expand(count, dim // 2)[:, None].expand(count, count, dim // 2).reshape(-1, dim // 2)
    return general_preference_score(first, second, scales).reshape(count, count) / temperature


class GeneralPreferenceModel(HeadedModel):
    """v(x, y) in R^d from a linear head at the pooled token, and scales (d/2) from a head at the prompt's last token.

    Settings, stored in config.json and so part of the saved model:

    - `dim`: d, even.
    - `normalize`: whether v is divided by its Euclidean norm.
    - `scale_gate`: None for no prompt head; "softmax": softmax(z); "scaled_softmax": (d/2) softmax(z / sqrt(H)), of
      mean one.
    - `temperature`: tau; P = sigmoid(s / tau).
    - `pooling`: as in `RewardModel`; the released models read the closing EOS ("eos").
    - `lm_head`: whether the language model head is kept, for a supervised term beside the preference loss.

    Checkpoints of the released code (`value_head.weight`, `prompt_head.weight`) are read as they are: d and the prompt
    head follow from the weights. They do not say which variant they are, so `normalize`, `scale_gate` and
    `temperature` are then those of the authors' usage example (True, "softmax", 0.1) unless given.

    Reference: arXiv 2410.02197 and its released code, which holds three inconsistent variants.
    """

    kind: ClassVar[str] = "general_preference"
    head_names: ClassVar[tuple[str, ...]] = ("value_head", "prompt_head")
    defaults: ClassVar[dict[str, Any]] = {
        "pooling": "eos",
        "dim": 2,
        "normalize": False,
        "scale_gate": None,
        "temperature": 0.1,
        "lm_head": False,
    }

    @classmethod
    def check_record(cls, record: dict[str, Any]) -> None:
        """See `HeadedModel.check_record`."""
        super().check_record(record)
        dim = record["dim"]
        if not isinstance(dim, int) or dim < 2 or dim % 2:
            raise ValueError(
                f"The embedding width `dim` must be a positive even number, got {dim!r}; for one scalar use a "
                "RewardModel."
            )
        if record["scale_gate"] not in (None, *SCALE_GATES):
            raise ValueError(
                f"Unknown scale gate {record['scale_gate']!r}; use one of {', '.join(SCALE_GATES)}, or None."
            )
        if not record["temperature"] > 0:
            raise ValueError(f"temperature must be positive, got {record['temperature']!r}.")

    def build_heads(self, hidden_size: int, record: dict[str, Any]) -> None:
        """Create `value_head` (d, H), `prompt_head` (d/2, H) and `lm_head` (V, H) as the record asks."""
        self.value_head = Float32Linear(hidden_size, record["dim"])
        if record["scale_gate"] is not None:
            self.prompt_head = Float32Linear(hidden_size, record["dim"] // 2)
        if record["lm_head"]:
            self.lm_head = nn.Linear(hidden_size, self.config.get_text_config().vocab_size, bias=False)
            share_tied_weights(self, like=MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)])

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Float32Linear):  # the released code's initialisation of both heads
            init.normal_(module.weight, mean=0.0, std=1.0 / (module.in_features + 1))
        else:
            super()._init_weights(module)

    @property
    def temperature(self) -> float:
        """Tau of P(chosen beats rejected) = sigmoid(score / tau)."""
        return self.head_record["temperature"]

    @classmethod
    def _merge_settings(
        cls, path: str | os.PathLike[str], config: PretrainedConfig, asked: dict[str, Any], hub: dict[str, Any]
    ) -> dict[str, Any]:
        merged = super()._merge_settings(path, config, asked, hub)
        shapes = _head_shapes(path, hub) if not getattr(config, RECORD, None) else {}
        if "value_head.weight" not in shapes:
            return merged
        dim, gated = shapes["value_head.weight"][0], "prompt_head.weight" in shapes
        if asked.get("dim") not in (None, dim):
            raise ValueError(
                f"{path} has embeddings of width {dim}, but dim={asked['dim']} was asked for; leave it out."
            )
        usual = {"dim": dim, "normalize": True, "scale_gate": "softmax" if gated else None, "temperature": 0.1}
        merged |= {name: value for name, value in usual.items() if asked.get(name) is None}
        logger.warning(
            f"{path} does not say which variant it is; read with normalize={merged['normalize']}, "
            f"scale_gate={merged['scale_gate']!r}, temperature={merged['temperature']}."
        )
        if gated != (merged["scale_gate"] is not None):
            raise ValueError(
                f"{path} has {'a' if gated else 'no'} prompt head, which scale_gate={merged['scale_gate']!r} "
                "contradicts."
            )
        return merged

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        last_index: torch.Tensor | None = None,
        prompt_index: torch.Tensor | None = None,
        sft_index: torch.Tensor | None = None,
        sft_targets: torch.Tensor | None = None,
        sft_completions: torch.Tensor | None = None,
    ) -> GeneralPreferenceOutput:
        """Compute embeddings of rows or completions, their prompts' scales, and log-probs for a supervised term.

        Args:
            input_ids: as in `RewardModel.forward`.
            attention_mask: as in `RewardModel.forward`.
            position_ids: as in `RewardModel.forward`.
            last_index: as in `RewardModel.forward`.
            prompt_index: (C,) flattened position of the last prompt token of each row or completion; needed with a
                prompt head.
            sft_index: (S,) where the tokens of the supervised term are predicted; needs the LM head.
            sft_targets: (S,) those tokens.
            sft_completions: (S,) the row or completion that each belongs to.
        """
        hidden = self.hidden_states(input_ids, attention_mask, position_ids)
        embeddings = self.value_head(self.pool(hidden, input_ids, attention_mask, last_index))
        if self.head_record["normalize"]:
            embeddings = nn.functional.normalize(embeddings, dim=-1)
        scales = None
        if self.head_record["scale_gate"] is not None:
            if prompt_index is None:
                raise ValueError(
                    "This model has a prompt head: give the position of the last prompt token of each row."
                )
            scales = self._scales(hidden.reshape(-1, hidden.shape[-1])[prompt_index])
        logps = None
        if sft_index is not None:
            if not self.head_record["lm_head"]:
                raise ValueError("This model was made without its LM head; a supervised term needs `lm_head=True`.")
            assert sft_targets is not None and sft_completions is not None
            tokens = token_logps(self, hidden.reshape(-1, hidden.shape[-1])[sft_index], sft_targets)
            logps = tokens.new_zeros(len(embeddings)).index_add(0, sft_completions, tokens)
        return GeneralPreferenceOutput(embeddings=embeddings, scales=scales, logps=logps)

    def _scales(self, prompt_states: torch.Tensor) -> torch.Tensor:
        logits = self.prompt_head(prompt_states)
        if self.head_record["scale_gate"] == "softmax":
            return logits.softmax(-1)
        return (logits / math.sqrt(prompt_states.shape[-1])).softmax(-1) * logits.shape[-1]

    @torch.no_grad()
    def embeddings(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        prompt_lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute embeddings (N, d) and scales (N, d/2) or None of rows padded on either side, without gradient.

        Args:
            input_ids: (N, T), prompt and response.
            attention_mask: (N, T), 0 at padding; None for no padding.
            prompt_lengths: (N,) number of prompt tokens of each row; needed with a prompt head.
        """
        index = None
        if prompt_lengths is not None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
            rows = torch.arange(len(input_ids), device=input_ids.device)
            index = rows * input_ids.shape[1] + mask.argmax(-1) + prompt_lengths.to(rows) - 1
        output = self(input_ids, attention_mask, prompt_index=index)
        return output.embeddings, output.scales


def _head_shapes(path: str | os.PathLike[str], hub: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the two heads' weights in a checkpoint, without loading it."""
    quiet = {"_raise_exceptions_for_missing_entries": False, **hub}
    index = cached_file(path, "model.safetensors.index.json", **quiet)
    names = ("value_head.weight", "prompt_head.weight")
    if index is None:
        files = dict.fromkeys(names, "model.safetensors")
    else:
        weight_map = read_json(index)["weight_map"]
        files = {name: weight_map[name] for name in names if name in weight_map}
    shapes = {}
    for name, file_name in files.items():
        weights = cached_file(path, file_name, **quiet)
        if weights is None:
            raise ValueError(
                f"{path} has no safetensors weights; convert it with transformers' `save_pretrained` first."
            )
        with safe_open(weights, framework="pt") as tensors:
            if name in set(tensors.keys()):
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return shapes
