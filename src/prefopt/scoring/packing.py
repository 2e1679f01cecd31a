"""Choose between packed and padded rows: packed wherever that is exact for the model at hand.

What is known of an architecture is read from its config. What is not known is tried: one real pair is scored packed
and by the model's plain forward on padded rows, which finds a model that numbers positions itself, or in which the
segments' boundaries do not reach every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from prefopt.scoring.attention import CannotPackError, restore_attention, transformers_model, use_packed_attention
from prefopt.scoring.layouts import Group, Layout, PackedLayout, PaddedLayout
from prefopt.scoring.logprobs import has_scoring_path, is_sharded, score_completions

_WINDOWS = {"gpt_neo": "window_size", "modernbert-decoder": "local_attention"}
"""The setting that is a model's sliding window, where it is not called `sliding_window`."""
_RECURRENT = ("mamba", "rwkv", "recurrent", "xlstm", "jamba", "bamba", "zamba", "falcon_h1")
_PROBE_TOKENS = 128  # the pair that is tried is the one nearest to this length: long enough to tell, cheap to run
EXACT_TOLERANCE, ROUNDED_TOLERANCE = 5e-6, 2.5e-3
"""Largest root mean square difference of token log-probs (nats) or of hidden states (relative), for each layer of a
model: in float32, and where weights, activations or products are rounded to fewer bits."""


def why_not_packed(config: PretrainedConfig, *, longest_sequence: int) -> str | None:
    """Return why a model cannot be trained on packed rows exactly, in words for the log; None if nothing is known.

    Args:
        config: the model's config.
        longest_sequence: longest prompt + completion of the data, in tokens.
    """
    text = config.get_text_config()
    settings = text.to_dict()
    if text.model_type in ("bloom", "mpt") or settings.get("alibi"):
        return "its attention biases count places along the row (ALiBi)"
    window = settings.get(_WINDOWS.get(text.model_type, "sliding_window"))
    if window is not None and settings.get("use_sliding_window", True) and window < longest_sequence:
        return f"its sliding window of {window} tokens is shorter than the longest sequence ({longest_sequence})"
    chunk = settings.get("attention_chunk_size")
    if chunk and chunk < longest_sequence:
        return f"its attention chunks of {chunk} tokens are shorter than the longest sequence"
    if settings.get("attention_dropout"):
        return f"its attention has dropout (`attention_dropout` is {settings['attention_dropout']} in its config)"
    kinds = set(settings.get("layer_types") or settings.get("layers_block_type") or [])
    if unknown := sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention", "attention"}):
        return f"it has layers that carry state along the row ({', '.join(unknown)})"
    if any(word in text.model_type for word in _RECURRENT):
        return f"{text.model_type} carries state along the row"
    return None


def choose_layout(
    batch_layout: str,
    config: PretrainedConfig,
    *,
    pad_token_id: int,
    longest_sequence: int,
    pad_to_multiple_of: int = 1,
    share_prompt: bool = True,
    against_packing: str | None = None,
    probe: Callable[[PackedLayout], str | None] | None = None,
) -> tuple[Layout, str | None]:
    """Choose the layout of a model's batches: packed where that is exact, unless the padded one is asked for.

    Args:
        batch_layout: "auto", "packed" or "padded".
        config: the model's config.
        pad_token_id: of either layout.
        pad_to_multiple_of: of the padded layout.
        longest_sequence: longest prompt + completion of the data, in tokens.
        share_prompt: of the packed layout.
        against_packing: a reason that only the caller knows.
        probe: tries the packed layout and returns a reason against it (`probe_packing`); called last.

    Returns:
        The layout, and why it is padded where packing would have been tried.

    Raises:
        ValueError: "packed" is asked for and cannot be exact.
    """
    padded = PaddedLayout(pad_token_id, pad_to_multiple_of=pad_to_multiple_of)
    if batch_layout == "padded":
        return padded, None
    packed = PackedLayout(pad_token_id, share_prompt=share_prompt)
    reason = against_packing or why_not_packed(config, longest_sequence=longest_sequence)
    if reason is None and probe is not None:
        reason = probe(packed)
    if reason is None:
        return packed, None
    if batch_layout == "packed":
        raise ValueError(
            f"`batch_layout: packed` cannot be exact for this model: {reason}. Use `batch_layout: padded`."
        )
    return padded, reason


