"""Settings of DPO against several references, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass, field

from prefopt.references.weights import SlidingWindowWeights, ThompsonSampling, fixed_weights, weighting_name
from prefopt.trainers.config import PreferenceConfig

MODES = ("multi_dpo", "geometric", "harmonic", "arithmetic", "forward_kl")
UNITS = ("none", "token", "byte")
DTYPES = ("bfloat16", "float16", "float32")
VALIDATED = ("vdw", "vaw", "tsw")
"""Weightings that need validation pairs."""
_OWN_LENGTHS = ("ipo", "sigmoid_norm", "sft")
_NO_REFERENCE = ("simpo",)


@dataclass
class MultiReferenceDPOConfig(PreferenceConfig):
    """Settings of `MultiReferenceDPOTrainer`: those of all pair methods, the references, and how they are mixed and weighed."""

    references: list[str] | None = field(
        default=None,
        metadata={
            "help": "Hub names or folders of the references, in order; their scores come from `ref_logps_dir`. The "
            "policy's own initial "
            "model should be one of them. None: the data holds `ref_chosen_logps` and `ref_rejected_logps` already."
        },
    )
    reference_dtype: str = field(
        default="bfloat16",
        metadata={"help": "dtype in which the references were scored: bfloat16, float16 or float32."},
    )
    mode: str = field(
        default="multi_dpo",
        metadata={
            "help": "'multi_dpo' (weighted mean of the losses), or one loss against a mixture: 'geometric' (exact for "
            "reverse KL), "
            "'harmonic' (MRPO), 'arithmetic' (heuristic), 'forward_kl' (experimental)."
        },
    )
    weighting: str = field(
        default="uniform",
        metadata={
            "help": "'uniform', 'fixed', 'arwc', 'arwc_normalized', 'vdw' (offline_1), 'vaw' (offline_2), 'swcw' "
            "(online_1), "
            "'swcw_one_hot' or 'tsw'."
        },
    )
    reference_weights: list[float] | None = field(
        default=None, metadata={"help": "The weights of `weighting: fixed`, one a reference, summing to one."}
    )
    normalize: str = field(
        default="none",
        metadata={
            "help": "Unit of log-probs in the loss, policy's and references': 'none' (sums), 'token' (each model's "
            "own) or 'byte'. "
            "Per token or byte, `beta` must be larger by about the length."
        },
    )
    anchor: str | None = field(
        default=None,
        metadata={
            "help": "The reference that is the policy's own initial model; found by itself where their names agree."
        },
    )
    clip_to_anchor: float | None = field(
        default=None,
        metadata={
            "help": "MRPO's trust region: keep references within this relative distance of the anchor (0.1 there)."
        },
    )
    accept_outliers: bool = field(
        default=False,
        metadata={"help": "Train with references that the health check quarantines, instead of refusing."},
    )
    max_exponent: float = field(default=20.0, metadata={"help": "Cap of the exponent of `mode: forward_kl`."})
    validation_rows: int = field(
        default=1000,
        metadata={
            "help": "Training rows held out, by prompt, for weightings that need validation pairs (vdw, vaw, tsw)."
        },
    )
    validation_set: str | None = field(
        default=None,
        metadata={
            "help": "One of the `eval_datasets` whose pairs serve such weightings; then no training rows are held out."
        },
    )
    accuracy_temperature: float | None = field(
        default=None, metadata={"help": "vaw: softmax of accuracies at this temperature; None: their ratio."}
    )
    window: int = field(default=1, metadata={"help": "swcw: optimizer steps that count."})
    window_reduce: str = field(
        default="ratio_of_means", metadata={"help": "swcw: 'ratio_of_means' or 'mean_of_ratios'."}
    )
    sampling_prior: float = field(default=5.0, metadata={"help": "tsw: parameter of the Beta prior (5 or 10 there)."})
    sampling_subset: int = field(
        default=250, metadata={"help": "tsw: validation pairs scored before and after each step."}
    )
    sampling_metric: str = field(default="accuracy", metadata={"help": "tsw: 'accuracy' or 'loss'."})
    sampling_ties: str = field(
        default="failure", metadata={"help": "tsw: an unchanged metric is a 'failure' or is skipped ('skip')."}
    )
    sampling_discount: float = field(default=1.0, metadata={"help": "tsw: factor on all counts before each update."})
    truncation_mode: str = field(
        default="drop",
        metadata={"help": "'drop': rows longer than `max_length` under any model are left out.", "choices": ["drop"]},
    )

    def __post_init__(self) -> None:
        self.precompute_ref_log_probs = True  # no reference is ever in memory
        super().__post_init__()
        self.weighting = weighting_name(self.weighting)
        choices = {
            "mode": MODES,
            "normalize": UNITS,
            "sampling_metric": ("accuracy", "loss"),
            "reference_dtype": DTYPES,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, not {getattr(self, name)!r}.")
        if self.truncation_mode != "drop":
            raise ValueError(
                "`truncation_mode` must be 'drop': references score whole texts, so no model may cut one."
            )
        self._check_references()
        self._check_losses()
        self._check_weighting()

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

    def _check_weighting(self) -> None:
        if self.weighting in VALIDATED and self.validation_rows < 1:
            raise ValueError(f"`weighting: {self.weighting}` needs `validation_rows` of at least 1.")
        if self.sampling_subset < 1:
            raise ValueError(f"`sampling_subset` must be at least 1, not {self.sampling_subset}.")
        if self.accuracy_temperature is not None and not self.accuracy_temperature > 0:
            raise ValueError(f"`accuracy_temperature` must be above 0, not {self.accuracy_temperature}.")
        # refused here, before anything is loaded
        SlidingWindowWeights(1, window=self.window, reduce=self.window_reduce)
        ThompsonSampling(
            1, prior=self.sampling_prior, seed=0, ties=self.sampling_ties, discount=self.sampling_discount
        )

    def _check_losses(self) -> None:
        losses = self.loss_type
        if clash := [name for name in losses if name in _NO_REFERENCE]:
            raise ValueError(f"`loss_type: {clash[0]}` has no reference: several of them would not be used.")
        if self.normalize != "none" and (clash := [name for name in losses if name in _OWN_LENGTHS]):
            raise ValueError(f"`loss_type: {clash[0]}` divides by length itself: use `normalize: none` with it.")
        if self.normalize != "none" and (clash := [name for name in losses if name.startswith("sppo")]):
            raise ValueError(
                f"`loss_type: {clash[0]}` has targets in nats of whole answers: use `normalize: none` with it."
            )
        if self.mode == "forward_kl" and (list(losses) != ["sigmoid"] or self.label_smoothing):
            raise ValueError(
                "`mode: forward_kl` is a loss of its own: leave `loss_type` at sigmoid without label smoothing."
            )
        per_pair = self.weighting.startswith("arwc")
        if self.mode == "multi_dpo" and per_pair and (clash := [name for name in losses if name.startswith("aot")]):
            raise ValueError(
                f"`loss_type: {clash[0]}` sorts the batch, so `weighting: {self.weighting}` cannot weigh its pairs in "
                "multi_dpo; use a "
                "mixture, or weights of the whole set."
            )
