"""The adversarial loop: a reward model learns to tell golden answers from the policy's, the policy learns from the reward model, again and again.

An iteration: the policy answers the reward model's prompts -> adversarial pairs against golden answers -> the reward
model, with human comparisons ->
the policy answers prompts of its own -> scores -> rows -> the policy -> answers to test prompts -> evaluation by a
reward model of its own -> report.

Reference: arXiv 2311.08045.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from prefopt.candidates.prompts import load_prompts
from prefopt.data.holdout import prompt_text_key
from prefopt.data.messages import BadRow, without_none
from prefopt.data.rows import normalise_comparison
from prefopt.data.sources import DataSource, load_source
from prefopt.evaluation.evaluate import EVALUATION_FILE
from prefopt.launch import LAUNCH_KEYS
from prefopt.pipelines.commands import Commands, Place
from prefopt.pipelines.stages import Stage

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
        "Where each iteration's reward model starts: base (reward_model_name_or_path, as published), continued (that "
        "of the iteration before, at "
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
            "help": "Settings of `prefopt reward-model` for the evaluating reward model; with testing_comparisons "
            "only."
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
                    f"{mapping} has no effect with reward_update {self.reward_update}, aligner {self.aligner} and the "
                    "evaluating "
                    "reward model that is named; leave it out."
                )


def check_data(loop: AdversarialLoop) -> dict[str, int]:
    """The numbers of prompts and golden answers, having seen that sets of prompts are disjoint and golden answers fit.

    Raises:
        ValueError: two sets share a prompt, or golden answers do not meet prompts.
    """
    prompts = {"policy_prompts": _keys(loop.policy_prompts), "test_prompts": _keys(loop.test_prompts)}
    counts: dict[str, int] = {}
    if loop.reward_update != "fixed":
        ids = _prompts(loop.reward_prompts)
        prompts["reward_prompts"] = {prompt_text_key(prompt) for prompt in ids.values()}
        counts |= _check_golden(loop, set(ids))
    prompts["comparisons"] = _compared(loop.comparisons)
    for one, other in combinations(prompts, 2):
        common = prompts[one] & prompts[other]
        if common and {one, other} != {"reward_prompts", "comparisons"}:
            raise ValueError(
                f"{one} ({getattr(loop, one)}) and {other} ({getattr(loop, other)}) have {len(common)} prompts in "
                "common; they must be "
                "disjoint, or the reward model judges answers that it was trained on: `prefopt split` makes disjoint "
                "sets."
            )
    if loop.testing_comparisons is not None:
        common = prompts["test_prompts"] & _compared(loop.testing_comparisons)
        if common:
            raise ValueError(
                f"test_prompts ({loop.test_prompts}) and testing_comparisons ({loop.testing_comparisons}) have "
                f"{len(common)} prompts in "
                "common: the evaluating reward model must not be trained on the prompts on which it judges."
            )
    return {f"prompts of {name}": len(keys) for name, keys in prompts.items()} | counts


def _prompts(path: str) -> dict[str, Any]:
    """prompt_id -> prompt."""
    read = load_prompts(DataSource(path), column="prompt", off_policy_columns=())
    if not read.items:
        raise ValueError(f"{path}: no row has a prompt ({dict(read.reasons())}).")
    return {item["prompt_id"]: item["prompt"] for item in read.items}


def _keys(path: str) -> set[str]:
    return {prompt_text_key(prompt) for prompt in _prompts(path).values()}


def _compared(path: str) -> set[str]:
    """The prompts of comparisons in any form; rows that cannot be used are for the trainer to report."""
    found = set()
    for row in load_source(DataSource(path)):
        try:
            found.add(prompt_text_key(normalise_comparison(without_none(row))["prompt"]))
        except BadRow:
            continue
    return found


def _check_golden(loop: AdversarialLoop, ids: set[str]) -> dict[str, int]:
    """How many golden answers and reward prompts have no counterpart."""
    path = loop.golden or loop.reward_prompts
    rows = load_source(DataSource(path))
    name = next((name for name in ("query_id", "prompt_id") if name in rows.column_names), None)
    if name is None or "golden" not in rows.column_names:
        raise ValueError(f"{path}: golden answers need `golden` and `prompt_id`; it has {sorted(rows.column_names)}.")
    answered = {str(key) for key, golden in zip(rows[name], rows["golden"]) if golden is not None}
    without = {
        "golden answers without a reward prompt": answered - ids,
        "reward prompts without a golden answer": ids - answered,
    }
    if not ids & answered:
        raise ValueError(
            f"{path}: no golden answer has the prompt_id of one of the {len(ids)} prompts of {loop.reward_prompts}."
        )
    for what, found in without.items():
        if found and loop.on_unmatched == "raise":
            raise ValueError(
                f"{len(found)} {what}, {min(found)!r} among them; mend the data or set on_unmatched: drop."
            )
    return {what: len(found) for what, found in without.items()}


__all__ = ["AdversarialLoop", "check_data", "stages_of"]

MODEL = "*.safetensors"
SCORE = "reward"  # the name under which `prefopt rank` stores scores


@dataclass(frozen=True)
class Model:
    """A model on the way: where it is, and the stage that makes it (none: it was there before)."""

    path: str | Place
    stage: str | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """The stage that must be done before the model is there."""
        return () if self.stage is None else (self.stage,)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The folder that is read, where it comes from outside the run."""
        return () if self.stage is not None else (str(self.path),)


