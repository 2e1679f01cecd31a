"""A scalar reward model: one linear output on a pooled token of a causal LM's backbone."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import logging

from prefopt.models.heads import RECORD, Float32Linear, HeadedModel

logger = logging.get_logger(__name__)

OWN_MODEL_TYPE = "prefopt_reward_model"
"""`model_type` of saved models that no other loader reads correctly (pooling "mean" and "max")."""


class _OwnConfig(PretrainedConfig):
    """Lets AutoConfig name the model type; `RewardModel.from_pretrained` reads the backbone's own config."""

    model_type = OWN_MODEL_TYPE


AutoConfig.register(OWN_MODEL_TYPE, _OwnConfig, exist_ok=True)


class RewardModel(HeadedModel):
    """r(x, y) = w . h, with h the pooled last hidden state of prompt and response; a bias would cancel in a ranking.

    Pooling reads the attention mask, never the pad token's id, and takes either padding side: "eos" the last real
    token, "last" the token before a closing EOS, "mean" and "max" over all real tokens of prompt and response.

    Saved in the layout of transformers' `...ForSequenceClassification` (`score.weight`, one label), which
    `AutoModelForSequenceClassification` loads. It reads the last token that is not the pad token: the same score for
    "eos" where the pad token is not the EOS, and for "last" where it is the EOS or where the text ends without one.
    Models with "mean" and "max" pooling are saved under a separate model type, so that a loader that would score
    otherwise fails on them.

    Reference: arXiv 2311.08045 and its released code (head without bias, pooling names; there padding enters "max",
    here it does not).
    """

    kind: ClassVar[str] = "reward"
    head_names: ClassVar[tuple[str, ...]] = ("score",)
    defaults: ClassVar[dict[str, Any]] = {"pooling": "eos"}
    published_names: ClassVar[dict[str, str]] = {r"^value_head\.": "score."}

    def build_heads(self, hidden_size: int, record: dict[str, Any]) -> None:
        """Create `score`, (1, H)."""
        self.num_labels = 1
        self.score = Float32Linear(hidden_size, 1)

    @classmethod
    def _set_record(cls, config: PretrainedConfig, record: dict[str, Any]) -> None:
        super()._set_record(config, record)
        config.num_labels = 1

    def saved_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Name the sequence classification class where it scores as this model does, else a separate model type."""
        known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config["model_type"])
        pooling = self.head_record["pooling"]
        if pooling in ("mean", "max"):
            record = {**config[RECORD], "backbone": config["model_type"]}
            return {**config, "model_type": OWN_MODEL_TYPE, RECORD: record}
        if pooling == "eos" and config.get("pad_token_id") in self.eos_token_ids:
            logger.warning_once(
                "The pad token is the EOS token: loaders that find the last token by the pad id "
                "(AutoModelForSequenceClassification) will read this model one token too early. Use another pad "
                "token, or pooling 'last'."
            )
        if pooling == "last" and config.get("pad_token_id") not in self.eos_token_ids:
            logger.warning_once(
                "The pad token is not the EOS token: AutoModelForSequenceClassification will read a closing EOS where "
                "this model (pooling 'last') reads the token before it. Give it texts without their EOS, or set the "
                "pad token to the EOS."
            )
        return {**config, "architectures": [known or config["architectures"][0]]}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        last_index: torch.Tensor | None = None,
    ) -> SequenceClassifierOutputWithPast:
        """Compute the rewards of the rows, or of the completions that `last_index` ends.

        Args:
            input_ids: (N, T).
            attention_mask: (N, T), 0 at padding; None for no padding; with `last_index` also a packed mask.
            position_ids: (N, T); default: real tokens counted from 0.
            last_index: (C,) flattened positions of the completions' last tokens (`scoring.layouts`).

        Returns:
            `logits`: (N, 1) or (C, 1) float32.
        """
        hidden = self.hidden_states(input_ids, attention_mask, position_ids)
        pooled = self.pool(hidden, input_ids, attention_mask, last_index)
        return SequenceClassifierOutputWithPast(logits=self.score(pooled))

    @torch.no_grad()
    def rewards(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the rewards (N,), float32, without gradient, of rows (N, T) with padding on either side."""
        return self(input_ids, attention_mask).logits[:, 0]
