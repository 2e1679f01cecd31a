"""What every trainer of this library shares: planned batches, exact normalisation, device-side metrics, evaluation, checkpoints.

A method trainer says what the loss of one micro-batch is (`step_loss`); everything here is about running it: over
micro-batches and ranks so
that the gradient is that of the mean over the whole optimizer step, with each example used once an epoch, and with
metrics that are those of
the whole step.
"""

from __future__ import annotations

import math
import sys
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from prefopt import files
from prefopt.scoring.attention import by_parts
from prefopt.scoring.layouts import Layout, choose_layout
from prefopt.scoring.plan import BatchPlan, GroupLengths
from prefopt.trainers.checkpoints import check_saved_shapes, last_checkpoint
from prefopt.trainers.collators import PlannedBatches, only
from prefopt.trainers.metrics import FiniteWatch, MetricLog, MetricSums
from prefopt.trainers.model_card import write_model_card
from prefopt.trainers.policy import base_model_of

CPU_ROW_TOKENS = 1024
"""Capacity of a packed row on a CPU where its mask is dense: it costs the square of the row."""


def row_capacity(lengths: Sequence[GroupLengths], *, groups_per_row: int, dense: bool) -> int:
    """Tokens of a packed row where the recipe sets none.

    Args:
        lengths: of all groups.
        groups_per_row: groups that one micro-batch holds on average.
        dense: the mask is, so rows are short; otherwise one row a micro-batch, in which attention skips what other
            pairs own.
    """
    longest = max(group.packed for group in lengths)
    if dense:
        return max(longest, CPU_ROW_TOKENS)
    mean = sum(group.packed for group in lengths) / len(lengths)
    return math.ceil(max(longest, 1.5 * mean * groups_per_row + longest / 2) / 1024) * 1024


class PlannedLoader(DataLoader):
    """A data loader that passes its epoch on to its plan."""

    def set_epoch(self, epoch: int) -> None:
        """Have the plan draw the order of `epoch`."""
        self.batch_sampler.set_epoch(epoch)


def compiled_so_far() -> dict[str, float]:
    """`perf/compiled_graphs` and `perf/compile_seconds` of this process; empty where nothing was compiled.

    A count that still grows after the first steps means that shapes keep changing.
    """
    utils = sys.modules.get("torch._dynamo.utils")  # imported by the first compilation
    if utils is None or not (graphs := utils.counters["stats"]["unique_graphs"]):
        return {}
    seconds = sum((metrics.duration_us or 0) for metrics in utils.get_compilation_metrics()) / 1e6
    return {"perf/compiled_graphs": float(graphs), "perf/compile_seconds": seconds}


_aten = torch.ops.aten
KEPT = (
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
)
"""Operations whose results are kept: matrix products and attention, nearly all of a layer's arithmetic."""


def selective_contexts():
    """Contexts of the forward and of the recomputation, for `torch.utils.checkpoint`'s `context_fn`."""
    return create_selective_checkpoint_contexts(list(KEPT))


TRAINING, EVALUATION = "train", "eval"
"""Names of the data sets in messages, reports and checks."""


def evaluation_name(key: str) -> str:
    """Return the name of an evaluation set given under `key`: its metrics' prefix, which no training set can have."""
    return f"{EVALUATION}_{key}"


def name_of_prefix(metric_key_prefix: str) -> str:
    """Return the name of a set that is evaluated under this prefix: the prefix, unless it does not name evaluations."""
    prefix = metric_key_prefix
    return prefix if prefix == EVALUATION or prefix.startswith(f"{EVALUATION}_") else evaluation_name(prefix)


