"""`prefopt check RECIPE`: what a recipe would run, and everything that would stop it, without starting."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psutil
import torch
from trl import ModelConfig

from prefopt import run
from prefopt.arguments import masked, missing
from prefopt.cli import COMMANDS, arguments_of, function_of, method_of
from prefopt.data import TokenizationReport, check_fits_model
from prefopt.files import parse_yaml
from prefopt.hardware import GIB
from prefopt.host_memory import estimate_host
from prefopt.launch import launch_words, split_launch_settings, world_size
from prefopt.memory import (
    ASSUMED_CARD,
    Launch,
    Memory,
    ModelShape,
    Recomputation,
    Run,
    choose_recomputation,
    choose_tokens,
    estimate,
    optimizer_bytes,
    with_master_weights,
)
from prefopt.pages import counted, printable
from prefopt.recipes.arguments import DatasetArguments, RunArguments
from prefopt.recipes.recipe import DEFAULTS, Recipe, build, collect, load_settings
from prefopt.recipes.source import locate
from prefopt.trainers.checkpointing import recomputation_of
from prefopt.trainers.checkpoints import check_space
from prefopt.trainers.data_tables import data_warnings
from prefopt.trainers.fitting import NOTHING_ON_CPU, explain, ways_of
from prefopt.trainers.pair_losses import REFERENCE_FREE_LOSSES
from prefopt.trainers.policy import is_adapter
from prefopt.training import suite_of, tokenise_data

T = TypeVar("T")


@dataclass
class Findings:
    """What was found out about a recipe."""

    method: str = ""
    resolved: str = ""
    launch: Launch = field(default_factory=Launch)
    launch_name: str = ""
    batch: str = ""
    reports: list[TokenizationReport] = field(default_factory=list)
    memory: Memory | None = None
    host: Memory | None = None
    checkpointing: str = ""
    on_cpu: bool = False
    notices: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def attempt(self, function: Callable[..., T], *values: Any) -> T | None:
        """Call a function; add what it raises to the problems, and go on with `None`."""
        try:
            return function(*values)
        except (ValueError, OSError, ImportError) as error:
            text = " ".join(str(error).split())
            if text not in self.problems:
                self.problems.append(text)
            return None


def check(words: list[str]) -> int:
    """Print what `words` (a recipe and settings that override it) would run; return 0 when nothing would stop it."""
    findings = inspect(words)
    print(printable(masked(report(findings))))
    return 2 if findings.problems else 0


def inspect(words: list[str], method: str | None = None) -> Findings:
    """Check everything that a run checks, short of loading weights.

    Args:
        words: a recipe and settings that override it.
        method: the training command; by default the one that the recipe names.

    Raises:
        ValueError: there is no recipe, or it does not say which method it is for.
    """
    found = Findings()
    name, settings = load_settings(words)
    launch_settings, settings = split_launch_settings(settings)
    found.method = method or method_of(settings)
    classes = arguments_of(found.method)
    recipe = collect(name, settings, classes, found.problems)
    found.notices += recipe.notices
    found.resolved = run.resolved_recipe(recipe, classes)
    found.attempt(read_launch, launch_settings, found)
    found.on_cpu = found.launch.use_cpu or bool(recipe.values.get("use_cpu"))
    found.attempt(run.check_adapter_keys, recipe)
    found.attempt(run.check_output, recipe, found.resolved)
    if not found.launch_name:
        found.attempt(run.check_devices, recipe)
    found.problems += run.missing_packages(recipe)
    if found.on_cpu:
        found.attempt(run.check_attention_on_cpu, recipe)
    found.attempt(suite_of, recipe)
    config, data_args, model_args, run_args = build_each(recipe, classes, found)
    if config is not None:
        check_precision(recipe, config, found)
        found.attempt(function_of(found.method).check_settings, config)
    if config is None or model_args is None or model_args.model_name_or_path is None:
        found.notices.append("The model and the data were not checked: fix the problems first.")
    else:
        check_model_and_data(config, data_args, model_args, run_args or RunArguments(), found)
    return found


def read_launch(settings: dict[str, str], found: Findings) -> None:
    """Read the accelerate config that would be used; its name stays empty without a launcher."""
    if not settings:
        return
    launch_words(settings)  # raises for numbers that are none
    processes, machines = (
        int(settings[key]) if key in settings else None for key in ("num_processes", "num_machines")
    )
    name = settings.get("accelerate_config", "multi_gpu" if processes and processes > 1 else "single_gpu")
    found.launch = launch = Launch.read(locate(name, "accelerate_configs"), processes, machines)
    found.launch_name = name
    if launch.batch_keys:
        found.problems.append(f"{name}: remove {', '.join(launch.batch_keys)}; batch sizes belong into the recipe.")
    gpus = torch.cuda.device_count()
    if not launch.use_cpu and gpus * launch.machines < launch.processes:
        found.notices.append(f"{name} starts {launch.processes} processes; this machine has {gpus} GPUs.")


def build_each(recipe: Recipe, classes: Sequence[type], found: Findings) -> list[Any]:
    """Build an instance of each class, or `None` where it rejects its values."""
    values, processes = run.config_values(recipe), found.launch.processes
    values |= found.attempt(run.batch_sizes, values, classes[0], max(world_size(), processes)) or {}
    if not values.get("use_cpu") and not torch.cuda.is_available():
        values["use_cpu"] = True  # configs ask the machine at hand, which need not be the one that trains
        values.setdefault("bf16", not values.get("fp16"))  # what a GPU would choose
        found.notices.append("There is no GPU here: settings were checked as they stand, and not against one.")
    if values.get("model_name_or_path") is None:
        found.problems.append(missing("model_name_or_path"))
    adjusted = Recipe(recipe.name, values)
    instances = [(found.attempt(build, adjusted, [cls]) or (None,))[0] for cls in classes]
    config, data_args = instances[:2]
    if data_args is not None:
        data_args.evaluates = run.may_evaluate(recipe)
    if config is not None:
        per_device, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
        found.batch = (
            f"{per_device} per device x {accumulation} accumulation steps x {processes} processes = "
            f"{per_device * accumulation * processes}"
        )
    return instances


def check_precision(recipe: Recipe, config: Any, found: Findings) -> None:
    """Check that recipe and accelerate config name the same precision and the same kind of device."""
    launch, name = found.launch, found.launch_name
    if not name:
        return
    wanted = "bf16" if config.bf16 else "fp16" if config.fp16 else "no"
    # DeepSpeed computes as its config says; others leave "no" to the recipe
    if launch.mixed_precision not in ((wanted,) if launch.zero_stage else (wanted, "no")):
        found.problems.append(
            f"the recipe computes in {wanted} and {name} says mixed_precision: {launch.mixed_precision}; make them "
            "equal."
        )
    if launch.use_cpu and not recipe.values.get("use_cpu"):
        found.problems.append(f"{name} runs on the CPU: set use_cpu: true and bf16: false in the recipe.")


def check_model_and_data(
    config: Any, data_args: DatasetArguments | None, model_args: ModelConfig, run_args: RunArguments, found: Findings
) -> None:
    """Check model and reference by their configs, the tokenizer, the data, and the memory that these ask for."""
    trainer, rows, name = function_of(found.method), COMMANDS[found.method].rows, str(model_args.model_name_or_path)
    model_config = found.attempt(run.read_config, name, model_args, config)
    found.attempt(run.check_reference, run_args, config, rows)
    tokenizer = found.attempt(run.load_tokenizer, name, model_args, config, run_args) if model_config else None
    if tokenizer is not None:
        found.attempt(run.check_reference_tokenizer, run_args, config, tokenizer)
    if tokenizer is not None and data_args is not None:
        with contextlib.redirect_stdout(sys.stderr):
            datasets, found.reports = found.attempt(tokenise_data, rows, tokenizer, config, data_args) or ({}, [])
            for data in found.reports:
                found.notices += data_warnings(data, config.max_length)
            for split, dataset in datasets.items():
                found.attempt(trainer.check_data, dataset, config, split)
                if not is_adapter(name):
                    found.attempt(check_fits_model, dataset, model_config, split)
    planned = None
    if model_config is not None:
        planned = found.attempt(planned_run, name, model_config, config, model_args, found)
    if model_config is not None and tokenizer is not None and rows == "pairs":  # reward models generate nothing
        found.attempt(run.check_saving, name, model_config, config, model_args, tokenizer)
    if planned is not None:
        if tokenizer is not None:
            found.attempt(check_disk, planned, config, found)
        found.memory = found.attempt(estimate_memory, planned, config, found)
        found.host = estimate_host(planned, saves=config.save_strategy != "no")
    if found.host is not None and found.launch_name:
        here = psutil.virtual_memory().total
        if found.host.total > here:
            found.notices.append(f"A node needs more of its memory than the {here / GIB:.0f} GiB of this machine.")
    if found.memory is not None and torch.cuda.is_available() and not found.launch.use_cpu:
        available = torch.cuda.get_device_properties(0).total_memory
        if found.memory.total > available:
            found.notices.append(f"This is more than the {available / GIB:.0f} GiB of a GPU here.")


def card_bytes() -> int:
    """Return the memory of the card here, or of the one that is assumed where there is none."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else ASSUMED_CARD


