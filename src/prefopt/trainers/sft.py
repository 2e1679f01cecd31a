"""Supervised fine-tuning with TRL's trainer, with strict recipes and runs that resume."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import set_seed
from trl import ModelConfig, SFTTrainer, get_peft_config, get_quantization_config
from trl import SFTConfig as TRLSFTConfig

from prefopt.arguments import SecretsStayOut, check_settings, missing, setting
from prefopt.data.sources import DataSource, load_source
from prefopt.trainers.checkpoints import checkpoint_to_resume
from prefopt.trainers.config import choose_precision, model_options

__all__ = ["ModelConfig", "SFTArguments", "SFTConfig", "run"]


@dataclass
class SFTArguments:
    """Data of `prefopt sft`."""

    dataset_name: str = setting("", "Rows with `prompt` and `completion`: hub name, file or folder.", required=True)
    dataset_train_split: str = setting("train", "Split to train on.")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass
class SFTConfig(SecretsStayOut, TRLSFTConfig):
    """TRL's `SFTConfig`, with a precision that follows the device where neither bf16 nor fp16 is set."""

    def __post_init__(self) -> None:
        choose_precision(self)
        super().__post_init__()


def run(args: SFTArguments, config: SFTConfig, model_args: ModelConfig) -> Path:
    """Train on the completions, and save model and tokenizer to `output_dir`.

    Returns:
        `output_dir`.

    Raises:
        ValueError: rows without `prompt` and `completion`, or no model.
    """
    if model_args.model_name_or_path is None:
        raise ValueError(missing("model_name_or_path"))
    rows = load_source(DataSource(args.dataset_name, split=args.dataset_train_split))
    for name in ("prompt", "completion"):
        if name not in rows.column_names:
            raise ValueError(f"{args.dataset_name} has no column {name!r}; it has {sorted(rows.column_names)}.")
    set_seed(config.seed)
    options = model_options(model_args) | (config.model_init_kwargs or {})  # type: ignore[operator]
    config.model_init_kwargs = options
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=config,
        train_dataset=rows,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=_start(config))
    trainer.save_model()
    return Path(str(config.output_dir))


def _start(config: SFTConfig) -> str | None:
    """Find the checkpoint to continue from: the one that is named, the last one where that is true, or none."""
    resume = str(config.resume_from_checkpoint or False)
    if resume.lower() == "true":
        return checkpoint_to_resume(Path(str(config.output_dir)))
    return None if resume.lower() == "false" else resume
