"""The README.md that goes with a trained model."""

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
    trainer: Any, *, model_name: str | None, dataset_name: str | None, tags: str | list[str] | None
) -> None:
    """Write `README.md` into the trainer's output folder.

    Args:
        trainer: a `BaseTrainer`; its `_name`, `_paper` and `_tag_names` say what the method is.
        model_name: title of the card; default: the output folder's name.
        dataset_name: hub name of the training data, if it has one.
        tags: more tags.
    """
    folder = Path(trainer.args.output_dir)
    base_model = get_config_model_id(trainer.model.config)
    on_hub = bool(base_model) and not Path(base_model).exists()
    data = ModelCardData(
        base_model=base_model if on_hub else None,
        datasets=dataset_name,
        library_name="transformers",
        model_name=model_name or folder.name,
        tags=sorted({*trainer._tag_names, *([tags] if isinstance(tags, str) else tags or [])}),
    )
    folder.mkdir(parents=True, exist_ok=True)
    text = f"---\n{data.to_yaml()}\n---\n\n{_body(trainer, model_name or folder.name, base_model or 'a model given in memory')}"
    ModelCard(text).save(folder / "README.md")


def _body(trainer: Any, model_name: str, base_model: str) -> str:
    paper, args = trainer._paper, trainer.args
    settings = [(name, getattr(args, name)) for name in _SETTINGS if name in args.__dataclass_fields__]
    settings.append(("world size", args.world_size))
    source = f", [{paper['title']}](https://huggingface.co/papers/{paper['id']})" if paper else ""
    lines = [
        f"# {escape(model_name)}",
        "",
        f"Trained from {escape(base_model)} with **{trainer._name}**{source}, by "
        "[prefopt](https://pypi.org/project/prefopt/).",
        "",
        "## Settings",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {escape(value)} |" for name, value in settings),
        "",
        "## Versions",
        "",
        *(f"- {name} {importlib.metadata.version(name)}" for name in _PACKAGES),
    ]
    if paper.get("citation"):
        lines += ["", "## Citation", "", "```bibtex", paper["citation"].strip(), "```"]
    return "\n".join(lines) + "\n"
