"""The authors' own functions beside ours, on the same random numbers: the table of docs/fidelity.md

python benchmarks/authors_code.py CHECKOUTS            prints the table
python benchmarks/authors_code.py CHECKOUTS --write    and writes it into docs/fidelity.md

CHECKOUTS is a folder with git checkouts of the repositories: SPPO (uclaml), SimPO (princeton-nlp), WPO (wzhouad),
general-preference-model (general-preference), APO (Linear95), RRHF (GanjinZero); one that is missing is left out.
Functions are taken out of the authors' files and run as they stand, with nothing but torch and numpy around them,
because the files import versions of their libraries that no longer install together. What reads files runs in a
temporary folder.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import subprocess
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefopt import losses
from prefopt.candidates.pairs import select_pairs

PAGE = Path(__file__).resolve().parents[1] / "docs" / "fidelity.md"
BEGIN, END = "<!-- written by benchmarks/authors_code.py -->", "<!-- end of the table -->"
BATCHES, PAIRS = 50, 16

Row = tuple[str, str, str, float]
"""What of ours, what of theirs, on what, and the largest deviation |ours - theirs| / max(1, |theirs|)."""


def taken_from(path: Path, *names: str) -> SimpleNamespace:
    """Execute the functions and classes of those names, and nothing else of the file; methods lose their class."""
    known: dict[str, Any] = {**vars(typing), "torch": torch, "nn": nn, "F": F, "np": np, "pd": pd, "json": json}
    known |= {"os": os, "datasets": datasets, "Dataset": datasets.Dataset, "load_dataset": None}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in names:
            node.decorator_list = []
            exec(compile(ast.Module([node], []), str(path), "exec"), known)
    return SimpleNamespace(globals=known, **{name: known[name] for name in names})


def deviation(ours: Any, theirs: Any) -> float:
    """Return the largest |ours - theirs| / max(1, |theirs|)."""
    ours, theirs = (torch.as_tensor(np.asarray(value), dtype=torch.float64) for value in (ours, theirs))
    return float(((ours - theirs).abs() / theirs.abs().clamp(min=1)).max())


def worst(compare: Callable[[torch.Generator], float]) -> float:
    """Return the largest deviation over seeded batches."""
    return max(compare(torch.Generator().manual_seed(seed)) for seed in range(BATCHES))


def logps(generator: torch.Generator, count: int) -> Tensor:
    """Draw `count` vectors of summed log-probs as of a few hundred tokens, float64."""
    return -300 * torch.rand(count, PAIRS, generator=generator, dtype=torch.float64)


def near(values: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the log-probs of another policy that is not far from one."""
    return values + 3 * torch.randn(values.shape, generator=generator, dtype=values.dtype)


HOST = SimpleNamespace(device="cpu")


def sppo(folder: Path) -> Iterator[Row]:
    """Compare the losses of the SPPO repository, and the pairs that its scripts pick."""
    theirs = taken_from(folder / "sppo" / "trainer.py", "sppo_loss").sppo_loss
    beta = {"sppo": 0.001, "sppo_single": 0.001, "ipo": 0.01, "sigmoid": 0.1, "hinge": 0.1}
    ours: dict[str, Callable[..., Tensor]] = {
        "sppo": lambda c, r, w, s, p, b: losses.sppo_loss(c, r, w, s, beta=b),
        "sppo_single": lambda c, r, w, s, p, b: losses.sppo_single_loss(c, r, p, beta=b),
        "ipo": lambda c, r, w, s, p, b: losses.ipo_loss(c, r, beta=b),
        "sigmoid": lambda c, r, w, s, p, b: losses.dpo_loss(c, r, beta=b),
        "hinge": lambda c, r, w, s, p, b: losses.hinge_loss(c, r, beta=b),
    }
    shown = {"ipo": "`ipo_sum`"}

    for name in ours:

        def compare(generator: torch.Generator, name: str = name) -> float:
            policy = logps(generator, 2)
            reference = near(policy, generator)
            probabilities = torch.rand(3, PAIRS, generator=generator, dtype=torch.float64)
            host = SimpleNamespace(accelerator=HOST, loss_type=name, beta=beta[name], label_smoothing=0.0)
            expected, _, _ = theirs(
                host, *policy, *reference, probabilities[0], probabilities[1], probabilities[2], reference_free=False
            )
            ratios = policy - reference
            return deviation(
                ours[name](*ratios, probabilities[1], probabilities[2], probabilities[0], beta[name]), expected
            )

        yield f"{shown.get(name, f'`{name}`')}", "SPPO, `sppo_loss`", f"{BATCHES * PAIRS} pairs", worst(compare)
    yield "`sppo_paper`", "SPPO, `compute_prob.py`", *picked(folder / "scripts" / "compute_prob.py", "sppo_paper")


