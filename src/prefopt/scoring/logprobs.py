"""From hidden states to completion scores, inside the model's own forward.

`install_scoring` gives a causal LM a second way through its forward: called with `score_index` and `score_targets`, it
runs the backbone, gathers the positions that predict a scored token, and folds the LM head over them in tiles.
Whole-sequence logits never exist, for policy or reference. Because the path lies inside `model.forward`, wrappers
(PEFT, DDP, DeepSpeed, FSDP2) see one ordinary forward and synchronise gradients as usual.

Letters: C completions, S scored tokens, N rows, T tokens of a row, H hidden width, V vocabulary, E experts.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from prefopt._trl import (
    CPU_LOGPROB_TILE,
    LOGPROB_CHUNK_SIZE,
    ChunkedLogProbFunction,
    maybe_gather_lm_head_ctx,
)
from prefopt.scoring.attention import PackedRows, plain_attention, use_packed_attention

ALIGNMENTS = ("sampled", "greedy", "none")
VOCAB_STATISTICS = ("entropy", "mean_logits", "is_top1")
_GREEDY_CHUNK = 1024  # positions whose whole logits exist at a time
_TOLERANCE = 0.03  # of the largest logit; bf16 rounds to 0.004


@dataclass
class CompletionScores(ModelOutput):
    """Scores of each completion of a batch; every field is float32.

    Attributes:
        logps: (C,) log-probability summed over the scored tokens (weighted by `score_weights` where the batch has
            them), in nats.
        counts: (C,) number of scored tokens.
        mean_aligned_logps: (C,) WPO's log-weight of the completion, mean over tokens, without gradient; None unless
            asked for.
        entropy, mean_logits, top1: (C,) sums over tokens of the predictive entropy (nats), of the mean logit over the
            vocabulary, and of whether the token was the model's first choice; None unless asked for. Without gradient.
        aux_loss: () MoE load-balancing loss of the batch; None for dense models.
    """

    # the first two are always there; ModelOutput allows one field without a default
    logps: Tensor
    counts: Tensor = None  # type: ignore[assignment]
    mean_aligned_logps: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    top1: Tensor | None = None
    aux_loss: Tensor | None = None


# ---- the scoring path


def install_scoring(model: PreTrainedModel) -> None:
    """Add the scoring path to `model.forward`; call it on the base model, before any wrapper. Idempotent.

    The path is a bound method, so that a deep copy of the model scores with its own weights.

    Raises:
        ValueError: the model's logits are not those that the path computes.
    """
    if "_plain_forward" in model.__dict__:
        return
    check_logits(model)
    patched: Any = model
    patched._plain_forward = model.forward
    patched.forward = types.MethodType(_scoring_forward(patched.__class__), model)


@functools.cache
def _scoring_forward(model_class: Any) -> Callable[..., Any]:
    @functools.wraps(model_class.forward)
    def forward(self: Any, *args: Any, score_index: Tensor | None = None, **kwargs: Any) -> Any:
        if score_index is None:
            # generation, and whatever else users call, computes attention as before
            with plain_attention(self):
                return self._plain_forward(*args, **kwargs)
        # PEFT adds `inputs_embeds=None`, ...
        given = {name: value for name, value in kwargs.items() if value is not None}
        return _score(self, score_index=score_index, **given)

    # generate() checks its arguments against the signature; accelerate would unwrap `__wrapped__` to the plain forward
    forward.__signature__ = inspect.signature(model_class.forward)  # type: ignore[attr-defined]
    del forward.__wrapped__  # type: ignore[attr-defined]
    return forward


def is_sharded(parameter: Tensor) -> bool:
    """Check whether a rank holds only a part of a parameter (ZeRO-3, FSDP2)."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def has_scoring_path(model: nn.Module) -> bool:
    """Check whether `install_scoring` has prepared a model, wrapped or not."""
    return any("_plain_forward" in module.__dict__ for module in model.modules())


def attention_mask_of(model: nn.Module, batch: dict[str, Any]) -> Any:
    """Return a batch's `attention_mask`, with `model` switched to the attention that packed rows need."""
    if isinstance(batch["attention_mask"], PackedRows):
        use_packed_attention(model)
    return batch["attention_mask"]


