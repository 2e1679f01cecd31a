"""Adversarial preference optimization against a fixed reward model that sees the same golden answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from benchmarks.study.experiments.base import SMALLEST, Experiment, best, by_seed, grouped, mean
from benchmarks.study.lab import Lab, pair_row
from benchmarks.study.results import Row
from benchmarks.study.self_play import train_round
from benchmarks.study.statistics import Claim, difference
from benchmarks.study.world import ANNOTATED, assistant, draw_answer, golden_answer, true_reward, user
from prefopt import (
    AdversarialRewardConfig,
    AdversarialRewardTrainer,
    DPOConfig,
    DPOTrainer,
    RewardConfig,
    RewardTrainer,
)
from prefopt.pages import table

ROUNDS, SAMPLES, COEFFICIENT = 3, 4, 1.0
WAYS = ("no loop", "fixed", "fixed + golden", "loop")
BETAS = (0.3, 1.0)
SMALLEST_ACCURACY = 0.02


class Adversarial(Experiment):
    """APO, and the control that it lacks."""

    name = "adversarial"
    title = "Adversarial preference optimization"
    seeds = 5
    design = f"""Annotators compare only short answers (at most {ANNOTATED} words), one in ten wrong, so a reward
model of theirs has not seen that answers can be too long. Golden answers name all five things once. Four ways to the
same policy updates (DPO, best against worst of {SAMPLES} samples under the reward model, {ROUNDS} rounds of fresh
prompts): *no loop*, the reward model of the comparisons, and all pairs drawn from the start at once; *fixed*, the
same reward model, samples of the present policy in each round; *fixed + golden*, a reward model trained once on the
comparisons and on golden answers against samples of the *start*; *loop* (APO), a reward model trained anew each
round on the comparisons and on the same golden answers against samples of the *present* policy. The third is the
control that a comparison of the second with the fourth lacks: the same supervision, but not the game. Each reward
model starts from the start policy's backbone (`adversarial_coeff: {COEFFICIENT:g}`). DPO's beta (two) is chosen on
seed 0 for *fixed + golden*."""
    reading = """What the loop adds is *loop* minus *fixed + golden*; *loop* minus *fixed* mixes it with what golden