def planned_run(name: str, model_config: Any, config: Any, model_args: ModelConfig, found: Findings) -> Run:
    """Describe the run as the estimates need it."""
    adapter = run.adapter_of(name) if is_adapter(name) else run.adapter_config(model_args)
    planned = Run(
        ModelShape.of(model_config, adapter, trust_remote_code=config.trust_remote_code),
        found.launch,
        dtype=model_args.dtype,
        bf16=config.bf16,
        optimizer=config.optim.value,
        four_bit=model_args.load_in_4bit,
        keeps_reference=adapter is None and keeps_reference(found.method, config),
        fused=config.use_liger_kernel,
        accumulates=config.gradient_accumulation_steps > 1 or config.tokens_per_micro_batch is not None,
        scores_tokens=COMMANDS[found.method].rows == "pairs" or found.method == "rrhf",
    )
    return with_master_weights(planned, config.master_weights, available=card_bytes())


def estimate_memory(planned: Run, config: Any, found: Findings) -> Memory:
    """Estimate the memory of one GPU, with what `auto` chooses on it; see `prefopt.memory`."""
    card = card_bytes()
    ways = ways_of(config, planned)
    tokens, scored = micro_batch_tokens(config, found.reports)
    if (wanted := config.tokens_per_micro_batch) is not None and not (wanted == "auto" and found.on_cpu):
        if wanted == "auto":
            wanted = choose_tokens(planned, ways, available=card)
        tokens, scored = wanted, round(wanted * scored / tokens)
        found.batch += f"; as micro-batches of up to {wanted:,} tokens"
    way = recomputation_of(config)
    found.checkpointing = f"Checkpointing: {way}."
    if config.checkpointing == "auto" and found.on_cpu:
        way, found.checkpointing = Recomputation("none"), NOTHING_ON_CPU
    elif config.checkpointing == "auto":
        way = choose_recomputation(planned, ways, tokens=tokens, scored_tokens=scored, available=card)
        found.checkpointing = explain(planned, way, tokens=tokens, scored_tokens=scored, card=card)
        if not torch.cuda.is_available():
            found.checkpointing += f" There is no GPU here: reckoned with a card of {card / 1e9:.0f} GB."
    return estimate(planned, way, tokens=tokens, scored_tokens=scored)


