"""Settings that trainers share, and settings of transformers and TRL that have no effect here: setting one raises."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import SchedulerType, TrainingArguments, get_scheduler
from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig as TRLDPOConfig
from trl import ModelConfig

from prefopt.arguments import SecretsStayOut, check_settings, setting
from prefopt.data.encoding import (
    CHAT_RENDERINGS,
    COMPLETION_TURNS,
    SPECIAL_TOKENS,
    TRUNCATION_MODES,
    TextMode,
    Truncation,
)
from prefopt.scoring.logprobs import ALIGNMENTS
from prefopt.trainers.checkpointing import MODES, read_aliases, read_options
from prefopt.trainers.precision import MASTER_WEIGHTS

BATCH_LAYOUTS = ("auto", "packed", "padded")

# settings of transformers that our data loaders and evaluation loop cannot honour: (field, value that means "off",
# what to do instead)
NOT_HONOURED: tuple[tuple[str, Any, str], ...] = (
    ("label_smoothing_factor", 0.0, "It smooths token labels; `label_smoothing` is that of the preference losses."),
    ("batch_eval_metrics", False, "`compute_metrics` gets the predictions of all rows at once."),
    ("include_for_metrics", [], "`compute_metrics` gets predictions only."),
    ("eval_do_concat_batches", True, "`compute_metrics` gets the predictions of all rows in one array."),
    ("dataloader_in_order", True, "The micro-batches of a step belong together."),
    ("auto_find_batch_size", False, "It would change the recipe's batch; set `per_device_train_batch_size`."),
)

# settings of transformers that it does not check, or too late: (field, whether a value can work, in words)
IN_RANGE: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("learning_rate", lambda value: 0 <= value < math.inf, "a number from 0 up"),
    ("num_train_epochs", lambda value: 0 < value < math.inf, "above 0"),
    ("max_steps", lambda value: value != 0, "at least 1 (or -1, for whole epochs)"),
    ("save_steps", lambda value: value > 0, "above 0 (`save_strategy: 'no'` saves no checkpoint)"),
    ("adam_beta1", lambda value: 0 <= value < 1, "in [0, 1)"),
    ("adam_beta2", lambda value: 0 <= value < 1, "in [0, 1)"),
    ("adam_epsilon", lambda value: 0 <= value < math.inf, "a number from 0 up"),
    ("weight_decay", lambda value: 0 <= value < math.inf, "a number from 0 up"),
    ("dataloader_num_workers", lambda value: value >= 0, "at least 0"),
)

# settings of TRL's DPOConfig that would change a result and have no counterpart here
WITHOUT_COUNTERPART = (
    ("sync_ref_model", False, "The reference of these trainers stays fixed."),
    ("f_divergence_type", "reverse_kl", "Only the reverse KL is implemented."),
    ("activation_offloading", False, "Use `checkpointing` to save activation memory."),
    ("pad_token", None, "Set the tokenizer's `pad_token`."),
    ("precompute_ref_batch_size", None, "Reference passes are filled by tokens, as many as fit."),
    ("neftune_noise_alpha", None, "Its noise would reach the policy's log-probs and not the reference's."),
)

# a mixin: the settings that it reads are those of the config that it is mixed into; the fields of a real base would
# replace that config's defaults
if TYPE_CHECKING:
    _Mixin = TrainingArguments
else:
    _Mixin = object


@dataclass
class BatchConfig(SecretsStayOut, _Mixin):
    """How examples become batches; a mixin for trainer configs."""

    max_prompt_length: int | None = setting(
        None,
        "Where prompt and longest completion do not fit in `max_length`, keep the last `max_prompt_length` prompt "
        "tokens. None cuts as TRL's `truncation_mode` says.",
        at_least=1,
    )
    on_bad_row: str = setting(
        "drop",
        "What to do with a row that cannot be used: 'drop' (counted and reported) or 'raise'.",
        choices=("drop", "raise"),
    )
    batch_layout: str = setting(
        "auto",
        "'packed' (several examples a row), 'padded', or 'auto': packed where that is exact.",
        choices=BATCH_LAYOUTS,
    )
    share_prompt: bool = setting(True, "In packed rows, run each prompt once for all of its completions.")
    max_tokens_per_row: int | None = setting(
        None,
        "Capacity of a packed row in tokens. None: one row a micro-batch.",
    )
    tokens_per_micro_batch: int | str | None = setting(
        None,
        "Tokens that a micro-batch holds at most, or 'auto': as many as the card's memory allows. The optimizer step "
        "keeps the examples that `global_batch_size` (or per-device batch x accumulation x processes) makes of it.",
        decides_result=False,
    )
    compile_blocks: bool = setting(
        False,
        "Compile the decoder layers of policy and reference one by one with torch.compile (`torch_compile` compiles "
        "the policy as a whole).",
    )
    checkpointing: str = setting(
        "auto",
        "Activations that the backward pass recomputes: 'none', 'every_n' (of every n-th layer, `every_n_layers` of "
        "`gradient_checkpointing_kwargs`, 2 by default), 'selective' (all but results of matrix products and "
        "attention), 'all', or 'auto': as few as the card's memory allows.",
        choices=MODES,
        decides_result=False,
    )
    gradient_checkpointing: bool | None = setting(
        None, "True: `checkpointing: all`, false: `checkpointing: none`.", decides_result=False
    )
    selective_checkpointing: bool = setting(
        False, "With `gradient_checkpointing: true`: `checkpointing: selective`.", decides_result=False
    )
    ddp_timeout: int = setting(
        4 * 60 * 60,
        "Seconds that ranks wait for each other before the run ends: longer than the first rank takes to tokenise the "
        "data while the others wait.",
        at_least=1,
        decides_result=False,
    )
    resume_changed: bool = setting(
        False,
        "Continue from a checkpoint although data, tokenizer, chat template, policy or reference have changed since.",
        decides_result=False,
    )
    master_weights: str = setting(
        "auto",
        "How updates of trainable bf16 or fp16 weights are kept that rounding would lose, outside DeepSpeed and FSDP, "
        "which have master copies: 'float32' (master copies in the optimizer), 'stochastic' (stochastic rounding, no "
        "further memory), 'auto' (float32 where it fits) or 'none'.",
        choices=MASTER_WEIGHTS,
    )
    warmup_type: str = setting(
        "linear",
        "How the learning rate rises over `warmup_steps`: 'linear', or 'log' as DeepSpeed's schedules do by default.",
        choices=("linear", "log"),
    )
    schedule_epochs: float | None = setting(
        None,
        "Epochs that the learning-rate schedule (warm-up included) is laid out for, where training stops earlier, "
        "after `num_train_epochs`; None: the same.",
    )

    @property
    def text_mode(self) -> TextMode:
        """How texts become token ids."""
        return TextMode()

    def check_batching(self) -> None:
        """Raise a ValueError where these settings cannot work."""
        check_settings(self)
        check_unset(self, NOT_HONOURED)
        read_options(self)
        # the loss is finite or the run stops: Trainer's own filter would hide it
        self.logging_nan_inf_filter = False
        if self.use_liger_kernel:
            # its layers only: the LM head and the loss are the scoring path's
            fused = {"fused_linear_cross_entropy": False, "cross_entropy": False}
            self.liger_kernel_config: dict[str, Any] | None = {**(self.liger_kernel_config or {}), **fused}
        if self.compile_blocks and self.torch_compile:
            raise ValueError("`compile_blocks` and `torch_compile` compile the same layers: drop one of them.")
        tokens = self.tokens_per_micro_batch
        if isinstance(tokens, str) and tokens.isdecimal():  # argparse knows one type only
            self.tokens_per_micro_batch = tokens = int(tokens)
        if tokens not in (None, "auto") and (isinstance(tokens, str) or tokens < 1):
            raise ValueError(f"`tokens_per_micro_batch` must be a number of tokens or 'auto', not {tokens!r}.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, not {getattr(self, name)}.")
        for name, fits, words in IN_RANGE:
            if not fits(getattr(self, name)):
                raise ValueError(f"`{name}` must be {words}, not {getattr(self, name)}.")
        if self.train_sampling_strategy == "group_by_length":
            raise ValueError(
                "`train_sampling_strategy: group_by_length` is not supported: micro-batches are balanced by length "
                "already."
            )
        if self.accelerator_config.split_batches:  # type: ignore[union-attr]  # a dataclass after __post_init__
            raise ValueError(
                "`split_batches` is not supported: `per_device_train_batch_size` is that of each process."
            )
        check_schedule(self)
        epochs, planned = self.num_train_epochs, self.schedule_epochs
        if planned is not None and (self.max_steps > 0 or planned < epochs):
            raise ValueError(
                f"`schedule_epochs` ({planned}) must be at least `num_train_epochs` ({epochs}), without `max_steps`."
            )
        prompt, longest = self.max_prompt_length, self.max_length  # type: ignore[attr-defined]  # of TRL's configs
        if prompt is not None and longest is not None and prompt >= longest:
            raise ValueError(
                f"`max_prompt_length` ({prompt}) must be below `max_length` ({longest}), or no room is left for a "
                "completion."
            )


def check_schedule(args: TrainingArguments) -> None:
    """Raise a ValueError where the learning-rate schedule lacks settings, or has some that it does not know."""
    weight = nn.Parameter(torch.zeros(1))
    try:
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([weight], lr=1.0),
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]  # a dict by now
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`lr_scheduler_type: {SchedulerType(args.lr_scheduler_type).value}` cannot be made with "
            f"`lr_scheduler_kwargs: {args.lr_scheduler_kwargs}`: {error}"
        ) from error


def before_transformers(args: Any) -> None:
    """Settle what TRL's and transformers' `__post_init__` would read in another way; call it before them."""
    choose_precision(args)
    read_aliases(args)


def choose_precision(args: Any) -> None:
    """Choose bf16 on a GPU that has it, where neither bf16 nor fp16 is set; TRL's `__post_init__` comes after it."""
    if args.bf16 is None and not args.fp16:
        args.bf16 = is_torch_bf16_gpu_available() and not args.use_cpu


