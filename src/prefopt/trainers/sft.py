"""Supervised fine-tuning with TRL's trainer, under the rules of the other commands: a strict recipe, and a run that continues where it stopped."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed
from trl import ModelConfig, SFTTrainer, get_peft_config, get_quantization_config
from trl import SFTConfig as TRLSFTConfig

from prefopt.arguments import SecretsStayOut
from prefopt.data.sources import DataSource, load_source
from prefopt.trainers.checkpoints import last_checkpoint
from prefopt.trainers.config import BatchConfig

__all__ = ["ModelConfig", "SFTArguments", "SFTConfig", "run"]


@dataclass
class SFTArguments:
    """What `prefopt sft` trains on."""

    dataset_name: str = field(
        default="", metadata={"help": "Rows with `prompt` and `completion`: hub name, file or folder."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})

    def __post_init__(self) -> None:
        if not self.dataset_name:
            raise ValueError("dataset_name is missing: set it in the recipe or with --dataset_name.")


@dataclass
class SFTConfig(SecretsStayOut, TRLSFTConfig):
    """Settings of supervised fine-tuning: TRL's `SFTConfig`; its precision follows the device where neither bf16 nor fp16 is set."""

    def __post_init__(self) -> None:
        BatchConfig.choose_precision(self)  # type: ignore[arg-type]
        super().__post_init__()


def run(args: SFTArguments, config: SFTConfig, model_args: ModelConfig) -> Path:
    """Train on the completions, and save model and tokenizer to `output_dir`.

    Returns:
        `output_dir`.

    Raises:
        ValueError: rows without `prompt` and `completion`, or no model.
    """
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing: set it in the recipe or with --model_name_or_path.")
    rows = load_source(DataSource(args.dataset_name, split=args.dataset_train_split))
    missing = [name for name in ("prompt", "completion") if name not in rows.column_names]
    if missing:
        raise ValueError(f"{args.dataset_name} has no column {missing[0]!r}; it has {sorted(rows.column_names)}.")
    set_seed(config.seed)
    config.model_init_kwargs = {
        **_model_options(model_args),
        **(config.model_init_kwargs or {}),  # type: ignore[dict-item]
    }
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=config,
        train_dataset=rows,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=_start(config))
    trainer.save_model()
    return Path(config.output_dir)


def _model_options(model_args: ModelConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"revision": model_args.model_revision, "dtype": model_args.dtype}
    if model_args.attn_implementation is not None:
        options["attn_implementation"] = model_args.attn_implementation
    return options


def _start(config: SFTConfig) -> str | None:
    """The checkpoint to continue from: the one that is named, the last one where that is true, or none."""
    resume = config.resume_from_checkpoint
    if resume is None or str(resume).lower() == "false":
        return None
    if str(resume).lower() != "true":
        return str(resume)
    return last_checkpoint(Path(config.output_dir))
