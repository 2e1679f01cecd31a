"""Completions of the policy beside the reference's, on held-out prompts, while it trains."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from prefopt._transformers import tensorboard_writer
from prefopt.pages import Sample, markdown_page, printable
from prefopt.progress import print_above_bars
from prefopt.trainers.base import BaseTrainer
from prefopt.trainers.preference import PreferenceTrainer
from prefopt.trainers.reference import adapter_of_reference

SAMPLES_FILE = "samples.jsonl"
PRINTED_CHARACTERS = 300


class SampleCompletionsCallback(TrainerCallback):
    """Completes held-out prompts under policy and reference: before training, at every evaluation, and after it.

    Completions are greedy, so that two steps differ by the weights alone, and no random number of the run is used.
    They are printed, written to `samples.jsonl` in the output folder (`prefopt report` shows them), and sent to
    TensorBoard, Weights & Biases, trackio and MLflow where the run logs to these. All ranks generate together.

    Args:
        trainer: a trainer of a policy; add the callback to it with `trainer.add_callback`.
        num_prompts: how many prompts of the evaluation data, the first distinct ones.
        max_new_tokens: of a completion.

    Raises:
        ValueError: there is no evaluation data, or the model generates nothing.
    """

    def __init__(self, trainer: BaseTrainer, num_prompts: int = 4, *, max_new_tokens: int = 128) -> None:
        if num_prompts < 1 or max_new_tokens < 1:
            raise ValueError(
                f"`num_prompts` ({num_prompts}) and `max_new_tokens` ({max_new_tokens}) must be at least 1."
            )
        self.trainer, self.max_new_tokens = trainer, max_new_tokens
        if not trainer.accelerator.unwrap_model(trainer.model).can_generate():
            raise ValueError("Completions are sampled from a policy; a reward or preference model writes none.")
        plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 1:
            raise ValueError("Completions cannot be sampled under FSDP 1: use FSDP 2, or leave them out.")
        self.prompts = _distinct_prompts(trainer, num_prompts)
        self._reference: list[str] | None = None
        self._last_step = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sample before the first step; a run that is continued has done so."""
        if state.global_step == 0:
            self.sample(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sample beside every evaluation."""
        self.sample(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sample after the last step; at `on_train_end` trackers have closed their runs already."""
        if control.should_training_stop:
            self.sample(state.global_step)

    def sample(self, step: int) -> list[dict[str, Any]]:
        """Complete the prompts and log them, unless that has been done in this step; all ranks call it.

        Returns:
            For each prompt `step`, `row_id`, `prompt`, `policy` and `reference` (None where there is none at hand).
        """
        if step == self._last_step:
            return []
        self._last_step = step
        decode = self.trainer.processing_class.decode
        policy = self._complete()
        if self._reference is None:
            self._reference = policy if step == 0 and self._reference_is_policy() else self._complete_reference()
        reference: Sequence[str | None] = self._reference or [None] * len(policy)
        samples = [
            {"step": step, "row_id": row, "prompt": decode(ids), "policy": text, "reference": other}
            for (row, ids), text, other in zip(self.prompts, policy, reference)
        ]
        if self.trainer.is_world_process_zero():
            self._log(step, samples)
        return samples

    def _reference_is_policy(self) -> bool:
        """Return whether the reference is the policy before training, whatever it is held as."""
        trainer = self.trainer
        return isinstance(trainer, PreferenceTrainer) and trainer.needs_reference and trainer.reference_is_initial

    def _complete_reference(self) -> list[str] | None:
        reference = self.trainer.reference if isinstance(self.trainer, PreferenceTrainer) else None
        if reference is None:
            return None
        if reference.module is None:
            with adapter_of_reference(reference.policy):
                return self._complete()
        return self._complete(reference.module)

    def _complete(self, model: Any = None) -> list[str]:
        """Complete the prompts one by one, which needs no padding; a policy is in training mode again afterwards."""
        trainer = self.trainer
        tokenizer = trainer.processing_class
        wrapped = trainer.model_wrapped if model is None else model
        trainer.restore_attention()
        completions = []
        with _generating(trainer, wrapped) as unwrapped:
            for _, ids in self.prompts:
                prompt = torch.tensor([ids], device=trainer.args.device)
                whole = unwrapped.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    pad_token_id=tokenizer.pad_token_id,
                )
                completions.append(tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True))
        return completions

    def _log(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Print the samples, add them to the output folder's file, and send them to the run's trackers."""
        args = self.trainer.args
        for sample in samples:
            lines = [f"step {step}, prompt: {_short(sample['prompt'])}", f"  policy:    {_short(sample['policy'])}"]
            if sample["reference"] is not None:
                lines.append(f"  reference: {_short(sample['reference'])}")
            print_above_bars("\n".join(lines))
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / SAMPLES_FILE, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        columns = ["step", "prompt", "policy", "reference"]
        rows = [[sample[name] for name in columns] for sample in samples]
        if "wandb" in args.report_to:
            import wandb

            wandb.log({"samples": wandb.Table(columns=columns, data=rows)})
        if "trackio" in args.report_to:
            import pandas
            import trackio

            trackio.log({"samples": trackio.Table(dataframe=pandas.DataFrame(rows, columns=columns))})
        if "mlflow" in args.report_to:
            import mlflow

            mlflow.log_text(_as_markdown(step, samples), f"samples/step-{step}.md")
        if (writer := tensorboard_writer(self.trainer)) is not None:
            writer.add_text("samples", _as_markdown(step, samples), step)


@contextmanager
def _generating(trainer: BaseTrainer, wrapped: Any) -> Iterator[Any]:
    """Yield a model for generation: without dropout, checkpointing and gradients, in the run's precision."""
    model = trainer.accelerator.unwrap_model(wrapped)
    training = model.training
    model.eval()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(trainer.compute_loss_context_manager())
            yield model
    finally:
        model.train(training)


def _distinct_prompts(trainer: BaseTrainer, count: int) -> list[tuple[str, list[int]]]:
    dataset: Any = trainer.eval_dataset
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()))
    if dataset is None:
        raise ValueError(
            "Completions are sampled for held-out prompts: give the trainer an `eval_dataset` (in a recipe, "
            "test_split_size: 0.05 holds some rows out)."
        )
    found: dict[tuple[int, ...], str] = {}
    for row in dataset:
        found.setdefault(tuple(row["prompt_ids"]), row["row_id"])
        if len(found) == count:
            break
    return [(row_id, list(ids)) for ids, row_id in found.items()]


def _as_markdown(step: int, samples: list[dict[str, Any]]) -> str:
    names = ("policy", "reference")
    blocks = [
        Sample(sample["prompt"], [(name, "", sample[name]) for name in names if sample[name] is not None])
        for sample in samples
    ]
    return markdown_page(f"Samples of step {step}", blocks)


def _short(text: str) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= PRINTED_CHARACTERS else f"{line[:PRINTED_CHARACTERS]} …"
