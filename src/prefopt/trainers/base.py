"""Running of a trainer: planned batches, exact normalisation, metrics on the device, evaluation, checkpoints.

A method trainer defines the loss of one micro-batch (`step_loss`). `BaseTrainer` runs it over micro-batches and ranks
so that the gradient is that of the mean over the whole optimizer step, each example is used once an epoch, and metrics
are those of the whole step. `SavingTrainer` below it saves and resumes.

Letters: B examples of a micro-batch.
"""

from __future__ import annotations

import copy
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, TrainOutput

from prefopt._trl import is_log_completions
from prefopt.data.tokenization import TokenizationReport, check_fits_model
from prefopt.hardware import peak_memory_gib
from prefopt.launch import print_on_main
from prefopt.pages import counted
from prefopt.progress import library_bars
from prefopt.scoring.attention import PackedRows, restore_attention
from prefopt.scoring.layouts import Layout, PackedLayout, PaddedLayout
from prefopt.scoring.packing import choose_layout, nearest_to_probe, probe_packing
from prefopt.scoring.plan import BatchPlan, GroupLengths, MicroBatch, row_capacity
from prefopt.trainers import fitting
from prefopt.trainers.checkpointing import checkpoint_selectively
from prefopt.trainers.collators import PlannedBatches, PlannedLoader
from prefopt.trainers.console import print_few_figures
from prefopt.trainers.metrics import FiniteWatch, MetricLog, MetricSums
from prefopt.trainers.policy import base_model_of, compile_blocks, compiled_so_far, use_liger
from prefopt.trainers.precision import MasterWeights, UpdatesLost, keep_updates
from prefopt.trainers.saving import SavingTrainer
from prefopt.trainers.sharding import describe_wrapping, give_addresses, keep_float32_under_fsdp2

LARGEST_LOAD_RATIO = 2.0
"""Tokens of the heaviest rank over those of the lightest from which on a warning says so."""

_TOTALS = ("num_tokens", "perf/tokens")  # metrics that are added up over the steps of a log, not averaged


TRAINING, EVALUATION = "train", "eval"
"""Names of the data sets in messages, reports and checks."""


def evaluated(name: Any) -> str:
    """Return the name of an evaluation set in reports and checks, which no training set has, even if it is "train"."""
    if not isinstance(name, str):
        raise ValueError(f"An evaluation set is called {name!r}: its name must be a string.")
    return name if name.startswith(EVALUATION) else f"{EVALUATION}/{name}"


