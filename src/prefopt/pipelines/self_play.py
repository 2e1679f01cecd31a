"""The self-play loop: the policy answers, a ranker compares the answers, pairs with win probabilities train it; and again.

An iteration: generate -> rank -> build-pairs -> (score-references) -> train -> answers to held-out prompts -> evaluate
-> report. DPO and WPO
run in the same loop as baselines: `training: {method: dpo}`.

Reference: arXiv 2405.00675 (SPPO), arXiv 2410.02197 (GPO).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.candidates.pairs import POLICIES
from prefopt.cli import COMMANDS, arguments_of
from prefopt.evaluation.evaluate import EVALUATION_FILE
from prefopt.files import read_json
from prefopt.launch import LAUNCH_KEYS
from prefopt.pipelines.commands import Commands, Place, check_method
from prefopt.pipelines.stages import Stage
from prefopt.run import batch_sizes
from prefopt.trainers.sppo import SELF_PLAY_LOSSES

# keys that the loop itself sets
OWN_KEYS = {
    "sampling": ("model_name_or_path", "prompts", "prompts_split", "prompts_config", "prompt_column", "output_dir"),
    "ranking": ("candidates", "output_dir"),
    "selection": ("candidates", "output_dir"),
    "training": ("model_name_or_path", "ref_model_name_or_path", "dataset_name", "output_dir", "resume_from_checkpoint", "ref_logps_dir"),
}  # fmt: skip
# and those that an evaluation's sampling may not have besides: it is of the policy alone, and as often as the
# evaluation says
OWN_EVALUATION_KEYS = (*OWN_KEYS["sampling"], "num_samples", "for_evaluation", "off_policy_columns")


@dataclass
class PromptSource:
    """A set of prompts."""

    path: str
    split: str = "train"
    name: str | None = None
    column: str = "prompt"

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of `prefopt generate` for it."""
        named = {} if self.name is None else {"prompts_config": self.name}
        return {"prompts": self.path, "prompts_split": self.split, "prompt_column": self.column, **named}

    def holds(self, other: PromptSource) -> bool:
        """Whether its name alone says that it has prompts of `other`: the same data, and no slice or the same one."""
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


