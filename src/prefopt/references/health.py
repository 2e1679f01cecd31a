"""A health card for each reference, computed from its scores before anything is trained against it.

K references, N pairs. Accuracy at chance is reported and no more: such a reference is useless, not broken. A reference
is *quarantined* where its scores cannot be right:

- its median nats per byte is at least twice its peers' and more than five robust standard deviations (1.4826 MAD of
  log nats per byte) above their median, with three references or more: text that fluent models find likely is not
  that surprising to another fluent model, so weights, tokenizer, template or dtype are wrong;
- half of its pairs or more tie: different answers do not get equal scores;
- the scores of a batch differ from those of single texts by more than 5 % (bfloat16 stays below 2 %): padding or masks
  are wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt.intervals import wilson_interval

MIN_PEERS = 2
OUTLIER_RATIO = 2.0
OUTLIER_DEVIATIONS = 5.0
BATCH_TOLERANCE = 0.05
MANY_TIES, TOO_MANY_TIES = 0.05, 0.5
HEAVY_TAIL = 50.0


@dataclass(frozen=True)
class HealthCard:
    """Figures of one reference on N pairs.

    Attributes:
        name: the reference.
        rows: N.
        accuracy, accuracy_low, accuracy_high: share of pairs whose chosen completion has the higher log-prob per
            token, with its 95 % Wilson interval; a tie counts as wrong.
        ties: share of pairs with equal log-probs per token.
        confidence_mean, confidence_median, confidence_p99: of |m(chosen) - m(rejected)|, nats per token.
        nats_per_token, nats_per_byte: medians over completions.
        not_prefix: rows whose prompt is not a token prefix of prompt + completion; None where unknown.
        batched_vs_single: largest relative difference between batched and single scores; None where unknown.
        remarks: what a user should know.
        quarantine: why the reference must not be used, or "".
    """

    name: str
    rows: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    ties: float
    confidence_mean: float
    confidence_median: float
    confidence_p99: float
    nats_per_token: float
    nats_per_byte: float
    not_prefix: int | None
    batched_vs_single: float | None
    remarks: tuple[str, ...] = ()
    quarantine: str = ""


def health_cards(
    names: Sequence[str],
    *,
    logps: tuple[np.ndarray, np.ndarray],
    tokens: tuple[np.ndarray, np.ndarray],
    num_bytes: tuple[np.ndarray, np.ndarray],
    checks: Sequence[dict[str, Any]] | None = None,
) -> list[HealthCard]:
    """Make the cards of K references on N pairs, each compared with its peers.

    Args:
        names: K names.
        logps: chosen and rejected, (K, N) summed log-probs in nats.
        tokens: chosen and rejected, (K, N) scored tokens.
        num_bytes: chosen and rejected, (K, N) or (N,) UTF-8 bytes of the completions.
        checks: for each reference the notes of scoring (`not_prefix`, `batched_vs_single`).

    Raises:
        ValueError: no pairs, or shapes that do not agree.
    """
    shape = (len(names), np.asarray(logps[0]).shape[-1])
    sums, counts = (np.asarray(pair, dtype=np.float64) for pair in (logps, tokens))
    if shape[1] == 0 or sums.shape != (2, *shape) or counts.shape != (2, *shape):
        raise ValueError(f"scores of {len(names)} references must have shape {shape}, got {sums.shape[1:]}.")
    sizes = np.stack([np.broadcast_to(np.maximum(side, 1), shape) for side in num_bytes])
    surprise = np.median(np.concatenate(-sums / sizes, axis=1), axis=1).tolist()
    notes = checks if checks is not None else [{}] * len(names)
    return [
        _card(name, sums[:, k] / counts[:, k], surprise[k], surprise[:k] + surprise[k + 1 :], notes[k])
        for k, name in enumerate(names)
    ]


def _card(
    name: str, means: np.ndarray, nats_per_byte: float, peers: Sequence[float], check: dict[str, Any]
) -> HealthCard:
    """Make a card from the (2, N) log-probs per token of chosen and rejected completions."""
    chosen, rejected = means
    confidence = np.abs(chosen - rejected)
    median, p99 = (float(np.quantile(confidence, q)) for q in (0.5, 0.99))
    right, rows, ties = int((chosen > rejected).sum()), len(chosen), float((chosen == rejected).mean())
    low, high = wilson_interval(right, rows)
    not_prefix, batched_vs_single = check.get("not_prefix"), check.get("batched_vs_single")
    few_nats = len(peers) >= MIN_PEERS and nats_per_byte * OUTLIER_RATIO <= float(np.median(peers))
    remarks = {
        "accuracy is below chance": high < 0.5,
        "accuracy is not above chance": low <= 0.5 <= high,
        f"{ties:.0%} ties": ties > MANY_TIES,
        "a few pairs dominate its confidence": p99 > HEAVY_TAIL * max(median, 1e-12),
        f"{not_prefix} prompts are no token prefix": bool(not_prefix),
        "far less surprised than its peers: it may have been trained on these texts": few_nats,
    }
    return HealthCard(
        name=name,
        rows=rows,
        accuracy=right / rows,
        accuracy_low=low,
        accuracy_high=high,
        ties=ties,
        confidence_mean=float(confidence.mean()),
        confidence_median=median,
        confidence_p99=p99,
        nats_per_token=float(np.median(-means)),
        nats_per_byte=nats_per_byte,
        not_prefix=not_prefix,
        batched_vs_single=batched_vs_single,
        remarks=tuple(words for words, holds in remarks.items() if holds),
        quarantine=_why_quarantined(nats_per_byte, peers, ties, batched_vs_single),
    )


def _why_quarantined(
    nats_per_byte: float, peers: Sequence[float], ties: float, batched_vs_single: float | None
) -> str:
    if batched_vs_single is not None and not batched_vs_single <= BATCH_TOLERANCE:
        return f"its batched scores differ from single ones by {batched_vs_single:.1%}"
    if ties >= TOO_MANY_TIES:
        return f"{ties:.0%} of its pairs tie"
    if len(peers) < MIN_PEERS:
        return ""
    logs = np.log(np.maximum(peers, 1e-12))
    centre = float(np.median(logs))
    deviation = 1.4826 * float(np.median(np.abs(logs - centre)))
    excess = math.log(max(nats_per_byte, 1e-12)) - centre
    if excess >= max(math.log(OUTLIER_RATIO), OUTLIER_DEVIATIONS * deviation):
        return f"{nats_per_byte:.2f} nats per byte, {math.exp(excess):.1f} times its peers' median"
    return ""


def cards_table(cards: Sequence[HealthCard]) -> str:
    """Format the cards as text, one reference a line, with remarks and quarantines below."""
    width = max(9, *(len(card.name) for card in cards))
    head = (
        f"{'reference':<{width}}  {'rows':>6}  {'accuracy (95 %)':>20}  {'ties':>5}  {'confidence mean/p50/p99':>24}"
    )
    lines = [f"{head}  {'nats/token':>10}  {'nats/byte':>9}  {'batched':>8}"]
    for card in cards:
        accuracy = f"{card.accuracy:.3f} [{card.accuracy_low:.3f}, {card.accuracy_high:.3f}]"
        confidence = f"{card.confidence_mean:.3f}/{card.confidence_median:.3f}/{card.confidence_p99:.3f}"
        batched = "-" if card.batched_vs_single is None else f"{card.batched_vs_single:.0e}"
        lines.append(
            f"{card.name:<{width}}  {card.rows:>6}  {accuracy:>20}  {card.ties:>5.1%}  {confidence:>24}  "
            f"{card.nats_per_token:>10.3f}  {card.nats_per_byte:>9.3f}  {batched:>8}"
        )
    lines += [f"{card.name}: {'; '.join(card.remarks)}." for card in cards if card.remarks]
    lines += [f"QUARANTINED {card.name}: {card.quarantine}." for card in cards if card.quarantine]
    return "\n".join(lines)