def picked(script: Path, policy: str, *, with_tables: bool = False) -> tuple[str, float]:
    """Run the authors' script on the scores of many prompts, and compare picks and probabilities with ours."""
    prompts, count = 600, 5  # the script draws 500 of them
    random = np.random.default_rng(0)
    half = np.triu(random.normal(scale=2, size=(prompts, count, count)), 1)
    tables = (half - half.transpose(0, 2, 1)).astype(np.float32)
    scores = (tables - tables.transpose(0, 2, 1)).mean(axis=-1)  # their ranker's
    code = taken_from(script, "from_ranks", "prepare_score")
    code.globals["SUFFIX"] = "_table"
    questions = [f"question {number}" for number in range(prompts)]
    code.globals["load_dataset"] = lambda *args, **kwargs: datasets.Dataset.from_dict({"prompt": questions})
    code.globals["datasets"] = SimpleNamespace(
        load_dataset=lambda path, **kwargs: {
            name: pd.read_parquet(f"{path}/{name}.parquet")
            for name in ("train", "train_table")
            if Path(path, f"{name}.parquet").is_file()
        }
    )
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            name = "data-x"
            for part in (f"ranking/{name}", f"generated/{name}"):
                Path(part).mkdir(parents=True)
            np.save(f"ranking/{name}/0_0.npy", scores)
            np.save(f"ranking/{name}/0_0_table.npy", tables)
            for number in range(count):
                answers = [f"answer {number} to {question}" for question in questions]
                Path(f"generated/{name}/responses_{number}.json").write_text(json.dumps(answers))
            args = SimpleNamespace(
                num_gpu=1, pairs=count, prompts="x", gpu_ids="(0)", output_dir=name, frac_len=prompts, org="x"
            )
            with redirect_stdout(io.StringIO()):
                code.from_ranks(args)
                found = pd.read_parquet(Path(code.prepare_score(args)) / "train.parquet")
        finally:
            os.chdir(here)
    largest = 0.0
    for number, row in enumerate(found.to_dict("records")):
        given, settings = (tables[number], {"temperature": 0.5}) if with_tables else (scores[number], {})
        (pair,) = select_pairs(["x"] * count, given, policy=policy, **settings)
        answers = [row[side][1]["content"] for side in ("chosen", "rejected")]
        if answers != [f"answer {index} to question {number}" for index in (pair.chosen, pair.rejected)]:
            raise SystemExit(f"{script} picks other answers than {policy} for prompt {number}")
        ours = pair.chosen_over_rejected_prob, pair.chosen_win_prob, pair.rejected_win_prob
        largest = max(
            largest, deviation(ours, [row[k] for k in ("chosen_probs", "chosen_probs_win", "chosen_probs_lose")])
        )
    return f"{prompts} prompts of {count} answers: the same picks", largest


