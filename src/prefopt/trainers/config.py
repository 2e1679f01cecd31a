"""Settings that trainers share, and TRL's settings that we refuse by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig as TRLDPOConfig

from prefopt.arguments import SecretsStayOut
from prefopt.scoring.logprobs import ALIGNMENTS

BATCH_LAYOUTS = ("auto", "packed", "padded")

# TRL settings that would change a result here and have no counterpart: (field, value that means "off", what to do
# instead)
_REFUSED = (
    ("sync_ref_model", False, "The reference of these trainers stays fixed."),
    ("f_divergence_type", "reverse_kl", "Only the reverse KL is implemented."),
    ("activation_offloading", False, "Use `gradient_checkpointing` to save activation memory."),
    ("pad_token", None, "Set the tokenizer's `pad_token`."),
    ("precompute_ref_batch_size", None, "Reference passes are filled by tokens, as many as fit."),
    ("neftune_noise_alpha", None, "Its noise would reach the policy's log-probs and not the reference's."),
)

# settings of transformers that our loaders and our evaluation pass by
_PASSED_BY = (
    ("label_smoothing_factor", 0.0, "It smooths token labels; `label_smoothing` is that of the preference losses."),
    ("batch_eval_metrics", False, "`compute_metrics` gets the predictions of all rows at once."),
    ("include_for_metrics", [], "`compute_metrics` gets predictions only."),
    ("eval_do_concat_batches", True, "`compute_metrics` gets the predictions of all rows in one array."),
    ("dataloader_in_order", True, "The micro-batches of a step belong together."),
)


@dataclass
class BatchConfig(SecretsStayOut):
    """How examples become batches; a mixin for trainer configs."""

    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Where prompt and longest completion do not fit in `max_length`, keep the last "
            "`max_prompt_length` prompt tokens. "
            "None cuts as TRL's `truncation_mode` says."
        },
    )
    on_bad_row: str = field(
        default="drop",
        metadata={"help": "What to do with a row that cannot be used: 'drop' (counted and reported) or 'raise'."},
    )
    batch_layout: str = field(
        default="auto",
        metadata={"help": "'packed' (several examples a row), 'padded', or 'auto': packed where that is exact."},
    )
    share_prompt: bool = field(
        default=True, metadata={"help": "In packed rows, run each prompt once for all of its completions."}
    )
    max_tokens_per_row: int | None = field(
        default=None,
        metadata={
            "help": "Capacity of a packed row in tokens. None: one row a micro-batch (short rows where the mask is "
            "dense: eager attention on a CPU)."
        },
    )

    selective_checkpointing: bool = field(
        default=False,
        metadata={
            "help": "With `gradient_checkpointing`: keep the results of matrix products and attention and recompute "
            "only the rest; "
            "more memory, less time."
        },
    )

    def choose_precision(self) -> None:
        """Where neither bf16 nor fp16 is set: bf16 on a GPU that has it, float32 elsewhere; call it before TRL's checks."""
        if self.bf16 is None and not self.fp16:
            self.bf16 = is_torch_bf16_gpu_available() and not self.use_cpu

    schedule_epochs: float | None = field(
        default=None,
        metadata={
            "help": "Epochs that the learning-rate schedule (warm-up included) is laid out for, where training stops "
            "earlier, after "
            "`num_train_epochs`; None: the same."
        },
    )

    def check_batching(self) -> None:
        """Raise a ValueError where these settings cannot work."""
        refuse_set(self, _PASSED_BY)
        if self.train_sampling_strategy == "group_by_length":
            raise ValueError(
                "`train_sampling_strategy: group_by_length` is not supported: micro-batches are balanced by length "
                "already."
            )
        if self.accelerator_config.split_batches:
            raise ValueError(
                "`split_batches` is not supported: `per_device_train_batch_size` is that of each process."
            )
        if self.batch_layout not in BATCH_LAYOUTS:
            raise ValueError(f"`batch_layout` must be one of {', '.join(BATCH_LAYOUTS)}, not {self.batch_layout!r}.")
        if self.on_bad_row not in ("drop", "raise"):
            raise ValueError(f"`on_bad_row` must be 'drop' or 'raise', not {self.on_bad_row!r}.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, not {getattr(self, name)}.")
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"`learning_rate` must be a number from 0 up, not {self.learning_rate}.")
        if self.auto_find_batch_size:
            raise ValueError(
                "`auto_find_batch_size` would change the batch that the recipe asks for; set "
                "`per_device_train_batch_size`."
            )
        if self.schedule_epochs is not None and (self.max_steps > 0 or self.schedule_epochs < self.num_train_epochs):
            raise ValueError(
                f"`schedule_epochs` ({self.schedule_epochs}) must be at least `num_train_epochs` "
                f"({self.num_train_epochs}), without `max_steps`."
            )
        if self.selective_checkpointing:
            if not self.gradient_checkpointing:
                raise ValueError(
                    "`selective_checkpointing` chooses what `gradient_checkpointing` keeps: turn that on as well."
                )
            if (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
                raise ValueError(
                    "`selective_checkpointing` needs `use_reentrant: false` in `gradient_checkpointing_kwargs`."
                )
        if self.use_liger_kernel:
            # its layers only: the LM head and the loss are the scoring path's
            fused = {"fused_linear_cross_entropy": False, "cross_entropy": False}
            self.liger_kernel_config = {**(self.liger_kernel_config or {}), **fused}
        max_length = self.max_length
        if self.max_prompt_length is not None:
            if self.max_prompt_length < 1:
                raise ValueError(f"`max_prompt_length` must be at least 1, not {self.max_prompt_length}.")
            if max_length is not None and self.max_prompt_length >= max_length:
                raise ValueError(
                    f"`max_prompt_length` ({self.max_prompt_length}) must be below `max_length` ({max_length}), "
                    "or no room is left for a completion."
                )


def refuse_set(args: Any, table: Sequence[tuple[str, Any, str]]) -> None:
    """Raise a ValueError where a field of `table` (name, value that means "off", what to do instead) is set."""
    for name, off, instead in table:
        if getattr(args, name) != off:
            raise ValueError(f"`{name}={getattr(args, name)!r}` is not supported. {instead}")


@dataclass
class PreferenceConfig(BatchConfig, TRLDPOConfig):
    """Settings of all pair methods: TRL's `DPOConfig`, how batches are laid out, and WPO's weights.

    TRL fields without a counterpart here (`sync_ref_model`, `f_divergence_type`, `activation_offloading`, `pad_token`,
    `precompute_ref_batch_size`, `neftune_noise_alpha`) are refused when set; `padding_free` is read as `batch_layout:
    packed`.
    """

    vocab_metrics: bool = field(
        default=True,
        metadata={
            "help": "Log `entropy`, `logits/*` and `mean_token_accuracy`, from the pass that the log-probs need "
            "anyway."
        },
    )
    max_weight: float | None = field(
        default=None,
        metadata={"help": "Largest WPO weight of a pair where `use_weighting` is on; None: no clamp, as TRL."},
    )
    weight_alignment: str = field(
        default="sampled",
        metadata={
            "help": "What a token's probability is compared with in WPO's weight: 'sampled', 'greedy' or 'none'."
        },
    )
    gamma_beta_ratio: float = field(
        default=0.5, metadata={"help": "SimPO's target margin divided by beta (loss_type 'simpo' only)."}
    )
    ref_logps_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of cached reference scores, read and filled when `precompute_ref_log_probs` is on."},
    )

    def __post_init__(self) -> None:
        self.choose_precision()
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        super().__post_init__()
        if self.padding_free:
            if self.batch_layout == "padded":
                raise ValueError("`padding_free` and `batch_layout: padded` contradict each other; drop one.")
            self.padding_free, self.batch_layout = False, "packed"
        self.check_batching()
        refuse_set(self, _REFUSED)
        if not 0 < self.beta < math.inf:
            raise ValueError(f"`beta` must be positive, not {self.beta}.")
        if self.weight_alignment not in ALIGNMENTS:
            raise ValueError(
                f"`weight_alignment` must be one of {', '.join(ALIGNMENTS)}, not {self.weight_alignment!r}."
            )
        if self.max_weight is not None and not self.max_weight > 0:
            raise ValueError(f"`max_weight` must be positive or null, not {self.max_weight}.")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"`ld_alpha` must lie in [0, 1], not {self.ld_alpha}.")
        if self.ld_alpha is not None and self.precompute_ref_log_probs:
            raise ValueError(
                "`ld_alpha` weighs tokens by position and cached reference sums do not: use one or the other."
            )
        # the loss is finite or the run stops: Trainer's own filter would hide it
        self.logging_nan_inf_filter = False
