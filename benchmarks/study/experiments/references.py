"""Several references against single ones, one of them damaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.study.experiments.base import SMALLEST, Experiment, best, by_seed, grouped, mean
from benchmarks.study.lab import START_WRITER, Lab
from benchmarks.study.results import Row
from benchmarks.study.statistics import Claim, difference, reach
from benchmarks.study.world import WORDS
from prefopt import MultiReferenceDPOConfig, MultiReferenceDPOTrainer
from prefopt.pages import table

REFERENCES = ("own", "better", "worse", "damaged")
WRITERS = {
    "better": replace(START_WRITER, on_topic=0.95, remembers=0.95),
    "worse": replace(START_WRITER, on_topic=0.5, remembers=0.2),
}
WEIGHTINGS = ("uniform", "arwc", "vdw", "vaw", "swcw")
BETAS = (0.1, 0.3, 1.0)
QUICK_WAYS = ("uniform", "vdw", "own", "damaged", "none")
HELD_OUT = 0.2  # share of the pairs from which vdw and vaw take their weights


class References(Experiment):
    """Multi against single reference."""

    name = "references"
    title = "Several references against single ones"
    seeds = 10
    design = """References are taught from scratch: the policy's own start, a better one (its writer stays on the
topic and repeats less; its true reward is given below), a worse one, and a damaged one: the start reading every word
as another one, as token ids of a wrong vocabulary would. Pairs are best and worst of four samples of the start under
the true rule, one in ten swapped. DPO on sums (`multi_dpo`) with all four references under five weightings, with
each reference alone, and with none (a reference that gives every text the same probability). Every run trains on
four fifths of the pairs; vdw and vaw take their weights from the rest. Beta (three) is chosen on seed 0 for DPO
against the own start, and used throughout."""
    reading = """"Spread" is how far beta times the references' margins lie apart, in nats, mean over pairs: near 0
nobody could say which reference was used; at 1 the loss of a pair changes by a factor. The single reference to beat
is the own start, which needs no further model; the best of the singles is known only afterwards."""
    real_scale = """Real references share data and are never damaged this plainly; they differ in tokenizer and