def score_completions(
    model: nn.Module,
    batch: dict[str, Any],
    *,
    alignment: str | None = None,
    vocab_statistics: bool = False,
    aux_loss: bool = False,
) -> CompletionScores:
    """Score every completion of a batch in one forward of `model`, through whatever wraps it.

    Args:
        model: a model that `install_scoring` has prepared, or a wrapper around one.
        batch: made by a layout (`scoring.layouts.Layout.collate`), on the model's device; optionally `score_weights`
            (S,), the weight of each scored token in `logps`. Packed rows switch the model to the attention that they
            need; it stays switched, since checkpointed layers run again in the backward pass (`restore_attention`).
        alignment: WPO's alignment, one of `ALIGNMENTS`, or None for no weights.
        vocab_statistics: also return entropy, mean logits and first choices, from the same pass over the vocabulary.
        aux_loss: also return the MoE load-balancing loss.

    Returns:
        The scores, C = number of completions in the batch.
    """
    scores: CompletionScores = model(
        input_ids=batch["input_ids"],
        attention_mask=attention_mask_of(model, batch),
        position_ids=batch["position_ids"],
        score_index=batch["score_index"],
        score_targets=batch["score_targets"],
        score_completions=batch["score_completions"],
        score_weights=batch.get("score_weights"),
        num_completions=batch["last_index"].numel(),
        alignment=alignment,
        vocab_statistics=vocab_statistics,
        aux_token_weights=batch["token_weights"] if aux_loss else None,
    )
    return scores


def _score(
    model: PreTrainedModel,
    *,
    score_index: Tensor,
    score_targets: Tensor,
    score_completions: Tensor,
    num_completions: int,
    score_weights: Tensor | None = None,
    alignment: str | None = None,
    vocab_statistics: bool = False,
    aux_token_weights: Tensor | None = None,
    **inputs: Tensor,
) -> CompletionScores:
    """Run the backbone on `inputs` (ids, mask, positions), and score the targets from its hidden states."""
    routers = {} if aux_token_weights is None else {"output_router_logits": True}
    outputs = model.base_model(**inputs, use_cache=False, **routers)
    hidden = outputs.last_hidden_state
    hidden = hidden.reshape(-1, hidden.shape[-1])[score_index]
    tokens = _token_scores(model, hidden, score_targets, alignment=alignment, vocab_statistics=vocab_statistics)

    def per_completion(values: Tensor) -> Tensor:
        return values.new_zeros(num_completions).index_add(0, score_completions, values)

    counts = per_completion(torch.ones_like(tokens["logps"]))
    logps = tokens["logps"] if score_weights is None else tokens["logps"] * score_weights
    scores = CompletionScores(logps=per_completion(logps), counts=counts)
    if alignment is not None:
        scores.mean_aligned_logps = per_completion(tokens["aligned"]) / counts
    if vocab_statistics:
        scores.entropy = per_completion(tokens["entropy"])
        scores.mean_logits = per_completion(tokens["mean_logits"])
        scores.top1 = per_completion(tokens["is_top1"])
    if aux_token_weights is not None:
        top_k = model.config.get_text_config().num_experts_per_tok
        scores.aux_loss = load_balancing_loss(outputs.router_logits, aux_token_weights.reshape(-1), top_k=top_k)
    return scores


# ---- the LM head