def model_options(model_args: ModelConfig) -> dict[str, Any]:
    """Return the keywords with which a recipe's model is loaded."""
    options: dict[str, Any] = {"revision": model_args.model_revision, "dtype": model_args.dtype}
    if model_args.attn_implementation is not None:
        options["attn_implementation"] = model_args.attn_implementation
    return options


def check_unset(args: Any, table: Sequence[tuple[str, Any, str]]) -> None:
    """Raise a ValueError where a field of `table` (name, value that means "off", what to do instead) is set."""
    for name, off, instead in table:
        if getattr(args, name) != off:
            raise ValueError(f"`{name}={getattr(args, name)!r}` is not supported. {instead}")


@dataclass
class PreferenceConfig(BatchConfig, TRLDPOConfig):  # type: ignore[misc]  # gradient_checkpointing
    """Settings of all pair methods: TRL's `DPOConfig`, how batches are laid out, and WPO's weights.

    TRL fields without a counterpart here (`sync_ref_model`, `f_divergence_type`, `activation_offloading`, `pad_token`,
    `precompute_ref_batch_size`, `neftune_noise_alpha`) raise when set; `padding_free` is read as `batch_layout:
    packed`.
    """

    vocab_metrics: bool = setting(
        True, "Log `entropy`, `logits/*` and `mean_token_accuracy`, from the pass that the log-probs need anyway."
    )
    max_weight: float | None = setting(
        None, "Largest WPO weight of a pair where `use_weighting` is on; None: no clamp, as TRL.", above=0
    )
    weight_alignment: str = setting(
        "sampled",
        "What a token's probability is compared with in WPO's weight: 'sampled', 'greedy' or 'none'.",
        choices=ALIGNMENTS,
    )
    gamma_beta_ratio: float = setting(0.5, "SimPO's target margin divided by beta (loss_type 'simpo' only).")
    ref_logps_dir: str | None = setting(
        None, "Folder of cached reference scores, read and filled when `precompute_ref_log_probs` is on."
    )
    truncation_mode: str = setting(
        "keep_start",
        "What a pair longer than `max_length` keeps: 'keep_start', 'keep_end' (TRL's), 'drop' (nothing: it is left "
        "out), or 'trl09': completions keep `max_length - max_prompt_length` tokens, as in TRL 0.9.",
        choices=TRUNCATION_MODES,
    )
    chat_rendering: str = setting(
        "joint",
        "Where a completion begins: 'joint' (with the answer's text); as published code has it, 'handbook' "
        "(alignment-handbook, SimPO, WPO: turns rendered apart, header scored) or 'sppo' (header scored).",
        choices=CHAT_RENDERINGS,
    )
    special_tokens: str = setting(
        "template",
        "BOS and end token of a pair: the 'template''s, 'trl09' (added where there is none, as in TRL 0.9) or 'sppo' "
        "(added in any case).",
        choices=SPECIAL_TOKENS,
    )
    completion_turns: str = setting(
        "all",
        "Of a completion of several turns, score 'all' of the assistant's turns, or the 'last' one.",
        choices=COMPLETION_TURNS,
    )

    @property
    def text_mode(self) -> TextMode:
        """How texts become token ids."""
        return TextMode(self.chat_rendering, self.special_tokens, self.completion_turns)

    def __post_init__(self) -> None:
        before_transformers(self)
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        super().__post_init__()
        if self.padding_free:
            if self.batch_layout == "padded":
                raise ValueError("`padding_free` and `batch_layout: padded` contradict each other; drop one.")
            self.padding_free, self.batch_layout = False, "packed"
        self.check_batching()
        if not self.loss_type:
            raise ValueError("`loss_type` is an empty list: name at least one loss.")
        check_unset(self, WITHOUT_COUNTERPART)
        Truncation(self.max_length, self.max_prompt_length, self.truncation_mode)
        if not 0 < self.beta < math.inf:
            raise ValueError(f"`beta` must be positive, not {self.beta}.")
        if self.ld_alpha is not None:
            if not 0 <= self.ld_alpha <= 1:
                raise ValueError(f"`ld_alpha` must lie in [0, 1], not {self.ld_alpha}.")
            if self.precompute_ref_log_probs:
                raise ValueError(
                    "`ld_alpha` weighs tokens by position and cached reference sums do not: use one or the other."
                )
