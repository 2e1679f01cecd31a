"""SPPO and GPO against iterated DPO and WPO, at the same KL."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from benchmarks.study.experiments.base import SMALLEST, Experiment, by_seed, grouped, measured
from benchmarks.study.lab import Lab
from benchmarks.study.results import Row
from benchmarks.study.self_play import ITERATIONS, play, tables, train_ranker
from benchmarks.study.statistics import Claim, bracket, difference, score_at, shared_kl
from prefopt.pages import table

BETAS = {
    "sppo": (0.1, 0.2, 0.4, 0.8),
    "gpo": (0.5, 1.0, 2.0, 4.0),
    "dpo": (0.1, 0.3, 1.0, 3.0),
    "wpo": (0.1, 0.3, 1.0, 3.0),
}
RISES = 5  # seeds that "rises from iteration to iteration" is planned for


class Iterated(Experiment):
    """Self-play against iterated pairs."""

    name = "iterated"
    title = "SPPO and GPO against iterated DPO and WPO"
    seeds = 16
    design = f"""For each seed a general preference model (d = 4) is trained on annotated comparisons of the start's
kind of answers and then ranks for all methods. {ITERATIONS} iterations, each with fresh prompts, five samples of the
present policy a prompt, one pair a prompt (SPPO: highest and lowest mean win probability; GPO: mean score; DPO and
WPO: highest and lowest mean win probability), and the policy at the start of the iteration as the reference. On seed
0 every method runs with four betas. The KL to the start at which methods are compared is the middle of the range
that all of them reach after the last iteration on seed 0; further seeds run each method with the two betas on either
side of it, and their scores are interpolated linearly in KL within each seed. A seed whose two runs do not enclose
that KL is left out of that method's comparisons, never extrapolated. The learning rate is the same for all."""
    reading = """Judged by the true rule, never by the preference model. "Rises" is about the run with the smaller of
the two betas. Differences between methods count only at the same KL, since each beta means something else in each
loss."""
    real_scale = """The preference here has one true scale, so a Bradley-Terry model would do; SPPO's and GPO's
advantage over DPO is claimed for preferences that have none (see the next experiment). The papers run 20,000 prompts
an iteration against a PairRM or GPM that was trained on other models' answers, where its errors, not the loss, may
decide."""

    def choose(self, lab: Lab) -> Any:
        """Choose the KL of the comparison, and two betas for each method."""
        if lab.quick:
            return {"kl": None, "betas": {method: BETAS[method][1:2] for method in ("sppo", "dpo")}}
        found = {
            method: {
                beta: self._unit(lab, "choose", 0, method, beta)["outcome"]["iterations"][-1]["kl"] for beta in betas
            }
            for method, betas in BETAS.items()
        }
        try:
            kl = shared_kl([(min(each.values()), max(each.values())) for each in found.values()])
        except ValueError:  # the page then has no comparison at the same KL
            return {"kl": None, "betas": {method: betas[1:3] for method, betas in BETAS.items()}}
        return {"kl": kl, "betas": {method: bracket(each, kl) for method, each in found.items()}}

    def run_seed(self, lab: Lab, chosen: Any, seed: int) -> None:
        """Run every method with its betas."""
        for method, betas in chosen["betas"].items():
            for beta in betas:
                self._unit(lab, "measure", seed, method, beta)

    def _unit(self, lab: Lab, stage: str, seed: int, method: str, beta: float) -> Row:
        def work() -> Row:
            start = lab.policy(seed)
            ranker, accuracy = lab.once(
                ("ranker", seed),
                lambda: self.ranker(lab, seed),
            )
            before = lab.once(("score", seed), lambda: lab.score(start, start, seed))
            after = play(
                lab, start, ranker, seed, method=method, beta=beta, measure=lambda p: lab.score(p, start, seed)
            )
            return {"iterations": [before, *after], "ranker_accuracy": accuracy}

        return self.unit(lab, stage, seed, work, method=method, beta=beta)

    @staticmethod
    def ranker(lab: Lab, seed: int) -> tuple[Any, float]:
        """Train the preference model that ranks for all methods; and its share of right orders on held-out pairs."""
        rows = lab.comparisons(seed, 2 * lab.scale.comparisons)
        model = train_ranker(lab, lab.policy(seed), rows, seed, loss_type="general_preference", rate=2.0)
        held_out = lab.comparisons(seed, 400, errors=0.0, skip=3000, prompts=500)
        answers = [[row["chosen"][0]["content"], row["rejected"][0]["content"]] for row in held_out]
        found = tables(lab, model, [row["prompt"][0]["content"] for row in held_out], answers)
        return model, sum(float(each[0, 1] > 0) for each in found) / len(found)

    def claims(self, rows: Sequence[Row], chosen: Any) -> list[Claim]:
        """Return the claims on rises and on differences at the same KL."""
        result = []
        for method in ("sppo", "gpo"):
            rewards = by_seed(rows, _rewards, method=method, beta=chosen["betas"][method][0])
            for number, name in enumerate(("start", "iteration 1", "iteration 2")):
                after, before = ({seed: found[t] for seed, found in rewards.items()} for t in (number + 1, number))
                result.append(
                    Claim(
                        f"{method.upper()} rises in iteration {number + 1}",
                        f"iteration {number + 1} - {name}",
                        difference(after, before),
                        SMALLEST,
                        RISES,
                    )
                )
        if chosen["kl"] is not None:
            at = {method: self.at_kl(rows, method, chosen["kl"]) for method in BETAS}
            for mine, theirs in (("sppo", "dpo"), ("gpo", "dpo"), ("gpo", "sppo"), ("wpo", "dpo")):
                other = f"iterated {theirs.upper()}" if theirs == "dpo" else theirs.upper()
                result.append(
                    Claim(
                        f"{mine.upper()} is better than {other} at the same KL",
                        f"{mine.upper()} - {theirs.upper()} at {chosen['kl']:.2f} nats",
                        difference(at[mine], at[theirs]),
                        SMALLEST,
                        self.seeds,
                    )
                )
        return result

    @staticmethod
    def at_kl(rows: Sequence[Row], method: str, kl: float) -> dict[int, float]:
        """Interpolate each seed's final score at this KL, where its runs enclose it."""
        points: dict[int, list[tuple[float, float]]] = {}
        for (seed,), found in grouped([r for r in rows if r["settings"]["method"] == method], "seed").items():
            points[seed] = [
                (row["outcome"]["iterations"][-1]["kl"], row["outcome"]["iterations"][-1]["reward"]) for row in found
            ]
        scores = {seed: score_at(each, kl) for seed, each in points.items()}
        return {seed: score for seed, score in scores.items() if score is not None}

    def tables(self, rows: Sequence[Row]) -> list[str]:
        """Return means after each iteration."""
        lines = []
        for (method, beta), found in grouped(rows, "method", "beta").items():
            cells = []
            for iteration in range(ITERATIONS + 1):
                for metric, digits in (("reward", 3), ("kl", 2), ("words", 2)):
                    values = [row["outcome"]["iterations"][iteration][metric] for row in found]
                    cells.append(f"{sum(values) / len(values):.{digits}f}")
            shown = [" / ".join(cells[3 * number : 3 * number + 3]) for number in range(ITERATIONS + 1)]
            lines.append([method, f"{beta:g}", *shown, len(found)])
        head = ["method", "beta", *("start" if not n else f"iteration {n}" for n in range(ITERATIONS + 1)), "seeds"]
        known = {row["settings"]["seed"]: row["outcome"]["ranker_accuracy"] for row in measured(rows)}
        accuracy = sum(known.values()) / len(known)
        note = f"The preference models order {accuracy:.3f} of held-out pairs of the start's kind of answers rightly."
        return ["True reward / KL / words:", "", *table(head, lines), "", note]

    def draw(self, axes: Any, rows: Sequence[Row]) -> None:
        """Draw reward over KL along the iterations, mean over seeds, one line a method and beta."""
        colours = dict(zip(BETAS, ("C0", "C1", "C2", "C3")))
        for (method, beta), found in grouped(rows, "method", "beta").items():
            points = [
                [
                    sum(row["outcome"]["iterations"][t][metric] for row in found) / len(found)
                    for metric in ("kl", "reward")
                ]
                for t in range(ITERATIONS + 1)
            ]
            x, y = zip(*points)
            axes.plot(
                x, y, marker="o", markersize=3, linewidth=1, color=colours[method], label=f"{method}, beta {beta:g}"
            )
        axes.set(xlabel="KL to the start, nats an answer", ylabel="true reward")
        axes.legend(fontsize="small")

    def check(self, rows: Sequence[Row]) -> None:
        """Assert that self-play leaves the start, and that every iteration was measured."""
        for method in BETAS:
            for seed, found in by_seed(rows, lambda row: row["outcome"]["iterations"], method=method).items():
                kls = [each["kl"] for each in found]
                assert len(kls) == ITERATIONS + 1 and kls[0] == 0 and kls[-1] > 0.005, (method, seed, kls)
                assert all(abs(a - b) > 1e-6 for a, b in pairwise(kls)), (method, seed, kls)


def _rewards(row: Row) -> list[float]:
    return [each["reward"] for each in row["outcome"]["iterations"]]