def use_selective_checkpointing(model) -> None:
    """Have a model that checkpoints its layers keep matrix products and attention, and recompute norms and activations only.

    Args:
        model: a transformers model, or a wrapper that passes `gradient_checkpointing_enable` on to it.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": selective_contexts})


STATE_FILE = "method_state.json"
_TOTALS = ("num_tokens", "perf/tokens")


class _StepEnd(TrainerCallback):
    """Looks at the finished step before anything of it is logged, evaluated or saved."""

    def __init__(self, trainer: BaseTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        """Stop on a loss that is not finite; on a GPU only when the host waits for the device anyway."""
        waits = control.should_log or control.should_save or control.should_evaluate or control.should_training_stop
        if waits or args.device.type == "cpu" or state.global_step >= state.max_steps:
            self.trainer.check_finite()

    def on_train_begin(self, args, state, control, **kwargs):
        """Say how the run is set up, once everything is wrapped."""
        if state.is_world_process_zero:
            print(self.trainer.describe_run())
        if args.gradient_checkpointing and args.selective_checkpointing:
            use_selective_checkpointing(base_model_of(self.trainer.accelerator.unwrap_model(self.trainer.model)))

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Start the clock of tokens/s anew, so that the time between epochs does not count."""
        self.trainer.restart_clock()


