"""The adversarial loop: a reward model learns to tell golden answers from the policy's, the policy learns from the reward model, again and again.

An iteration: the policy answers the reward model's prompts -> adversarial pairs against golden answers -> the reward model, with human comparisons ->
the policy answers prompts of its own -> scores -> rows -> the policy -> answers to test prompts -> evaluation by a reward model of its own -> report.

Reference: arXiv 2311.08045.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.evaluation.evaluate import EVALUATION_FILE
from prefopt.launch import LAUNCH_KEYS
from prefopt.pipelines.adversarial_data import check_data
from prefopt.pipelines.adversarial_loop import AdversarialLoop
from prefopt.pipelines.commands import Commands, Place
from prefopt.pipelines.stages import Stage

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
