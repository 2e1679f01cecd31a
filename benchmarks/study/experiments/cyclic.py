"""General preference models against Bradley-Terry as preferences become cyclic."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.study.experiments.base import Experiment, best, by_seed, grouped, mean
from benchmarks.study.lab import START_WRITER, Lab, annotate, pair_row
from benchmarks.study.results import Row
from benchmarks.study.self_play import ITERATIONS, play, tables, train_ranker
from benchmarks.study.statistics import Claim, contrast, difference
from benchmarks.study.world import ERRORS, FLAVOURS, WORDS, draw_answer, flavour
from prefopt.pages import table

KINDS_ASKED = ("animals", "plants", "tools")
SHARES = {"0": 0, "1/3": 1, "1": 3}  # how many of these kinds have the cyclic rule
MODELS = ("general_preference", "bradley_terry")
NAMES = {"general_preference": "GPM", "bradley_terry": "BT"}
WRITER = replace(START_WRITER, goes_on=0.0)  # one word an answer
RATES = (1.0, 3.0)
BETA = 0.2
COMPARISONS = 1200  # at every scale: with far fewer, no model learns a circle
METRICS = {"accuracy": "accuracy", "exploit": "exploitability", "mixture": "the mixture's exploitability"}
SMALLEST_ACCURACY, SMALLEST_EXPLOIT = 0.02, 0.02


def is_cyclic(prompt: str, share: str) -> bool:
    """Whether a prompt is judged by the cyclic rule: by its kind."""
    return prompt.split()[0] in KINDS_ASKED[: SHARES[share]]


def asked_prompts(prompts: Sequence[str]) -> list[str]:
    """Keep the prompts of the three kinds that this experiment asks for."""
    return [prompt for prompt in prompts if prompt.split()[0] in KINDS_ASKED]


def beats(first: int | None, second: int | None) -> float:
    """The probability that an answer of one flavour beats another's under the cyclic rule; one without loses."""
    if first == second:
        return 0.5
    if first is None or second is None:
        return ERRORS if first is None else 1 - ERRORS
    return 1 - ERRORS if (first - second) % FLAVOURS == 1 else ERRORS


def compare(prompt: str, texts: Sequence[str], share: str, rng: random.Random, *, errors: float) -> Row | None:
    """Annotate two answers by the prompt's rule, wrong in `errors`; None where they tie."""
    if not is_cyclic(prompt, share):
        return annotate(prompt, texts, rng, errors=errors)
    first, second = texts
    if flavour(first) == flavour(second):
        return None
    wins = beats(flavour(first), flavour(second)) > 0.5
    if rng.random() < errors:
        wins = not wins
    return pair_row(prompt, *((first, second) if wins else (second, first)))


def best_response(masses: Sequence[float]) -> float:
    """The win rate of the best pure reply under the cyclic rule, minus 1/2.

    Args:
        masses: probability of each flavour, then that of answers without one.
    """
    flavours: list[int | None] = [*range(FLAVOURS), None]
    replies = [sum(m * beats(k, j) for m, j in zip(masses, flavours)) for k in range(FLAVOURS)]
    return max(replies) - 0.5


