"""Batch layouts and precisions: the same final reward within noise, or not."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.study.experiments.base import SMALLEST, Experiment, by_seed, grouped, mean
from benchmarks.study.lab import Lab, annotate, best_and_worst
from benchmarks.study.results import Row
from benchmarks.study.statistics import Claim, difference, reach
from prefopt import DPOConfig, DPOTrainer
from prefopt.pages import table

BASE = "padded"
# way -> settings of the trainer, and the dtype of the weights
WAYS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "padded": ({"batch_layout": "padded"}, torch.float32),
    "packed, prompts shared": ({"batch_layout": "packed", "share_prompt": True}, torch.float32),
    "packed, prompts repeated": ({"batch_layout": "packed", "share_prompt": False}, torch.float32),
    "bf16, float32 master weights": ({"batch_layout": "padded", "master_weights": "float32"}, torch.bfloat16),
    "bf16, stochastic rounding": ({"batch_layout": "padded", "master_weights": "stochastic"}, torch.bfloat16),
    "bf16, none": ({"batch_layout": "padded", "master_weights": "none"}, torch.bfloat16),
}
RATES = {"high": 1.0, "low": 0.1}  # times the scale's learning rate
EPOCHS = {"high": 2, "low": 6}


class Layouts(Experiment):
    """Layouts and precision."""

    name = "layouts"
    title = "Layouts and precision"
    seeds = 6
    design = """DPO (beta 0.1) on the start's own pairs, the same pairs in the same order in every run of a seed:
float32 in padded rows, in packed rows with prompts shared and repeated; bf16 weights with float32 master weights in
the optimizer, with stochastic rounding, and with neither. Once at a high learning rate, once at a tenth of it, where
a step is smaller than bf16 can add to most weights. Nothing is chosen."""
    reading = """The claim is sameness: an interval within the smallest difference that would matter on both sides.
Layouts compute the same loss up to rounding, so their differences are noise of the training's own chaos. bf16
without master weights is the one that may differ."""
    real_scale = """Learning rates of 5e-7 on weights of 0.02 are far below what bf16 can add; here even the low rate
reaches some weights. On a GPU, packed rows run other kernels than here."""

    def choose(self, lab: Lab) -> Any:
        """Choose nothing."""

    def run_seed(self, lab: Lab, chosen: Any, seed: int) -> None:
        """Run every layout and precision at both rates."""
        for rate in RATES if not lab.quick else ("high",):
            for way in WAYS:
                self._unit(lab, seed, rate, way)

    def _unit(self, lab: Lab, seed: int, rate: str, way: str) -> Row:
        def work() -> Row:
            start = lab.policy(seed)
            settings, dtype = WAYS[way]
            rows = lab.once(("layout pairs", seed), lambda: self.pairs(lab, seed))
            model = start if dtype == torch.float32 else lab.copy(start).to(dtype)
            done = lab.train(
                DPOTrainer,
                DPOConfig,
                model,
                rows,
                beta=0.1,
                learning_rate=RATES[rate] * lab.scale.learning_rate,
                num_train_epochs=1 if lab.quick else EPOCHS[rate],
                seed=seed,
                vocab_metrics=False,
                **settings,
            )
            return lab.score(lab.copy(done.model).float(), start, seed)

        return self.unit(lab, "measure", seed, work, rate=rate, way=way)

    @staticmethod
    def pairs(lab: Lab, seed: int) -> list[Row]:
        """Draw pairs of the start's samples."""
        prompts = lab.prompts(seed, lab.scale.prompts * 2)
        rng = random.Random(f"layouts {seed}")
        found = [
            annotate(p, best_and_worst(p, t), rng)
            for p, t in zip(prompts, lab.sample(lab.policy(seed), prompts, 4, seed))
        ]
        return [row for row in found if row is not None]

    def claims(self, rows: Sequence[Row], chosen: Any) -> list[Claim]:
        """Return the claims of sameness, and the one of a difference."""
        result = []
        for rate in RATES:
            base = by_seed(rows, "reward", rate=rate, way=BASE)
            for way in list(WAYS)[1:]:
                found = difference(by_seed(rows, "reward", rate=rate, way=way), base)
                text = f"{way} ends like padded float32, {rate} rate"
                result.append(Claim(text, f"{way} - {BASE}", found, SMALLEST, self.seeds, same=True))
        return result

    def tables(self, rows: Sequence[Row]) -> list[str]:
        """Return means by rate and way."""
        lines = [
            [
                rate,
                way,
                f"{mean(found, 'reward'):.3f}",
                f"{mean(found, 'kl'):.3f}",
                f"{mean(found, 'words'):.2f}",
                len(found),
            ]
            for (rate, way), found in sorted(grouped(rows, "rate", "way").items(), key=lambda item: item[0][0])
        ]
        return table(["rate", "layout and precision", "true reward", "KL", "words", "seeds"], lines)

    def draw(self, axes: Any, rows: Sequence[Row]) -> None:
        """Draw each way's difference to padded float32."""
        ways = list(WAYS)[1:]
        for offset, rate in enumerate(RATES):
            base = by_seed(rows, "reward", rate=rate, way=BASE)
            for number, way in enumerate(ways):
                found = difference(by_seed(rows, "reward", rate=rate, way=way), base)
                if found is not None:
                    axes.errorbar(
                        [found.mean],
                        [number + 0.2 * offset],
                        xerr=reach(found),
                        marker="o",
                        capsize=3,
                        color=f"C{offset}",
                        label=f"{rate} rate" if not number else None,
                    )
        for edge in (-SMALLEST, 0, SMALLEST):
            axes.axvline(edge, color="0.6", linewidth=1, linestyle="-" if not edge else "--")
        axes.set(xlabel="true reward - that of padded float32", yticks=range(len(ways)), yticklabels=ways)
        axes.invert_yaxis()
        axes.legend(fontsize="small")

    def check(self, rows: Sequence[Row]) -> None:
        """Assert that packed rows end like padded ones."""
        base = by_seed(rows, "kl", rate="high", way=BASE)
        assert base
        for seed, kl in by_seed(rows, "kl", rate="high", way="packed, prompts shared").items():
            assert abs(kl - base[seed]) < 0.02 + 0.2 * base[seed], (seed, kl, base[seed])
