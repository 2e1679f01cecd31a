"""`prefopt check RECIPE`: what a recipe would run, and everything that would stop it, without starting."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from prefopt.data import TokenizationReport
from prefopt.launch import launch_words, split_launch_settings, world_size
from prefopt.memory import GIB, Launch, Memory, ModelShape, adapter_parameters, estimate
from prefopt.pages import printable
from prefopt.recipes.arguments import RunArguments
from prefopt.recipes.recipe import Recipe, build, collect, load_settings
from prefopt.recipes.source import locate
from prefopt.run import (
    adapter_config,
    adapter_of,
    batch_sizes,
    check_adapter_keys,
    check_devices,
    check_model,
    check_output,
    check_reference,
    config_values,
    is_adapter,
    load_tokenizer,
    may_evaluate,
    missing_packages,
    read_config,
    resolved_recipe,
)
from prefopt.trainers.pair_losses import REFERENCE_FREE_LOSSES
from prefopt.training import tokenise_data


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
    notices: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Note what goes wrong in the block, and go on."""
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            text = " ".join(str(error).split())
            if text not in self.problems:
                self.problems.append(text)


def run(words: list[str]) -> int:
    """Print what `words` (a recipe and settings that override it) would run; the exit status is 0 when nothing would stop it."""
    findings = inspect(words)
    print(printable(report(findings)))
    return 2 if findings.problems else 0


def inspect(words: list[str]) -> Findings:
    """Look at everything that a run looks at, short of loading weights.

    Raises:
        ValueError: there is no recipe to look at, or no telling which method it is for.
    """
    from prefopt.cli import arguments_of, function_of, method_of

    found = Findings()
    name, settings = load_settings(words)
    launch_settings, settings = split_launch_settings(settings)
    found.method = method_of(settings)
    classes = arguments_of(found.method)
    recipe = collect(name, settings, classes, found.problems)
    found.notices += recipe.notices
    found.resolved = resolved_recipe(recipe, classes)
    with found.looking():
        found.launch, found.launch_name = read_launch(launch_settings, found)
    with found.looking():
        check_adapter_keys(recipe)
    with found.looking():
        check_output(recipe, found.resolved)
    if not found.launch_name:
        with found.looking():
            check_devices(recipe)
    found.problems += missing_packages(recipe)
    config, data_args, model_args, run_args = build_each(recipe, classes, found)
    check_precision(recipe, config, found)
    if config is not None:
        with found.looking():
            function_of(found.method).check_settings(config)
    if config is None or model_args is None or model_args.model_name_or_path is None:
        found.notices.append("The model and the data were not looked at: mend the problems first.")
    else:
        look_at_model_and_data(config, data_args, model_args, run_args or RunArguments(), found)
    return found


def look_at_model_and_data(
    config: Any, data_args: Any, model_args: Any, run_args: RunArguments, found: Findings
) -> None:
    """Model and reference by their configs, tokenizer, data, and the memory that these ask for."""
    from prefopt.cli import COMMANDS, function_of

    trainer, rows = function_of(found.method), COMMANDS[found.method].rows
    with found.looking():
        check_model(model_args.model_name_or_path, model_args, config)
    with found.looking():
        check_reference(run_args, config, rows)
    tokenizer = None
    with found.looking():
        tokenizer = load_tokenizer(model_args.model_name_or_path, model_args, config, run_args)
    if tokenizer is not None and data_args is not None:
        with found.looking(), contextlib.redirect_stdout(sys.stderr):
            datasets, found.reports = tokenise_data(rows, tokenizer, config, data_args)
            for name, dataset in datasets.items():
                trainer.check_data(dataset, config, name)
    with found.looking():
        found.memory = estimate_memory(config, model_args, found)
        if torch.cuda.is_available() and not found.launch.use_cpu:
            available = torch.cuda.get_device_properties(0).total_memory
            if found.memory.total > available:
                found.notices.append(f"This is more than the {available / GIB:.0f} GiB of a GPU here.")


def read_launch(settings: dict[str, str], found: Findings) -> tuple[Launch, str]:
    """The accelerate config that would be used, and its name; one process without a launcher where none is asked for."""
    if not settings:
        return Launch(), ""
    launch_words(settings)  # numbers that are none
    processes = int(settings["num_processes"]) if "num_processes" in settings else None
    name = settings.get("accelerate_config", "multi_gpu" if processes and processes > 1 else "single_gpu")
    launch = Launch.read(locate(name, "accelerate_configs"), processes)
    if launch.batch_keys:
        found.problems.append(f"{name}: remove {', '.join(launch.batch_keys)}; batch sizes belong into the recipe.")
    gpus = torch.cuda.device_count()
    if not launch.use_cpu and gpus * launch.machines < launch.processes:
        found.notices.append(f"{name} starts {launch.processes} processes; this machine has {gpus} GPUs.")
    return launch, name