def check_disk(planned: Run, config: Any, found: Findings) -> None:
    """Raise a ValueError where the disk has no room for the checkpoints that the run will keep."""
    rows = next((data.rows_kept for data in found.reports if data.name == "train"), 0)
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * max(found.launch.processes, 1)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(rows / batch) * math.ceil(config.num_train_epochs)
    trained = planned.shape.trained
    check_space(
        config,
        planned.loaded_bytes * trained,
        optimizer_bytes(planned.optimizer) * trained,
        steps=max(steps, 1),
    )


def keeps_reference(method: str, config: Any) -> bool:
    """Return whether a run of full fine-tuning holds a reference model beside the policy."""
    if COMMANDS[method].rows != "pairs" or method == "multi-reference-dpo":
        return False
    return not config.precompute_ref_log_probs and not set(config.loss_type) <= set(REFERENCE_FREE_LOSSES)


def micro_batch_tokens(config: Any, reports: list[TokenizationReport]) -> tuple[int, int]:
    """Return the tokens of a large micro-batch (95th percentiles of the data, or max_length) and the scored ones."""
    batch = config.per_device_train_batch_size
    lengths = next((report.lengths for report in reports if report.name == "train"), {})
    if not lengths:
        return batch * 2 * (config.max_length or 2048), batch * 2 * (config.max_length or 2048)
    prompt = lengths["prompt"].p95
    answers = [summary.p95 for part, summary in lengths.items() if part != "prompt"]
    scored = sum(answers) if len(answers) > 1 else 2 * sum(answers)
    return round(batch * (2 * prompt + scored)), round(batch * scored)


def report(found: Findings) -> str:
    """Write everything that was found as text."""
    given, _, defaults = found.resolved.partition(DEFAULTS)
    lines = [f"method: {found.method}", "", given.rstrip()]
    if defaults:
        values, _ = parse_yaml(defaults, "the defaults")
        lines.append(f"# {len(values)} further keys have their defaults; a run's recipe.yaml lists them.")
    processes = counted(found.launch.processes, "process", "processes")
    lines += ["", f"launch: {found.launch_name or 'no launcher'}, {processes}"]
    if found.batch:
        lines.append(f"batch: {found.batch}")
    for data in found.reports:
        lines += ["", data.table()]
    if found.memory is not None:
        lines += ["", found.checkpointing]
        place = "process" if found.on_cpu else "GPU"
        lines += ["", f"memory of one {place}, estimated:", found.memory.table()]
    if found.host is not None:
        lines += ["", "memory of the first node beside its GPUs, estimated:", found.host.table()]
    if found.notices:
        lines += ["", *(f"note: {notice}" for notice in found.notices)]
    if found.problems:
        head = f"{counted(len(found.problems), 'problem')}:"
        return "\n".join([*lines, "", head, *(f"  - {problem}" for problem in found.problems)])
    return "\n".join([*lines, "", "Nothing was found that would stop this run."])
