"""The README.md that is released with a trained model."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from prefopt._trl import get_config_model_id
from prefopt.pages import escape

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
    settings["world size"] = args.world_size
    table = "\n".join(f"| {name} | {escape(value)} |" for name, value in settings.items())
    versions = "\n".join(f"- {name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    source = f", [{paper['title']}](https://huggingface.co/papers/{paper['id']})" if paper else ""
    text = f"""# {escape(title)}

Trained from {escape(base_model)} with **{trainer._name}**{source}, by prefopt.

## Settings

| setting | value |
|---|---|
{table}

## Versions

{versions}
"""
    if paper.get("citation"):
        text += f"\n## Citation\n\n```bibtex\n{paper['citation'].strip()}\n```\n"
    return text