def simpo(folder: Path) -> Iterator[Row]:
    """Compare SimPO's loss and logged rewards."""
    theirs = taken_from(folder / "scripts" / "simpo_trainer.py", "simpo_loss").simpo_loss

    def compare(generator: torch.Generator, rewards: bool) -> float:
        means = -3 * torch.rand(2, PAIRS, generator=generator, dtype=torch.float64)
        host = SimpleNamespace(
            accelerator=HOST, loss_type="sigmoid", beta=2.5, gamma_beta_ratio=0.55, label_smoothing=0.0
        )
        expected = theirs(host, *means)
        if rewards:
            return deviation(2.5 * means, torch.stack(expected[1:]))
        return deviation(losses.simpo_loss(*means, beta=2.5, gamma_beta_ratio=0.55), expected[0])

    for what, rewards in (("`simpo`", False), ("`simpo`, logged rewards", True)):
        yield what, "SimPO, `simpo_loss`", f"{BATCHES * PAIRS} pairs", worst(lambda g, r=rewards: compare(g, r))


def wpo(folder: Path) -> Iterator[Row]:
    """Compare WPO's log-probs, weights and loss, from logits on."""
    code = taken_from(folder / "scripts" / "run_wpo.py", "get_batch_logps", "dpo_loss")

    def compare(generator: torch.Generator, part: int) -> float:
        tokens, vocabulary, prompt = 24, 50, 6
        logits = 3 * torch.randn(2 * PAIRS, tokens, vocabulary, generator=generator, dtype=torch.float64)
        # sampled from the logits that predict them, so that weights are not all near 0
        drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator).view(2 * PAIRS, tokens)
        labels = drawn.roll(1, dims=1)
        ends = torch.randint(prompt + 1, tokens + 1, (2 * PAIRS, 1), generator=generator)
        place = torch.arange(tokens)
        scored = (place >= prompt) & (place < ends)
        labels = torch.where(scored, labels, -100)
        sums, weights = code.get_batch_logps(logits.clone(), labels.clone())
        logprobs = logits[:, :-1].log_softmax(-1)
        kept = scored[:, 1:]
        chosen_tokens = logprobs.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        aligned = torch.where(kept, chosen_tokens - (2 * logprobs).logsumexp(-1), 0.0).sum(-1) / kept.sum(-1)
        ours = losses.wpo_pair_weights(aligned[:PAIRS], aligned[PAIRS:], max_weight=1.0)
        if part == 0:
            return deviation(ours, weights)
        reference = near(sums, generator)
        host = SimpleNamespace(accelerator=HOST, reference_free=False, beta=0.01, label_smoothing=0.0)
        expected, _, _ = code.dpo_loss(host, sums[:PAIRS], sums[PAIRS:], reference[:PAIRS], reference[PAIRS:], weights)
        ratios = sums - reference
        return deviation(ours * losses.dpo_loss(ratios[:PAIRS], ratios[PAIRS:], beta=0.01), expected)

    on = f"{BATCHES * PAIRS} pairs, from logits"
    yield "`wpo_pair_weights`", "WPO, `get_batch_logps`", on, worst(lambda g: compare(g, 0))
    yield "`dpo_loss` times the weights", "WPO, `dpo_loss`", on, worst(lambda g: compare(g, 1))


def gpm(folder: Path) -> Iterator[Row]:
    """Compare the losses of general preference models, and the pairs that the fork of SPPO picks."""
    path = folder / "general_preference" / "models" / "loss.py"
    names = ("GeneralPreferenceLoss", "HighDimGeneralPreferenceLoss", "PairWiseLoss")
    code = taken_from(path, *names)

    def compare(generator: torch.Generator, name: str, margin: bool) -> float:
        width = {"PairWiseLoss": 1, "GeneralPreferenceLoss": 2}.get(name, 6)
        vectors = torch.randn(2, PAIRS, width, generator=generator, dtype=torch.float64)
        gap = torch.rand(PAIRS, generator=generator, dtype=torch.float64) if margin else None
        settings = {"value_head_dim": width} if width > 2 else {}
        if width == 1:
            vectors = vectors[..., 0]
            ours = losses.bradley_terry_loss(*vectors, tau=0.1, margin=gap)
        else:
            ours = losses.general_preference_loss(losses.general_preference_score(*vectors), tau=0.1, margin=gap)
        expected, _ = getattr(code, name)(tau=0.1, **settings)(*vectors, gap)
        return deviation(ours.mean(), expected)

    shown = {"PairWiseLoss": "`bradley_terry_loss`"}
    for name in names:
        for margin in (False, True):
            yield (
                shown.get(name, "`general_preference_loss`") + (", with margins" if margin else ""),
                f"general-preference-model, `{name}`",
                f"{BATCHES} batches of {PAIRS}",
                worst(lambda g, name=name, margin=margin: compare(g, name, margin)),
            )
    script = folder / "LLM-Alignment" / "scripts" / "compute_prob_from_raw.py"
    yield (
        "`sppo_mean_logit`, temperature 0.5",
        "general-preference-model, `compute_prob_from_raw.py`",
        *picked(script, "sppo_mean_logit", with_tables=True),
    )


