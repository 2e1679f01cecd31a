"""Which models and tokenizer a recipe names: found without loading weights, then as the trainers take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config, get_quantization_config

from prefopt.launch import tell
from prefopt.recipes.arguments import RunArguments
from prefopt.trainers.pair_losses import REFERENCE_FREE_LOSSES
from prefopt.trainers.policy import load_model, with_pad_token


def check_model(name: str, model_args: ModelConfig, args: Any) -> None:
    """Make sure that there is a model under `name`, without loading its weights.

    Raises:
        ValueError: there is none.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").exists() and not is_adapter(name):
        raise ValueError(f"model_name_or_path: the folder {name} holds no model (no config.json).")
    read_config(name, model_args, args)


def check_reference(run_args: RunArguments, args: Any, rows: str) -> None:
    """Make sure that the reference model that a recipe names exists and is used, without loading its weights.

    Raises:
        ValueError: there is none under this name, or the method has no reference.
    """
    name = run_args.ref_model_name_or_path
    if name is None:
        if run_args.ref_model_revision is not None:
            raise ValueError("ref_model_revision belongs to ref_model_name_or_path, which is not given.")
        return
    if rows != "pairs":
        raise ValueError("ref_model_name_or_path: this method has no reference model; remove it.")
    if set(args.loss_type) <= set(REFERENCE_FREE_LOSSES):
        raise ValueError(f"ref_model_name_or_path: {', '.join(args.loss_type)} has no reference; remove it.")
    with readable_errors("ref_model_name_or_path", name):
        AutoConfig.from_pretrained(
            name, revision=run_args.ref_model_revision or "main", trust_remote_code=args.trust_remote_code
        )


def read_config(name: str, model_args: ModelConfig, args: Any) -> Any:
    """The config of the model, or of the one that a local adapter belongs to.

    Raises:
        ValueError: there is no such model.
    """
    revision = model_args.model_revision
    with readable_errors("model_name_or_path", name):
        if is_adapter(name):
            name, revision = str(adapter_of(name).base_model_name_or_path), "main"
    with readable_errors("model_name_or_path", name):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)


def adapter_of(name: str) -> PeftConfig:
    """The config of an adapter in a local folder."""
    return PeftConfig.from_pretrained(str(Path(name).expanduser()))


def is_adapter(name: str) -> bool:
    """Whether a local folder holds an adapter and no whole model."""
    path = Path(name).expanduser()
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()


def load_tokenizer(name: str, model_args: ModelConfig, args: Any, run_args: RunArguments) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token, and the recipe's chat template if it gives one."""
    with readable_errors("the tokenizer of model_name_or_path", name):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
        )
    if run_args.chat_template is not None:
        tokenizer.chat_template = run_args.chat_template
    return with_pad_token(tokenizer)


def single_model(name: str, args: Any, model_args: ModelConfig, run_args: RunArguments) -> dict[str, Any]:
    """The model of a method without a reference, as its trainer takes it."""
    return {
        "model": name,
        "quantization_config": get_quantization_config(model_args),
        "peft_config": adapter_config(model_args),
    }


def adapter_config(model_args: ModelConfig) -> PeftConfig | None:
    """The adapter that the recipe describes, if any."""
    config = get_peft_config(model_args)
    targets = model_args.lora_target_modules
    if config is not None and isinstance(targets, str) and targets.isidentifier():
        config.target_modules = {targets}  # TRL makes a list of one name a pattern, which no full name would match
    return config


def pair_models(name: str, args: Any, model_args: ModelConfig, run_args: RunArguments) -> dict[str, Any]:
    """Policy and reference of a pair method, as its trainer takes them."""
    models = {**single_model(name, args, model_args, RunArguments()), "ref_model": load_reference(run_args, args)}
    if is_adapter(name):
        options = {**args.model_init_kwargs, "dtype": torch_dtype(model_args)}
        models["model"] = AutoPeftModelForCausalLM.from_pretrained(
            name, is_trainable=True, quantization_config=models["quantization_config"], **options
        )
        args.model_init_kwargs = models["quantization_config"] = models["peft_config"] = None
        tell(f"{name} is an adapter: it is trained on, and its present weights are the reference.")
    return models


def torch_dtype(model_args: ModelConfig) -> Any:
    """The recipe's dtype as `from_pretrained` takes it."""
    return getattr(torch, model_args.dtype) if model_args.dtype not in (None, "auto") else model_args.dtype


def model_options(model_args: ModelConfig) -> dict[str, Any]:
    """How the weights are loaded."""
    options: dict[str, Any] = {"revision": model_args.model_revision, "dtype": model_args.dtype}
    if model_args.attn_implementation is not None:
        options["attn_implementation"] = model_args.attn_implementation
    return options


def load_reference(run_args: RunArguments, args: Any) -> Any:
    """The reference model that the recipe names, or `None`: the policy before training."""
    name = run_args.ref_model_name_or_path
    if name is None:
        return None
    kept = args.model_init_kwargs
    args.model_init_kwargs = {**kept, "revision": run_args.ref_model_revision or "main"}
    try:
        return load_model(name, args)
    finally:
        args.model_init_kwargs = kept


class readable_errors:
    """Turn what transformers raises about a missing or unreadable model into one sentence."""

    def __init__(self, key: str, name: str) -> None:
        self.key, self.name = key, name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, ValueError, KeyError)):
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            where = "cannot be read" if Path(self.name).exists() else "is no folder here, and the hub does not give it"
            raise ValueError(f"{self.key} {self.name!r} {where}: {reason}") from error