class Cyclic(Experiment):
    """GPM against Bradley-Terry."""

    name = "cyclic"
    title = "GPM against Bradley-Terry"
    seeds = 8
    design = f"""In this experiment a policy is taught to answer with one word. On a share of the prompts (0, 1/3, 1;
none, one or all of three kinds) the true rule is cyclic: the flavour of the (first) word decides, 1 beats 0, 2 beats
1, 0 beats 2; on the others the true reward decides. Annotators err in one case of ten under both. A general
preference model (d = 4, tau 0.1) and a Bradley-Terry model (tau 1) are trained on the same comparisons; each has the
learning rate (two) with the higher held-out accuracy on seed 0, where a third is cyclic. Accuracy is on held-out
comparisons without errors. Then each serves as the ranker of {ITERATIONS} iterations of SPPO at the same beta
({BETA:g}). Exploitability is the win rate of the best reply to the policy under the *true* rule, minus 1/2. Only the
first word counts under the cyclic rule, so it is computed exactly, from the policy's first-token probabilities, for
each prompt against the best of the three flavours: 0 is unbeatable, {0.5 - ERRORS:g} is a policy that always gives
the same flavour. The start leans to some words, so it can be exploited."""
    reading = """A scalar can order at most two of the three pairs of a circle: with these flavours' frequencies at
most 0.77 of all comparisons. Whether that matters to the policy is another question: the last iterate of self-play
may circle even with the right preferences, so the exploitability of the last policy and that of the mixture of the
three iterations (the average that the theory speaks of) are both given."""
    real_scale = """How cyclic human preferences are is not known from this; the share is set by hand here. A cycle
that the first word decides is easy to learn for a general preference model, and for an opponent easy to exploit."""

    def choose(self, lab: Lab) -> Any:
        """Choose each model's learning rate, where a third of the prompts is cyclic."""
        if lab.quick:
            return dict.fromkeys(MODELS, RATES[0])
        return {
            model: best(
                [self._unit(lab, "choose", 0, "1/3", model, rate, policy=False) for rate in RATES],
                "accuracy",
                within=0.0,
            )["settings"]["rate"]
            for model in MODELS
        }

    def run_seed(self, lab: Lab, chosen: Any, seed: int) -> None:
        """Run both models at every share."""
        for share in SHARES if not lab.quick else ("1",):
            for model in MODELS:
                policy = not lab.quick or model == MODELS[0]  # the slow part once
                self._unit(lab, "measure", seed, share, model, chosen[model], policy=policy)

    def _unit(self, lab: Lab, stage: str, seed: int, share: str, model: str, rate: float, *, policy: bool) -> Row:
        def work() -> Row:
            start = lab.policy(seed, WRITER)
            ranker = train_ranker(
                lab, start, self.comparisons(lab, seed, share), seed, loss_type=model, rate=rate, pooling="last"
            )
            found = self.accuracies(lab, ranker, seed, share)
            if not policy:
                return found

            def measure(trained: Any) -> Row:
                return lab.score(trained, start, seed, asked_prompts) | {
                    "masses": self.masses(lab, trained, seed, share)
                }

            steps = [
                measure(start),
                *play(lab, start, ranker, seed, method="sppo", beta=BETA, measure=measure, keep=asked_prompts),
            ]
            masses = torch.tensor([step.pop("masses") for step in steps])  # (iterations + 1, prompts, flavours + 1)
            exploits = [_mean([best_response(each) for each in part.tolist()]) for part in masses]
            mixture = _mean([best_response(each) for each in masses[1:].mean(0).tolist()])
            return found | {**steps[-1], "exploits": exploits, "exploit": exploits[-1], "mixture": mixture}

        settings = {"share": share, "model": model, "rate": rate, "policy": policy, "rule": "kinds", "pooling": "last"}
        return self.unit(lab, stage, seed, work, **settings, beta=BETA)

    @staticmethod
    def comparisons(lab: Lab, seed: int, share: str) -> list[Row]:
        """Draw annotated comparisons of the start's kind of answers."""
        rng = random.Random(f"cyclic {seed} {share}")
        prompts = asked_prompts(lab.prompts(seed, 1000, skip=2000))
        rows: list[Row] = []
        while len(rows) < COMPARISONS:
            prompt = rng.choice(prompts)
            texts = [draw_answer(prompt, rng, writer=WRITER) for _ in range(2)]
            row = compare(prompt, texts, share, rng, errors=ERRORS)
            rows += [row] if row is not None else []
        return rows

    @staticmethod
    def accuracies(lab: Lab, ranker: Any, seed: int, share: str) -> Row:
        """Share of held-out comparisons in the right order: all, cyclic ones, others."""
        rng = random.Random(f"held out {seed} {share}")
        prompts = asked_prompts(lab.prompts(seed, 500, skip=3000))
        asked, answers = [], []
        while len(asked) < 600:
            prompt = rng.choice(prompts)
            row = compare(prompt, [draw_answer(prompt, rng, writer=WRITER) for _ in range(2)], share, rng, errors=0)
            if row is not None:
                asked.append(prompt)
                answers.append([row["chosen"][0]["content"], row["rejected"][0]["content"]])
        right = [float(logits[0, 1] > 0) for logits in tables(lab, ranker, asked, answers)]
        cyclic = [value for prompt, value in zip(asked, right) if is_cyclic(prompt, share)]
        return {"accuracy": _mean(right), "cyclic_accuracy": _mean(cyclic) if cyclic else None}

    @staticmethod
    @torch.no_grad()
    def masses(lab: Lab, policy: Any, seed: int, share: str) -> list[list[float]]:
        """Return, for each test prompt (as if it had the cyclic rule), the mass of each flavour and of none."""
        known = lab.tokenizer.get_vocab()
        prompts = asked_prompts(lab.test_prompts(seed))
        ids, mask, _ = (tensor.to(policy.device) for tensor in lab.encode([(prompt, "") for prompt in prompts]))
        first = policy(ids[:, :-1], attention_mask=mask[:, :-1]).logits[:, -1].float().softmax(-1)
        columns = [[known[word] for word in WORDS if flavour(word) == k] for k in range(FLAVOURS)]
        masses = torch.stack([first[:, each].sum(1) for each in columns], dim=1)
        return torch.cat([masses, 1 - masses.sum(1, keepdim=True)], dim=1).tolist()

    def claims(self, rows: Sequence[Row], chosen: Any) -> list[Claim]:
        """Return the claims on accuracy and exploitability."""

        def gap(metric: str, share: str) -> tuple[dict[int, float], dict[int, float]]:
            return tuple(by_seed(rows, metric, share=share, model=model) for model in MODELS)

        def claim(text: str, metric: str, share: str, smallest: float, **more: Any) -> Claim:
            return Claim(
                text,
                f"GPM - BT, {METRICS[metric]}, share {share}",
                difference(*gap(metric, share)),
                smallest,
                self.seeds,
                **more,
            )

        return [
            claim(
                "Without cycles the models are as accurate as each other",
                "accuracy",
                "0",
                SMALLEST_ACCURACY,
                same=True,
            ),
            claim("GPM is more accurate where a third is cyclic", "accuracy", "1/3", SMALLEST_ACCURACY),
            claim("GPM is more accurate where all is cyclic", "accuracy", "1", SMALLEST_ACCURACY),
            Claim(
                "The gap in accuracy grows with the share",
                "gap at 1 - gap at 0",
                difference(contrast(*gap("accuracy", "1")), contrast(*gap("accuracy", "0"))),
                SMALLEST_ACCURACY,
                self.seeds,
            ),
            claim("GPM's policy is less exploitable where all is cyclic", "exploit", "1", SMALLEST_EXPLOIT, sign=-1),
            claim("So is the mixture of its iterations", "mixture", "1", SMALLEST_EXPLOIT, sign=-1),
        ]

    def tables(self, rows: Sequence[Row]) -> list[str]:
        """Return means by share and model."""
        lines = []
        for (share, model), found in grouped(rows, "share", "model").items():
            cyclic = f"{mean(found, 'cyclic_accuracy'):.3f}" if share != "0" else ""
            started = sum(row["outcome"]["exploits"][0] for row in found) / len(found)
            exploits = [f"{value:.3f}" for value in (started, mean(found, "exploit"), mean(found, "mixture"))]
            lines.append(
                [
                    share,
                    NAMES[model],
                    f"{found[0]['settings']['rate']:g}",
                    f"{mean(found, 'accuracy'):.3f}",
                    cyclic,
                    *(exploits if share != "0" else ["", "", ""]),
                    f"{mean(found, 'reward'):.3f}",
                    f"{mean(found, 'kl'):.2f}",
                    f"{mean(found, 'words'):.2f}",
                    len(found),
                ]
            )
        head = [
            "cyclic",
            "model",
            "rate",
            "accuracy",
            "on cyclic prompts",
            "exploitability: start",
            "last policy",
            "mixture",
            "true reward",
            "KL",
            "words",
            "seeds",
        ]
        note = (
            "Exploitability is of first words on all test prompts, as if each had the cyclic rule (at share 1 it has)."
        )
        return [*table(head, lines), "", note]

    def draw(self, axes: Any, rows: Sequence[Row]) -> None:
        """Draw exploitability after each iteration at share 1."""
        for model in MODELS:
            found = list(by_seed(rows, lambda row: row["outcome"]["exploits"], share="1", model=model).values())
            for each in found:
                axes.plot(range(len(each)), each, color=f"C{MODELS.index(model)}", alpha=0.25, linewidth=1)
            if found:
                axes.plot(
                    range(ITERATIONS + 1),
                    [_mean(column) for column in zip(*found)],
                    color=f"C{MODELS.index(model)}",
                    marker="o",
                    label=f"policy trained on {NAMES[model]}",
                )
        axes.set(xlabel="iteration", ylabel="exploitability (share 1)", xticks=range(ITERATIONS + 1), ylim=(0, 0.42))
        axes.legend(fontsize="small")

    def check(self, rows: Sequence[Row]) -> None:
        """Assert that GPM orders circles and Bradley-Terry cannot."""
        found = {model: by_seed(rows, "accuracy", share="1", model=model) for model in MODELS}
        for seed, accuracy in found["general_preference"].items():
            assert accuracy > found["bradley_terry"][seed] + 0.05, (seed, found)
        exploits = by_seed(rows, "exploit", policy=True)
        assert exploits and all(0 <= value <= 0.4 + 1e-6 for value in exploits.values())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
