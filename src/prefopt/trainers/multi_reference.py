"""DPO against several references: their scores come from the cache, so K of them cost a step as much as one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from prefopt import losses as pure
from prefopt.files import content_hash
from prefopt.references.cache import SIDES
from prefopt.references.columns import JoinReport
from prefopt.scoring.logprobs import CompletionScores, score_completions
from prefopt.scoring.plan import BatchPlan
from prefopt.trainers.base import TRAINING, evaluated
from prefopt.trainers.collators import PlannedBatches
from prefopt.trainers.metrics import MetricSums
from prefopt.trainers.multi_reference_config import MultiReferenceDPOConfig
from prefopt.trainers.pair_losses import PAIR_LOSSES, PairScores, ReferenceScores
from prefopt.trainers.preference import PreferenceTrainer
from prefopt.trainers.reference_data import (
    advise,
    hold_out_by_prompt,
    reference_names,
    scorers_of,
    short_names,
    with_scores,
)
from prefopt.trainers.reference_weighting import WEIGHTINGS, Weighting, WeightingInputs
from prefopt.trainers.sppo import SELF_PLAY_LOSSES, check_self_play_columns

__all__ = ["MultiReferenceDPOConfig", "MultiReferenceDPOTrainer"]

logger = logging.getLogger(__name__)

DOMINANT = 0.99
# stands for the references in metrics and rewards where a loss mixes none
_REPORTED_MIXTURE = {"multi_dpo": "geometric", "forward_kl": "arithmetic"}


@dataclass(frozen=True)
class MultiPairScores(PairScores):
    """Scores of pairs beside those of all references; `ref_*_logps` are the mixture's."""

    references: ReferenceScores | None = None

    @property
    def weighted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of the references (K, B), chosen and rejected, and their weights (K, B)."""
        assert self.references is not None and self.references.weights is not None
        chosen, weights = self.references.chosen_logps, self.references.weights
        return (
            chosen,
            self.references.rejected_logps,
            weights if weights.dim() == 2 else weights[:, None].expand_as(chosen),
        )


class _AfterStep(TrainerCallback):
    """Lets online weights see what the step did."""

    def __init__(self, trainer: MultiReferenceDPOTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass on that an optimizer step has ended."""
        self.trainer.weighting.end_step()