length, which the health cards and `normalize` are about (docs/multi_reference.md). Beta times length is in the
hundreds of nats there, so spread is rarely small."""

    def choose(self, lab: Lab) -> Any:
        """Choose beta for DPO against the own start."""
        if lab.quick:
            return BETAS[1]
        return best([self._unit(lab, "choose", 0, "own", beta) for beta in BETAS])["settings"]["beta"]

    def run_seed(self, lab: Lab, chosen: Any, seed: int) -> None:
        """Run all weightings, every single reference, and none."""
        for way in (*WEIGHTINGS, *REFERENCES, "none") if not lab.quick else QUICK_WAYS:
            self._unit(lab, "measure", seed, way, chosen)

    def _unit(self, lab: Lab, stage: str, seed: int, way: str, beta: float) -> Row:
        def work() -> Row:
            start, (rows, quality) = lab.policy(seed), lab.once(("references", seed), lambda: self.pairs(lab, seed))
            several, held_out = way in WEIGHTINGS, way in ("vdw", "vaw")
            numbers = list(range(len(REFERENCES))) if several else [REFERENCES.index(way)] if way != "none" else []
            done = lab.train(
                MultiReferenceDPOTrainer,
                MultiReferenceDPOConfig,
                start,
                [_keep(row, numbers) for row in (rows if held_out else rows[: len(rows) - self._held_out(lab)])],
                beta=beta,
                mode="multi_dpo",
                weighting=way if several else "uniform",
                accept_outliers=True,
                seed=seed,
                vocab_metrics=False,
                logging_strategy="steps",
                logging_steps=1,
                **({"validation_rows": self._held_out(lab)} if held_out else {}),
            )
            logged = [entry for entry in done.state.log_history if "references/spread" in entry]
            weights = [_mean([e[f"references/weight/{k}"] for e in logged]) for k in range(max(1, len(numbers)))]
            return lab.score(done.model, start, seed) | {
                "spread": _mean([entry["references/spread"] for entry in logged]),
                "weights": dict(zip([REFERENCES[n] for n in numbers], weights)),
                "quality": quality,
            }

        return self.unit(lab, stage, seed, work, way=way, beta=beta, held_out=HELD_OUT)

    @staticmethod
    def _held_out(lab: Lab) -> int:
        return round(HELD_OUT * 2 * lab.scale.prompts)

    @staticmethod
    def pairs(lab: Lab, seed: int) -> tuple[list[Row], dict[str, float]]:
        """Draw the pairs with all references' scores; and the true reward of each reference's own answers."""
        start = lab.policy(seed)
        models = {
            "own": start,
            **{name: lab.policy(seed, writer, pupil=2 + n) for n, (name, writer) in enumerate(WRITERS.items())},
        }
        rows = lab.sampled_pairs(start, seed, 2 * lab.scale.prompts, "references")
        for side in ("chosen", "rejected"):
            asked = [(row["prompt"][0]["content"], row[side][0]["content"]) for row in rows]
            scores = [lab.logps(model, asked) for model in models.values()]
            scores.append(lab.logps(start, [(prompt, _misread(text)) for prompt, text in asked]))
            for number, row in enumerate(rows):
                row[f"ref_{side}_logps"] = [float(logps[number]) for logps, _ in scores]
                row[f"ref_{side}_counts"] = [float(counts[number]) for _, counts in scores]
        quality = {name: lab.score(model, start, seed)["reward"] for name, model in models.items()}
        return rows, quality

    def claims(self, rows: Sequence[Row], chosen: Any) -> list[Claim]:
        """Return the claims on several references."""
        reward = {way: by_seed(rows, "reward", way=way) for way in (*WEIGHTINGS, *REFERENCES, "none")}

        def claim(text: str, mine: str, theirs: str, **more: Any) -> Claim:
            return Claim(
                text, f"{mine} - {theirs}", difference(reward[mine], reward[theirs]), SMALLEST, self.seeds, **more
            )

        return [
            claim("Several references, uniform, beat the own start alone", "uniform", "own"),
            *(claim(f"{name} beats uniform weights", name, "uniform") for name in WEIGHTINGS[1:]),
            claim("A better reference alone beats the own start", "better", "own"),
            claim("A damaged reference alone does harm", "damaged", "own", sign=-1),
            claim("A reference beats none", "own", "none"),
        ]

    def tables(self, rows: Sequence[Row]) -> list[str]:
        """Return means by way."""
        lines = []
        for (way,), found in grouped(rows, "way").items():
            weights = [row["outcome"]["weights"] for row in found]
            shown = ", ".join(f"{name} {_mean([w[name] for w in weights]):.2f}" for name in weights[0])
            spread = f"{mean(found, 'spread'):.2f}" if way in WEIGHTINGS else ""
            lines.append(
                [
                    way,
                    f"{mean(found, 'reward'):.3f}",
                    f"{mean(found, 'kl'):.2f}",
                    f"{mean(found, 'words'):.2f}",
                    spread,
                    shown if way in WEIGHTINGS else "",
                    len(found),
                ]
            )
        found = measured_quality(rows)
        note = (
            "True reward of the references' own answers: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()) + "."
        )
        head = ["references", "true reward", "KL", "words", "spread, nats", "mean weights", "seeds"]
        return [*table(head, lines), "", note]

    def draw(self, axes: Any, rows: Sequence[Row]) -> None:
        """Draw each way's difference to DPO against the own start."""
        ways = [way for (way,) in grouped(rows, "way") if way != "own"]
        own = by_seed(rows, "reward", way="own")
        for number, way in enumerate(ways):
            found = difference(by_seed(rows, "reward", way=way), own)
            if found is not None:
                axes.errorbar(
                    [found.mean],
                    [number],
                    xerr=reach(found),
                    marker="o",
                    capsize=3,
                    color="C0" if way in WEIGHTINGS else "C1",
                )
        axes.axvline(0, color="0.6", linewidth=1)
        axes.set(xlabel="true reward - that of DPO against the own start", yticks=range(len(ways)), yticklabels=ways)
        axes.invert_yaxis()

    def check(self, rows: Sequence[Row]) -> None:
        """Assert that references matter: spread, and that the damaged one trains another policy."""
        assert min(by_seed(rows, "spread", way="uniform").values()) > 0.05
        own, damaged = (by_seed(rows, "kl", way=way) for way in ("own", "damaged"))
        assert all(abs(damaged[seed] - kl) > 1e-3 for seed, kl in own.items())


def measured_quality(rows: Sequence[Row]) -> dict[str, float]:
    """Average the references' own true reward over seeds."""
    found = [row["outcome"]["quality"] for row in rows if row["settings"]["stage"] == "measure"]
    return {name: _mean([each[name] for each in found]) for name in found[0]} if found else {}


def _keep(row: Row, numbers: Sequence[int]) -> Row:
    """Keep the scores of some references; without any, those of one that gives every text the same probability."""
    kept = dict(row)
    for side in ("chosen", "rejected"):
        logps, counts = row[f"ref_{side}_logps"], row[f"ref_{side}_counts"]
        kept[f"ref_{side}_logps"] = [logps[number] for number in numbers] or [-1.0]
        kept[f"ref_{side}_counts"] = [counts[number] for number in numbers] or [counts[0]]
    return kept


def _misread(text: str) -> str:
    """Exchange every word for another, always the same one."""
    return " ".join(WORDS[(WORDS.index(word) + 7) % len(WORDS)] if word in WORDS else word for word in text.split())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
