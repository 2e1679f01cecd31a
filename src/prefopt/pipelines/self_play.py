"""The self-play loop: the policy answers, a ranker compares the answers, pairs of them train the policy; and again.

An iteration: generate -> rank -> build-pairs -> (score-references) -> train -> answers to held-out prompts -> evaluate
-> report. DPO and WPO run in the same loop as baselines: `training: {method: dpo}`.

Reference: arXiv 2405.00675 (SPPO), arXiv 2410.02197 (GPO).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.arguments import check_settings, check_together, setting
from prefopt.candidates.pairs import POLICIES
from prefopt.cli import COMMANDS, arguments_of
from prefopt.evaluation.evaluate import EVALUATION_FILE
from prefopt.files import read_json
from prefopt.pipelines.commands import MODEL, Commands, LoopPlan, Model, Place, check_left_to_loop, check_method
from prefopt.pipelines.stages import Stage
from prefopt.run import batch_sizes
from prefopt.trainers.sppo import SELF_PLAY_LOSSES

# What the loop itself sets, in each mapping of settings for one command.
OWN_KEYS = {
    "sampling": ("model_name_or_path", "prompts", "prompts_split", "prompts_config", "prompt_column", "output_dir"),
    "ranking": ("candidates", "output_dir"),
    "selection": ("candidates", "output_dir"),
    "training": (
        "model_name_or_path", "ref_model_name_or_path", "dataset_name", "output_dir", "resume_from_checkpoint",
        "ref_logps_dir",
    ),
}  # fmt: skip
# An evaluation measures the policy alone, and its own keys say how often.
OWN_EVALUATION_KEYS = (*OWN_KEYS["sampling"], "num_samples", "for_evaluation", "off_policy_columns")
# The pairs that a loss is trained on, unless `selection` names another policy.
SELECTION_OF = {"sppo": "sppo", "sppo_single": "sppo", "gpo": "gpo"}
DEFAULT_LOSS = {"sppo": "sppo"}  # of the methods where it is not DPO's
PAIRS = ("train.*",)


@dataclass
class PromptSource:
    """A set of prompts."""

    path: str
    split: str = "train"
    name: str | None = None
    column: str = "prompt"

    @property
    def settings(self) -> dict[str, Any]:
        """Return the keys of `prefopt generate` for it."""
        named = {} if self.name is None else {"prompts_config": self.name}
        return {"prompts": self.path, "prompts_split": self.split, "prompt_column": self.column, **named}

    def holds(self, other: PromptSource) -> bool:
        """Return whether its name says that it has prompts of `other`: the same data, and no slice or the same one."""
        (mine, _, my_slice), (theirs, _, their_slice) = self.split.partition("["), other.split.partition("[")
        same = (self.path, self.name, mine) == (other.path, other.name, theirs)
        return same and (not my_slice or not their_slice or my_slice == their_slice)


@dataclass
class Evaluation:
    """What is measured after each iteration, and when the loop ends for it."""

    prompts: PromptSource
    num_samples: int = 4
    sampling: dict[str, Any] = field(default_factory=dict)
    min_win_rate: float | None = None
    max_length_ratio: float | None = None
    dtype: str = "bfloat16"


@dataclass
class SelfPlayLoop:
    """The keys of a self-play pipeline's recipe."""

    model_name_or_path: str = setting("", "The policy at the start.", required=True)
    num_iterations: int = setting(3, "Number of iterations.", at_least=1)
    prompts: list[PromptSource] = setting(
        factory=list,
        help="Prompts: one source (path, split, name, column) for each iteration, or a single one, of which each "
        "iteration gets a share.",
    )
    reuse_prompts: bool = setting(False, "Give every iteration all prompts of a single source.")
    reference: str = setting(
        "previous",
        "The reference of an iteration: previous (the policy at its start, as in the papers) or base "
        "(model_name_or_path throughout).",
        choices=("previous", "base"),
    )
    precompute_references: bool = setting(
        False, "Score the reference in a stage before training, so that training holds one model in memory."
    )
    seed: int = setting(42, "Seed; iteration t samples with seed + t and trains with seed.", at_least=0)

    sampling: dict[str, Any] = setting(factory=dict, help="Settings of `prefopt generate`.")
    ranking: dict[str, Any] = setting(factory=dict, help="Settings of `prefopt rank`: ranker, model_name_or_path, ...")
    selection: dict[str, Any] = setting(
        factory=dict,
        help="Settings of `prefopt build-pairs`; its policy follows from the loss: sppo, gpo, or best_worst.",
    )
    training: dict[str, Any] = setting(
        factory=dict,
        help="Settings of the training: `method` (sppo, dpo, wpo), `recipe` (read first), and that method's keys.",
    )
    evaluation: Evaluation | None = setting(
        None,
        "After each iteration: prompts (held out), num_samples, sampling, min_win_rate and max_length_ratio (stop "
        "rules), dtype.",
    )
    push_to_hub: bool = setting(
        False,
        "Push the models of all iterations to the hub, after everything else is done or the loop has ended early.",
    )
    hub_model_id: str | None = setting(None, "Name of the models there; -iter1, -iter2, ... is appended.")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.reference == "base" and self.precompute_references:
            raise ValueError(
                "precompute_references scores the policy's own start; with `reference: base` leave it out."
            )
        check_together(self, "push_to_hub", "hub_model_id")
        for mapping, own in OWN_KEYS.items():
            check_left_to_loop(mapping, getattr(self, mapping), own)
            if getattr(self, mapping).get("push_to_hub"):
                raise ValueError(
                    f"{mapping}: the loop pushes its models at its end (push_to_hub and hub_model_id of the loop "
                    "itself), and nothing else: each iteration would replace what the one before has pushed."
                )
        if self.evaluation is not None:
            check_left_to_loop("evaluation: sampling", self.evaluation.sampling, OWN_EVALUATION_KEYS)
        method = check_method(self.training.get("method", "sppo"))
        if COMMANDS[method].rows != "pairs":
            raise ValueError(f"training: {method} trains no policy on pairs.")
        self._check_prompts()

    def _check_prompts(self) -> None:
        if not self.prompts:
            raise ValueError("prompts is missing: name one source, or one for each iteration.")
        if 1 < len(self.prompts) < self.num_iterations:
            raise ValueError(
                f"prompts has {len(self.prompts)} sources for {self.num_iterations} iterations: name one for each, or "
                "a single one to share."
            )
        held_out = None if self.evaluation is None else self.evaluation.prompts
        if held_out is not None and any(source.holds(held_out) for source in self.prompts):
            raise ValueError(
                f"evaluation: prompts: the split {held_out.split!r} of {held_out.path} is trained on; name prompts "
                "that are held out."
            )
        if self.reuse_prompts and len(self.prompts) > 1:
            raise ValueError("reuse_prompts is for a single source of prompts.")
        shared_out = len(self.prompts) == 1 < self.num_iterations and not self.reuse_prompts
        if shared_out and "[" in self.prompts[0].split:
            raise ValueError(
                f"prompts: the split {self.prompts[0].split!r} is a slice, which cannot be shared out: name a source "
                "for each iteration."
            )

    def prompts_of(self, iteration: int) -> PromptSource:
        """Return the prompts of an iteration, counted from 1."""
        if len(self.prompts) > 1:
            return self.prompts[iteration - 1]
        whole = self.prompts[0]
        if self.reuse_prompts or self.num_iterations == 1:
            return whole
        ends = [round(100 * part / self.num_iterations) for part in (iteration - 1, iteration)]
        return PromptSource(whole.path, f"{whole.split}[{ends[0]}%:{ends[1]}%]", whole.name, whole.column)