class BaseTrainer(SavingTrainer):
    """Base of all trainers here; see the module's docstring.

    Args:
        model: the model, with its scoring path installed and PEFT applied.
        args: the trainer's config, a `TrainingArguments` with `BatchConfig`.
        collate: a collator of `prefopt.trainers.collators`.
        train_dataset, eval_dataset: tokenised data sets (`eval_dataset` may be a dict of them).
        processing_class: the tokenizer, with a pad token.
        compute_metrics: called after an evaluation with the predictions of `step_loss`.
        callbacks, optimizers: as for `transformers.Trainer`.
    """

    # the loss is the mean over the whole optimizer step, whatever its division into micro-batches and ranks
    loss_is_scaled_for_ga = True
    _tag_names: tuple[str, ...] = ("prefopt",)
    _name = ""
    _paper: Mapping[str, str] = {}
    movable = (torch.Tensor, PackedRows)
    metric_minima: tuple[str, ...] = ()
    metric_maxima: tuple[str, ...] = ()
    # of the data sets that were given as rows, by name: what became of the rows, and the sets as they were given
    tokenization_reports: dict[str, TokenizationReport]
    given_datasets: dict[str, Dataset]
    keeps_reference = False  # a reference model beside the policy

    def __init__(
        self,
        model: Any,
        args: Any,
        collate: Any,
        train_dataset: Dataset | None,
        eval_dataset: Dataset | dict[str, Dataset] | None,
        processing_class: PreTrainedTokenizerBase,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process. Start the run with `accelerate launch` (or `prefopt "
                f"... --num_processes {args.n_gpu}`), or make one GPU visible with CUDA_VISIBLE_DEVICES."
            )
        args = copy.copy(args)  # what is settled for this model and data is not settled for the config's next one
        if args.checkpointing == "auto" and args.ddp_find_unused_parameters is None:
            # Trainer would decide it before anything is settled; every trained weight is in the loss's graph
            args.ddp_find_unused_parameters = not isinstance(model, PreTrainedModel)
        self.collate = collate
        self.groups_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._lengths: dict[str, list[GroupLengths]] = {}
        self._train_sums = MetricSums()
        self._eval_sums = MetricSums()
        self._predictions: list[torch.Tensor] = []
        self._log_buffer = MetricLog()
        self._watch = FiniteWatch()
        self._update_hook: Any = None
        self._masters: MasterWeights | None = None
        self._updates_lost: UpdatesLost | None = None
        self._tokens_seen = 0.0
        self._warned_of_uneven_ranks = False
        self._packing = ""  # what `describe_run` says about the choice of the layout
        self._clock = time.perf_counter()
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if not self.is_fsdp_enabled and any(parameter.is_meta for parameter in self.model.parameters()):
            raise ValueError(
                "The accelerate config asks for FSDP, which accelerate applies on GPUs only, and this run is on a "
                "CPU: choose another config, such as cpu_ddp_2ranks."
            )
        keep_float32_under_fsdp2(self.accelerator)
        parallel = self.accelerator.parallelism_config
        if parallel is not None and parallel.non_data_parallel_size > 1:
            raise ValueError(
                "Tensor, context and sequence parallelism are not supported: each process takes pairs of its own. Use "
                "ZeRO-3 or FSDP."
            )
        for name, dataset in self._named_datasets().items():
            check_fits_model(dataset, self.model.config, name)  # before a pair is tried
        self.layout = self._choose_layout()
        fitting.settle(self)
        if args.compile_blocks:
            compile_blocks(base_model_of(self.model))
        self.add_early_callback(_RunCallback(self))
        print_few_figures(self)
        self.model.add_model_tags(list(self._tag_names))

    def add_callback(self, callback: Any) -> None:
        """Add a callback; TRL's `LogCompletionsCallback` gets the prompts that the tokenised rows no longer hold.

        Raises:
            ValueError: there are none, or it does not know when to log.
        """
        if is_log_completions(callback) and "prompt" not in callback.eval_dataset.column_names:
            callback.eval_dataset = self._prompts_for(callback)
        super().add_callback(callback)

    def _prompts_for(self, callback: Any) -> Dataset:
        instead = "prefopt.SampleCompletionsCallback(trainer) needs none of this."
        if not (callback.freq or self.args.eval_steps):
            raise ValueError(f"LogCompletionsCallback needs `freq`, or `eval_steps` in the config; {instead}")
        if isinstance(self.eval_dataset, dict):
            raise ValueError(f"LogCompletionsCallback reads one evaluation set, and there are several; {instead}")
        rows = self.raw_rows(EVALUATION) if EVALUATION in self.given_datasets else None
        if rows is None or "prompt" not in rows.column_names:
            raise ValueError(
                "LogCompletionsCallback reads the column `prompt`, and the evaluation rows were given without it; "
                f"{instead}"
            )
        return rows.select(range(len(callback.eval_dataset)))

    def raw_rows(self, name: str = TRAINING) -> Dataset:
        """Return the rows that are used of a data set as they were given, in the order of the tokenised ones.

        Args:
            name: "train", "eval", or for one of several evaluation sets "eval/NAME".

        Raises:
            ValueError: there is no such set.
        """
        self._check_name(name, self.given_datasets)
        report, given = self.tokenization_reports[name], self.given_datasets[name]
        if len(given) == report.rows_kept:  # nothing was dropped, or the rows were tokenised before
            return given
        dropped = {row["row"] for row in report.dropped_rows}
        return given.select([row for row in range(len(given)) if row not in dropped])

    def dropped_rows(self, name: str = TRAINING) -> list[dict[str, Any]]:
        """Return of each row that cannot be used its number in the data set, `row_id`, `reason` and `detail`.

        Args:
            name: as in `raw_rows`.

        Raises:
            ValueError: there is no such set.
        """
        self._check_name(name, self.tokenization_reports)
        return list(self.tokenization_reports[name].dropped_rows)

    @staticmethod
    def _check_name(name: str, known: Mapping[str, Any]) -> None:
        if name not in known:
            raise ValueError(f"There is no data set {name!r} here; there is {', '.join(map(repr, known)) or 'none'}.")

    # ---- what a method defines

    @classmethod
    def check_settings(cls, args: Any) -> None:
        """Raise a ValueError for settings that contradict each other, before anything is loaded."""

    @classmethod
    def check_data(cls, dataset: Dataset, args: Any, name: str) -> None:
        """Raise a ValueError for tokenised rows that the method cannot use, as the constructor does."""

    @abstractmethod
    def step_loss(
        self, model: nn.Module, batch: dict[str, Any], sums: MetricSums
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the loss of one micro-batch.

        Args:
            model: the wrapped model.
            batch: a collated micro-batch on the device.
            sums: where metrics are added.

        Returns:
            - () loss, scaled with `self.reduce` so that its mean over ranks, summed over micro-batches, is that of the
              optimizer step;
            - (B, ...) predictions of each example, for `compute_metrics`.
        """

    def derive_metrics(self, values: dict[str, torch.Tensor]) -> None:
        """Replace sums by what is computed from them, once they are reduced over ranks."""

    def method_state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold beside model, optimizer and schedule (JSON values)."""
        return super().method_state() | {"num_tokens": self._tokens_seen + self._log_buffer.total("num_tokens")}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Restore what `method_state` returned."""
        self._tokens_seen = state["num_tokens"]

    def keeps_float32_copies(self) -> bool:
        """See `SavingTrainer.keeps_float32_copies`."""
        return self._masters is not None or super().keeps_float32_copies()

    def describe_run(self) -> str:
        """Describe processes, wrapping, batches and what the method adds in one line."""
        return f"{'; '.join(self.run_facts())}."

    def run_facts(self) -> list[str]:
        """Return the parts of `describe_run`."""
        processes = counted(self.args.world_size, "process", "processes")
        return [
            f"Training on {processes} as {describe_wrapping(self.model_wrapped)}",
            f"batches: {self.layout.name}{self._packing}",
        ]

    def why_not_packed(self) -> str | None:
        """Return the method's own reason against packed rows, if it has one."""
        return None

    # ---- batches

    def _named_datasets(self) -> dict[str, Dataset]:
        evaluations = self.eval_dataset
        if isinstance(evaluations, dict):
            named = {evaluated(key): dataset for key, dataset in evaluations.items()}
        else:
            named = {EVALUATION: evaluations}
        return {name: d for name, d in ({TRAINING: self.train_dataset} | named).items() if d is not None}

    def _datasets(self) -> list[Dataset]:
        return list(self._named_datasets().values())

    def lengths(self, dataset: Dataset) -> list[GroupLengths]:
        """Return the token counts of every example of `dataset`, counted once."""
        key = dataset._fingerprint
        if key not in self._lengths:
            self._lengths[key] = self.collate.lengths(dataset, share_prompt=self.args.share_prompt)
        return self._lengths[key]

    def _choose_layout(self) -> Layout:
        longest = max((group.longest for data in self._datasets() for group in self.lengths(data)), default=0)
        multiple = getattr(self.args, "pad_to_multiple_of", None)
        # a model that is sharded later can run only then
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        layout, reason = choose_layout(
            self.args.batch_layout,
            self.model.config,
            pad_token_id=self.processing_class.pad_token_id,
            pad_to_multiple_of=multiple if isinstance(multiple, int) else 1,  # TRL's default is "auto"
            share_prompt=self.args.share_prompt,
            longest_sequence=longest,
            against_packing=self.why_not_packed(),
            probe=self._probe if self._datasets() and not sharded else None,
        )
        self._note_layout(reason)
        return layout

    def _note_layout(self, reason: str | None) -> None:
        if reason is not None:
            self._packing = f" ({reason})"
            if self.is_world_process_zero():
                print(f"Batches are padded, not packed: {reason}.")

    def _probe(self, packed: PackedLayout) -> str | None:
        """Score one pair of the data packed and by the model's plain forward; return a reason against packing."""
        dataset = self._datasets()[0]
        index = nearest_to_probe([group.packed for group in self.lengths(dataset)])
        twice = MicroBatch(((index, index),), False, 2, 1, 1)
        batches = [
            self.to_device(PlannedBatches(dataset, self.collate, layout)[twice])
            for layout in (packed, PaddedLayout(packed.pad_token_id))
        ]
        reason = probe_packing(self.model_wrapped, *batches, autocast=self.compute_loss_context_manager)
        if reason is None:
            self._packing = " (tried: a pair of the data scores as in padded rows)"
        return reason

    def probe_sharded(self, loader: PlannedLoader) -> None:
        """Try packed rows on a model that has just been sharded; pad the batches of `loader` where they are not exact.

        Raises:
            ValueError: they are not, and the recipe demands them.
        """
        if self._packing or not isinstance(self.layout, PackedLayout):
            return
        multiple = getattr(self.args, "pad_to_multiple_of", None)
        self.layout, reason = choose_layout(
            self.args.batch_layout,
            self.model.config,
            pad_token_id=self.layout.pad_token_id,
            pad_to_multiple_of=multiple if isinstance(multiple, int) else 1,
            share_prompt=self.args.share_prompt,
            longest_sequence=0,  # was checked in the constructor
            probe=self._probe,
        )
        self._note_layout(reason)
        loader.use_layout(self.layout)

    def restore_attention(self) -> None:
        """Give the models back the attention that they were given with, once nothing will run backward."""
        restore_attention(self.model)

    def prepare_layers(self, model: Any) -> None:
        """Give a reference the layers that the policy will have: liger's, compiled ones."""
        use_liger(model, self.args)
        if self.args.compile_blocks:
            compile_blocks(base_model_of(model))

    def row_capacity(self, lengths: Sequence[GroupLengths], *, training: bool) -> int | None:
        """Return the capacity of a packed row in tokens; None for padded batches."""
        args = self.args
        if self.layout.name == "padded":
            return None
        if args.max_tokens_per_row is not None:
            return args.max_tokens_per_row
        if training and args.tokens_per_micro_batch is not None:
            # one row a micro-batch, the few too that come out larger than they should
            return row_capacity(lengths, tokens=1.25 * args.tokens_per_micro_batch)
        size = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
        longest = max(group.packed for group in lengths)
        mean = sum(group.packed for group in lengths) / len(lengths)
        return row_capacity(lengths, tokens=1.5 * mean * size + longest / 2)

    def divide_step(self, micro_batches: int) -> None:
        """Run each optimizer step as this number of micro-batches; before anything is wrapped."""
        self.args.gradient_accumulation_steps = micro_batches  # accelerator's own stays 1: it would scale the loss
        if self.is_deepspeed_enabled:
            # it must get three numbers that fit together, and scales nothing by them
            self.accelerator.state.deepspeed_plugin.deepspeed_config.update(
                train_micro_batch_size_per_gpu=1,
                gradient_accumulation_steps=micro_batches,
                train_batch_size=micro_batches * self.args.world_size,
            )

    def get_total_train_batch_size(self, args: Any) -> int:
        """Return the examples of one optimizer step over all processes."""
        return self.groups_per_step

    def training_plan(self, *, micro_batches: int | None = None) -> BatchPlan:
        """Make this rank's plan of the training data, with this many micro-batches a step or those of the config."""
        args, lengths = self.args, self.lengths(self.train_dataset)
        return BatchPlan(
            lengths,
            micro_batches=micro_batches or args.gradient_accumulation_steps,
            groups_per_step=self.groups_per_step,
            world_size=args.world_size,
            rank=args.process_index,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            max_tokens_per_row=self.row_capacity(lengths, training=True),
            shuffle=args.train_sampling_strategy == "random",
            drop_last=args.dataloader_drop_last,
        )

    def evaluation_plan(self, dataset: Dataset) -> BatchPlan:
        """Make this rank's plan of an evaluation set, in its order."""
        args, lengths = self.args, self.lengths(dataset)
        return BatchPlan(
            lengths,
            groups_per_micro_batch=args.per_device_eval_batch_size,
            world_size=args.world_size,
            rank=args.process_index,
            max_tokens_per_row=self.row_capacity(lengths, training=False),
            shuffle=False,
        )

    def _loader(self, dataset: Dataset, plan: BatchPlan) -> DataLoader:
        args, workers = self.args, self.args.dataloader_num_workers
        return PlannedLoader(
            PlannedBatches(dataset, self.collate, self.layout),
            batch_sampler=plan,
            collate_fn=itemgetter(0),  # an item is a whole micro-batch already, and each list of them holds one
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context if workers else None,
        )

    def _warn_of_uneven_ranks(self, plan: BatchPlan) -> None:
        if self._warned_of_uneven_ranks or plan.world_size == 1:
            return
        self._warned_of_uneven_ranks = True
        ratio, pairs = plan.load_ratio(), plan.groups_per_step // plan.world_size
        if ratio > LARGEST_LOAD_RATIO:
            print_on_main(
                f"Warning: in a step one rank computes {ratio:.1f} times the tokens of another, which waits for it: "
                f"{pairs} example(s) a rank are too few to balance lengths. Use fewer processes, or a larger global "
                "batch."
            )

    def get_train_dataloader(self) -> DataLoader:
        """Make the loader of this rank's micro-batches; accelerate must not shard it, since the plan does already."""
        if self.train_dataset is None:
            raise ValueError("Training needs a `train_dataset`.")
        plan = self.training_plan()
        self._warn_of_uneven_ranks(plan)
        return self._loader(self.train_dataset, plan)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Make the loader of this rank's evaluation batches, in the data set's order."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise ValueError("Evaluation needs an `eval_dataset`.")
        return self._loader(dataset, self.evaluation_plan(dataset))

    # ---- training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; see `transformers.Trainer.train`. Resuming restores the method's state as well."""
        resume_from_checkpoint = self.prepare_to_resume(resume_from_checkpoint)
        self.restart_clock()
        try:
            with library_bars(shown=not self.args.disable_tqdm):
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.restore_attention()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """See `Trainer.create_optimizer`; updates of 16-bit weights are kept as `master_weights` says."""
        if self.is_fsdp_enabled:
            give_addresses(self.model, upcast=self.accelerator.mixed_precision != "no")
        optimizer = super().create_optimizer(model)
        if self._updates_lost is not None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return optimizer
        self._masters = keep_updates(optimizer, self.args)
        self._updates_lost = UpdatesLost(optimizer, self._masters)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """See `Trainer.create_scheduler`; the schedule may be laid out for more epochs than are trained."""
        if self.args.schedule_epochs is not None:
            num_training_steps = math.ceil(num_training_steps * self.args.schedule_epochs / self.args.num_train_epochs)
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.args.warmup_type == "log":
            warm_up_logarithmically(scheduler, self.args.get_warmup_steps(num_training_steps))
        return scheduler

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of a micro-batch; after the last one of a step its metrics are reduced over ranks."""
        loss, predictions = self._watched_loss(model, inputs, self._train_sums)
        self._count_tokens(inputs, self._train_sums)
        if self.accelerator.sync_gradients:
            values = self._train_sums.reduce()
            self._train_sums = MetricSums()
            self._watch.end_step(values.pop("not_finite"))
            self.derive_metrics(values)
            self._log_buffer.append(values)
        return (loss, predictions) if return_outputs else loss

    def _watched_loss(
        self, model: nn.Module, batch: dict[str, Any], sums: MetricSums
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss, predictions = self.step_loss(model, batch, sums)
        _add_flag(sums, self._watch.see_total(batch["row_ids"], loss))
        return loss, predictions

    def reduce(self, total: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        """Scale a micro-batch's sum to its share of the mean over the optimizer step's examples.

        Averaged over ranks, as gradients are, and summed over micro-batches, the shares are that mean.
        """
        return total * (self.args.world_size / batch["step_groups"])

    def watch_finite(self, losses: torch.Tensor, batch: dict[str, Any], sums: MetricSums) -> None:
        """Have the run stop, naming the rows, where one of the losses (B,) is not finite.

        The loss of every micro-batch is watched anyway (`compute_loss`); this finds which of its rows it was.
        """
        _add_flag(sums, self._watch.see(batch["row_ids"], losses, batch["real"]))

    def check_finite(self, *, step: int) -> None:
        """Raise on all ranks where a loss of the optimizer step that is under way was not finite."""
        watch, self._watch = self._watch, FiniteWatch()
        watch.check(step=step)

    def before_first_update(self) -> None:
        """Have the optimizer check the loss before it changes a weight, and start from the present weights.

        The check is a hook of the innermost optimizer, since DeepSpeed steps within its backward, before any callback.
        """
        if self._masters is not None:
            self._masters.follow_weights()
        wrapped: Any = self.model_wrapped if self.is_deepspeed_enabled else self.optimizer
        optimizer = wrapped.basic_optimizer if self.is_deepspeed_enabled else wrapped.optimizer
        if self._update_hook is not None:  # of an earlier call of `train`
            self._update_hook.remove()
        self._update_hook = optimizer.register_step_pre_hook(
            lambda *_: self.check_finite(step=self.state.global_step + 1)
        )

    @staticmethod
    def _count_tokens(batch: dict[str, Any], sums: MetricSums) -> None:
        # a filler only keeps this rank in step with the others (`BatchPlan`): its example counts on another rank
        weights = batch["token_weights"] * batch["real"].any()
        sums.add_total("num_tokens", weights)  # a prompt counts once per completion, as in TRL
        sums.add_total("perf/tokens", weights > 0)  # every token that was computed counts once

    def record_lost_updates(self) -> None:
        """Log which share of the weights with a gradient the first steps have not moved so far."""
        if self._updates_lost is not None and (share := self._updates_lost.take()) is not None:
            self._log_buffer.append({"perf/updates_lost": share})

    def restart_clock(self) -> None:
        """Measure tokens/s from now on."""
        self._clock = time.perf_counter()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the steps since the last log to what the Trainer logs."""
        if "loss" in logs:
            minima = (*self.metric_minima, "perf/updates_lost")  # of a share that falls from step to step
            metrics = self._log_buffer.drain(minima=minima, maxima=self.metric_maxima, totals=_TOTALS)
            self._tokens_seen += metrics.get("num_tokens", 0.0)
            tokens = metrics.pop("perf/tokens", 0.0)
            logs |= metrics | {
                "num_tokens": self._tokens_seen,
                "perf/tokens_per_second": tokens / (time.perf_counter() - self._clock),
                "perf/peak_memory_gib": peak_memory_gib(self.args.device),
                **compiled_so_far(),
            }
            self.restart_clock()
        super().log(logs, start_time)

    # ---- evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate with sums and counts: the mean over examples, whatever the batches.

        The Trainer's own means would weigh batches, and repeat the size of the first one for a planned loader.
        """
        self._eval_sums, self._predictions = MetricSums(), []
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only=True, metric_key_prefix=metric_key_prefix
        )
        self.restore_attention()
        watch, self._watch = self._watch, FiniteWatch()
        values = self._eval_sums.reduce()
        if values.pop("not_finite").item() > 0:  # nothing is trained on it, so nothing stops
            where = watch.whose()
            if self.is_world_process_zero():
                print(f"{description}: the loss is not finite in {where}.", flush=True)
        self.derive_metrics(values)
        metrics = {name: value.item() for name, value in values.items() if torch.isfinite(value)}
        if self.compute_metrics is not None:
            gathered = gather_object([predicted.cpu() for predicted in self._predictions])
            predictions: Any = torch.cat(gathered).numpy()
            prediction = EvalPrediction(predictions=predictions, label_ids=None)  # type: ignore[arg-type]
            metrics |= self.compute_metrics(prediction)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        count = len(dataloader.dataset)  # type: ignore[arg-type]
        return output._replace(metrics=(output.metrics or {}) | named, num_samples=count)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Add one evaluation batch to the sums."""
        batch = self.to_device(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            _, predicted = self._watched_loss(model, batch, self._eval_sums)
        if self.compute_metrics is not None:
            self._predictions.append(predicted[batch["real"]])
        return None, None, None

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Raise a ValueError: these models answer no labels."""
        raise ValueError(
            "`predict` is not supported. `evaluate(dataset)` gives the metrics, and `compute_metrics` gets each row's "
            "rewards."
        )


def _add_flag(sums: MetricSums, flag: torch.Tensor) -> None:
    sums.add_max("not_finite", flag, torch.ones_like(flag, dtype=torch.bool))


def warm_up_logarithmically(scheduler: Any, steps: int) -> None:
    """Replace a schedule's linear warm-up by log(step) / log(steps), as in DeepSpeed's WarmupLR and WarmupDecayLR.

    Raises:
        ValueError: the schedule is not a factor of the step.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ValueError("`warmup_type: log` needs an `lr_scheduler_type` that transformers computes from the step.")

    def warmed_up(factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: math.log(max(step, 1)) / math.log(steps) if step < steps else factor(step)

    if steps > 1:
        scheduler.lr_lambdas = [warmed_up(factor) for factor in scheduler.lr_lambdas]


class _RunCallback(TrainerCallback):
    """Calls the trainer at the moments of a run; it comes before trackers, see `HookedTrainer.add_early_callback`."""

    def __init__(self, trainer: BaseTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Try packed rows on a sharded model, and print how the run is set up, once everything is wrapped."""
        self.trainer.probe_sharded(kwargs["train_dataloader"])
        if state.is_world_process_zero:
            print(self.trainer.describe_run())
        # here and not earlier: Trainer has set the tokenizer's special tokens in the configs by now
        self.trainer.check_saving()
        self.trainer.check_space()
        self.trainer.before_first_update()
        if args.checkpointing == "selective":  # Trainer has turned checkpointing on by now
            checkpoint_selectively(base_model_of(self.trainer.accelerator.unwrap_model(self.trainer.model)))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restart the clock of tokens/s, so that the time between epochs does not count."""
        self.trainer.restart_clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop on a loss that is not finite where fp16's gradient scaler left the update out, and its hook with it."""
        self.trainer.check_finite(step=state.global_step)
        self.trainer.record_lost_updates()
