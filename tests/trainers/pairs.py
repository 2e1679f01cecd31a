"""A small preference data set, a trainer around a tiny model, and what they must agree with."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import trl
from datasets import Dataset
from transformers import TrainerCallback

import prefopt
from prefopt.scoring.layouts import Group
from tests.scoring.helpers import plain_logps
from tests.tiny import tiny_model, tiny_tokenizer

WORDS = "blue fox two five sky answer please long short question help woods animal colour morning".split()


def preference_rows(count: int = 24, *, seed: int = 0) -> Dataset:
    """Conversational pairs of random words, 1 to 15 of them."""
    rng = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))

    def pair() -> dict:
        sides = {side: [{"role": "assistant", "content": words(15)}] for side in ("chosen", "rejected")}
        return {"prompt": [{"role": "user", "content": words(12)}], **sides}

    rows = []
    while len(rows) < count:
        row = pair()
        if row["chosen"] != row["rejected"]:
            rows.append(row)
    return Dataset.from_list(rows)


COMMON = dict(  # noqa: C408
    per_device_train_batch_size=4,
    learning_rate=1e-3,
    num_train_epochs=1,
    logging_steps=1,
    report_to="none",
    gradient_checkpointing=False,
    bf16=False,
    use_cpu=True,
    disable_tqdm=True,
    save_strategy="no",
)


def make_trainer(
    tmp_path: Path, trainer="WPO", *, model=None, rows=None, callbacks=None, trainer_options=None, **settings
):
    """A trainer of ours, by its short name, on a tiny model."""
    cls, config = getattr(prefopt, f"{trainer}Trainer"), getattr(prefopt, f"{trainer}Config")
    args = config(str(tmp_path / "out"), **{**COMMON, "beta": 0.1, **settings})
    return cls(
        model if model is not None else tiny_model(),
        args=args,
        train_dataset=rows if rows is not None else preference_rows(),
        processing_class=tiny_tokenizer("llama3"),
        callbacks=callbacks,
        **(trainer_options or {}),
    )


def logged_names(entry: dict) -> set[str]:
    """The metrics of a log entry, without those of what an earlier test in the same process compiled."""
    return {name for name in entry if not name.startswith("perf/compile")}


class Seen(TrainerCallback):
    """Keeps a trainer's batches, in the order in which they were trained on."""

    def __init__(self) -> None:
        self.batches: list[dict] = []

    def watch(self, trainer) -> None:
        step_loss = trainer.step_loss

        def seen(model, batch, sums):
            if trainer.model.training:
                self.batches.append(batch)
            return step_loss(model, batch, sums)

        trainer.step_loss = seen


def history(trainer, key: str = "loss") -> list[float]:
    """A logged figure, step by step."""
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry and key in entry]


def weights_of(model) -> torch.Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def plain_pair_logps(model, dataset, row_ids: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) summed log-probs of chosen and rejected, from the model's own logits, one sequence at a time."""
    rows = {row["row_id"]: row for row in dataset}
    groups = [Group(rows[r]["prompt_ids"], [rows[r]["chosen_ids"], rows[r]["rejected_ids"]]) for r in row_ids]
    logps = plain_logps(model, groups)
    return logps[0::2], logps[1::2]


def trl_trainer(tmp_path: Path, like, *, model, **settings):
    """TRL's DPOTrainer on the pairs of a trainer of ours, in the order in which ours trains on them."""
    batches = like.get_train_dataloader().batch_sampler
    order = [index for step in range(batches.num_steps) for m in batches.step(0, step)[0] for index in m.indices]

    class Ordered(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _get_train_sampler(self, *args, **kwargs):
            return order

    import copy

    args = trl.DPOConfig(str(tmp_path / "trl"), **{**COMMON, "beta": 0.1, **settings})
    return Ordered(
        model,
        ref_model=copy.deepcopy(model),
        args=args,
        train_dataset=like.train_dataset,
        processing_class=tiny_tokenizer("llama3"),
    )