class MultiReferenceDPOTrainer(PreferenceTrainer):
    """DPO with K references: a mixture of them (`mode`) or the mean of the K losses, with weights from `weighting`.

    The references never enter memory: `prefopt score-references` has scored the text of every completion under each,
    with the reference's own tokenizer. Constructor arguments are those of `PreferenceTrainer`; `ref_model` stays None.

    Example:
    ```python
    args = MultiReferenceDPOConfig("out", references=[a, b, c], ref_logps_dir="scores", mode="multi_dpo")
    trainer = MultiReferenceDPOTrainer(a, args=args, train_dataset=dataset)
    trainer.train()
    ```

    Reference: arXiv 2405.16388 (MRPO), arXiv 2512.10040 (MDPO and the weightings), arXiv 2502.01203 (exact mixtures).
    """

    args: MultiReferenceDPOConfig
    config_class = MultiReferenceDPOConfig
    # soft self-play as well: its targets are log-ratios, to a mixture or to each reference in turn
    pair_loss_table = {  # noqa: RUF012
        **PAIR_LOSSES,
        **{name: SELF_PLAY_LOSSES[name] for name in ("sppo", "sppo_single")},
    }
    _name = "Multi-reference DPO"
    _tag_names = ("prefopt", "multi-reference-dpo")
    _paper = {  # noqa: RUF012
        "title": "Multi-Reference Preference Optimization for Large Language Models",
        "id": "2405.16388",
        "citation": """
@article{le2024multi,
    title   = {Multi-Reference Preference Optimization for Large Language Models},
    author  = {Le, Hung and Tran, Quan and Nguyen, Dung and Do, Kien and Mittal, Saloni and Ogueji, Kelechi
               and Venkatesh, Svetha},
    journal = {arXiv preprint arXiv:2405.16388},
    year    = 2024,
}""",
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: MultiReferenceDPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
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
            model, None, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics,
            callbacks, optimizers, quantization_config, peft_config,
        )  # fmt: skip
        if not self._datasets():
            raise ValueError("Give a `train_dataset` or an `eval_dataset`.")
        counts = {len(dataset[0]["ref_chosen_logps"]) for dataset in self._datasets()}
        if len(counts) > 1:
            raise ValueError(f"The data sets hold scores of different numbers of references: {sorted(counts)}.")
        self.num_references = counts.pop()
        names = reference_names(args, self.num_references)
        self.reference_names = short_names(names)
        if self._anchor_name is not None and self._anchor_name not in names:
            raise ValueError(f"`anchor` {self._anchor_name!r} is not among the references {names}.")
        self.anchor = None if self._anchor_name is None else names.index(self._anchor_name)
        if self.anchor is None and args.clip_to_anchor is not None:
            raise ValueError("`clip_to_anchor` needs `anchor`: the reference that is the policy's own initial model.")
        self.weighting = self._make_weighting()
        self.add_callback(_AfterStep(self))
        if self.is_world_process_zero() and self.train_dataset is not None:
            for advice in advise(self.train_dataset, args, has_anchor=self.anchor is not None):
                logger.warning(advice)

    # ---- the spine ----

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """See `BaseTrainer.compute_loss`; online weights are updated before a step's first micro-batch."""
        self.step_model = model
        self.weighting.start_step(self.state.global_step)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def reference_scores(self, batch: dict[str, Any]) -> ReferenceScores:
        """Return the cached scores (K, B), clipped and per unit of length, and weights, from unclipped scores."""
        assert self.model is not None
        weights = self.weighting.weights(batch, training=self.model.training)
        chosen, rejected = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
        if self.args.clip_to_anchor is not None:
            assert self.anchor is not None
            chosen, rejected = pure.clip_to_anchor(
                chosen, rejected, anchor=self.anchor, max_eps=self.args.clip_to_anchor
            )
        units = [self._units(batch, side, batch.get(f"ref_{side}_counts")) for side in SIDES]
        return ReferenceScores(chosen / units[0], rejected / units[1], weights)

    def pair_scores(self, scores: CompletionScores, reference: ReferenceScores, batch: dict[str, Any]) -> PairScores:
        """See `PreferenceTrainer.pair_scores`; the policy's log-probs are per unit of length, like the references'."""
        pair = super().pair_scores(scores, reference, batch)
        per_unit = {
            "chosen_logps": pair.chosen_logps / self._units(batch, "chosen", pair.chosen_counts),
            "rejected_logps": pair.rejected_logps / self._units(batch, "rejected", pair.rejected_counts),
        }
        return MultiPairScores(**{**vars(pair), **per_unit}, references=reference)

    def mix_references(self, reference: ReferenceScores, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the mixture's log-probs (B,), chosen and rejected."""
        assert reference.weights is not None
        mode = _REPORTED_MIXTURE.get(self.args.mode, self.args.mode)
        chosen = pure.mixture_logps(reference.chosen_logps, reference.weights, mode=mode)
        return chosen, pure.mixture_logps(reference.rejected_logps, reference.weights, mode=mode)

    def pair_losses(self, pair: PairScores, reference: ReferenceScores, batch: dict[str, Any]) -> Tensor:
        """Compute the loss of each pair (B,), times WPO's weights where they are on."""
        if self.args.mode not in _REPORTED_MIXTURE:
            return super().pair_losses(pair, reference, batch)
        policy, frozen = (pair.chosen_logps, pair.rejected_logps), (reference.chosen_logps, reference.rejected_logps)
        weights, beta = reference.weights, self.args.beta
        assert weights is not None
        if self.args.mode == "forward_kl":
            losses = pure.forward_kl_loss(*policy, *frozen, weights, beta=beta, max_exponent=self.args.max_exponent)
        elif self.args.loss_type == ["sigmoid"] and not self.args.loss_weights and not self.args.label_smoothing:
            losses = pure.multi_dpo_loss(policy[0] - policy[1], frozen[0] - frozen[1], weights, beta=beta)
        else:
            losses = torch.zeros_like(pair.chosen_logps)
            for weight, chosen, rejected in zip(weights, *frozen):
                against = replace(pair, ref_chosen_logps=chosen, ref_rejected_logps=rejected)
                losses = losses + weight * super().pair_losses(against, reference, batch)
            return losses  # with WPO's weights already
        pair_weights = self.pair_weights(pair)
        return losses if pair_weights is None else losses * pair_weights

    def record(
        self, losses: Tensor, pair: PairScores, scores: CompletionScores, batch: dict[str, Any], sums: MetricSums
    ) -> None:
        """See `PreferenceTrainer.record`; adds the references' weights and influence, and comparable accuracies.

        `logps/*` and `rewards/*` are in the unit of `normalize`.
        """
        super().record(losses, pair, scores, batch, sums)
        assert isinstance(pair, MultiPairScores)
        real, (chosen, rejected, weights) = batch["real"], pair.weighted
        for name, values in zip(self.reference_names, weights):
            sums.add_mean(f"references/weight/{name}", values, real)
        entropy = -torch.special.xlogy(weights, weights).sum(dim=0)
        sums.add_mean("references/effective_number", entropy.exp(), real)
        sums.add_mean("references/spread", self.args.beta * (chosen - rejected).std(dim=0, correction=0), real)
        for logps in (chosen, rejected):
            share = (weights.log() - logps).softmax(dim=0).amax(dim=0)
            sums.add_mean("references/harmonic_dominance", (share > DOMINANT).float(), real)
        sums.add_mean("accuracies/reference_free", _right_per_token(scores), real)
        if self.anchor is not None:
            assert scores.logps is not None
            anchored = batch["ref_chosen_logps"][self.anchor] - batch["ref_rejected_logps"][self.anchor]
            sums.add_mean("accuracies/own_init", (scores.logps[0::2] - scores.logps[1::2] > anchored).float(), real)

    def _units(self, batch: dict[str, Any], side: str, counts: Tensor | None) -> Tensor:
        """Return what sums are divided by: (B,) or (K, B)."""
        if self.args.normalize == "token":
            assert counts is not None
            return counts
        if self.args.normalize == "byte":
            return batch[f"{side}_bytes"].clamp_min(1)
        return torch.ones((), device=batch["real"].device)

    # ---- data ----

    @classmethod
    def check_data(cls, dataset: Dataset, args: Any, name: str) -> None:
        """See `BaseTrainer.check_data`; the references' scores are checked as well."""
        super().check_data(dataset, args, name)
        with_scores(dataset, args, name)

    @classmethod
    def check_columns(cls, dataset: Dataset, args: Any, name: str) -> None:
        """Raise on data without what self-play losses read; the references' scores are checked in `_prepare`."""
        check_self_play_columns(dataset, args.loss_type, name)

    def _prepare(self, dataset: Dataset | None, name: str) -> Dataset | None:
        dataset = super()._prepare(dataset, name)
        if dataset is None:
            return None
        args, tokenizer = cast(tuple[MultiReferenceDPOConfig, PreTrainedTokenizerBase], self._args_for_data)
        dataset, report = with_scores(dataset, args, name)
        if report is not None:
            self.join_reports[name] = report
        if args.validation_set is not None and name == evaluated(args.validation_set):
            if self._validation is None:  # a set that is evaluated later may have the same name
                self._validation = dataset
        elif name == TRAINING and WEIGHTINGS[args.weighting].pairs == "validation" and args.validation_set is None:
            dataset, self._validation = hold_out_by_prompt(dataset, args.validation_rows, args.seed, tokenizer)
            if args.process_index == 0:
                rows = len(self._validation)
                print(f"{name}: {rows} rows are held out for `weighting: {args.weighting}`.", flush=True)
        return dataset

    def get_train_dataloader(self) -> DataLoader:
        """See `BaseTrainer.get_train_dataloader`; online weights read its plan."""
        loader = super().get_train_dataloader()
        plan = loader.batch_sampler
        assert isinstance(plan, BatchPlan)
        self._plan = plan
        return loader

    # ---- weights ----

    def _make_weighting(self) -> Weighting:
        kind = WEIGHTINGS[self.args.weighting]
        if self.args.validation_set is not None and self._validation is None:
            named = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
            raise ValueError(
                f"`validation_set` {self.args.validation_set!r} is not among the evaluation sets {named}."
            )
        pairs = self._validation
        if kind.pairs == "train" and self.train_dataset is not None:
            pairs = self.train_dataset
        if kind.pairs is not None and pairs is None:
            raise ValueError(f"`weighting: {self.args.weighting}` takes its pairs from a `train_dataset`: give one.")
        return kind(
            WeightingInputs(self.args, self.num_references, self.anchor, pairs, self._current_plan, self.measure)
        )

    def _current_plan(self) -> BatchPlan:
        assert self._plan is not None, "online weights are asked for in training only"
        return self._plan

    def measure(self, indices: Sequence[int]) -> float:
        """Compute the policy's `sampling_metric` on these validation pairs: its mean, the same on every rank.

        All ranks call it and share the work; the step's model is scored in evaluation mode and without gradient. More
        is better: "accuracy" is whether the chosen completion has the higher log-prob per token, "loss" minus the DPO
        loss against all references alike.
        """
        assert self._validation is not None
        dataset = self._validation.select(indices)
        lengths = self.collate.lengths(dataset, share_prompt=self.args.share_prompt)
        size = self.args.per_device_eval_batch_size
        plan = BatchPlan(
            lengths,
            groups_per_micro_batch=size,
            world_size=self.args.world_size,
            rank=self.args.process_index,
            max_tokens_per_row=self.row_capacity(lengths, training=False),
            shuffle=False,
        )
        batches = PlannedBatches(dataset, self.collate, self.layout)
        policy = self.step_model
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        training = policy.training
        policy.eval()
        for (micro_batch,) in plan:
            batch = self.to_device(batches[micro_batch])
            with torch.no_grad(), self.compute_loss_context_manager():
                scores = score_completions(policy, batch)
                by_accuracy = self.args.sampling_metric == "accuracy"
                merit = _right_per_token(scores) if by_accuracy else -self._plain_loss(scores, batch)
            total += torch.where(batch["real"], merit, 0.0).sum()
        policy.train(training)
        if dist.is_initialized():
            dist.all_reduce(total)
        return total.item() / len(dataset)

    def _plain_loss(self, scores: CompletionScores, batch: dict[str, Any]) -> Tensor:
        """Compute the DPO loss (B,) against all references alike."""
        reference = self.reference_scores(batch)
        pair = self.pair_scores(scores, reference, batch)
        margins = pair.chosen_logps - pair.rejected_logps
        margins = margins - (reference.chosen_logps - reference.rejected_logps).mean(dim=0)
        return -torch.nn.functional.logsigmoid(self.args.beta * margins)

    def origin(self) -> dict[str, str]:
        """See `BaseTrainer.origin`; names the references by what decides their scores."""
        found = super().origin()
        if self.args.references is not None:
            found["the references"] = content_hash([scorer.key for scorer in scorers_of(self.args)])
            found.pop("the reference", None)
        return found

    def method_state(self) -> dict[str, Any]:
        """See `BaseTrainer.method_state`; holds the online weights."""
        return super().method_state() | {"weighting": self.weighting.state_dict()}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Restore what `method_state` returned.

        Raises:
            ValueError: the weighting was another one.
        """
        super().load_method_state(state)
        if set(state["weighting"]) != set(self.weighting.state_dict()):
            raise ValueError(f"The checkpoint was trained with another `weighting` than {self.args.weighting}.")
        self.weighting.load_state_dict(state["weighting"])


def _right_per_token(scores: CompletionScores) -> Tensor:
    """Return (B,): 1 where the chosen completion has the higher log-prob per token, whatever the method's unit."""
    assert scores.logps is not None and scores.counts is not None
    means = scores.logps / scores.counts
    return (means[0::2] > means[1::2]).float()
