"""The spine of all pair methods: score the policy, score the reference, apply the pair loss.

Read `PreferenceTrainer.step_loss` first; a method overrides one of the functions that it calls.

Letters: B pairs, K references.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from trl import DPOConfig as TRLDPOConfig

from prefopt import losses as pure
from prefopt.data.encoding import with_pad_token
from prefopt.data.rows import REFERENCE_COLUMNS
from prefopt.data.tokenization import check_fits_model, tokenize_pairs
from prefopt.launch import print_on_main
from prefopt.progress import library_bars
from prefopt.references.fingerprints import rows_fingerprint
from prefopt.scoring.attention import restore_attention
from prefopt.scoring.logprobs import CompletionScores, score_completions
from prefopt.trainers.base import EVALUATION, TRAINING, BaseTrainer, evaluated
from prefopt.trainers.collators import CustomCollator, PairCollator
from prefopt.trainers.config import PreferenceConfig
from prefopt.trainers.data_tables import show_report
from prefopt.trainers.metrics import MetricSums
from prefopt.trainers.pair_losses import (
    PAIR_LOSSES,
    REFERENCE_FREE_LOSSES,
    SFT,
    Pair,
    PairLoss,
    PairScores,
    ReferenceScores,
    check_unread_settings,
)
from prefopt.trainers.policy import base_model_of, load_model, load_tokenizer, with_adapter
from prefopt.trainers.reference import (
    Reference,
    attach_scores,
    check_given_scores,
    has_scores,
    reference_module,
)
from prefopt.trainers.sharding import describe_wrapping

SIDES = ("chosen", "rejected")

__all__ = ["PreferenceTrainer", "ReferenceScores"]


def record_pairs(sums: MetricSums, pair: PairScores, rewards: Pair, scores: CompletionScores, real: Tensor) -> None:
    """Add rewards, log-probs, lengths, and the vocabulary statistics where the scores have them.

    Args:
        sums: where the metrics are added.
        pair: (B,) scores of the pairs.
        rewards: (B,) implicit rewards of the chosen and of the rejected completions.
        scores: (2B,) scores of their completions, chosen and rejected in turn.
        real: (B,) False for a pair that only fills a micro-batch.
    """
    logps, counts = (pair.chosen_logps, pair.rejected_logps), (pair.chosen_counts, pair.rejected_counts)
    sums.add_mean("rewards/margins", rewards[0] - rewards[1], real)
    sums.add_mean("rewards/accuracies", (rewards[0] > rewards[1]).float(), real)
    for number, side in enumerate(SIDES):
        sums.add_mean(f"rewards/{side}", rewards[number], real)
        sums.add_mean(f"logps/{side}", logps[number], real)
        sums.add_mean(f"lengths/{side}", counts[number], real)
        if scores.entropy is not None and scores.mean_logits is not None:
            tokens = counts[number] * real
            sums.add_mean(f"logits/{side}", scores.mean_logits[number::2] / counts[number], tokens)
            sums.add_mean("entropy", scores.entropy[number::2] / counts[number], tokens)
    if scores.top1 is not None:
        sums.add_mean("mean_token_accuracy", scores.top1[0::2] / counts[0], counts[0] * real)


def record_weights(
    sums: MetricSums, weights: Tensor, pair: PairScores, real: Tensor, *, max_weight: float | None
) -> None:
    """Add statistics of WPO's weights (B,); `effective_pairs` follows from the sums of all ranks."""
    sums.add_mean("wpo/weight_mean", weights, real)
    sums.add_min("wpo/weight_min", weights, real)
    sums.add_max("wpo/weight_max", weights, real)
    kept = torch.where(real, weights, 0.0)
    sums.add_total("wpo/_sum", kept)
    sums.add_total("wpo/_sum_of_squares", kept.square())
    clamped = torch.zeros_like(weights)
    if max_weight is not None:
        chosen, rejected = pair.mean_aligned_logps()
        clamped = ((chosen + rejected).exp() > max_weight).float()
    sums.add_mean("wpo/clamped_fraction", clamped, real)


def effective_pairs(values: dict[str, torch.Tensor]) -> None:
    """Replace the sums of weights by (sum of weights)^2 / sum of squared weights of the whole step."""
    if "wpo/_sum" in values:
        values["wpo/effective_pairs"] = values.pop("wpo/_sum").square() / values.pop("wpo/_sum_of_squares")