def stages_of(loop: SelfPlayLoop, commands: Commands) -> list[Stage]:
    """Return all stages of the loop, in order."""
    plan = _Plan(loop, commands)
    policy: Model = loop.model_name_or_path
    plan.measure_base()
    for number in range(1, loop.num_iterations + 1):
        policy = plan.iteration(number, policy)
    if loop.push_to_hub:
        for number in range(1, loop.num_iterations + 1):
            plan.push(number)
    return plan.stages


def stop_after(stage: Stage, run_dir: Path) -> str | None:
    """Return why the loop ends after `stage`, by the rule that its evaluation has applied; None elsewhere."""
    iteration, _, part = stage.name.partition("/")
    if part != "report":
        return None
    reason = read_json(run_dir / iteration / "evaluate" / EVALUATION_FILE)["stop"]
    return None if reason is None else str(reason)


class _Plan(LoopPlan):
    def __init__(self, loop: SelfPlayLoop, commands: Commands) -> None:
        super().__init__(commands)
        self.loop = loop
        self.training = dict(loop.training)
        self.method = check_method(self.training.pop("method", "sppo"))

    def measure_base(self) -> None:
        """Add the base model's answers to held-out prompts, and of several, pairs for preference accuracy."""
        evaluation = self.loop.evaluation
        if evaluation is None:
            return
        answers = self.answers("base", self.loop.model_name_or_path, evaluation)
        if evaluation.num_samples > 1:
            ranked = self.rank("base/rank", answers, self.loop.ranking)
            self.add("base/build-pairs", "build-pairs", {"candidates": ranked, "policy": "max_min"}, outputs=PAIRS)

    def answers(self, prefix: str, policy: Model, evaluation: Evaluation) -> Place:
        """Add answers to held-out prompts, sampled alike for every policy, without those that a dataset has."""
        sampling = {
            **evaluation.prompts.settings,
            **{key: value for key, value in self.loop.sampling.items() if key != "off_policy_columns"},
            "num_samples": evaluation.num_samples,
            "for_evaluation": True,
            "seed": self.loop.seed,
            **evaluation.sampling,
        }
        return self.generate(f"{prefix}/answers", policy, sampling)

    def iteration(self, number: int, policy: Model) -> Place:
        """Add one iteration; return the new policy."""
        loop, prefix = self.loop, f"iteration-{number}"
        sampling = {**loop.prompts_of(number).settings, "seed": loop.seed + number, **loop.sampling}
        candidates = self.generate(f"{prefix}/generate", policy, sampling)
        ranked = self.rank(f"{prefix}/rank", candidates, loop.ranking)
        losses = self.losses(f"{prefix}/train")
        selected = next((SELECTION_OF[loss] for loss in losses if loss in SELECTION_OF), "best_worst")
        selection = {"candidates": ranked, "policy": selected, **loop.selection}
        pairs = self.add(f"{prefix}/build-pairs", "build-pairs", selection, outputs=PAIRS)
        check_columns(pairs.path, selection["policy"], losses)
        trained = self.train_policy(prefix, policy, pairs)
        if loop.evaluation is not None:
            self.measure(number, trained, loop.evaluation)
        return trained

    def losses(self, name: str) -> list[str]:
        """Return the losses of the training `name`, whether they are in `training` or in its recipe.

        Raises:
            ValueError: the method has no such loss, or its batch cannot be shared out among its processes.
        """
        keys = dict(self.training)
        settings = self.commands.stage(name, self.method, keys, recipe=keys.pop("recipe", None)).settings
        try:
            batch_sizes(dict(settings), arguments_of(self.method)[0], int(self.training.get("num_processes") or 1))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return [str(loss) for loss in settings.get("loss_type", [DEFAULT_LOSS.get(self.method, "sigmoid")])]

    def train_policy(self, prefix: str, policy: Model, pairs: Place) -> Place:
        """Add the training, after the scoring of its reference where that is a separate stage."""
        loop = self.loop
        keys: dict[str, Any] = {"dataset_name": pairs, "seed": loop.seed, **self.training, "push_to_hub": False}
        base = loop.model_name_or_path if loop.reference == "base" else None
        if base is not None and isinstance(policy, Place):
            keys["ref_model_name_or_path"] = base
        if loop.precompute_references:
            scores = Place(f"{prefix}/score-references")
            keys |= {"precompute_ref_log_probs": True, "ref_logps_dir": scores}
            self.add(scores.path, "score-references", {**keys, "method": self.method, "model_name_or_path": policy})
        outputs = (*MODEL, "tokenizer*")
        return self.train(f"{prefix}/train", self.method, policy, keys, inputs=(base,), outputs=outputs)

    def measure(self, number: int, trained: Place, evaluation: Evaluation) -> None:
        """Add win rates, lengths and preference accuracy of an iteration's policy, and the report so far."""
        self.answers(f"iteration-{number}", trained, evaluation)
        rules = {"min_win_rate": evaluation.min_win_rate, "max_length_ratio": evaluation.max_length_ratio}
        more: dict[str, Any] = {rule: value for rule, value in rules.items() if value is not None}
        if evaluation.num_samples > 1:
            pairs = Place("base/build-pairs")
            more |= {"model_name_or_path": trained, "pairs": pairs, "dtype": evaluation.dtype}
        self.evaluate(number, self.loop.ranking, more)

    def push(self, number: int) -> None:
        """Add the upload of a finished model, with the hub's own command."""
        trained = f"iteration-{number}/train"
        repository = f"{self.loop.hub_model_id}-iter{number}"
        folder = str(self.commands.run_dir / trained)
        words = ("hf", "upload", repository, folder, "--exclude", "checkpoint-*/*", "--private")
        name = f"push/iteration-{number}"
        self.stages.append(Stage(name, words, {"repository": repository}, needs=(trained,), at_end=True))


def check_columns(name: str, policy: str, losses: Sequence[str]) -> None:
    """Check that pairs have every number that one of the losses reads.

    Raises:
        ValueError: names the policies that make it.
    """
    for loss in losses:
        columns = SELF_PLAY_LOSSES[loss].columns if loss in SELF_PLAY_LOSSES else ()
        if not set(columns) <= set(POLICIES[policy].columns):
            able = [other for other, entry in POLICIES.items() if set(columns) <= set(entry.columns)]
            raise ValueError(
                f"{name}: `loss_type: {loss}` reads {' and '.join(columns)}, which the policy {policy!r} does not "
                f"make; {', '.join(able)} do."
            )
