"""The keys of a self-play pipeline's recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prefopt.cli import COMMANDS
from prefopt.pipelines.commands import check_method

# keys that the loop itself sets
OWN_KEYS = {
    "sampling": ("model_name_or_path", "prompts", "prompts_split", "prompts_config", "prompt_column", "output_dir"),
    "ranking": ("candidates", "output_dir"),
    "selection": ("candidates", "output_dir"),
    "training": ("model_name_or_path", "ref_model_name_or_path", "dataset_name", "output_dir", "resume_from_checkpoint", "ref_logps_dir"),
}  # fmt: skip
# and those that an evaluation's sampling may not have besides: it is of the policy alone, and as often as the evaluation says
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
            "help": "Prompts: one source (path, split, name, column) for each iteration, or a single one, of which each iteration gets a share."
        },
    )
    reuse_prompts: bool = _setting(False, "Give every iteration all prompts of a single source.")
    reference: str = _setting(
        "previous",
        "The reference of an iteration: previous (the policy at its start, as in the papers) or base (model_name_or_path throughout).",
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
            "help": "Settings of the training: `method` (sppo, dpo, wpo), `recipe` (read first), and that method's keys."
        },
    )
    evaluation: Evaluation | None = field(
        default=None,
        metadata={
            "help": "After each iteration: prompts (held out), num_samples, sampling, min_win_rate and max_length_ratio (stop rules), dtype."
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
                    f"{mapping}: the loop pushes its models at its end (push_to_hub and hub_model_id of the loop itself), and nothing else: "
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
                f"prompts has {len(self.prompts)} sources for {self.num_iterations} iterations: name one for each, or a single one to share."
            )
        if self.evaluation is not None and any(source.holds(self.evaluation.prompts) for source in self.prompts):
            raise ValueError(
                f"evaluation: prompts: the split {self.evaluation.prompts.split!r} of {self.evaluation.prompts.path} is trained on; name prompts "
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
                f"prompts: the split {self.prompts[0].split!r} is a slice, which cannot be shared out: name a source for each iteration."
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