def note_default_beta(args: PreferenceConfig) -> None:
    """Print once that `beta` was left at a default which is not TRL's: a script that comes from there gets another."""
    default, trls = (config.__dataclass_fields__["beta"].default for config in (type(args), TRLDPOConfig))
    if args.beta is default and default != trls:  # `is`: the same number given by a user is another object
        _print_once(
            f"beta is {default}, the default of {type(args).__name__}; TRL's DPOConfig has {trls}. Set `beta` to "
            "choose."
        )


@cache
def _print_once(message: str) -> None:
    print_on_main(message)


class PreferenceTrainer(BaseTrainer):
    """Base of the pair methods; the constructor takes TRL's `DPOTrainer` arguments in TRL's order.

    Args:
        model: hub name or folder, a causal LM in memory, or a `PeftModel`.
        ref_model: the reference; None: the model's present weights (for a fresh adapter the model without it, for a
            trained adapter a frozen copy of it).
        args: the method's config; default: its defaults.
        data_collator: a collator in TRL's form, instead of the planned layouts; batches are then padded.
        train_dataset, eval_dataset: preference rows in any form that `prefopt.data` reads, or tokenised pairs;
            `eval_dataset` may be a dict of data sets.
        processing_class: the tokenizer; default: the one saved with the model.
        compute_metrics: called after an evaluation; `predictions` is (pairs, 2), the rewards of chosen and rejected.
        callbacks, optimizers: as for `transformers.Trainer`.
        quantization_config: how to quantise a model that is loaded by name (QLoRA).
        peft_config: the adapter to train.

    Raises:
        ValueError: the arguments cannot work; the message says what is wrong and how to fix it.
    """

    config_class = PreferenceConfig
    pair_loss_table: Mapping[str, PairLoss] = PAIR_LOSSES
    metric_minima = ("wpo/weight_min",)
    metric_maxima = ("wpo/weight_max",)
    args: PreferenceConfig
    model: PreTrainedModel

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: PreferenceConfig | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        if args is None:
            args = self.config_class()
        self._check_arguments(model, ref_model, args, data_collator, processing_class)
        self.check_settings(args)
        note_default_beta(args)
        set_seed(args.seed)  # a new adapter's weights are drawn before Trainer sets it
        self.tokenization_reports, self.given_datasets = {}, {}
        with library_bars(shown=not args.disable_tqdm):
            if processing_class is None:
                loaded = load_model(model, args, quantization_config)
                tokenizer = with_pad_token(load_tokenizer(loaded, args))
                train_dataset, eval_dataset = self._prepare_all(train_dataset, eval_dataset, args, tokenizer)
            else:
                # mistakes in the data are found before any weights are loaded
                tokenizer = with_pad_token(processing_class)
                train_dataset, eval_dataset = self._prepare_all(train_dataset, eval_dataset, args, tokenizer)
                loaded = load_model(model, args, quantization_config)
            self.reference_is_initial = ref_model is None
            self._scores_given = False
            self._cached_module: str | None = None  # fingerprint of a reference that is given up once it has scored
            reference = reference_module(model, loaded, ref_model, args, quantization_config, peft_config)
            policy = with_adapter(loaded, args, peft_config)
        self.keeps_reference = reference is not None and not args.precompute_ref_log_probs
        super().__init__(
            model=policy,
            args=args,
            collate=CustomCollator(data_collator) if data_collator else PairCollator(ld_alpha=args.ld_alpha),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if reference is not None:
            for name, dataset in self._named_datasets().items():
                check_fits_model(dataset, base_model_of(reference).config, name, model="reference")
        self._aux_coefficient = _router_coefficient(policy, args)
        self._margin_checked = False
        self._scored_by_policy = False
        if args.precompute_ref_log_probs:
            self._attach_scores_to_all(reference)
            reference = None
        if self.keeps_reference:
            self.prepare_layers(reference)
        self.reference = Reference(reference, policy, self.accelerator) if self.needs_reference else None

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference as a module; None where the policy holds it or its scores are cached."""
        return None if self.reference is None else self.reference.module

    # ---- the spine

    def step_loss(self, model: nn.Module, batch: dict[str, Any], sums: MetricSums) -> tuple[Tensor, Tensor]:
        """Compute the loss of a micro-batch; predictions are the (B, 2) rewards. See `BaseTrainer.step_loss`."""
        scores = self.score_completions(model, batch)  # policy, one forward
        reference = self.reference_scores(batch)  # live, adapter off, or cached
        pair = self.pair_scores(scores, reference, batch)
        self._check_initial_margin(pair)
        losses = self.pair_losses(pair, reference, batch)  # (B,), what most methods override
        self.watch_finite(losses, batch, sums)
        total = torch.where(batch["real"], losses, 0.0).sum()
        loss = self.reduce(total, batch) + self._token_terms(pair, scores, batch, sums)
        self.record(losses, pair, scores, batch, sums)
        return loss, torch.stack(self.rewards(pair), dim=1).detach()

    def score_completions(self, model: nn.Module, batch: dict[str, Any]) -> CompletionScores:
        """Score all completions of the batch under the policy."""
        return score_completions(
            model,
            batch,
            alignment=self.args.weight_alignment if self.args.use_weighting else None,
            vocab_statistics=self.args.vocab_metrics,
            aux_loss=bool(self._aux_coefficient),
        )

    def reference_scores(self, batch: dict[str, Any]) -> ReferenceScores:
        """Score all completions of the batch under the reference, or read cached scores: (K, B) each."""
        if self.args.precompute_ref_log_probs:
            return ReferenceScores(batch["ref_chosen_logps"], batch["ref_rejected_logps"])
        if self.reference is None:
            zeros = torch.zeros(1, len(batch["row_ids"]), device=self.args.device)
            return ReferenceScores(zeros, zeros)
        logps = self.reference.logps(batch, self.model_wrapped)
        return ReferenceScores(logps[None, 0::2], logps[None, 1::2])

    def pair_scores(self, scores: CompletionScores, reference: ReferenceScores, batch: dict[str, Any]) -> PairScores:
        """Divide the scores into chosen and rejected, beside one reference log-prob each."""
        aligned = scores.mean_aligned_logps
        return PairScores(
            scores.logps[0::2],
            scores.logps[1::2],
            scores.counts[0::2],
            scores.counts[1::2],
            *self.mix_references(reference, batch),
            *((None, None) if aligned is None else (aligned[0::2], aligned[1::2])),
        )

    def mix_references(self, reference: ReferenceScores, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return one log-prob (B,) for chosen and for rejected from the K references."""
        assert reference.chosen_logps.shape[0] == 1, "several references need a mixture"
        return reference.chosen_logps[0], reference.rejected_logps[0]

    def pair_losses(self, pair: PairScores, reference: ReferenceScores, batch: dict[str, Any]) -> Tensor:
        """Compute each pair's loss, (B,): the weighted sum of `loss_type`, times WPO's weights where they are on."""
        total = torch.zeros_like(pair.chosen_logps)
        for name, weight in self._weighted_losses():
            if name != SFT:
                total = total + weight * self.pair_loss_table[name](pair, self.args, batch)
        weights = self.pair_weights(pair)
        return total if weights is None else total * weights

    def rewards(self, pair: PairScores) -> Pair:
        """Compute the implicit rewards (B,) of chosen and rejected, for the metrics.

        Beta times what the loss takes as the reward; with several losses that disagree, beta times the log-ratios.
        """
        kinds = {self.pair_loss_table[name].rewards for name in self.args.loss_type if name != SFT}
        read = kinds.pop() if len(kinds) == 1 else PairScores.logratios
        chosen, rejected = read(pair)
        return self.args.beta * chosen, self.args.beta * rejected

    def pair_weights(self, pair: PairScores) -> Tensor | None:
        """Compute WPO's weight of each pair, (B,), without gradient; None where `use_weighting` is off."""
        if not self.args.use_weighting:
            return None
        return pure.wpo_pair_weights(*pair.mean_aligned_logps(), max_weight=self.args.max_weight)

    def record(
        self, losses: Tensor, pair: PairScores, scores: CompletionScores, batch: dict[str, Any], sums: MetricSums
    ) -> None:
        """Add this micro-batch's metrics."""
        real = batch["real"]
        record_pairs(sums, pair, self.rewards(pair), scores, real)
        weights = self.pair_weights(pair)
        if weights is not None:
            record_weights(sums, weights, pair, real, max_weight=self.args.max_weight)
        if not self.model.training:
            sums.add_mean("loss", losses, real)

    def _check_initial_margin(self, pair: PairScores) -> None:
        """Check before the first step that a reference which is the initial policy scores like it.

        Raises:
            ValueError: it does not.
        """
        args = self.args
        if self._margin_checked:
            return
        self._margin_checked = True
        known = self._scored_by_policy if args.precompute_ref_log_probs else self.needs_reference
        if not (self.reference_is_initial and known and self.state.global_step == 0 and args.disable_dropout):
            return
        tolerance = 1e-3 if self.model.dtype == torch.float32 and not (args.bf16 or args.fp16) else 2e-2
        policy = torch.stack([pair.chosen_logps, pair.rejected_logps])
        reference = torch.stack([pair.ref_chosen_logps, pair.ref_rejected_logps])
        gap = ((policy - reference).abs() / (1 + reference.abs())).max().item()
        if not gap <= tolerance:
            raise ValueError(
                "Before the first step the reference does not score like the policy (relative difference "
                f"{gap:.2g}). The model changed after the trainer was built, or the reference is another model; pass "
                "`ref_model` if that is meant."
            )

    def _token_terms(
        self, pair: PairScores, scores: CompletionScores, batch: dict[str, Any], sums: MetricSums
    ) -> Tensor:
        """Compute the terms that belong to no pair: SFT (mean over the step's chosen tokens) and the MoE loss."""
        real = batch["real"]
        terms = torch.zeros((), device=real.device)
        for name, weight in self._weighted_losses():
            if name == SFT:
                nll = torch.where(real, -pair.chosen_logps, 0.0).sum()
                terms = terms + weight * nll * (self.args.world_size / batch["step_first_tokens"])
                if not self.model.training:
                    sums.add_mean("_sft", -pair.chosen_logps / pair.chosen_counts, pair.chosen_counts * real)
        if scores.aux_loss is not None:
            aux = torch.where(real.any(), scores.aux_loss, 0.0)
            terms = terms + self._aux_coefficient * self.reduce(aux * real.sum(), batch)
            sums.add_mean("aux_loss", scores.aux_loss.expand(1), real.sum()[None])
        return terms

    def _weighted_losses(self) -> list[tuple[str, float]]:
        return list(zip(self.args.loss_type, self.args.loss_weights or [1.0] * len(self.args.loss_type)))

    @property
    def needs_reference(self) -> bool:
        """Whether any of the losses reads the reference."""
        return not set(self.args.loss_type) <= set(REFERENCE_FREE_LOSSES)

    def derive_metrics(self, values: dict[str, Tensor]) -> None:
        """Add to an evaluation's loss the terms that belong to no pair; see `BaseTrainer.derive_metrics`."""
        effective_pairs(values)
        if "loss" in values:
            sft = values.pop("_sft", 0.0) * dict(self._weighted_losses()).get(SFT, 0.0)
            values["loss"] = values["loss"] + sft + self._aux_coefficient * values.get("aux_loss", 0.0)

    # ---- checks and words

    @classmethod
    def _check_arguments(
        cls,
        model: Any,
        ref_model: Any,
        args: Any,
        data_collator: Any,
        processing_class: Any,
    ) -> None:
        """Raise a ValueError where an argument is of another kind than a pair trainer needs."""
        if model is None:
            raise ValueError("`model` is None: give a hub name, a folder, or a model in memory.")
        if not isinstance(args, cls.config_class):
            needed, given = cls.config_class.__name__, type(args)
            raise ValueError(
                f"{cls.__name__} needs a prefopt.{needed}, which has all fields of TRL's, not a "
                f"{given.__module__}.{given.__name__}."
            )
        if isinstance(ref_model, str):
            raise ValueError(
                f"`ref_model` must be a model in memory: `AutoModelForCausalLM.from_pretrained({ref_model!r})`."
            )
        if ref_model is not None and ref_model is model:
            raise ValueError(
                "`ref_model` is the same object as `model` and would train with it. Leave `ref_model` out, or give a "
                "copy."
            )
        if isinstance(model, nn.Module) and ref_model is not None and (shared := shared_weight(model, ref_model)):
            raise ValueError(
                f"`ref_model` shares {shared} with `model`, so that one would be frozen or the other trained. Leave "
                "it out (for an adapter, its model without it is the reference), or give a copy."
            )
        if processing_class is not None and not isinstance(processing_class, PreTrainedTokenizerBase):
            raise ValueError(
                f"`processing_class` must be a tokenizer, not a {type(processing_class).__name__}: only text is read."
            )
        if data_collator is not None and args.ld_alpha is not None:
            raise ValueError("`ld_alpha` would not reach the batches of a `data_collator`: use one or the other.")

    @classmethod
    def check_settings(cls, args: PreferenceConfig) -> None:
        """Check the losses and their settings; see `BaseTrainer.check_settings`."""
        table, names = cls.pair_loss_table, args.loss_type
        if unknown := [name for name in names if name not in table and name != SFT]:
            known = ", ".join(sorted([*table, SFT]))
            raise ValueError(f"Unknown loss_type {unknown[0]!r} for {cls.__name__}. Known: {known}.")
        if args.use_weighting and (clash := [name for name in names if name == SFT or table[name].sorts_batch]):
            raise ValueError(
                f"WPO's weights belong to pairs, and {clash[0]!r} has no value per pair. Turn `use_weighting` off, or "
                "drop that loss."
            )
        check_unread_settings(args, names)
        for name in names:
            if name != SFT:
                table[name].check_settings(args, name)

    @classmethod
    def check_data(cls, dataset: Dataset, args: PreferenceConfig, name: str) -> None:
        """See `BaseTrainer.check_data`."""
        cls.check_columns(dataset, args, name)

    @classmethod
    def check_columns(cls, dataset: Dataset, args: PreferenceConfig, name: str) -> None:
        """Check the columns of tokenised pairs that the losses need."""
        if args.precompute_ref_log_probs:
            check_given_scores(dataset, name)

    def why_not_packed(self) -> str | None:
        """Name a user's collator, which makes padded batches, as the reason against packing."""
        return "a `data_collator` was given" if isinstance(self.collate, CustomCollator) else None

    def restore_attention(self) -> None:
        """See `BaseTrainer.restore_attention`; the reference's as well."""
        super().restore_attention()
        if self.ref_model is not None:
            restore_attention(self.ref_model)

    def run_facts(self) -> list[str]:
        """See `BaseTrainer.run_facts`; where reference scores come from as well."""
        if self.args.precompute_ref_log_probs:
            reference = "cached scores"
        elif self.reference is None:
            reference = "none"
        elif self.reference.module is None:
            reference = "the policy with its adapter off or exchanged"
        else:
            reference = f"live, {describe_wrapping(self.reference.module)}"
        return [*super().run_facts(), f"reference: {reference}"]

    # ---- data

    def _prepare_all(
        self,
        train_dataset: Dataset | None,
        eval_dataset: Dataset | dict[str, Dataset] | None,
        args: PreferenceConfig,
        tokenizer: PreTrainedTokenizerBase,
    ) -> tuple[Dataset | None, Dataset | dict[str, Dataset] | None]:
        self._args_for_data = args, tokenizer
        train_dataset = self._prepare(train_dataset, TRAINING)
        if isinstance(eval_dataset, dict):
            return train_dataset, {key: self._prepare(d, evaluated(key)) for key, d in eval_dataset.items()}
        return train_dataset, self._prepare(eval_dataset, EVALUATION)

    def _prepare(self, dataset: Dataset | None, name: str) -> Dataset | None:
        """Tokenise `dataset` and check the columns that the method needs."""
        if dataset is None:
            return None
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                "Streaming data sets are not supported: the plan of batches needs every length. Use a `Dataset`."
            )
        args, tokenizer = self._args_for_data
        self.given_datasets[name] = dataset
        dataset, report = tokenize_pairs(
            dataset,
            tokenizer,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            truncation_mode=args.truncation_mode,
            on_bad_row=cast(Any, args.on_bad_row),
            text_mode=args.text_mode,
            num_proc=args.dataset_num_proc,
            name=name,
        )
        self.tokenization_reports[name] = report
        show_report(report, args.max_length)
        self.check_columns(dataset, args, name)
        return dataset

    def _attach_scores(
        self, datasets: Mapping[str, Dataset], module: PreTrainedModel | PeftModel | None
    ) -> tuple[dict[str, Dataset], str | None]:
        return attach_scores(
            datasets,
            module=module,
            policy=self.model,
            args=self.args,
            accelerator=self.accelerator,
            layout=self.layout,
            longest=max(
                (g.packed for dataset in datasets.values() if not has_scores(dataset) for g in self.lengths(dataset)),
                default=0,
            ),
        )

    def origin(self) -> dict[str, str]:
        """See `BaseTrainer.origin`; adds the reference, unless the policy holds it."""
        rows: Any = self.train_dataset
        reference = self._cached_module
        if self.reference is not None and self.reference.module is not None and not self.reference_is_initial:
            reference = self.reference.fingerprint()
        elif self._scores_given:
            reference = rows_fingerprint(rows, set(REFERENCE_COLUMNS) & set(rows.column_names))
        return super().origin() | ({} if reference is None else {"the reference": reference})

    def _attach_scores_to_all(self, module: PreTrainedModel | PeftModel | None) -> None:
        self._scores_given = self.train_dataset is not None and has_scores(self.train_dataset)
        # scores that came with the data may be those of any model
        self._scored_by_policy = not any(has_scores(dataset) for dataset in self._datasets())
        done, weights = self._attach_scores(self._named_datasets(), module)
        if module is not None and not self._scores_given:
            self._cached_module = weights
        elif module is None and not isinstance(self.model, PeftModel):
            self._policy_weights = weights
        self.train_dataset = done.get(TRAINING)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {key: done.get(evaluated(key)) for key in self.eval_dataset}
        else:
            self.eval_dataset = done.get(EVALUATION)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate; a data set given here is prepared like the one of the constructor."""
        if isinstance(eval_dataset, dict):
            eval_dataset = {key: self._prepare_late(d, evaluated(key)) for key, d in eval_dataset.items()}
        elif not isinstance(eval_dataset, (str, type(None))) and eval_dataset not in self._datasets():
            eval_dataset = self._prepare_late(eval_dataset, evaluated(metric_key_prefix))
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _prepare_late(self, dataset: Dataset, name: str) -> Dataset:
        """Prepare a data set that comes after the constructor."""
        with library_bars(shown=not self.args.disable_tqdm):
            prepared = self._prepare(dataset, name)
        assert prepared is not None
        if not self.args.precompute_ref_log_probs or REFERENCE_COLUMNS[0] in prepared.column_names:
            return prepared
        policy_is_reference = self.state.global_step == 0 or isinstance(self.model, PeftModel)
        if not (self.reference_is_initial and policy_is_reference):
            raise ValueError(
                f"The {name} data has no cached reference scores, and the reference is no longer at hand: give it to "
                "the constructor as `eval_dataset`, or turn `precompute_ref_log_probs` off."
            )
        done, _ = self._attach_scores({name: prepared}, None)
        return done[name]


def shared_weight(model: nn.Module, reference: nn.Module) -> str | None:
    """Return the name of a weight of `reference` that lies in the same memory as one of `model`; None without one."""
    addresses = {parameter.data_ptr() for parameter in model.parameters()} - {0}  # 0: meta, or sharded elsewhere
    return next((name for name, each in reference.named_parameters() if each.data_ptr() in addresses), None)


def _router_coefficient(policy: PreTrainedModel | PeftModel, args: PreferenceConfig) -> float:
    """Return the weight of the MoE load-balancing loss; 0 for a dense model.

    Raises:
        ValueError: `router_aux_loss_coef` is set for a dense model.
    """
    config = policy.config.get_text_config().to_dict()
    default = config.get("router_aux_loss_coef", 0.0)
    coefficient: float = default if args.router_aux_loss_coef is None else args.router_aux_loss_coef
    if coefficient and "router_aux_loss_coef" not in config:
        raise ValueError(f"`router_aux_loss_coef` is set, but {policy.config.model_type} is not a mixture of experts.")
    return coefficient
