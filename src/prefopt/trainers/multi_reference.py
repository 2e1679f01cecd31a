"""DPO against several references: their scores come from the cache, so K of them cost a step as much as one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from prefopt import losses as pure
from prefopt.references.columns import JoinReport
from prefopt.scoring.logprobs import CompletionScores, score_completions
from prefopt.scoring.plan import BatchPlan
from prefopt.trainers.collators import PlannedBatches
from prefopt.trainers.metrics import MetricSums
from prefopt.trainers.multi_reference_config import VALIDATED, MultiReferenceDPOConfig
from prefopt.trainers.pair_losses import PAIR_LOSSES, PairScores
from prefopt.trainers.preference import PreferenceTrainer, ReferenceScores
from prefopt.trainers.reference_data import advise, hold_out_by_prompt, short_names, with_scores
from prefopt.trainers.reference_weighting import Weighting, make_weighting
from prefopt.trainers.sppo import SELF_PLAY_LOSSES, check_self_play_columns


def measure_policy(trainer: MultiReferenceDPOTrainer, dataset: Dataset, *, metric: str) -> float:
    """The mean metric over `dataset`, the same on every rank; all ranks call it and share the work.

    Args:
        trainer: training; its step's model is scored, in evaluation mode and without gradient.
        dataset: tokenised pairs with the references' scores.
        metric: "accuracy": whether log pi per token of the chosen completion is higher; "loss": minus the DPO loss
            against all
            references alike. More is better.
    """
    lengths = trainer.collate.lengths(dataset, share_prompt=trainer.args.share_prompt)
    size = trainer.args.per_device_eval_batch_size
    plan = BatchPlan(
        lengths,
        groups_per_micro_batch=size,
        world_size=trainer.args.world_size,
        rank=trainer.args.process_index,
        max_tokens_per_row=trainer._row_capacity(lengths, size),
        shuffle=False,
    )
    batches, model = PlannedBatches(dataset, trainer.collate, trainer.layout), trainer.step_model
    total = torch.zeros((), dtype=torch.float64, device=trainer.args.device)
    training = model.training
    model.eval()
    for (micro_batch,) in plan:
        batch = trainer.to_device(batches[micro_batch])
        with torch.no_grad(), trainer.compute_loss_context_manager():
            scores = score_completions(model, batch)
            merit = _accuracy(scores) if metric == "accuracy" else _minus_loss(trainer, scores, batch)
        total += torch.where(batch["real"], merit, 0.0).sum()
    model.train(training)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item() / len(dataset)


def _accuracy(scores: CompletionScores) -> torch.Tensor:
    means = scores.logps / scores.counts
    return (means[0::2] > means[1::2]).float()


def _minus_loss(trainer: MultiReferenceDPOTrainer, scores: CompletionScores, batch: dict[str, Any]) -> torch.Tensor:
    reference = trainer.reference_scores(batch)
    pair = trainer.pair_scores(scores, reference, batch)
    margins = pair.chosen_logps - pair.rejected_logps
    margins = margins - (reference.chosen_logps - reference.rejected_logps).mean(dim=0)
    return torch.nn.functional.logsigmoid(trainer.args.beta * margins)


__all__ = ["MultiReferenceDPOConfig", "MultiReferenceDPOTrainer"]

logger = logging.getLogger(__name__)

DOMINANT = 0.99
# what stands for the references where a loss has no mixture of its own: in metrics and rewards
_REPORTED_MIXTURE = {"multi_dpo": "geometric", "forward_kl": "arithmetic"}


class _AfterStep(TrainerCallback):
    def __init__(self, trainer: MultiReferenceDPOTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        """Let online weights see what the step did."""
        self.trainer.weighting.end_step()


class MultiReferenceDPOTrainer(PreferenceTrainer):
    """DPO with K references: a mixture of them (`mode`) or the weighted mean of the K losses, weighed by `weighting`.

    The references never enter memory: `prefopt score-references` has scored the text of every completion under each,
    with its
    own tokenizer. Constructor arguments are those of `PreferenceTrainer`; `ref_model` stays None.

    Example:
    ```python
    args = MultiReferenceDPOConfig("out", references=[a, b, c], ref_logps_dir="scores", mode="multi_dpo")
    trainer = MultiReferenceDPOTrainer(a, args=args, train_dataset=dataset)
    trainer.train()
    ```

    Reference: arXiv 2405.16388 (MRPO), arXiv 2512.10040 (MDPO and the weightings), arXiv 2502.01203 (exact mixtures).
    """

    config_class = MultiReferenceDPOConfig
    # soft self-play as well: its targets are log-ratios, to a mixture or to each reference in turn
    pair_loss_table = {**PAIR_LOSSES, **{name: SELF_PLAY_LOSSES[name] for name in ("sppo", "sppo_single")}}  # noqa: RUF012
    _name = "Multi-reference DPO"
    _tag_names = ("prefopt", "multi-reference-dpo")
    _paper = {  # noqa: RUF012
        "title": "Multi-Reference Preference Optimization for Large Language Models",
        "id": "2405.16388",
        "citation": """
