"""The quickstart's figures: held-out pairs scored by the model, and its own answers judged by the rule."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from preferences import Question, correct, well_formed, wins

from prefopt.data import tokenize_pairs
from prefopt.files import read_jsonl
from prefopt.scoring.layouts import Group, PaddedLayout
from prefopt.scoring.logprobs import install_scoring, score_completions

ANSWER_SEED, OPPONENT_SEED = 1, 2
SHOWN = 6


@dataclass
class Measures:
    """What the table shows of one model; all but the margin are shares of the held-out prompts."""

    accuracy: float  # pairs with log pi(chosen) > log pi(rejected), without the reference
    margin: float  # mean of log-ratio(chosen) - log-ratio(rejected) against the start model, in nats (beta is 1)
    follows_rule: float
    win_rate: float  # against an answer of the start model, under the rule; a tie counts one half
    well_formed: float
    correct: float
    answers: list[str] = field(repr=False)

    def figures(self) -> dict[str, float]:
        """The numbers without the answers."""
        return {name: value for name, value in asdict(self).items() if name != "answers"}


def measure(model, tokenizer, start_model, pairs_file: Path, questions: list[Question]) -> Measures:
    """Scores the pairs of `pairs_file` and lets the model answer `questions`, which are those of the file in its
    order."""
    pairs = list(read_jsonl(pairs_file))
    chosen, rejected = pair_logps(model, tokenizer, pairs)
    ref_chosen, ref_rejected = pair_logps(start_model, tokenizer, pairs)
    answers = generate(model, tokenizer, pairs, seed=ANSWER_SEED)
    opponents = generate(start_model, tokenizer, pairs, seed=OPPONENT_SEED)
    won = [wins(question, text) for question, text in zip(questions, answers)]
    other_won = [wins(question, text) for question, text in zip(questions, opponents)]
    count = len(questions)
    return Measures(
        accuracy=(chosen > rejected).float().mean().item(),
        margin=((chosen - ref_chosen) - (rejected - ref_rejected)).mean().item(),
        follows_rule=sum(won) / count,
        win_rate=sum((1 + mine - theirs) / 2 for mine, theirs in zip(won, other_won)) / count,
        well_formed=sum(well_formed(question, text) for question, text in zip(questions, answers)) / count,
        correct=sum(correct(question, text) for question, text in zip(questions, answers)) / count,
        answers=answers,
    )


@torch.no_grad()
def pair_logps(model, tokenizer, pairs: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probabilities of chosen and rejected, (B,) each, through the library's own scoring path."""
    rows, _ = tokenize_pairs(Dataset.from_list(pairs), tokenizer, max_length=None, name="held-out")
    groups = [[Group(row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"]))] for row in rows]
    install_scoring(model.eval())
    batch = PaddedLayout(tokenizer.pad_token_id).collate(groups)
    logps = score_completions(model, batch).logps
    return logps[0::2], logps[1::2]


@torch.no_grad()
def generate(model, tokenizer, pairs: list[dict], *, seed: int) -> list[str]:
    """One sampled answer (temperature 1) to each prompt; an answer without an end is marked."""
    torch.manual_seed(seed)
    tokenizer.padding_side = "left"
    prompts = tokenizer.apply_chat_template(
        [pair["prompt"] for pair in pairs],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    outputs = model.eval().generate(
        prompts["input_ids"], attention_mask=prompts["attention_mask"], do_sample=True, top_k=0, max_new_tokens=32
    )
    completions = outputs[:, prompts["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    ended = (completions == tokenizer.eos_token_id).any(1).tolist()
    return [text if end else f"{text} [no end]" for text, end in zip(texts, ended)]


def compare(before: Measures, after: Measures, questions: list[Question]) -> str:
    """The table of figures, and the first few prompts with both answers."""
    rows = (
        ("preference accuracy on held-out pairs", "accuracy"),
        ("reward margin on held-out pairs (nats)", "margin"),
        ("answers that follow the rule", "follows_rule"),
        ("win rate against the start model", "win_rate"),
        ("well-formed answers", "well_formed"),
        ("answers with the right fact", "correct"),
    )
    lines = [f"{'':<40}{'before':>8}{'after':>8}"]
    lines += [f"{title:<40}{getattr(before, name):>8.2f}{getattr(after, name):>8.2f}" for title, name in rows]
    lines.append("(the rule: a well-formed answer that starts by naming the thing asked about)")
    for question, old, new in list(zip(questions, before.answers, after.answers))[:SHOWN]:
        lines += ["", f"  {question.prompt}", f"    before: {old}", f"    after:  {new}"]
    return "\n".join(lines)