def _setting(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class SelfPlayLoop:
    """The keys of a self-play pipeline's recipe."""

    model_name_or_path: str = _setting("", "The policy at the start.")
    num_iterations: int = _setting(3, "Number of iterations.")
    prompts: list[PromptSource] = field(
        default_factory=list,
        metadata={
            "help": "Prompts: one source (path, split, name, column) for each iteration, or a single one, of which "
            "each iteration gets a share."
        },
    )
    reuse_prompts: bool = _setting(False, "Give every iteration all prompts of a single source.")
    reference: str = _setting(
        "previous",
        "The reference of an iteration: previous (the policy at its start, as in the papers) or base "
        "(model_name_or_path throughout).",
        choices=["previous", "base"],
    )
    precompute_references: bool = _setting(
        False, "Score the reference in a stage before training, so that training holds one model in memory."
    )
    seed: int = _setting(42, "Seed; iteration t samples with seed + t and trains with seed.")

    sampling: dict[str, Any] = field(default_factory=dict, metadata={"help": "Settings of `prefopt generate`."})
    ranking: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Settings of `prefopt rank`: ranker, model_name_or_path, ..."}
    )
    selection: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Settings of `prefopt build-pairs`; its policy follows from the loss: sppo, gpo, or best_worst."
        },
    )
    training: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Settings of the training: `method` (sppo, dpo, wpo), `recipe` (read first), and that method's "
            "keys."
        },
    )
    evaluation: Evaluation | None = field(
        default=None,
        metadata={
            "help": "After each iteration: prompts (held out), num_samples, sampling, min_win_rate and "
            "max_length_ratio (stop rules), dtype."
        },
    )
    push_to_hub: bool = _setting(
        False,
        "Push the models of all iterations to the hub, after everything else is done or the loop has ended early.",
    )
    hub_model_id: str | None = _setting(None, "Name of the models there; -iter1, -iter2, ... is appended.")

    def __post_init__(self) -> None:
        if not self.model_name_or_path:
            raise ValueError("model_name_or_path is missing: set it in the recipe or with --model_name_or_path.")
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations must be at least 1, not {self.num_iterations}.")
        if self.reference not in ("previous", "base"):
            raise ValueError(f"reference must be previous or base, not {self.reference!r}.")
        if self.reference == "base" and self.precompute_references:
            raise ValueError(
                "precompute_references scores the policy's own start; with `reference: base` leave it out."
            )
        if self.push_to_hub != (self.hub_model_id is not None):
            raise ValueError("push_to_hub and hub_model_id belong together: give both or neither.")
        for mapping, own in OWN_KEYS.items():
            if taken := [key for key in own if key in getattr(self, mapping)]:
                raise ValueError(f"{mapping}: {taken[0]} is set by the loop; leave it out.")
            if getattr(self, mapping).get("push_to_hub"):
                raise ValueError(
                    f"{mapping}: the loop pushes its models at its end (push_to_hub and hub_model_id of the loop "
                    "itself), and nothing else: "
                    "each iteration would replace what the one before has pushed."
                )
        if self.evaluation is not None:
            taken = [key for key in OWN_EVALUATION_KEYS if key in self.evaluation.sampling]
            if taken:
                raise ValueError(f"evaluation: sampling: {taken[0]} is set by the loop; leave it out.")
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
        if self.evaluation is not None and any(source.holds(self.evaluation.prompts) for source in self.prompts):
            raise ValueError(
                f"evaluation: prompts: the split {self.evaluation.prompts.split!r} of {self.evaluation.prompts.path} "
                "is trained on; name prompts "
                "that are held out."
            )
        if self.reuse_prompts and len(self.prompts) > 1:
            raise ValueError("reuse_prompts is for a single source of prompts.")
        if (
            len(self.prompts) == 1
            and not self.reuse_prompts
            and self.num_iterations > 1
            and "[" in self.prompts[0].split
        ):
            raise ValueError(
                f"prompts: the split {self.prompts[0].split!r} is a slice, which cannot be shared out: name a source "
                "for each iteration."
            )

    def prompts_of(self, iteration: int) -> PromptSource:
        """The prompts of an iteration, counted from 1."""
        if len(self.prompts) > 1:
            return self.prompts[iteration - 1]
        whole = self.prompts[0]
        if self.reuse_prompts or self.num_iterations == 1:
            return whole
        ends = [round(100 * part / self.num_iterations) for part in (iteration - 1, iteration)]
        return PromptSource(whole.path, f"{whole.split}[{ends[0]}%:{ends[1]}%]", whole.name, whole.column)


MODEL = ("*.safetensors", "*config.json", "tokenizer*")
ROWS = "train.*"
CANDIDATES = "candidates.*"
__all__ = ["SelfPlayLoop", "stages_of", "stop_after"]

# what pairs a loss is trained on, unless `selection` names another policy
SELECTION_OF = {"sppo": "sppo", "sppo_single": "sppo", "gpo": "gpo"}
DEFAULT_LOSS = {"sppo": "sppo"}  # of the methods where it is not DPO's


def stages_of(loop: SelfPlayLoop, commands: Commands) -> list[Stage]:
    """All stages of the loop, in order."""
    return _Plan(loop, commands).all()


def stop_after(stage: Stage, run_dir: Path) -> str | None:
    """Why the loop ends after `stage`, by the rule that its evaluation has applied; None elsewhere."""
    iteration, _, part = stage.name.partition("/")
    if part != "report":
        return None
    reason = read_json(run_dir / iteration / "evaluate" / EVALUATION_FILE)["stop"]
    return None if reason is None else str(reason)