def token_logps(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return log-probs (S,) float32 of `targets` (S,) from the hidden states (S, H) that predict them.

    Call it inside `model.forward`, where the head's weights are gathered.
    """
    return _token_scores(model, hidden, targets, alignment=None, vocab_statistics=False)["logps"]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the kernel's tiles are no graph
def _token_scores(
    model: PreTrainedModel, hidden: Tensor, targets: Tensor, *, alignment: str | None, vocab_statistics: bool
) -> dict[str, Tensor]:
    """Return per-token log-probs and statistics, each (S,) float32, of `targets` (S,) under hidden states (S, H)."""
    head = model.get_output_embeddings()
    weight, bias = head.weight, head.bias
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
        bias = bias.full_tensor() if bias is not None else None
    softcap, scale = logit_transform(model.config)
    wanted = (("log_sum_sq_probs",) if alignment == "sampled" else ()) + (VOCAB_STATISTICS if vocab_statistics else ())
    with maybe_gather_lm_head_ctx(weight, bias):
        chunk = min(_tile_width(hidden), weight.shape[0])
        logps, entropy, log_sum_sq, mean_logits, is_top1 = ChunkedLogProbFunction.apply(
            hidden, weight, bias, targets, 1.0, chunk, softcap, scale, wanted
        )
        tokens = {"logps": logps}
        with torch.no_grad():
            if alignment == "none":
                tokens["aligned"] = logps.detach()
            elif alignment == "sampled":
                tokens["aligned"] = logps.detach() - log_sum_sq
            elif alignment == "greedy":
                tokens["aligned"] = logps.detach() - _largest_logps(hidden, weight, bias, softcap, scale)
    if vocab_statistics:
        tokens |= {"entropy": entropy.detach(), "mean_logits": mean_logits, "is_top1": is_top1.float()}
    return tokens


def _tile_width(hidden: Tensor) -> int:
    """Return the vocabulary columns of one tile of the log-prob kernel for hidden states (S, H)."""
    if hidden.device.type != "cpu":
        return LOGPROB_CHUNK_SIZE
    return max(CPU_LOGPROB_TILE // max(len(hidden), 1), 128)


def _largest_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> Tensor:
    """Return log max_v p(v) of each position, (S,) float32, in chunks of positions."""
    largest = []
    for chunk in hidden.split(_GREEDY_CHUNK):
        logits = logits_of(chunk, weight, bias, softcap, scale)
        largest.append(logits.amax(-1) - logits.logsumexp(-1))
    return torch.cat(largest)


def load_balancing_loss(router_logits: tuple[Tensor, ...], token_weights: Tensor, *, top_k: int) -> Tensor:
    """Compute the load-balancing loss of a mixture of experts over the real tokens of a batch.

    E * sum_{k, e} f_{k,e} * p_e, where f_{k,e} is the share of tokens whose k-th choice is expert e, and p_e the mean
    router probability.

    Args:
        router_logits: for each MoE layer, (N*T, E).
        token_weights: (N*T,) in how many sequences each token stands, 0 for padding; a shared prompt counts once per
            completion, so that packed and padded batches give the same loss.
        top_k: experts per token.

    Returns:
        () float32.

    Reference: Switch Transformers, arXiv 2101.03961, Eq. 4, over all layers at once as transformers computes it.
    """
    logits = torch.cat([layer.to(token_weights.device).float() for layer in router_logits])
    weights = token_weights.repeat(len(router_logits))[:, None]
    probs = logits.softmax(-1)
    chosen = nn.functional.one_hot(probs.topk(top_k, dim=-1).indices, probs.shape[-1]).float()  # (tokens, k, E)
    share = (chosen * weights[..., None]).sum(0) / weights.sum()
    mean_prob = (probs * weights).sum(0) / weights.sum()
    return probs.shape[-1] * (share * mean_prob).sum()


# ---- logits: how a model makes them, and whether the scoring path makes the same


def logit_transform(config: PretrainedConfig) -> tuple[float | None, float]:
    """Return how a model turns LM-head outputs into logits: (soft cap or None, factor); the factor comes first."""
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


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> Tensor:
    """Compute logits (S, V) float32 of hidden states (S, H) under an LM head (V, H) and a `logit_transform`."""
    bias = None if bias is None else bias.to(hidden.dtype)
    logits = nn.functional.linear(hidden, weight.to(hidden.dtype), bias).float() * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def check_logits(model: PreTrainedModel) -> None:
    """Check that the scoring path's LM head reproduces the model's own logits on one random hidden state.

    Sharded weights, and weights that are not loaded yet, are not checked.

    Raises:
        ValueError: the logits differ (a further layer before the head, a scale of its own), or the model has no
            backbone to call.
    """
    backbone, head = model.base_model, model.get_output_embeddings()
    if backbone is model or head is None:
        raise ValueError(f"{type(model).__name__} has no backbone with a separate LM head, so it cannot be scored.")
    weight = head.weight
    if is_sharded(weight) or weight.device.type == "meta":
        return
    draw = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0))
    hidden = draw.to(weight.device, weight.dtype)
    with torch.no_grad():
        # large logits, so that a soft cap shows
        largest = nn.functional.linear(hidden, weight).float().abs().max().clamp_min(1e-6)
        hidden = hidden * (20 / largest).to(weight.dtype)
        theirs = _model_logits(model, backbone, hidden)
        if theirs is None:
            return
        ours = logits_of(hidden, weight, head.bias, *logit_transform(model.config))
    gap = ((theirs - ours).abs().max() / ours.abs().max()).item()
    if not gap <= _TOLERANCE:
        raise ValueError(
            f"{type(model).__name__} does more to its logits than the scoring path knows (they differ by {gap:.0%}), "
            "so its log-probs would be wrong."
        )


class _Outputs(SimpleNamespace):
    """Stands in for a backbone's outputs: the hidden state, and None for every other attribute."""

    def __getattr__(self, name: str) -> Any:
        return None

    def __getitem__(self, index: Any) -> Tensor:
        hidden: Tensor = self.last_hidden_state
        return hidden


def _model_logits(model: PreTrainedModel, backbone: nn.Module, hidden: Tensor) -> Tensor | None:
    """Run `model.forward` on a fixed hidden state (1, H); return logits (1, V), or None without a backbone call."""
    kept, calls = backbone.__dict__.get("forward"), []

    def forward(*args: Any, **kwargs: Any) -> _Outputs:
        calls.append(args)
        return _Outputs(last_hidden_state=hidden[None])

    patched: Any = backbone
    patched.forward = forward
    try:
        ids = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
        return logits if calls else None
    except (AttributeError, TypeError, IndexError, ValueError, RuntimeError):
        return None
    finally:
        if kept is None:
            del patched.forward
        else:
            patched.forward = kept
