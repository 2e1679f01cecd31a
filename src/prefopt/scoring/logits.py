"""From hidden states to logits: scale and cap, and a check that a model does no more than that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

_TOLERANCE = 0.03  # of the largest logit; bf16 rounds to 0.004


def logit_transform(config: PretrainedConfig) -> tuple[float | None, float]:
    """How a model turns LM-head outputs into logits: (soft cap or None, factor), the factor applied first."""
    text = config.get_text_config()

    def first(*names: str) -> float | None:
        return next((float(v) for name in names if (v := getattr(text, name, None)) is not None), None)

    softcap = first("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    factor = first("logit_scale", "output_multiplier", "lm_head_multiplier")
    if factor is not None:
        return softcap, factor
    scaling = first("logits_scaling")
    if scaling is not None:
        return softcap, scaling if text.model_type == "hyperclovax" else 1 / scaling
    return softcap, 1.0


def logits_of(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, scale: float
) -> torch.Tensor:
    """The logits (S, V), float32, of hidden states (S, H) under an LM head (V, H) and the transform of `logit_transform`."""
    bias = None if bias is None else bias.to(hidden.dtype)
    logits = nn.functional.linear(hidden, weight.to(hidden.dtype), bias).float() * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def check_logits(model: PreTrainedModel) -> None:
    """Make sure that the model's own forward makes of a hidden state the logits that the scoring path makes of it.

    Weights that are sharded, or not there yet, are not looked at.

    Raises:
        ValueError: it makes others (a further layer before the head, a scale of its own), or it has no backbone to call.
    """
    backbone, head = model.base_model, model.get_output_embeddings()
    if backbone is model or head is None:
        raise ValueError(f"{type(model).__name__} has no backbone with an LM head of its own, so it cannot be scored.")
    weight = head.weight
    if isinstance(weight, DTensor) or hasattr(weight, "ds_id") or weight.device.type == "meta":
        return
    draw = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0))
    hidden = draw.to(weight.device, weight.dtype)
    with torch.no_grad():
        # large logits, so that a soft cap shows
        hidden = hidden * (20 / nn.functional.linear(hidden, weight).float().abs().max().clamp_min(1e-6)).to(
            weight.dtype
        )
        theirs = _own_logits(model, backbone, hidden)
        if theirs is None:
            return
        ours = logits_of(hidden, weight, head.bias, *logit_transform(model.config))
    gap = ((theirs - ours).abs().max() / ours.abs().max()).item()
    if not gap <= _TOLERANCE:
        raise ValueError(
            f"{type(model).__name__} does more to its logits than the scoring path knows (they differ by {gap:.0%}), so its log-probs would "
            "be wrong."
        )


def _own_logits(model: PreTrainedModel, backbone: nn.Module, hidden: torch.Tensor) -> torch.Tensor | None:
    """What `model.forward` makes of a hidden state (1, H), (1, V) float32; None where it goes another way than through its backbone's forward."""
    kept, calls = backbone.__dict__.get("forward"), []

    def forward(*args: Any, **kwargs: Any) -> _Outputs:
        calls.append(args)
        return _Outputs(last_hidden_state=hidden[None])

    backbone.forward = forward
    try:
        ids = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        return logits if calls else None
    except (AttributeError, TypeError, IndexError, ValueError, RuntimeError):
        return None
    finally:
        if kept is None:
            del backbone.forward
        else:
            backbone.forward = kept


class _Outputs(SimpleNamespace):
    """A backbone's outputs: the hidden state, and None for whatever else is asked of it."""

    def __getattr__(self, name: str) -> Any:
        return None

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.last_hidden_state