def stages_of(loop: AdversarialLoop, commands: Commands) -> list[Stage]:
    """All stages of the loop, in order."""
    return Plan(loop, commands).all()


class Plan:
    """Puts the stages of a loop together."""

    def __init__(self, loop: AdversarialLoop, commands: Commands) -> None:
        self.loop = loop
        self.commands = commands
        self.stages: list[Stage] = []

    def all(self) -> list[Stage]:
        """See `stages_of`."""
        loop = self.loop
        policy, reward = Model(loop.model_name_or_path), Model(loop.reward_model_name_or_path)
        judge = Model(loop.testing_reward_model or "")
        if loop.testing_comparisons is not None:
            judge = self.reward_model("testing/reward-train", loop.testing_comparisons, loop.testing_reward_training)
        if loop.reward_update != "base":
            reward = self.reward_model("base/reward-train", loop.comparisons, loop.base_reward_training)
        self.answers("base", policy)
        for number in range(1, loop.num_iterations + 1):
            prefix = f"iteration-{number}"
            scorer = reward if loop.reward_update == "fixed" else self.adversarial_reward_model(prefix, policy, reward)
            if loop.reward_update == "continued":
                reward = scorer
            policy = self.policy(prefix, number, policy, scorer)
            self.evaluate(number, policy, judge)
        return self.stages

    def add(self, name: str, tool: str, settings: Mapping[str, Any], **more: Any) -> str:
        """Append a stage; `settings` may hold a `recipe`."""
        settings = dict(settings)
        recipe = settings.pop("recipe", None)
        self.stages.append(self.commands.stage(name, tool, settings, recipe=recipe, **more))
        return name

    def train(
        self,
        name: str,
        tool: str,
        start: Model,
        settings: Mapping[str, Any],
        *,
        needs: Sequence[str],
        inputs: Sequence[str | None],
    ) -> Model:
        """A training stage; it continues from its last checkpoint when it was stopped."""
        own = {"model_name_or_path": start.path, "output_dir": Place(name), "resume_from_checkpoint": True}
        self.add(
            name,
            tool,
            {**settings, **own},
            outputs=(MODEL, "*config.json"),  # an adapter's folder has adapter_config.json
            needs=(*start.needs, *needs),
            inputs=(*start.inputs, *inputs),
        )
        return Model(Place(name), name)

    def reward_model(self, name: str, comparisons: str, settings: Mapping[str, Any]) -> Model:
        """A reward model on human comparisons only."""
        start = Model(self.loop.reward_model_name_or_path)
        data = {"dataset_name": comparisons, **self._evaluated()}
        inputs = (comparisons, self.loop.test_comparisons)
        return self.train(name, "reward-model", start, {**settings, **data}, needs=(), inputs=inputs)

    def _evaluated(self) -> dict[str, Any]:
        return (
            {}
            if self.loop.test_comparisons is None
            else {"eval_datasets": {"human": self.loop.test_comparisons}, "do_eval": True}
        )

    def generate(self, name: str, policy: Model, prompts: str, settings: Mapping[str, Any]) -> str:
        """Answers of the policy."""
        own = {"model_name_or_path": policy.path, "prompts": prompts, "output_dir": Place(name)}
        return self.add(
            name,
            "generate",
            {**settings, **own},
            outputs=("candidates.*",),
            needs=policy.needs,
            inputs=(*policy.inputs, prompts),
        )

    def adversarial_reward_model(self, prefix: str, policy: Model, start: Model) -> Model:
        """The reward model against the present policy."""
        loop = self.loop
        golden = loop.golden or loop.reward_prompts
        samples = self.generate(f"{prefix}/reward-generate", policy, loop.reward_prompts, loop.sampling)
        own = {
            "candidates": Place(samples),
            "golden": golden,
            "form": "adversarial",
            "on_unmatched": loop.on_unmatched,
        }
        pairs = f"{prefix}/reward-rows"
        self.add(
            pairs,
            "build-rows",
            {**own, "output_dir": Place(pairs)},
            outputs=("train.jsonl",),
            needs=(samples,),
            inputs=(golden,),
        )
        data = {"datasets": [{"path": loop.comparisons}, {"path": Place(f"{pairs}/train.jsonl")}], **self._evaluated()}
        return self.train(
            f"{prefix}/reward-train",
            "adversarial-reward-model",
            start,
            {**loop.reward_training, **data},
            needs=(pairs,),
            inputs=(loop.comparisons, loop.test_comparisons),
        )

    def policy(self, prefix: str, number: int, policy: Model, scorer: Model) -> Model:
        """The policy after learning from scores on its own prompts."""
        loop = self.loop
        candidates = self.generate(f"{prefix}/generate", policy, loop.policy_prompts, loop.sampling)
        scores = f"{prefix}/rank"
        own: dict[str, Any] = {"candidates": Place(candidates), "output_dir": Place(scores), "score_name": SCORE}
        self.add(
            scores,
            "rank",
            {**loop.ranking, **own, "ranker": "reward-model", "model_name_or_path": scorer.path},
            outputs=("candidates.*",),
            needs=(candidates, *scorer.needs),
            inputs=scorer.inputs,
        )
        pairs = loop.aligner in ("dpo", "wpo")
        tool = "build-pairs" if pairs else "build-rows"
        rows = f"{prefix}/{tool}"
        own = {"candidates": Place(scores), "output_dir": Place(rows), "score": SCORE}
        if pairs:
            settings = {**loop.selection, **own, "output_format": "jsonl"}
        else:
            settings = {**own, "form": "sft" if loop.aligner == "rjs" else "comparisons"}
        self.add(rows, tool, settings, outputs=("train.jsonl",), needs=(scores,))
        training = {**loop.policy_training, "dataset_name": Place(rows)}
        if loop.policy_learning_rates is not None:
            training["learning_rate"] = loop.policy_learning_rates[number - 1]
        trainer = "sft" if loop.aligner == "rjs" else loop.aligner
        return self.train(f"{prefix}/train", trainer, policy, training, needs=(rows,), inputs=())

    def answers(self, prefix: str, policy: Model) -> str:
        """Answers to the test prompts, sampled alike for every policy."""
        settings = {"for_evaluation": True, "num_samples": 1, **self.loop.test_sampling}
        return self.generate(f"{prefix}/answers", policy, self.loop.test_prompts, settings)

    def evaluate(self, number: int, policy: Model, judge: Model) -> None:
        """The policy against the first one and the one before under the evaluating reward model, and the report so far."""
        prefix = f"iteration-{number}"
        answers = self.answers(prefix, policy)
        others = {"base": "base/answers"}
        if number > 1:
            others["previous"] = f"iteration-{number - 1}/answers"
        ranking = {k: v for k, v in self.loop.ranking.items() if not k.startswith(("push", "hub"))}
        launching = {key: ranking.pop(key) for key in LAUNCH_KEYS & ranking.keys()}
        settings = {
            "answers": Place(answers),
            "opponents": {name: Place(place) for name, place in others.items()},
            "ranker": "reward-model",
            "ranker_model": judge.path,
            "ranker_settings": ranking,
            "output_dir": Place(f"{prefix}/evaluate"),
            **launching,
        }
        name = self.add(
            f"{prefix}/evaluate",
            "evaluate",
            settings,
            outputs=(EVALUATION_FILE,),
            needs=(answers, *others.values(), *judge.needs),
            inputs=judge.inputs,
        )
        report = f"{prefix}/report"
        own = {"run_dir": Place("."), "iterations": number, "output_dir": Place(report)}
        self.add(report, "report", own, outputs=("report.md",), needs=(name,))
