"""The keys of an adversarial pipeline's recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ALIGNERS = ("rjs", "rrhf", "dpo", "wpo")
REWARD_UPDATES = ("base", "continued", "fixed")
# mappings of settings for one command each, and the keys that the loop itself sets
GENERATION = ("model_name_or_path", "prompts", "prompts_split", "prompt_column", "output_dir", "off_policy_columns")
TRAINING = ("model_name_or_path", "dataset_name", "datasets", "eval_datasets", "output_dir", "resume_from_checkpoint")
OWN_KEYS = {
    "sampling": GENERATION,
    "test_sampling": GENERATION,
    "ranking": ("candidates", "output_dir", "ranker", "model_name_or_path", "score_name"),
    "selection": ("candidates", "output_dir", "score", "form", "golden"),
    "reward_training": TRAINING,
    "base_reward_training": TRAINING,
    "testing_reward_training": TRAINING,
    "policy_training": (*TRAINING, "ref_model_name_or_path"),
}


def _setting(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class AdversarialLoop:
    """The keys of an adversarial pipeline's recipe."""

    model_name_or_path: str = _setting("", "The policy at the start.")
    reward_model_name_or_path: str = _setting("", "The model that reward models are made of.")
    reward_prompts: str = _setting("", "The reward model's prompts: a file, folder or hub name, with `prompt_id`.")
    golden: str | None = _setting(
        None, "Golden answers: `golden` and `prompt_id` (or `query_id`); by default the rows of reward_prompts."
    )
    comparisons: str = _setting("", "Human comparisons for the reward model.")
    test_comparisons: str | None = _setting(None, "Human comparisons on which every reward model is evaluated.")
    policy_prompts: str = _setting("", "The policy's prompts; none may be a prompt of the reward model.")
    test_prompts: str = _setting("", "Prompts for evaluation; none may be a prompt of the reward model or the policy.")
    testing_reward_model: str | None = _setting(None, "The reward model that evaluates, trained before.")
    testing_comparisons: str | None = _setting(None, "Comparisons to train the evaluating reward model on.")

    num_iterations: int = _setting(1, "Number of iterations.")
    reward_update: str = _setting(
        "base",
        "Where each iteration's reward model starts: base (reward_model_name_or_path, as published), continued (that of the iteration before, at "
        "first one trained on `comparisons`), or fixed (never updated: no adversarial pairs, the plain aligner).",
        choices=list(REWARD_UPDATES),
    )
    aligner: str = _setting(
        "dpo",
        "How the policy learns from scores: rjs (supervised on the best answer), rrhf, dpo, wpo.",
        choices=list(ALIGNERS),
    )
    on_unmatched: str = _setting(
        "drop",
        "Reward prompts without golden answer and golden answers without prompt: counted (drop) or refused (raise).",
        choices=["drop", "raise"],
    )
    policy_learning_rates: list[float] | None = field(
        default=None, metadata={"help": "One learning rate an iteration, instead of the one in policy_training."}
    )

    sampling: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Settings of `prefopt generate` for both sets of training prompts."}
    )
    test_sampling: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Settings of `prefopt generate` for the test prompts."}
    )
    ranking: dict[str, Any] = field(default_factory=dict, metadata={"help": "Settings of `prefopt rank`."})
    selection: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Settings of `prefopt build-pairs`; dpo and wpo only."}
    )
    reward_training: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Settings of `prefopt adversarial-reward-model`; its `recipe` is read first."},
    )
    base_reward_training: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Settings of `prefopt reward-model` for the first or only reward model; continued and fixed only."
        },
    )
    testing_reward_training: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Settings of `prefopt reward-model` for the evaluating reward model; with testing_comparisons only."
        },
    )
    policy_training: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Settings of the aligner: `prefopt dpo`, `wpo`, `rrhf`, `sft`."}
    )

    def __post_init__(self) -> None:
        needed = ["model_name_or_path", "reward_model_name_or_path", "comparisons", "policy_prompts", "test_prompts"]
        if self.reward_update != "fixed":
            needed.append("reward_prompts")
        for name in needed:
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: set it in the recipe or with --{name}.")
        for name in ("reward_update", "aligner", "on_unmatched"):
            choices = type(self).__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}.")
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations must be at least 1, not {self.num_iterations}.")
        if (self.testing_reward_model is None) == (self.testing_comparisons is None):
            raise ValueError(
                "name the evaluating reward model with one of testing_reward_model and testing_comparisons."
            )
        rates = self.policy_learning_rates
        if rates is not None and len(rates) != self.num_iterations:
            raise ValueError(f"policy_learning_rates has {len(rates)} values for {self.num_iterations} iterations.")
        if rates is not None and "learning_rate" in self.policy_training:
            raise ValueError("policy_learning_rates replaces policy_training's learning_rate: give one of them.")
        self._check_settings()

    def _check_settings(self) -> None:
        for mapping, own in OWN_KEYS.items():
            taken = [key for key in own if key in getattr(self, mapping)]
            if taken:
                raise ValueError(f"{mapping}: {taken[0]} is set by the loop; leave it out.")
        without_effect = {
            "base_reward_training": self.reward_update == "base",
            "reward_training": self.reward_update == "fixed",
            "testing_reward_training": self.testing_comparisons is None,
            "selection": self.aligner not in ("dpo", "wpo"),
        }
        for mapping, idle in without_effect.items():
            if idle and getattr(self, mapping):
                raise ValueError(
                    f"{mapping} has no effect with reward_update {self.reward_update}, aligner {self.aligner} and the evaluating "
                    "reward model that is named; leave it out."
                )