class BaseTrainer(Trainer):
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
    _paper: dict[str, str] = {}  # noqa: RUF012
    metric_minima: tuple[str, ...] = ()
    metric_maxima: tuple[str, ...] = ()

    def __init__(
        self,
        model,
        args,
        collate,
        train_dataset: Dataset | None,
        eval_dataset: Dataset | dict[str, Dataset] | None,
        processing_class,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process. Start the run with `accelerate launch` (or `prefopt "
                "... --num_processes "
                f"{args.n_gpu}`), or make one GPU visible with CUDA_VISIBLE_DEVICES."
            )
        self.collate = collate
        self._lengths: dict[str, list[GroupLengths]] = {}
        self._sums = {"train": MetricSums(), "eval": MetricSums()}
        self._log_buffer = MetricLog()
        self._watch = FiniteWatch()
        self._any_bad: torch.Tensor | None = None
        self._tokens_seen = 0.0
        self._row_lengths: tuple[int, ...] = ()
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
        parallel = self.accelerator.parallelism_config
        if parallel is not None and parallel.non_data_parallel_size > 1:
            raise ValueError(
                "Tensor, context and sequence parallelism are not supported: each process takes pairs of its own. Use "
                "ZeRO-3 or FSDP."
            )
        self.layout = self._choose_layout()
        self.callback_handler.callbacks.insert(
            1, _StepEnd(self)
        )  # after the flow callback that decides what a step does
        self.model.add_model_tags(list(self._tag_names))

    # ---- what a method defines
    # -------------------------------------------------------------------------------------------------

    @classmethod
    def check_settings(cls, args) -> None:
        """Refuse settings that do not go together, before anything is loaded."""

    @classmethod
    def check_data(cls, dataset: Dataset, args, name: str) -> None:
        """Refuse tokenised rows that the method cannot use, as the constructor does, without a trainer."""

    @abstractmethod
    def step_loss(self, model, batch: dict[str, Any], sums: MetricSums) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of one micro-batch.

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
        """What a checkpoint must hold beside model, optimizer and schedule (JSON values)."""
        return {"num_tokens": self._tokens_seen + self._log_buffer.total("num_tokens")}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take up what `method_state` gave."""
        self._tokens_seen = state["num_tokens"]

    def describe_run(self) -> str:
        """One line on processes, wrapping and batches."""
        line = (
            f"Training on {self.args.world_size} process(es) as {describe_wrapping(self.model_wrapped)}; batches: "
            f"{self.layout.name}"
        )
        if lengths := self._row_lengths:
            line += f", rows of {', '.join(str(length) for length in lengths)} tokens"
        return line + "."

    # ---- batches
    # ---------------------------------------------------------------------------------------------------------------

    def _named_datasets(self) -> dict[str, Dataset]:
        evaluations = self.eval_dataset
        if isinstance(evaluations, dict):
            named = {evaluation_name(key): dataset for key, dataset in evaluations.items()}
        else:
            named = {EVALUATION: evaluations}
        return {name: d for name, d in ({TRAINING: self.train_dataset} | named).items() if d is not None}

    def _datasets(self) -> list[Dataset]:
        return list(self._named_datasets().values())

    def lengths(self, dataset: Dataset) -> list[GroupLengths]:
        """Token counts of every example of `dataset`, counted once."""
        key = dataset._fingerprint
        if key not in self._lengths:
            self._lengths[key] = self.collate.lengths(dataset, share_prompt=self.args.share_prompt)
        return self._lengths[key]

    def _choose_layout(self) -> Layout:
        multiple = getattr(self.args, "pad_to_multiple_of", None)
        layout, reason = choose_layout(
            self.args.batch_layout,
            self.model.config,
            pad_token_id=self.processing_class.pad_token_id,
            pad_to_multiple_of=multiple if isinstance(multiple, int) else 1,  # TRL's default is "auto"
            share_prompt=self.args.share_prompt,
            longest_sequence=max(
                (g.longest for dataset in self._datasets() for g in self.lengths(dataset)), default=0
            ),
            against_packing=self.why_not_packed(),
        )
        if reason and self.is_world_process_zero():
            print(f"Batches are padded, not packed: {reason}.")
        return layout

    def why_not_packed(self) -> str | None:
        """A reason of the trainer's own against packing."""
        return None

    @property
    def attn_implementation(self) -> str:
        """The model's attention implementation."""
        return self.model.config._attn_implementation

    def _row_capacity(self, lengths: list[GroupLengths], batch_size: int) -> int | None:
        if self.layout.name == "padded":
            return None
        if self.args.max_tokens_per_row is not None:
            return self.args.max_tokens_per_row
        on_cpu = self.args.device.type == "cpu"
        parts = by_parts(self.attn_implementation, self.args.device, compiled=self.args.torch_compile)
        return row_capacity(lengths, groups_per_row=batch_size, dense=on_cpu and not parts)

    def _loader(self, dataset: Dataset, *, training: bool) -> DataLoader:
        args, lengths = self.args, self.lengths(dataset)
        batch_size = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
        plan = BatchPlan(
            lengths,
            groups_per_micro_batch=batch_size,
            micro_batches=args.gradient_accumulation_steps if training else 1,
            world_size=args.world_size,
            rank=args.process_index,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            max_tokens_per_row=self._row_capacity(lengths, batch_size),
            epochs=math.ceil(args.num_train_epochs) if training else 1,
            few_row_lengths=args.device.type != "cpu",  # nothing is compiled there
            shuffle=training and args.train_sampling_strategy == "random",
            drop_last=training and args.dataloader_drop_last,
        )
        if training:
            self._row_lengths = plan.row_lengths
        return PlannedLoader(
            PlannedBatches(dataset, self.collate, self.layout),
            batch_sampler=plan,
            collate_fn=only,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers and args.dataloader_num_workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context if args.dataloader_num_workers else None,
        )

    def get_train_dataloader(self) -> DataLoader:
        """The planned micro-batches of this rank; not sharded by accelerate, since the plan already is."""
        if self.train_dataset is None:
            raise ValueError("Training needs a `train_dataset`.")
        return self._loader(self.train_dataset, training=True)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """The evaluation batches of this rank, in the data set's order."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise ValueError("Evaluation needs an `eval_dataset`.")
        return self._loader(dataset, training=False)

    # ---- training
    # --------------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train; see `transformers.Trainer.train`. Resuming takes up the method's own state as well."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(Path(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no checkpoint in {self.args.output_dir} to resume from.")
        if resume_from_checkpoint and (state := Path(resume_from_checkpoint) / STATE_FILE).exists():
            self.load_method_state(files.read_json(state))
        self.restart_clock()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # resumed at its last step: Trainer would train one more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """See `Trainer.create_scheduler`; the schedule may be laid out for more epochs than are trained."""
        if self.args.schedule_epochs is not None:
            num_training_steps = math.ceil(num_training_steps * self.args.schedule_epochs / self.args.num_train_epochs)
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one micro-batch, see `step_loss`; on the last one of a step the step's metrics are reduced over ranks."""
        sums = self._sums["train"]
        loss, predictions = self.step_loss(model, inputs, sums)
        self._count_tokens(inputs, sums)
        if self.accelerator.sync_gradients:
            values = sums.reduce()
            bad = values.pop("not_finite")
            self._any_bad = bad if self._any_bad is None else torch.maximum(self._any_bad, bad)
            self.derive_metrics(values)
            self._log_buffer.append(values)
        return (loss, predictions) if return_outputs else loss

    def reduce(self, total: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        """A sum over this micro-batch's examples as its share of the mean over the whole optimizer step (gradients are averaged over ranks)."""
        return total * (self.args.world_size / batch["step_groups"])

    def watch_finite(self, losses: torch.Tensor, batch: dict[str, Any], sums: MetricSums) -> None:
        """Have the run stop, naming the rows, where one of the losses (B,) is not finite."""
        bad = self._watch.see(batch["row_ids"], losses, batch["real"])
        sums.add_max("not_finite", bad, torch.ones_like(bad, dtype=torch.bool))

    def check_finite(self) -> None:
        """Stop all ranks where a loss since the last check was not finite; waits for the device."""
        if self._any_bad is not None:
            self._watch.check(bool(self._any_bad.item() > 0), step=self.state.global_step)
            self._any_bad = None

    @staticmethod
    def _count_tokens(batch: dict[str, Any], sums: MetricSums) -> None:
        real = batch["token_weights"] * batch["real"].any()
        sums.add_total("num_tokens", real)  # a prompt counts once per completion, as in TRL
        sums.add_total("perf/tokens", real > 0)  # every token that was computed counts once

    def restart_clock(self) -> None:
        """Measure tokens/s from now on."""
        self._clock = time.perf_counter()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the steps since the last log to what the Trainer logs."""
        if "loss" in logs:
            metrics = self._log_buffer.drain(minima=self.metric_minima, maxima=self.metric_maxima, totals=_TOTALS)
            self._tokens_seen += metrics.get("num_tokens", 0.0)
            tokens = metrics.pop("perf/tokens", 0.0)
            logs |= metrics | {
                "num_tokens": self._tokens_seen,
                "perf/tokens_per_second": tokens / (time.perf_counter() - self._clock),
                **compiled_so_far(),
            }
            self.restart_clock()
        super().log(logs, start_time)

    # ---- evaluation
    # ------------------------------------------------------------------------------------------------------------

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Evaluate with our own sums and counts: the mean over examples, whatever the batches."""
        sums = self._sums["eval"] = MetricSums()
        self._predictions: list[torch.Tensor] = []
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only=True, metric_key_prefix=metric_key_prefix
        )
        self._watch = FiniteWatch()
        values = sums.reduce()
        values.pop("not_finite")
        self.derive_metrics(values)
        metrics = {name: value.item() for name, value in values.items() if torch.isfinite(value)}
        if self.compute_metrics is not None:
            gathered = gather_object([predicted.cpu() for predicted in self._predictions])
            metrics |= self.compute_metrics(EvalPrediction(predictions=torch.cat(gathered).numpy(), label_ids=None))
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, output.metrics | named, len(dataloader.dataset))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Add one evaluation batch to the sums."""
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            _, predicted = self.step_loss(model, batch, self._sums["eval"])
        if self.compute_metrics is not None:
            self._predictions.append(predicted[batch["real"]])
        return None, None, None

    def predict(self, *args, **kwargs):
        """Not supported: these models answer no labels."""
        raise ValueError(
            "`predict` is not supported. `evaluate(dataset)` gives the metrics, and `compute_metrics` gets each row's "
            "rewards."
        )

    # ---- saving
    # ----------------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and make sure that every tensor arrived whole (ZeRO-3 can write empty ones)."""
        super().save_model(output_dir, _internal_call)
        if self.is_world_process_zero():
            check_saved_shapes(Path(output_dir or self.args.output_dir))

    def _save_checkpoint(self, model, trial) -> None:
        self.create_model_card(model_name=Path(self.args.hub_model_id or self.args.output_dir).name)
        if self.is_world_process_zero():  # before the trainer's state, which says that the checkpoint is whole
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # of a run that was resumed before it
            files.write_json(folder / STATE_FILE, self.method_state())
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """The last that every rank writes before the main process writes the trainer's state."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        """Write a README.md with method, paper and settings into the output folder (main process only)."""
        if self.is_world_process_zero():
            write_model_card(self, model_name=model_name, dataset_name=dataset_name, tags=tags)


def describe_wrapping(model) -> str:
    """The type that a model is wrapped into, with DeepSpeed's ZeRO stage."""
    name = type(model).__name__
    return f"{name} (ZeRO-{model.zero_optimization_stage()})" if name == "DeepSpeedEngine" else name
