"""lm-eval's tasks on a policy: the Open LLM Leaderboard's, IFEval's, or those of a local file (extra `eval`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefopt.arguments import setting
from prefopt.candidates.shards import current_processes
from prefopt.evaluation.figures import Figure, as_json
from prefopt.evaluation.settings import SharedSettings
from prefopt.files import write_json
from prefopt.intervals import normal_quantile

KIND = "lm-eval"
_ONLY = {"kind": (KIND,)}
RESULTS_FILE = "lm_eval.json"
# lm-eval's own group of the second Open LLM Leaderboard's tasks, IFEval among them
LEADERBOARD = ("leaderboard",)


@dataclass(kw_only=True)
class LMEvalSettings(SharedSettings):
    """lm-eval: tasks of EleutherAI's harness, which fetches their data sets from the hub."""

    tasks: list[str] = setting(
        factory=lambda: list(LEADERBOARD),
        help="Tasks or groups: leaderboard (the Open LLM Leaderboard's), leaderboard_ifeval, ifeval, or those of "
        "task_folder.",
        only_for=_ONLY,
    )
    task_folder: str | None = setting(None, "Folder with further tasks as lm-eval's YAML files.", only_for=_ONLY)
    num_fewshot: int | None = setting(None, "Examples in the prompt; by default the task's own.", only_for=_ONLY)
    limit: int | None = setting(None, "Only the first rows of each task, for a trial.", at_least=1, only_for=_ONLY)
    eval_batch_size: str = setting("auto", "lm-eval's batch_size: a number or auto.", only_for=_ONLY)
    apply_chat_template: bool = setting(
        False, "Put prompts under the model's chat template, examples as turns.", only_for=_ONLY
    )

    def check_lm_eval(self) -> None:
        """Check the settings of this kind.

        Raises:
            ValueError: no model, no tasks, or lm-eval is not installed.
        """
        if self.model_name_or_path is None:
            raise ValueError("lm-eval needs a model: give model_name_or_path.")
        if not self.tasks:
            raise ValueError("lm-eval needs `tasks`.")
        import_lm_eval()


def import_lm_eval() -> Any:
    """Import lm-eval.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise ValueError(f"kind lm-eval needs the package lm-eval ({error}): pip install 'prefopt[eval]'.") from error
    return lm_eval


def evaluate(args: LMEvalSettings) -> dict[str, Any]:
    """Run the tasks; lm-eval spreads them over the processes that were launched.

    Returns:
        `kind`, `model`, `figures` (`task/metric`, with normal intervals from lm-eval's standard errors), `versions` of
        the tasks. `lm_eval.json` holds lm-eval's own results.

    Raises:
        ValueError: lm-eval is not installed, or does not know a task.
    """
    harness = import_lm_eval()
    assert args.model_name_or_path is not None
    manager = harness.tasks.TaskManager(include_path=args.task_folder)
    if unknown := [name for name in args.tasks if not manager.match_tasks([name])]:
        raise ValueError(
            f"tasks: lm-eval has no {unknown[0]!r}; `lm-eval ls tasks` lists them, task_folder adds others."
        )
    found = harness.simple_evaluate(
        model="hf",
        model_args={"pretrained": args.model_name_or_path, "dtype": args.dtype, "max_length": args.max_length},
        tasks=args.tasks,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        batch_size=args.eval_batch_size,
        device=None if torch.cuda.is_available() else "cpu",  # by default it takes CUDA for granted
        apply_chat_template=args.apply_chat_template,
        fewshot_as_multiturn=args.apply_chat_template,
        task_manager=manager,
        log_samples=False,
    )
    results = found or {"results": {}, "versions": {}, "n-samples": {}}  # of the other processes
    team = current_processes()
    if team.is_main:
        kept = {name: results[name] for name in ("results", "versions", "n-samples", "n-shot") if name in results}
        write_json(Path(args.output_dir) / RESULTS_FILE, as_json(kept))
    figures = lm_eval_figures(results, confidence=args.confidence)
    return {"kind": KIND, "model": args.name, "figures": figures, "versions": results.get("versions", {})}


def lm_eval_figures(results: dict[str, Any], *, confidence: float) -> dict[str, Figure]:
    """Return lm-eval's `results` as figures; its standard errors become normal intervals.

    Args:
        results: `results` by task, with `metric,filter` and `metric_stderr,filter`; `n-samples` by task.
        confidence: of the intervals.
    """
    z = normal_quantile(confidence)
    figures: dict[str, Figure] = {}
    for task, values in results["results"].items():
        rows = results.get("n-samples", {}).get(task, {})
        count = int(rows.get("effective", 0)) if isinstance(rows, dict) else 0
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            name = f"{task}/{metric}" + ("" if kind == "none" else f" ({kind})")
            if isinstance(error, (int, float)):
                figures[name] = Figure(float(value), value - z * error, value + z * error, "normal", count)
            else:  # "N/A"
                figures[name] = Figure(float(value), None, None, "none", count)
    return figures