def apo(folder: Path) -> Iterator[Row]:
    """Compare the reward model's ranking loss."""
    theirs = taken_from(folder / "trainer.py", "reward_model_loss").reward_model_loss

    def compare(generator: torch.Generator, kind: str) -> float:
        rewards = torch.randn(PAIRS, 4, generator=generator, dtype=torch.float64)
        scores = torch.randint(0, 4, (PAIRS, 4), generator=generator).double()
        mask = torch.rand(PAIRS, 4, generator=generator) > 0.2
        coefficients = torch.rand(PAIRS, generator=generator, dtype=torch.float64)
        expected = theirs(
            rewards,
            torch.where(mask, scores, -1.0),
            coefficients,
            loss_type="diff" if kind == "difference" else "ranking",
        )
        ours = losses.ranking_loss(rewards, scores, mask=mask, coefficients=coefficients, kind=kind)
        return deviation(ours, expected)

    for kind in ("logistic", "difference"):
        yield (
            f"`ranking_loss`, {kind}",
            "APO, `reward_model_loss`",
            f"{BATCHES} batches of {PAIRS} rows",
            worst(lambda g, kind=kind: compare(g, kind)),
        )


def rrhf(folder: Path) -> Iterator[Row]:
    """Compare RRHF's ranking term."""
    theirs = taken_from(folder / "train.py", "rrhf_loss").rrhf_loss

    def compare(generator: torch.Generator) -> float:
        means = -3 * torch.rand(6, generator=generator, dtype=torch.float64)
        scores = torch.randint(0, 4, (1, 6), generator=generator).double()
        expected = theirs(None, means, None, scores)
        return deviation(losses.rrhf_loss(means[None], scores)[0], expected)

    yield "`rrhf_loss`", "RRHF, `rrhf_loss`", f"{BATCHES} prompts of 6 answers", worst(compare)


REPOSITORIES: dict[str, Callable[[Path], Iterator[Row]]] = {
    "SPPO": sppo,
    "SimPO": simpo,
    "WPO": wpo,
    "general-preference-model": gpm,
    "APO": apo,
    "RRHF": rrhf,
}


def commit(folder: Path) -> str:
    """Return the commit of a checkout, or where it has no .git, nothing."""
    if not (folder / ".git").exists():
        return ""
    command = ["git", "-C", str(folder), "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path)
    parser.add_argument("--write", action="store_true", help="write the table into docs/fidelity.md")
    args = parser.parse_args()
    found = {name: args.checkouts / name for name in REPOSITORIES if (args.checkouts / name).is_dir()}
    if not found:
        sys.exit(f"{args.checkouts} holds none of {', '.join(REPOSITORIES)}.")
    lines = ["| ours | the authors' | on | largest deviation |", "|---|---|---|---:|"]
    for name, folder in found.items():
        for ours, theirs, on, value in REPOSITORIES[name](folder):
            lines.append(
                f"| {ours} | {theirs} | {on} | {value:.0e} |" if value else f"| {ours} | {theirs} | {on} | 0 |"
            )
    commits = [f"{name} {number}" for name, folder in found.items() if (number := commit(folder))]
    if commits:
        lines += ["", f"Commits: {', '.join(commits)}."]
    print("\n".join(lines))
    if args.write:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
