"""The README.md that is released with a trained model."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel

from prefopt._trl import get_config_model_id
from prefopt.data.tokenization import TokenizationReport
from prefopt.hardware import describe_hardware
from prefopt.pages import escape, fenced, table
from prefopt.recipes.recipe import plain

_PACKAGES = ("prefopt", "torch", "transformers", "trl", "accelerate", "datasets", "peft")
_SETTINGS = (
    "beta",
    "loss_type",
    "label_smoothing",
    "use_weighting",
    "max_weight",
    "weight_alignment",
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "max_prompt_length",
    "seed",
)
# figures of training that a card shows, and endings of those that say nothing about the model
_FIGURES = ("loss", "rewards/accuracies", "rewards/margins", "accuracy", "margin")
_TIMES = ("_runtime", "_per_second", "_preparation_time")


def write_model_card(
    trainer: Any,
    folder: Path,
    *,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
) -> None:
    """Write `README.md` into `folder`.

    Args:
        trainer: a `BaseTrainer`; its `_name`, `_paper` and `_tag_names` say what the method is.
        folder: made where it is absent.
        model_name: title of the card; default: the name of the hub's repository or of the output folder.
        dataset_name: hub name of the training data, if it has one.
        tags: more tags.
    """
    base_model = get_config_model_id(trainer.model.config)
    title = model_name or Path(trainer.args.hub_model_id or trainer.args.output_dir).name
    data = ModelCardData(
        base_model=base_model if base_model and not Path(base_model).exists() else None,  # a hub name
        datasets=dataset_name,
        library_name="transformers",
        model_name=title,
        tags=sorted({*trainer._tag_names, *([tags] if isinstance(tags, str) else tags or [])}),
    )
    folder.mkdir(parents=True, exist_ok=True)
    body = _body(trainer, title, base_model or "a model given in memory")
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(folder / "README.md")


def _body(trainer: Any, title: str, base_model: str) -> str:
    paper, args = trainer._paper, trainer.args
    settings = {name: getattr(args, name) for name in _SETTINGS if name in args.__dataclass_fields__}
    settings = {name: value for name, value in settings.items() if value is not None}
    settings["processes"] = args.world_size
    source = f", [{paper['title']}](https://arxiv.org/abs/{paper['id']})" if paper else ""
    parts = [
        f"# {escape(title)}",
        f"Trained from {escape(base_model)} with **{trainer._name}**{source}, by prefopt.",
        *_usage(trainer),
        *_results(trainer.state.log_history),
        *_data(trainer.tokenization_reports),
        "## Settings",
        _lines(("setting", "value"), [(name, _words(value)) for name, value in settings.items()]),
        "## Hardware and versions",
        _hardware(args),
        "\n".join(f"- {name} {importlib.metadata.version(name)}" for name in _PACKAGES),
    ]
    if paper.get("citation"):
        parts += ["## Citation", f"```bibtex\n{paper['citation'].strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _usage(trainer: Any) -> list[str]:
    """Write how the model is loaded, from its repository or its folder."""
    args = trainer.args
    name = args.hub_model_id or Path(args.output_dir).name
    model = trainer.model
    kind = type(model.get_base_model() if isinstance(model, PeftModel) else model)
    if kind.__module__.startswith("prefopt."):
        if isinstance(model, PeftModel):
            return []  # its class needs the base model first: `docs/reward_models.md`
        lines = [
            f"from {kind.__module__} import {kind.__name__}",
            "",
            f"model = {kind.__name__}.from_pretrained({json.dumps(name)})",
        ]
    else:
        # `pipeline` loads an adapter with its base model as well
        chat = trainer.processing_class.chat_template is not None
        prompt = '[{"role": "user", "content": "What colour is a rose?"}]' if chat else '"What colour is a rose?"'
        lines = [
            "from transformers import pipeline",
            "",
            f'generator = pipeline("text-generation", model={json.dumps(name)})',
            f'print(generator({prompt}, max_new_tokens=128, return_full_text=False)[0]["generated_text"])',
        ]
    return ["## Use", "```python\n" + fenced("\n".join(lines)) + "\n```"]


def _results(history: list[dict[str, Any]]) -> list[str]:
    """Write the last figures of training and of each evaluation."""
    last: dict[str, float] = {}
    for entry in history:
        last |= {name: value for name, value in entry.items() if isinstance(value, (int, float))}
    rows = [(name, f"{value:.4g}") for name, value in last.items() if name.startswith("eval_") or name in _FIGURES]
    rows = [(escape(name), value) for name, value in rows if not name.endswith(_TIMES)]
    if not rows:
        return []
    step = max((entry.get("step", 0) for entry in history), default=0)
    return [f"## Results, after {step:.0f} steps", _lines(("figure", "value"), rows)]


def _data(reports: Mapping[str, TokenizationReport]) -> list[str]:
    rows = [(escape(name), r.rows_in, r.rows_kept, r.rows_dropped, r.rows_cut) for name, r in reports.items()]
    return ["## Data", _lines(("set", "rows read", "used", "dropped", "cut"), rows)] if rows else []


def _hardware(args: Any) -> str:
    facts = describe_hardware(processes=args.world_size, device=args.device)
    memory = f", {facts['memory_gib']} GiB each" if "memory_gib" in facts else f", {facts['cpu_cores']} cores"
    return f"{args.world_size} x {escape(facts['device'])}{memory}; {facts['platform']}."


def _lines(head: tuple[str, ...], rows: list[Any]) -> str:
    return "\n".join(table(head, rows))


def _words(value: Any) -> str:
    """Write a setting as a recipe has it: an enumeration's value, several values side by side."""
    value = plain(value)
    return escape(", ".join(map(str, value)) if isinstance(value, list) else value)
