"""Settings of DPO against several references, and which of them go together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

from prefopt.arguments import check_settings, setting
from prefopt.data.encoding import TextMode
from prefopt.references.weights import Reduction, Ties, fixed_weights
from prefopt.trainers.config import PreferenceConfig
from prefopt.trainers.pair_losses import PAIR_LOSSES
from prefopt.trainers.reference_weighting import NOTEBOOK_NAMES, WEIGHTINGS, weighting_name

MODES = ("multi_dpo", "geometric", "harmonic", "arithmetic", "forward_kl")
UNITS = ("none", "token", "byte")
DTYPES = ("bfloat16", "float16", "float32")
_OWN_LENGTHS = ("ipo", "sigmoid_norm", "sft")  # losses that divide by length themselves
_OWN_NATS = ("sppo", "sppo_single", "sppo_hard")  # losses with targets in nats of whole answers


@dataclass
class MultiReferenceDPOConfig(PreferenceConfig):
    """Settings of `MultiReferenceDPOTrainer`: those of all pair methods, the references, their mixture and weights."""

    references: list[str] | None = setting(
        None,
        "Hub names or folders of the references, in order; their scores come from `ref_logps_dir`. The policy's own "
        "initial model should be one of them. None: the data holds `ref_chosen_logps` and `ref_rejected_logps`.",
    )
    reference_dtype: str = setting(
        "bfloat16", "dtype in which the references were scored: bfloat16, float16 or float32.", choices=DTYPES
    )
    mode: str = setting(
        "multi_dpo",
        "'multi_dpo' (weighted mean of the losses), or one loss against a mixture: 'geometric' (exact for reverse "
        "KL), 'harmonic' (MRPO), 'arithmetic' (heuristic), 'forward_kl' (experimental).",
        choices=MODES,
    )
    weighting: str = setting(
        "uniform", f"One of {', '.join(WEIGHTINGS)} (or {', '.join(f'{k} = {v}' for k, v in NOTEBOOK_NAMES.items())})."
    )
    reference_weights: list[float] | None = setting(
        None, "The weights of `weighting: fixed`, one a reference, summing to one."
    )
    normalize: str = setting(
        "none",
        "Unit of log-probs in the loss, policy's and references': 'none' (sums), 'token' (each model's own) or "
        "'byte'. Per token or byte, `beta` must be larger by about the length.",
        choices=UNITS,
    )
    anchor: str | None = setting(
        None, "The reference that is the policy's own initial model; found by itself where their names agree."
    )
    clip_to_anchor: float | None = setting(
        None, "MRPO's trust region: keep references within this relative distance of the anchor (0.1 there)."
    )
    accept_outliers: bool = setting(
        False, "Train with references that the health check quarantines, instead of stopping."
    )
    max_exponent: float = setting(20.0, "Cap of the exponent of `mode: forward_kl`.")
    validation_rows: int = setting(
        1000, "Training rows held out, by prompt, for weightings that need validation pairs (vdw, vaw, tsw)."
    )
    validation_set: str | None = setting(
        None, "One of the `eval_datasets` whose pairs serve such weightings; then no training rows are held out."
    )
    accuracy_temperature: float | None = setting(
        None, "vaw: softmax of accuracies at this temperature; None: their ratio.", above=0
    )
    window: int = setting(1, "swcw: optimizer steps that count.", at_least=1)
    window_reduce: str = setting(
        "ratio_of_means", "swcw: 'ratio_of_means' or 'mean_of_ratios'.", choices=get_args(Reduction)
    )
    sampling_prior: float = setting(5.0, "tsw: parameter of the Beta prior (5 or 10 there).", above=0)
    sampling_subset: int = setting(250, "tsw: validation pairs scored before and after each step.", at_least=1)
    sampling_metric: str = setting("accuracy", "tsw: 'accuracy' or 'loss'.", choices=("accuracy", "loss"))
    sampling_ties: str = setting(
        "failure", "tsw: an unchanged metric is a 'failure' or is skipped ('skip').", choices=get_args(Ties)
    )
    sampling_discount: float = setting(1.0, "tsw: factor on all counts before each update.", above=0, at_most=1)
    truncation_mode: str = setting(
        "drop", "'drop': rows longer than `max_length` under any model are left out.", choices=("drop",)
    )

    def __post_init__(self) -> None:
        self.precompute_ref_log_probs = True  # no reference is ever in memory
        if self.truncation_mode != "drop":
            raise ValueError(
                "`truncation_mode` must be 'drop': references score whole texts, so no model may cut one."
            )
        super().__post_init__()
        if self.text_mode != TextMode():
            raise ValueError(
                "`chat_rendering`, `special_tokens` and `completion_turns` must be left alone: references score all "
                "answers of a text, each as its own template writes them."
            )
        self.weighting = weighting_name(self.weighting)
        check_settings(self)
        self._check_references()
        self._check_losses()

    def _check_references(self) -> None:
        names = self.references
        if names is not None:
            if not names or len(set(names)) < len(names):
                raise ValueError("`references` must name at least one model, and each once.")
            if self.anchor is not None and self.anchor not in names:
                raise ValueError(f"`anchor` {self.anchor!r} is not among the references {names}.")
        if (self.weighting == "fixed") != (self.reference_weights is not None):
            raise ValueError("`reference_weights` belongs to `weighting: fixed`: give both or neither.")
        if self.reference_weights is not None:
            fixed_weights(self.reference_weights, len(names) if names else len(self.reference_weights))
        if self.clip_to_anchor is not None and not 0 < self.clip_to_anchor < 1:
            raise ValueError(f"`clip_to_anchor` must lie between 0 and 1, not {self.clip_to_anchor}.")
        if WEIGHTINGS[self.weighting].pairs == "validation" and self.validation_rows < 1:
            raise ValueError(f"`weighting: {self.weighting}` needs `validation_rows` of at least 1.")

    def _check_losses(self) -> None:
        def check(clashing: Iterable[str], why: str) -> None:
            if clash := [name for name in self.loss_type if name in clashing]:
                raise ValueError(f"`loss_type: {clash[0]}` {why}")

        without_reference = [name for name, loss in PAIR_LOSSES.items() if not loss.needs_reference]
        check(without_reference, "has no reference: several of them would not be used.")
        if self.normalize != "none":
            check(_OWN_LENGTHS, "divides by length itself: use `normalize: none` with it.")
            check(_OWN_NATS, "has targets in nats of whole answers: use `normalize: none` with it.")
        if self.mode == "forward_kl" and (list(self.loss_type) != ["sigmoid"] or self.label_smoothing):
            raise ValueError(
                "`mode: forward_kl` is itself the loss: leave `loss_type` at sigmoid without label smoothing."
            )
        if self.mode == "multi_dpo" and WEIGHTINGS[self.weighting].per_example:
            check(
                [name for name, loss in PAIR_LOSSES.items() if loss.sorts_batch],
                f"sorts the batch, so `weighting: {self.weighting}` cannot weight its pairs in multi_dpo; use a "
                "mixture, or weights of the whole set.",
            )