class _Plan:
    """Puts the stages of a loop together. A policy is a name or path, or a `Place`; `needs` says which stage makes it."""

    def __init__(self, loop: SelfPlayLoop, commands: Commands) -> None:
        self.loop = loop
        self.commands = commands
        self.stages: list[Stage] = []
        training = dict(loop.training)
        self.method = check_method(training.pop("method", "sppo"))
        self.recipe = training.pop("recipe", None)
        self.training = training

    def all(self) -> list[Stage]:
        """See `stages_of`."""
        policy: str | Place = self.loop.model_name_or_path
        if self.loop.evaluation is not None:
            self.baseline(self.loop.evaluation)
        for iteration in range(1, self.loop.num_iterations + 1):
            policy = self.iteration(iteration, policy)
        if self.loop.push_to_hub:
            for iteration in range(1, self.loop.num_iterations + 1):
                self.push(iteration)
        return self.stages

    def add(self, name: str, tool: str, settings: Mapping[str, Any], **more: Any) -> str:
        """Append a stage."""
        self.stages.append(self.commands.stage(name, tool, settings, **more))
        return name

    def generate(self, name: str, policy: str | Place, prompts: PromptSource, settings: Mapping[str, Any]) -> str:
        """Answers of a policy."""
        own = {"model_name_or_path": policy, **prompts.settings, **settings, "output_dir": Place(name)}
        return self.add(
            name, "generate", own, outputs=(CANDIDATES,), needs=_needs(policy), inputs=(_outside(policy), prompts.path)
        )

    def rank(self, name: str, candidates: str) -> str:
        """Scores of answers."""
        ranking = self.loop.ranking
        own = {"candidates": Place(candidates), **ranking, "output_dir": Place(name)}
        return self.add(name, "rank", own, outputs=(CANDIDATES,), needs=(candidates,), inputs=_ranker_files(ranking))

    def iteration(self, number: int, policy: str | Place) -> Place:
        """One iteration; returns the new policy."""
        loop, prefix = self.loop, f"iteration-{number}"
        sampling = {"seed": loop.seed + number, **loop.sampling}
        candidates = self.generate(f"{prefix}/generate", policy, loop.prompts_of(number), sampling)
        ranked = self.rank(f"{prefix}/rank", candidates)
        pairs = f"{prefix}/build-pairs"
        losses = self.losses(f"{prefix}/train")
        policy_of_pairs = next((SELECTION_OF[loss] for loss in losses if loss in SELECTION_OF), "best_worst")
        selection = {"policy": policy_of_pairs, **loop.selection}
        own = {"candidates": Place(ranked), **selection, "output_dir": Place(pairs)}
        self.add(pairs, "build-pairs", own, outputs=(ROWS,), needs=(ranked,))
        check_columns(pairs, selection["policy"], losses)
        trained = self.train(prefix, policy, pairs)
        if loop.evaluation is not None:
            self.evaluate(loop.evaluation, number, trained)
        return Place(trained)

    def losses(self, name: str) -> list[str]:
        """The losses of the training `name`, whether they are in `training` or in its recipe.

        Raises:
            ValueError: the method has no such loss, or its batch cannot be shared out among its processes.
        """
        settings = self.commands.stage(name, self.method, self.training, recipe=self.recipe).settings
        losses = [str(loss) for loss in settings.get("loss_type", [DEFAULT_LOSS.get(self.method, "sigmoid")])]
        try:
            batch_sizes(dict(settings), arguments_of(self.method)[0], int(self.training.get("num_processes") or 1))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return losses

    def train(self, prefix: str, policy: str | Place, pairs: str) -> str:
        """The training, after the scoring of its reference where that is a stage of its own."""
        loop, name = self.loop, f"{prefix}/train"
        own: dict[str, Any] = {
            "model_name_or_path": policy,
            "dataset_name": Place(pairs),
            "seed": loop.seed,
            **self.training,
        }
        own["push_to_hub"] = False
        if loop.reference == "base" and isinstance(policy, Place):
            own["ref_model_name_or_path"] = loop.model_name_or_path
        needs = [pairs, *_needs(policy)]
        if loop.precompute_references:
            scores = f"{prefix}/score-references"
            own |= {"precompute_ref_log_probs": True, "ref_logps_dir": Place(scores)}
            scoring = {"method": self.method, **own, "output_dir": Place(scores)}
            self.add(scores, "score-references", scoring, recipe=self.recipe, needs=tuple(needs))
            needs.append(scores)
        own |= {"output_dir": Place(name), "resume_from_checkpoint": True}
        return self.add(
            name,
            self.method,
            own,
            recipe=self.recipe,
            outputs=MODEL,
            needs=tuple(needs),
            inputs=(_outside(policy), loop.model_name_or_path if loop.reference == "base" else None),
        )

    # ---- evaluation
    # ------------------------------------------------------------------------------------------------------------

    def answers(self, evaluation: Evaluation, name: str, policy: str | Place) -> str:
        """Answers to held-out prompts, sampled alike for every policy; by it alone, so without what a dataset has already."""
        sampling = {
            **{key: value for key, value in self.loop.sampling.items() if key != "off_policy_columns"},
            "num_samples": evaluation.num_samples,
            "for_evaluation": True,
            "seed": self.loop.seed,
        }
        return self.generate(name, policy, evaluation.prompts, {**sampling, **evaluation.sampling})

    def baseline(self, evaluation: Evaluation) -> None:
        """The base model's answers to held-out prompts, and pairs of them for preference accuracy where there are several."""
        answers = self.answers(evaluation, "base/answers", self.loop.model_name_or_path)
        if evaluation.num_samples > 1:
            ranked = self.rank("base/rank", answers)
            own = {"candidates": Place(ranked), "policy": "max_min", "output_dir": Place("base/build-pairs")}
            self.add("base/build-pairs", "build-pairs", own, outputs=(ROWS,), needs=(ranked,))

    def evaluate(self, evaluation: Evaluation, number: int, trained: str) -> None:
        """Win rates, lengths and preference accuracy of an iteration's policy, and the report so far."""
        prefix = f"iteration-{number}"
        answers = self.answers(evaluation, f"{prefix}/answers", Place(trained))
        others = {"base": "base/answers"}
        if number > 1:
            others["previous"] = f"iteration-{number - 1}/answers"
        ranking = dict(self.loop.ranking)
        launching = {key: ranking.pop(key) for key in LAUNCH_KEYS & ranking.keys()}
        settings: dict[str, Any] = {
            "answers": Place(answers),
            "opponents": {name: Place(place) for name, place in others.items()},
            "ranker": ranking.pop("ranker", ""),
            "ranker_model": ranking.pop("model_name_or_path", ""),
            "ranker_settings": ranking,
            **launching,
        }
        rules = {"min_win_rate": evaluation.min_win_rate, "max_length_ratio": evaluation.max_length_ratio}
        settings |= {rule: value for rule, value in rules.items() if value is not None}
        needs = [answers, *others.values()]
        if evaluation.num_samples > 1:
            settings |= {
                "model_name_or_path": Place(trained),
                "pairs": Place("base/build-pairs"),
                "dtype": evaluation.dtype,
            }
            needs += [trained, "base/build-pairs"]
        name = self.add(
            f"{prefix}/evaluate",
            "evaluate",
            {**settings, "output_dir": Place(f"{prefix}/evaluate")},
            outputs=(EVALUATION_FILE,),
            needs=tuple(needs),
            inputs=_ranker_files(self.loop.ranking),
        )
        self.add(
            f"{prefix}/report",
            "report",
            {"run_dir": Place("."), "iterations": number, "output_dir": Place(f"{prefix}/report")},
            outputs=("report.md",),
            needs=(name,),
        )

    def push(self, number: int) -> None:
        """Upload a finished model with the hub's own command."""
        trained = f"iteration-{number}/train"
        repository = f"{self.loop.hub_model_id}-iter{number}"
        words = (
            "hf",
            "upload",
            repository,
            str(self.commands.run_dir / trained),
            "--exclude",
            "checkpoint-*/*",
            "--private",
        )
        name = f"push/iteration-{number}"
        self.stages.append(Stage(name, words, {"repository": repository}, needs=(trained,), at_end=True))


def check_columns(name: str, policy: str, losses: Sequence[str]) -> None:
    """Refuse pairs without a number that one of the losses reads.

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


def _needs(policy: str | Place) -> tuple[str, ...]:
    return (policy.path,) if isinstance(policy, Place) else ()


def _outside(policy: str | Place) -> str | None:
    return None if isinstance(policy, Place) else policy


def _ranker_files(ranking: Mapping[str, Any]) -> tuple[str | None, ...]:
    """What of a ranker is here as files: a model's folder, or the file of a function."""
    name = str(ranking.get("model_name_or_path") or "")
    return (name.rpartition(":")[0] if ".py:" in name else name or None, ranking.get("judge_template"))