answers add. Accuracies are on held-out comparisons of short answers (human-like, without errors) and on comparisons
of the last policy's own samples."""
    real_scale = """Golden answers are perfect here; the paper's are GPT-4's. A game of three rounds on a policy of
two layers is over sooner than one between large models, and a reward model of this size forgets nothing that matters
to it."""

    def choose(self, lab: Lab) -> Any:
        """Choose beta."""
        if lab.quick:
            return BETAS[0]
        rows = [self._unit(lab, "choose", 0, "fixed + golden", beta) for beta in BETAS]
        return best(rows)["settings"]["beta"]

    def run_seed(self, lab: Lab, chosen: Any, seed: int) -> None:
        """Run the four ways."""
        for way in WAYS if not lab.quick else ("fixed", "loop"):
            self._unit(lab, "measure", seed, way, chosen)

    def _unit(self, lab: Lab, stage: str, seed: int, way: str, beta: float) -> Row:
        return self.unit(lab, stage, seed, lambda: self.play(lab, seed, way, beta), way=way, beta=beta)

    def play(self, lab: Lab, seed: int, way: str, beta: float) -> Row:
        """Play one way and score the policy after each round."""
        policy = start = lab.policy(seed)
        reward_model, rounds = None, [lab.score(start, start, seed)]
        for number in range(ROUNDS):
            if reward_model is None or way == "loop":
                golden = way in ("loop", "fixed + golden")
                reward_model = self.reward_model(lab, seed, policy if golden else None)
            if way == "no loop" and number > 0:
                continue
            rows = self.pairs(lab, reward_model, policy, seed, number, ROUNDS if way == "no loop" else 1)
            policy = train_round(lab, DPOTrainer, DPOConfig, policy, rows, beta=beta, seed=seed)
            rounds.append(lab.score(policy, start, seed))
        return {**rounds[-1], "rounds": rounds, **self.accuracies(lab, reward_model, policy, seed)}

    @staticmethod
    def reward_model(lab: Lab, seed: int, opponent: Any | None) -> Any:
        """Train a reward model on the comparisons and, against an opponent's samples, on golden answers."""
        settings: dict[str, Any] = {"num_train_epochs": 2, "seed": seed}
        rows = [_scored(row) for row in lab.comparisons(seed, lab.scale.comparisons, longest=ANNOTATED)]
        if opponent is None:
            return lab.train(RewardTrainer, RewardConfig, lab.policy(seed), rows, **settings).model
        prompts, rng = lab.prompts(seed, lab.scale.prompts, skip=1000), random.Random(f"golden {seed}")
        for prompt, texts in zip(prompts, lab.sample(opponent, prompts, SAMPLES, seed=50 + seed)):
            golden = golden_answer(prompt, rng)
            rows += [_scored(pair_row(prompt, golden, text), adversarial=True) for text in texts if text != golden]
        return lab.train(
            AdversarialRewardTrainer,
            AdversarialRewardConfig,
            lab.policy(seed),
            rows,
            adversarial_coeff=COEFFICIENT,
            num_samples=SAMPLES,
            **settings,
        ).model

    @staticmethod
    def pairs(lab: Lab, reward_model: Any, policy: Any, seed: int, number: int, rounds: int) -> list[Row]:
        """Draw best against worst under the reward model, for the prompts of some rounds."""
        count = lab.scale.prompts
        prompts = lab.prompts(seed, rounds * count, skip=number * count)
        answers = lab.sample(policy, prompts, SAMPLES, seed=100 * seed + number)
        values = lab.read(reward_model, [(p, text) for p, texts in zip(prompts, answers) for text in texts])
        rows = []
        for prompt, texts, scores in zip(prompts, answers, values.view(len(prompts), SAMPLES).tolist()):
            high, low = scores.index(max(scores)), scores.index(min(scores))
            if texts[high] != texts[low]:
                rows.append(pair_row(prompt, texts[high], texts[low]))
        return rows

    @staticmethod
    def accuracies(lab: Lab, reward_model: Any, policy: Any, seed: int) -> Row:
        """Share of comparisons in the right order: held-out short ones, and of the policy's own samples."""
        rng = random.Random(f"test {seed}")
        prompts = lab.prompts(seed, 500, skip=3000)
        human = [(p, [draw_answer(p, rng, ANNOTATED) for _ in range(2)]) for p in rng.choices(prompts, k=600)]
        tests = lab.test_prompts(seed)
        own = list(zip(tests, lab.sample(policy, tests, 2, seed=60 + seed)))
        found = {}
        for name, asked in (("human_accuracy", human), ("own_accuracy", own)):
            values = lab.read(reward_model, [(p, text) for p, texts in asked for text in texts]).view(-1, 2)
            gaps = [true_reward(p, texts[0]) - true_reward(p, texts[1]) for p, texts in asked]
            right = [float((a - b) * gap > 0) for (a, b), gap in zip(values.tolist(), gaps) if gap]
            found[name] = sum(right) / len(right) if right else None
        return found

    def claims(self, rows: Sequence[Row], chosen: Any) -> list[Claim]:
        """Return the claims on the loop."""
        reward, human = (
            {way: by_seed(rows, metric, way=way) for way in WAYS} for metric in ("reward", "human_accuracy")
        )

        def claim(text: str, mine: str, theirs: str) -> Claim:
            return Claim(text, f"{mine} - {theirs}", difference(reward[mine], reward[theirs]), SMALLEST, self.seeds)

        return [
            claim("The loop beats a fixed reward model", "loop", "fixed"),
            claim("The loop beats a fixed one with the same golden answers", "loop", "fixed + golden"),
            claim("Golden answers help a fixed reward model", "fixed + golden", "fixed"),
            claim("Fresh samples beat none", "fixed", "no loop"),
            Claim(
                "The loop's reward model is more accurate on human-like pairs",
                "accuracy, loop - fixed",
                difference(human["loop"], human["fixed"]),
                SMALLEST_ACCURACY,
                self.seeds,
            ),
        ]

    def tables(self, rows: Sequence[Row]) -> list[str]:
        """Return means by way."""
        lines = []
        for (way,), found in grouped(rows, "way").items():
            start = sum(row["outcome"]["rounds"][0]["reward"] for row in found) / len(found)
            known = [row["outcome"]["own_accuracy"] for row in found if row["outcome"]["own_accuracy"] is not None]
            lines.append(
                [
                    way,
                    f"{start:.3f}",
                    f"{mean(found, 'reward'):.3f}",
                    f"{mean(found, 'kl'):.2f}",
                    f"{mean(found, 'words'):.2f}",
                    f"{mean(found, 'human_accuracy'):.3f}",
                    f"{sum(known) / len(known):.3f}" if known else "",
                    len(found),
                ]
            )
        head = ["way", "true reward: start", "end", "KL", "words", "accuracy: human-like", "own samples", "seeds"]
        return table(head, lines)

    def draw(self, axes: Any, rows: Sequence[Row]) -> None:
        """Draw true reward after each round, one line a seed and their mean."""
        for number, way in enumerate(WAYS):
            found = [
                [each["reward"] for each in rounds]
                for rounds in by_seed(rows, lambda r: r["outcome"]["rounds"], way=way).values()
            ]
            if found:
                x = [0, ROUNDS] if way == "no loop" else range(ROUNDS + 1)
                for each in found:
                    axes.plot(x, each, color=f"C{number}", alpha=0.25, linewidth=1)
                axes.plot(
                    x, [sum(column) / len(column) for column in zip(*found)], color=f"C{number}", marker="o", label=way
                )
        axes.set(xlabel="round", ylabel="true reward", xticks=range(ROUNDS + 1))
        axes.legend(fontsize="small")

    def check(self, rows: Sequence[Row]) -> None:
        """Assert that reward models are better than chance on what they were trained on."""
        found = by_seed(rows, "human_accuracy", way="fixed")
        assert found and all(value > 0.55 for value in found.values()), found


def _scored(row: Row, *, adversarial: bool = False) -> Row:
    """Make a comparison row of a pair."""
    prompt, chosen, rejected = (row[name] for name in ("prompt", "chosen", "rejected"))
    responses = [assistant(chosen[0]["content"]), assistant(rejected[0]["content"])]
    asked = user(prompt[0]["content"])
    return {"prompt": asked, "responses": responses, "scores": [1.0, 0.0], "is_adversarial": adversarial}
