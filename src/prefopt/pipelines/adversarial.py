"""The adversarial loop: a reward model learns golden answers from the policy's, the policy learns from it, and again.

An iteration: the policy answers the reward model's prompts -> adversarial pairs against golden answers -> the reward
model, with human comparisons -> the policy answers its own prompts -> scores -> rows -> the policy -> answers to test
prompts -> evaluation by a separate reward model -> report.

Reference: arXiv 2311.08045.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from prefopt.arguments import check_settings, missing, setting
from prefopt.candidates.prompts import load_prompts
from prefopt.data.encoding import MESSAGES, STRINGS, check_chat_template, load_tokenizer
from prefopt.data.holdout import prompt_identity
from prefopt.data.messages import BadRow, without_none
from prefopt.data.rows import normalise_comparison
from prefopt.data.sources import DataSource, load_source
from prefopt.pipelines.commands import Commands, LoopPlan, Model, Place, check_left_to_loop
from prefopt.pipelines.stages import Stage

# What the loop itself sets, in each mapping of settings for one command.
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
PAIR_ALIGNERS = ("dpo", "wpo")
SCORE = "reward"  # the name under which `prefopt rank` stores scores
ROWS = ("train.jsonl",)


@dataclass
class AdversarialLoop:
    """The keys of an adversarial pipeline's recipe."""

    model_name_or_path: str = setting("", "The policy at the start.", required=True)
    reward_model_name_or_path: str = setting("", "The model that reward models are made of.", required=True)
    reward_prompts: str = setting("", "The reward model's prompts: a file, folder or hub name, with `prompt_id`.")
    golden: str | None = setting(
        None, "Golden answers: `golden` and `prompt_id` (or `query_id`); by default the rows of reward_prompts."
    )
    comparisons: str = setting("", "Human comparisons for the reward model.", required=True)
    test_comparisons: str | None = setting(None, "Human comparisons on which every reward model is evaluated.")
    policy_prompts: str = setting("", "The policy's prompts; none may be a prompt of the reward model.", required=True)
    test_prompts: str = setting(
        "", "Prompts for evaluation; none may be a prompt of the reward model or the policy.", required=True
    )
    testing_reward_model: str | None = setting(None, "The reward model that evaluates, trained before.")
    testing_comparisons: str | None = setting(None, "Comparisons to train the evaluating reward model on.")

    num_iterations: int = setting(1, "Number of iterations.", at_least=1)
    reward_update: str = setting(
        "base",
        "Where each iteration's reward model starts: base (reward_model_name_or_path, as published), continued (that "
        "of the iteration before, at first one trained on `comparisons`), or fixed (never updated: no adversarial "
        "pairs, the plain aligner).",
        choices=("base", "continued", "fixed"),
    )
    aligner: str = setting(
        "dpo",
        "How the policy learns from scores: rjs (supervised on the best answer), rrhf, dpo, wpo.",
        choices=("rjs", "rrhf", *PAIR_ALIGNERS),
    )
    on_unmatched: str = setting(
        "drop",
        "Reward prompts without golden answer and golden answers without prompt: counted (drop) or an error (raise).",
        choices=("drop", "raise"),
    )
    policy_learning_rates: list[float] | None = setting(
        None, "One learning rate an iteration, instead of the one in policy_training."
    )

    sampling: dict[str, Any] = setting(
        factory=dict, help="Settings of `prefopt generate` for both sets of training prompts."
    )
    test_sampling: dict[str, Any] = setting(factory=dict, help="Settings of `prefopt generate` for the test prompts.")
    ranking: dict[str, Any] = setting(factory=dict, help="Settings of `prefopt rank`.")
    selection: dict[str, Any] = setting(
        factory=dict,
        help="Settings of `prefopt build-pairs`; dpo and wpo only.",
        only_for={"aligner": PAIR_ALIGNERS},
    )
    reward_training: dict[str, Any] = setting(
        factory=dict,
        help="Settings of `prefopt adversarial-reward-model`; its `recipe` is read first.",
        only_for={"reward_update": ("base", "continued")},
    )
    base_reward_training: dict[str, Any] = setting(
        factory=dict,
        help="Settings of `prefopt reward-model` for the first or only reward model; continued and fixed only.",
        only_for={"reward_update": ("continued", "fixed")},
    )
    testing_reward_training: dict[str, Any] = setting(
        factory=dict,
        help="Settings of `prefopt reward-model` for the evaluating reward model; with testing_comparisons only.",
    )
    policy_training: dict[str, Any] = setting(
        factory=dict, help="Settings of the aligner: `prefopt dpo`, `wpo`, `rrhf`, `sft`."
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.reward_update != "fixed" and not self.reward_prompts:
            raise ValueError(missing("reward_prompts"))
        if (self.testing_reward_model is None) == (self.testing_comparisons is None):
            raise ValueError(
                "name the evaluating reward model with one of testing_reward_model and testing_comparisons."
            )
        if self.testing_reward_training and self.testing_comparisons is None:
            raise ValueError("testing_reward_training has no effect without testing_comparisons; leave it out.")
        rates = self.policy_learning_rates
        if rates is not None and len(rates) != self.num_iterations:
            raise ValueError(f"policy_learning_rates has {len(rates)} values for {self.num_iterations} iterations.")
        if rates is not None and "learning_rate" in self.policy_training:
            raise ValueError("policy_learning_rates replaces policy_training's learning_rate: give one of them.")
        for mapping, own in OWN_KEYS.items():
            check_left_to_loop(mapping, getattr(self, mapping), own)


# ---- data


def check_data(loop: AdversarialLoop) -> dict[str, int]:
    """Check that sets of prompts are disjoint and that golden answers fit; return the numbers of both.

    Raises:
        ValueError: two sets share a prompt, or golden answers do not meet prompts.
    """
    prompts = {"policy_prompts": _keys(loop.policy_prompts), "test_prompts": _keys(loop.test_prompts)}
    counts: dict[str, int] = {}
    if loop.reward_update != "fixed":
        ids = _prompts(loop.reward_prompts)
        prompts["reward_prompts"] = {prompt_identity(prompt) for prompt in ids.values()}
        counts |= _check_golden(loop, set(ids))
    prompts["comparisons"] = _compared_prompts(loop.comparisons)
    disjoint = (
        "they must be disjoint, or the reward model judges answers that it was trained on: `prefopt split` makes "
        "disjoint sets."
    )
    for one, other in combinations(prompts, 2):
        if {one, other} != {"reward_prompts", "comparisons"}:
            _check_disjoint(loop, one, other, prompts[one] & prompts[other], disjoint)
    if loop.testing_comparisons is not None:
        common = prompts["test_prompts"] & _compared_prompts(loop.testing_comparisons)
        unseen = "the evaluating reward model must not be trained on the prompts on which it judges."
        _check_disjoint(loop, "test_prompts", "testing_comparisons", common, unseen)
    _check_forms(loop)
    return {f"prompts of {name}": len(keys) for name, keys in prompts.items()} | counts


def _check_disjoint(loop: AdversarialLoop, one: str, other: str, common: set[str], why: str) -> None:
    if common:
        raise ValueError(
            f"{one} ({getattr(loop, one)}) and {other} ({getattr(loop, other)}) have {len(common)} prompts in "
            f"common: {why}"
        )


def _check_forms(loop: AdversarialLoop) -> None:
    """Check that every reward model is trained and evaluated on the form of text that it judges.

    Raises:
        ValueError: strings beside messages, or messages for a reward model without a chat template.
    """
    answers = {"policy_prompts": loop.sampling}
    if loop.reward_update != "fixed":
        answers["reward_prompts"] = loop.sampling
    forms = {name: _form_of_comparisons(getattr(loop, name)) for name in ("comparisons", "test_comparisons")}
    forms |= {f"the policy's answers to {name}": _form_of_answers(loop, name, how) for name, how in answers.items()}
    _check_alike(forms)
    judge = _form_of_comparisons(loop.testing_comparisons)
    judged = _form_of_answers(loop, "test_prompts", loop.test_sampling)
    _check_alike({"testing_comparisons": judge, "the policy's answers to test_prompts": judged})
    if MESSAGES in (forms["comparisons"], judge):
        tokenizer = _tokenizer(loop.reward_model_name_or_path)
        if tokenizer is not None:
            check_chat_template(tokenizer)


def _check_alike(forms: Mapping[str, str | None]) -> None:
    """Raise a ValueError where some of what one reward model reads are strings and some messages."""
    known = {name: form for name, form in forms.items() if form is not None}
    if len(set(known.values())) > 1:
        strings = ", ".join(name for name, form in known.items() if form == STRINGS)
        messages = ", ".join(name for name, form in known.items() if form == MESSAGES)
        raise ValueError(
            f"{strings}: strings; {messages}: messages. A reward model that is trained on one means nothing on the "
            "other. Give all as messages (HH dialogues: `prefopt convert ... --as_messages true`), with a policy that "
            "has a chat template; or all as strings, with `prompt_format: text` in sampling and test_sampling."
        )


def _form_of_comparisons(path: str | None) -> str | None:
    """Return the form of the first usable comparison; None where there is none."""
    for row in load_source(DataSource(path)) if path is not None else ():
        with suppress(BadRow):
            return MESSAGES if isinstance(normalise_comparison(without_none(row))["prompt"], list) else STRINGS
    return None


def _form_of_answers(loop: AdversarialLoop, prompts: str, sampling: Mapping[str, Any]) -> str | None:
    """Return the form in which `prefopt generate` writes the policy's answers; None where it is not known here."""
    if any(isinstance(prompt, list) for prompt in _prompts(getattr(loop, prompts)).values()):
        return MESSAGES
    how = sampling.get("prompt_format", "auto")
    if how == "auto":
        tokenizer = None if "recipe" in sampling else _tokenizer(loop.model_name_or_path)
        return tokenizer and (MESSAGES if tokenizer.chat_template else STRINGS)
    return MESSAGES if how == "chat" else STRINGS


def _tokenizer(name: str) -> Any:
    """Load a model's tokenizer; None where it is not at hand, which is for the stage that needs it to report."""
    with suppress(OSError, ValueError, ImportError):
        return load_tokenizer(name)
    return None


def _prompts(path: str) -> dict[str, Any]:
    """Read prompts by their prompt_id."""
    read = load_prompts(DataSource(path), column="prompt", off_policy_columns=())
    if not read.items:
        raise ValueError(f"{path}: no row has a prompt ({dict(read.reasons())}).")
    return {item["prompt_id"]: item["prompt"] for item in read.items}


def _keys(path: str) -> set[str]:
    return {prompt_identity(prompt) for prompt in _prompts(path).values()}


def _compared_prompts(path: str) -> set[str]:
    """Read the prompts of comparisons in any form; rows that cannot be used are for the trainer to report."""
    found = set()
    for row in load_source(DataSource(path)):
        try:
            found.add(prompt_identity(normalise_comparison(without_none(row))["prompt"]))
        except BadRow:
            continue
    return found


def _check_golden(loop: AdversarialLoop, ids: set[str]) -> dict[str, int]:
    """Count the golden answers and the reward prompts without a counterpart."""
    path = loop.golden or loop.reward_prompts
    rows = load_source(DataSource(path))
    name = next((name for name in ("query_id", "prompt_id") if name in rows.column_names), None)
    if name is None or "golden" not in rows.column_names:
        raise ValueError(f"{path}: golden answers need `golden` and `prompt_id`; it has {sorted(rows.column_names)}.")
    answered = {str(key) for key, golden in zip(rows[name], rows["golden"]) if golden is not None}
    if not ids & answered:
        raise ValueError(
            f"{path}: no golden answer has the prompt_id of one of the {len(ids)} prompts of {loop.reward_prompts}."
        )
    unmatched = {
        "golden answers without a reward prompt": answered - ids,
        "reward prompts without a golden answer": ids - answered,
    }
    for what, found in unmatched.items():
        if found and loop.on_unmatched == "raise":
            raise ValueError(
                f"{len(found)} {what}, {min(found)!r} among them; correct the data or set on_unmatched: drop."
            )
    return {what: len(found) for what, found in unmatched.items()}


# ---- stages


def stages_of(loop: AdversarialLoop, commands: Commands) -> list[Stage]:
    """Return all stages of the loop, in order."""
    plan = _Plan(loop, commands)
    policy: Model = loop.model_name_or_path
    reward: Model = loop.reward_model_name_or_path
    judge: Model = loop.testing_reward_model or ""
    if loop.testing_comparisons is not None:
        judge = plan.reward_model("testing/reward-train", loop.testing_comparisons, loop.testing_reward_training)
    if loop.reward_update != "base":
        reward = plan.reward_model("base/reward-train", loop.comparisons, loop.base_reward_training)
    plan.answers("base", policy)
    for number in range(1, loop.num_iterations + 1):
        prefix = f"iteration-{number}"
        scorer = reward if loop.reward_update == "fixed" else plan.adversarial_reward_model(prefix, policy, reward)
        if loop.reward_update == "continued":
            reward = scorer
        policy = plan.align(prefix, number, policy, scorer)
        plan.answers(prefix, policy)
        plan.evaluate(number, _reward_ranking(loop, judge), {})
    return plan.stages


def _reward_ranking(loop: AdversarialLoop, scorer: Model) -> dict[str, Any]:
    return {**loop.ranking, "ranker": "reward-model", "model_name_or_path": scorer}


class _Plan(LoopPlan):
    def __init__(self, loop: AdversarialLoop, commands: Commands) -> None:
        super().__init__(commands)
        self.loop = loop
        human = loop.test_comparisons
        self.evaluated = {} if human is None else {"eval_datasets": {"human": human}, "do_eval": True}

    def reward_model(self, name: str, comparisons: str, settings: Mapping[str, Any]) -> Place:
        """Add a reward model on human comparisons only."""
        start, inputs = self.loop.reward_model_name_or_path, (comparisons, self.loop.test_comparisons)
        keys = {**settings, "dataset_name": comparisons, **self.evaluated}
        return self.train(name, "reward-model", start, keys, inputs=inputs)

    def adversarial_reward_model(self, prefix: str, policy: Model, start: Model) -> Place:
        """Add the reward model against the present policy, and the rows that it is trained on."""
        loop = self.loop
        golden = loop.golden or loop.reward_prompts
        sampling = {**loop.sampling, "prompts": loop.reward_prompts}
        samples = self.generate(f"{prefix}/reward-generate", policy, sampling)
        keys = {"candidates": samples, "golden": golden, "form": "adversarial", "on_unmatched": loop.on_unmatched}
        rows = self.add(f"{prefix}/reward-rows", "build-rows", keys, outputs=ROWS, inputs=(golden,))
        datasets = [{"path": loop.comparisons}, {"path": Place(f"{rows.path}/train.jsonl")}]
        keys = {**loop.reward_training, "datasets": datasets, **self.evaluated}
        inputs = (loop.comparisons, loop.test_comparisons)
        return self.train(f"{prefix}/reward-train", "adversarial-reward-model", start, keys, inputs=inputs)

    def align(self, prefix: str, number: int, policy: Model, scorer: Model) -> Place:
        """Add the policy's training on scores of its answers to its own prompts."""
        loop = self.loop
        candidates = self.generate(f"{prefix}/generate", policy, {**loop.sampling, "prompts": loop.policy_prompts})
        ranking = {**_reward_ranking(loop, scorer), "score_name": SCORE}
        ranked = self.rank(f"{prefix}/rank", candidates, ranking)
        keys: dict[str, Any] = {"candidates": ranked, "score": SCORE}
        if loop.aligner in PAIR_ALIGNERS:
            tool, more = "build-pairs", {**loop.selection, "output_format": "jsonl"}
        else:
            tool, more = "build-rows", {"form": "sft" if loop.aligner == "rjs" else "comparisons"}
        rows = self.add(f"{prefix}/{tool}", tool, {**keys, **more}, outputs=ROWS)
        training = {**loop.policy_training, "dataset_name": rows}
        if loop.policy_learning_rates is not None:
            training["learning_rate"] = loop.policy_learning_rates[number - 1]
        trainer = "sft" if loop.aligner == "rjs" else loop.aligner
        return self.train(f"{prefix}/train", trainer, policy, training)

    def answers(self, prefix: str, policy: Model) -> None:
        """Add answers to the test prompts, sampled alike for every policy."""
        defaults = {"for_evaluation": True, "num_samples": 1}
        sampling = {**defaults, **self.loop.test_sampling, "prompts": self.loop.test_prompts}
        self.generate(f"{prefix}/answers", policy, sampling)
