"""What `prefopt COMMAND --help` and `prefopt recipes` print: keys in groups, and recipes by name."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from prefopt.arguments import default_of
from prefopt.recipes.recipe import plain
from prefopt.recipes.source import PACKAGE, packaged_names

WIDTH = 110
# of transformers' and TRL's settings, those that recipes usually set; the others are printed by `--help all`
USUAL = frozenset(
    {
        "output_dir", "resume_from_checkpoint", "seed", "use_cpu", "bf16", "fp16", "max_length", "truncation_mode",
        "loss_type", "loss_weights", "beta", "label_smoothing", "precompute_ref_log_probs", "dataset_num_proc",
        "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm",
        "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
        "gradient_accumulation_steps", "gradient_checkpointing_kwargs", "logging_steps", "report_to", "run_name",
        "do_eval", "eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit", "save_only_model",
        "push_to_hub", "hub_model_id", "model_init_kwargs", "trust_remote_code",
        "model_name_or_path", "model_revision", "dtype", "attn_implementation", "use_peft", "lora_r", "lora_alpha",
        "lora_dropout", "lora_target_modules", "lora_modules_to_save", "load_in_4bit",
    }
)  # fmt: skip
# settings that the trainers of methods raise for, and those that mean nothing without them
WITHOUT_EFFECT = frozenset(
    {
        "label_smoothing_factor", "batch_eval_metrics", "include_for_metrics", "eval_do_concat_batches",
        "dataloader_in_order", "auto_find_batch_size", "sync_ref_model", "ref_model_mixup_alpha",
        "ref_model_sync_steps", "f_divergence_type", "f_alpha_divergence_coef", "activation_offloading", "pad_token",
        "eos_token", "chat_template_path", "precompute_ref_batch_size", "neftune_noise_alpha",
        "center_rewards_coefficient",
    }
)  # fmt: skip


def keys_help(classes: Sequence[type], *, of_method: bool, everything: bool) -> str:
    """Write the keys of a command, in groups: what its own class declares first, libraries' settings last.

    Args:
        classes: the command's dataclasses.
        of_method: whether a method's trainer reads them, which rejects some of transformers' and TRL's settings.
        everything: print the unusual settings of libraries, too.
    """
    groups: dict[tuple[float, str], list[str]] = {}
    shown: set[str] = set()
    left_out = 0
    for cls in classes:
        for field in sorted(dataclasses.fields(cls), key=lambda field: field.kw_only is True):  # mixins' come last
            if not field.init or field.name in shown or (of_method and field.name in WITHOUT_EFFECT):
                continue
            shown.add(field.name)
            owner = declaring_class(cls, field.name)
            if not owner.__module__.startswith("prefopt.") and field.name not in USUAL and not everything:
                left_out += 1
                continue
            group = _group(owner, cls, first=cls is classes[0], of_method=of_method)
            groups.setdefault(group, []).append(_entry(field))
    parts = [f"{title}:\n" + "\n".join(groups[order, title]) for order, title in sorted(groups)]
    if left_out:
        parts.append(f"{left_out} further settings of transformers and TRL: `--help all`.")
    return "\n\n".join(parts)


def list_recipes(words: list[str]) -> int:
    """Print the packaged recipes, one a line, with the first sentence that each says about itself."""
    names = [name for name in packaged_names("training_configs") if not name.startswith("fragments/")]
    width = max(map(len, names))
    room = max(shutil.get_terminal_size((150, 24)).columns - width - 2, 40)
    for name in names:
        print(f"{name:<{width}}  {textwrap.shorten(about(name), room, placeholder=' ...')}")
    return 0


def declaring_class(cls: type, name: str) -> type:
    """Return the class that declares a field, or declares it anew with another default."""
    return next(base for base in cls.__mro__ if name in inspect.get_annotations(base))


def _group(owner: type, cls: type, *, first: bool, of_method: bool) -> tuple[float, str]:
    """Return the order and the title of the group that `owner`, a class that `cls` inherits from, declares."""
    if owner is cls and first:
        return 0, f"{cls.__name__}, the command's own keys"
    if not owner.__module__.startswith("prefopt."):
        return (3, f"{cls.__name__}, of TRL") if not first else (4, f"{cls.__name__}, as in TRL and transformers")
    if not first:
        return 2, cls.__name__
    if of_method:
        return 1, f"{cls.__name__}, shared with other methods"
    about = inspect.cleandoc(owner.__doc__ or "").partition("\n")[0].rstrip(".")
    is_generated = not about or about.startswith(f"{owner.__name__}(")  # a dataclass without a docstring
    return 1 + cls.__mro__.index(owner) / 100, f"{cls.__name__}, shared" if is_generated else about


def _entry(field: dataclasses.Field[Any]) -> str:
    default = plain(default_of(field))
    is_given = default not in (None, dataclasses.MISSING, [], {})
    choices = field.metadata.get("choices")
    facts = [f"one of {', '.join(map(str, choices))}"] if choices else []
    facts += [f"default: {default}"] if is_given else []
    text = " ".join(str(field.metadata.get("help", "")).replace("%%", "%").split())
    lines = textwrap.wrap(text, WIDTH, initial_indent=6 * " ", subsequent_indent=6 * " ")
    return "\n".join([f"  --{field.name}" + (f" ({'; '.join(facts)})" if facts else ""), *lines])


def about(name: str) -> str:
    """Return the first sentence that a packaged recipe says about itself."""
    text = (PACKAGE / "training_configs" / f"{name}.yaml").read_text(encoding="utf-8")
    comment = re.match(r"(?:#.*\n)+", text)
    words = " ".join(line.lstrip("# ") for line in comment[0].splitlines()) if comment else ""
    return re.split(r"(?<=[a-z\d)])\.\s", words, maxsplit=1)[0].rstrip(".")