def build_each(recipe: Recipe, classes: Sequence[type], found: Findings) -> list[Any]:
    """An instance of each class, or `None` where its values are refused."""
    values = config_values(recipe)
    with found.looking():
        values.update(batch_sizes(values, classes[0], max(world_size(), found.launch.processes)))
    if not values.get("use_cpu") and not torch.cuda.is_available():
        values["use_cpu"] = True  # configs ask the machine at hand, which need not be the one that trains
        values.setdefault("bf16", not values.get("fp16"))  # what a GPU would choose
        found.notices.append("There is no GPU here: settings were checked as they stand, and not against one.")
    if values.get("model_name_or_path") is None:
        found.problems.append("model_name_or_path is missing: set it in the recipe or with --model_name_or_path.")
    adjusted = Recipe(recipe.name, values, recipe.places)
    instances: list[Any] = []
    for cls in classes:
        instance = None
        with found.looking():
            (instance,) = build(adjusted, [cls])
        instances.append(instance)
    if instances[1] is not None:
        instances[1].evaluates = may_evaluate(recipe)
    if instances[0] is not None:
        config, launch = instances[0], found.launch
        total = config.per_device_train_batch_size * config.gradient_accumulation_steps * launch.processes
        found.batch = (
            f"{config.per_device_train_batch_size} per device x {config.gradient_accumulation_steps} accumulation "
            "steps x "
            f"{launch.processes} processes = {total}"
        )
    return instances


def check_precision(recipe: Recipe, config: Any, found: Findings) -> None:
    """Recipe and accelerate config must name the same precision."""
    if config is None or found.launch_name == "":
        return
    wanted = "bf16" if config.bf16 else "fp16" if config.fp16 else "no"
    if found.launch.mixed_precision not in (wanted, "no") or (
        found.launch.zero_stage and found.launch.mixed_precision != wanted
    ):
        found.problems.append(
            f"the recipe computes in {wanted} and {found.launch_name} says mixed_precision: "
            f"{found.launch.mixed_precision}; make them equal."
        )
    if found.launch.use_cpu and not recipe.values.get("use_cpu"):
        found.problems.append(f"{found.launch_name} runs on the CPU: set use_cpu: true and bf16: false in the recipe.")


def estimate_memory(config: Any, model_args: Any, found: Findings) -> Memory:
    """See `prefopt.memory`."""
    name, trust = model_args.model_name_or_path, config.trust_remote_code
    model_config = read_config(name, model_args, config)
    shape = ModelShape.of(model_config, trust_remote_code=trust)
    adapter = adapter_of(name) if is_adapter(name) else adapter_config(model_args)
    trained = (
        adapter_parameters(model_config, shape, adapter, trust_remote_code=trust) if adapter else shape.parameters
    )
    tokens, scored = micro_batch_tokens(config, found.reports)
    return estimate(
        shape,
        found.launch,
        dtype=model_args.dtype,
        bf16=config.bf16,
        optimizer=config.optim.value,
        trained=trained,
        four_bit=model_args.load_in_4bit,
        keeps_reference=adapter is None and keeps_reference(found.method, config),
        checkpointing=config.gradient_checkpointing,
        tokens=tokens,
        scored_tokens=scored,
    )


def keeps_reference(method: str, config: Any) -> bool:
    """Whether a run of full fine-tuning holds a reference model beside the policy."""
    from prefopt.cli import COMMANDS

    if COMMANDS[method].rows != "pairs" or method == "multi-reference-dpo":
        return False
    return not config.precompute_ref_log_probs and not set(config.loss_type) <= set(REFERENCE_FREE_LOSSES)


def micro_batch_tokens(config: Any, reports: list[TokenizationReport]) -> tuple[int, int]:
    """Tokens of a large micro-batch and how many of them are scored: by the 95th percentiles of the data, else by max_length."""
    batch = config.per_device_train_batch_size
    lengths = next((report.lengths for report in reports if report.name == "train"), {})
    if not lengths:
        return batch * 2 * (config.max_length or 2048), batch * 2 * (config.max_length or 2048)
    prompt = lengths["prompt"].p95
    answers = [summary.p95 for part, summary in lengths.items() if part != "prompt"]
    scored = sum(answers) if len(answers) > 1 else 2 * sum(answers)
    return round(batch * (2 * prompt + scored)), round(batch * scored)


def report(found: Findings) -> str:
    """Everything that was found, as text."""
    lines = [
        f"method: {found.method}",
        "",
        found.resolved.rstrip(),
        "",
        f"launch: {found.launch_name or 'no launcher'}, {found.launch.processes} process(es)",
    ]
    if found.batch:
        lines.append(f"batch: {found.batch}")
    for data in found.reports:
        lines += ["", data.table()]
    if found.memory is not None:
        lines += ["", f"memory of one GPU, estimated ({found.memory.total / GIB:.1f} GiB):", found.memory.table()]
    if found.notices:
        lines += ["", *(f"note: {notice}" for notice in found.notices)]
    if found.problems:
        lines += ["", f"{len(found.problems)} problem(s):", *(f"  - {problem}" for problem in found.problems)]
    else:
        lines += ["", "Nothing was found that would stop this run."]
    return "\n".join(lines)