@article{le2024multi,
    title   = {Multi-Reference Preference Optimization for Large Language Models},
    author  = {Le, Hung and Tran, Quan and Nguyen, Dung and Do, Kien and Mittal, Saloni and Ogueji, Kelechi and Venkatesh, Svetha},
    journal = {arXiv preprint arXiv:2405.16388},
    year    = 2024,
}""",
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: MultiReferenceDPOConfig | None = None,
        data_collator=None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics=None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        args = args or MultiReferenceDPOConfig()
        if ref_model is not None:
            raise ValueError(
                "`ref_model` would not be used: the references' scores come from the cache. Leave it out."
            )
        self.join_reports: dict[str, JoinReport] = {}
        self._validation: Dataset | None = None
        self._plan: BatchPlan | None = None
        self._anchor_name = args.anchor
        if args.anchor is None and isinstance(model, str) and model in (args.references or []):
            self._anchor_name = model
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        if not self._datasets():
            raise ValueError("Give a `train_dataset` or an `eval_dataset`.")
        counts = {len(dataset[0]["ref_chosen_logps"]) for dataset in self._datasets()}
        if len(counts) > 1:
            raise ValueError(f"The data sets hold scores of different numbers of references: {sorted(counts)}.")
        self.num_references = counts.pop()
        self.reference_names = short_names(args.references or [str(k) for k in range(self.num_references)])
        self.anchor = self._find_anchor()
        self.weighting = self._make_weighting()
        self.add_callback(_AfterStep(self))
        if self.is_world_process_zero() and self.train_dataset is not None:
            for advice in advise(self.train_dataset, args, has_anchor=self.anchor is not None):
                logger.warning(advice)

    # ---- the spine
    # -------------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """See `BaseTrainer.compute_loss`; online weights are brought up to date before a step's first micro-batch."""
        self.step_model = model
        self.weighting.start_step(self.state.global_step)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def reference_scores(self, batch: dict[str, Any]) -> ReferenceScores:
        """The cached scores (K, B), clipped and per unit of length; the batch gets its `reference_weights`, from unclipped scores."""
        batch["reference_weights"] = self.weighting.weights(batch, training=self.model.training)
        chosen, rejected = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
        if self.args.clip_to_anchor is not None:
            chosen, rejected = pure.clip_to_anchor(
                chosen, rejected, anchor=self.anchor, max_eps=self.args.clip_to_anchor
            )
        units = [self._units(batch, side, batch.get(f"ref_{side}_counts")) for side in ("chosen", "rejected")]
        batch["reference"] = ReferenceScores(chosen / units[0], rejected / units[1])
        return batch["reference"]

    def pair_scores(self, scores: CompletionScores, reference: ReferenceScores, batch: dict[str, Any]) -> PairScores:
        """See `PreferenceTrainer.pair_scores`; the policy's log-probs are per unit of length, as the references' are."""
        pair = super().pair_scores(scores, reference, batch)
        return replace(
            pair,
            chosen_logps=pair.chosen_logps / self._units(batch, "chosen", pair.chosen_counts),
            rejected_logps=pair.rejected_logps / self._units(batch, "rejected", pair.rejected_counts),
        )

    def mix_references(self, reference: ReferenceScores, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The mixture's log-probs (B,), chosen and rejected."""
        mode = _REPORTED_MIXTURE.get(self.args.mode, self.args.mode)
        weights = batch["reference_weights"]
        return (
            pure.mixture_logps(reference.chosen_logps, weights, mode=mode),
            pure.mixture_logps(reference.rejected_logps, weights, mode=mode),
        )

    def pair_losses(self, pair: PairScores, reference: ReferenceScores, batch: dict[str, Any]) -> Tensor:
        """The loss of each pair (B,), times WPO's weights where they are on."""
        if self.args.mode not in _REPORTED_MIXTURE:
            return super().pair_losses(pair, reference, batch)
        weights = batch["reference_weights"]
        if self.args.mode == "forward_kl":
            losses = pure.forward_kl_loss(
                pair.chosen_logps,
                pair.rejected_logps,
                reference.chosen_logps,
                reference.rejected_logps,
                weights,
                beta=self.args.beta,
                max_exponent=self.args.max_exponent,
            )
        elif self.args.loss_type == ["sigmoid"] and not self.args.loss_weights and not self.args.label_smoothing:
            losses = pure.multi_dpo_loss(
                pair.chosen_logps - pair.rejected_logps,
                reference.chosen_logps - reference.rejected_logps,
                weights,
                beta=self.args.beta,
            )
        else:
            return self._mean_over_references(pair, reference, batch)
        pair_weights = self.pair_weights(pair)
        return losses if pair_weights is None else losses * pair_weights

    def _mean_over_references(self, pair: PairScores, reference: ReferenceScores, batch: dict[str, Any]) -> Tensor:
        """sum_k a_k loss_k, for any pairwise loss."""
        total = torch.zeros_like(pair.chosen_logps)
        for k, weight in enumerate(batch["reference_weights"]):
            against = replace(
                pair, ref_chosen_logps=reference.chosen_logps[k], ref_rejected_logps=reference.rejected_logps[k]
            )
            total = total + weight * super().pair_losses(against, reference, batch)
        return total

    def record(
        self, losses: Tensor, pair: PairScores, scores: CompletionScores, batch: dict[str, Any], sums: MetricSums
    ) -> None:
        """See `PreferenceTrainer.record`; adds weights, influence of the references, and accuracies that compare across methods.

        `logps/*` and `rewards/*` are in the unit of `normalize`.
        """
        super().record(losses, pair, scores, batch, sums)
        real, weights = batch["real"], batch["reference_weights"]
        weights = weights if weights.dim() == 2 else weights[:, None].expand(-1, len(real))
        for name, values in zip(self.reference_names, weights):
            sums.add_mean(f"references/weight/{name}", values, real)
        entropy = -torch.special.xlogy(weights, weights).sum(dim=0)
        sums.add_mean("references/effective_number", entropy.exp(), real)
        reference = batch["reference"]
        spread = self.args.beta * (reference.chosen_logps - reference.rejected_logps).std(dim=0, correction=0)
        sums.add_mean("references/spread", spread, real)
        for logps in (reference.chosen_logps, reference.rejected_logps):
            share = (weights.log() - logps).softmax(dim=0).amax(dim=0)
            sums.add_mean("references/harmonic_dominance", (share > DOMINANT).float(), real)
        # of log-probs per token, so that it is the same number whatever the method's own unit
        chosen, rejected = scores.logps[0::2] / pair.chosen_counts, scores.logps[1::2] / pair.rejected_counts
        sums.add_mean("accuracies/reference_free", (chosen > rejected).float(), real)
        if self.anchor is not None:
            anchored = batch["ref_chosen_logps"][self.anchor] - batch["ref_rejected_logps"][self.anchor]
            gained = scores.logps[0::2] - scores.logps[1::2] > anchored
            sums.add_mean("accuracies/own_init", gained.float(), real)

    def _units(self, batch: dict[str, Any], side: str, counts: Tensor | None) -> Tensor:
        """What sums are divided by: (B,) or (K, B)."""
        if self.args.normalize == "token":
            assert counts is not None
            return counts
        if self.args.normalize == "byte":
            return batch[f"{side}_bytes"].clamp_min(1)
        return torch.ones((), device=batch["real"].device)

    # ---- data ------------------------------------------------------------------------------------------------------------------

    @classmethod
    def check_data(cls, dataset: Dataset, args: MultiReferenceDPOConfig, name: str) -> None:
        """See `BaseTrainer.check_data`; the references' scores are looked at as well."""
        super().check_data(dataset, args, name)
        with_scores(dataset, args, name)

    @classmethod
    def check_columns(cls, dataset: Dataset, args: MultiReferenceDPOConfig, name: str) -> None:
        """Refuse data without what self-play losses read; the references' scores are looked at in `_prepare`."""
        check_self_play_columns(dataset, args.loss_type, name)

    def _prepare(self, dataset: Dataset | None, name: str) -> Dataset | None:
        dataset = super()._prepare(dataset, name)
        if dataset is None:
            return None
        args, _ = self._args_for_data
        dataset, report = with_scores(dataset, args, name)
        if report is not None:
            self.join_reports[name] = report
        if name == args.validation_set:
            self._validation = dataset
        if name == "train" and args.weighting in VALIDATED and args.validation_set is None:
            dataset, self._validation = hold_out_by_prompt(dataset, args.validation_rows, args.seed)
            if args.process_index == 0:
                print(
                    f"{name}: {len(self._validation)} rows are held out for `weighting: {args.weighting}`.", flush=True
                )
        return dataset

    def _loader(self, dataset: Dataset, *, training: bool):
        loader = super()._loader(dataset, training=training)
        if training:
            self._plan = loader.batch_sampler
        return loader

    # ---- weights
    # ---------------------------------------------------------------------------------------------------------------

    def _find_anchor(self) -> int | None:
        if self._anchor_name is None:
            if self.args.clip_to_anchor is not None:
                raise ValueError(
                    "`clip_to_anchor` needs `anchor`: the reference that is the policy's own initial model."
                )
            return None
        names = self.args.references or [str(k) for k in range(self.num_references)]
        if self._anchor_name not in names:
            raise ValueError(f"`anchor` {self._anchor_name!r} is not among the references {names}.")
        return names.index(self._anchor_name)

    def _make_weighting(self) -> Weighting:
        needs_train = self.args.weighting.startswith("swcw")
        dataset = self.train_dataset if needs_train and self.train_dataset is not None else self._validation
        if self.args.validation_set is not None and self._validation is None:
            named = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
            raise ValueError(
                f"`validation_set` {self.args.validation_set!r} is not among the evaluation sets {named}."
            )
        if dataset is None and (needs_train or self.args.weighting in VALIDATED):
            raise ValueError(f"`weighting: {self.args.weighting}` takes its pairs from a `train_dataset`: give one.")
        return make_weighting(
            self.args,
            num_references=self.num_references,
            anchor=self.anchor,
            dataset=dataset,
            plan=self._current_plan,
            measure=self.measure,
        )

    def _current_plan(self) -> BatchPlan:
        assert self._plan is not None, "online weights are asked for in training only"
        return self._plan

    def measure(self, indices: Sequence[int]) -> float:
        """The policy's metric on these validation pairs, more is better; all ranks call it and share the work."""
        assert self._validation is not None
        return measure_policy(self, self._validation.select(indices), metric=self.args.sampling_metric)

    def method_state(self) -> dict[str, Any]:
        """See `BaseTrainer.method_state`; holds the online weights."""
        return super().method_state() | {"weighting": self.weighting.state_dict()}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take up what `method_state` gave.

        Raises:
            ValueError: the weighting was another one.
        """
        super().load_method_state(state)
        if set(state["weighting"]) != set(self.weighting.state_dict()):
            raise ValueError(f"The checkpoint was trained with another `weighting` than {self.args.weighting}.")
        self.weighting.load_state_dict(state["weighting"])