def nearest_to_probe(lengths: Sequence[int]) -> int:
    """Return the index of the group that `probe_packing` is to try."""
    return min(range(len(lengths)), key=lambda index: (abs(lengths[index] - _PROBE_TOKENS), index))


def probe_group(model: nn.Module, group: Group, layout: PackedLayout, *, device: torch.device) -> str | None:
    """Try the packed layout on a group; see `probe_packing`."""
    packed, padded = (
        {name: value.to(device) for name, value in each.collate([[group, group]]).items()}
        for each in (layout, PaddedLayout(layout.pad_token_id))
    )
    return probe_packing(model, packed, padded)


@torch.no_grad()
def probe_packing(
    model: nn.Module,
    packed: dict[str, Any],
    padded: dict[str, Any],
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> str | None:
    """Score one pair packed and by the model's plain forward; return why packing is not exact, or None.

    All ranks of a sharded model call it together.

    Args:
        model: prepared by `install_scoring`, or a model with a backbone; wrapped or not. It is set to eval meanwhile.
        packed: batch of the packed layout that holds the pair twice, so that a second one is tried as well as a first.
        padded: batch of the padded layout with the same pairs.
        autocast: context of the forward.
    """
    training = model.training
    model.eval()
    try:
        with autocast():
            plain, values = _plain_values(model, padded), _packed_values(model, packed)
    except CannotPackError as error:
        return str(error)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, AttributeError, RuntimeError, ValueError, IndexError, KeyError) as error:
        return f"its forward does not take packed rows ({type(error).__name__}: {error})"
    finally:
        model.train(training)
        restore_attention(model)
    gap, size = ((values - plain).float().square().mean().sqrt(), plain.float().square().mean().sqrt())
    difference = float(gap if has_scoring_path(model) else gap / size.clamp_min(1e-6))
    layers = getattr(transformers_model(model).config.get_text_config(), "num_hidden_layers", 1)
    if difference <= layers * (EXACT_TOLERANCE if _computes_exactly(model, autocast) else ROUNDED_TOLERANCE):
        return None
    return (
        "a pair of the data scores differently packed and by the model's plain forward (by "
        f"{difference:.2g} a token): the model numbers positions itself, or does not pass the segments' boundaries to "
        "every layer"
    )


def _packed_values(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Return the log-prob of every scored token (S,), or without a scoring path the hidden states (S, H)."""
    if has_scoring_path(model):
        return _token_logps(model, batch)
    use_packed_attention(model)
    return _hidden(model, batch, **{name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")})


def _plain_values(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Return the same values from a forward without position ids, as anyone would call the model."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"].long()}
    if not has_scoring_path(model):
        return _hidden(model, batch, **inputs)
    if any(is_sharded(parameter) for parameter in model.parameters()):
        # ZeRO-3 would prefetch the LM head in every later forward, which gathers it by itself
        return _token_logps(model, {**batch, "position_ids": None})
    logits = model(**inputs, use_cache=False).logits.flatten(0, 1)[batch["score_index"]].float()
    return logits.log_softmax(-1).gather(-1, batch["score_targets"][:, None])[:, 0]


def _token_logps(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    tokens = torch.arange(batch["score_targets"].numel(), device=batch["score_targets"].device)
    # every token counts as a completion, so that errors of different tokens cannot cancel, and as much as any other
    alone = {"score_completions": tokens, "last_index": tokens, "score_weights": None}
    return score_completions(model, {**batch, **alone}).logps


def _hidden(model: nn.Module, batch: dict[str, Any], **inputs: Tensor) -> Tensor:
    backbone: Any = transformers_model(model).base_model
    hidden: Tensor = backbone(**inputs, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[batch["score_index"]]


def _computes_exactly(model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]) -> bool:
    """Check whether the forward computes in float32 throughout."""
    parameters = list(model.parameters())
    device = parameters[0].device.type
    with autocast():
        if torch.is_autocast_enabled(device):
            return False
    if device != "cpu" and torch.get_float32_matmul_precision() != "highest":
        return False
    return all(parameter.dtype in (torch.float32, torch.float64) for parameter in parameters)
