"""The study's world, a game with a known true reward: name things of the kind that the prompt asks for, and no others.

A prompt is a kind and three digits, which mean nothing ("tools 4 0 7"). There are four kinds with five things each.
The true reward of an answer is (things of that kind named - other things - repetitions) / 5: at most 1, below 0 for
rambling. A writer draws answers word by word; its `Writer` says how well and in which words. Annotators compare only
short answers (at most three words) and err in one of ten cases: a reward model of theirs has seen that more things are
better, and neither long answers nor many repetitions. Golden answers name the five things in any order.

The cyclic rule judges an answer by the flavour of its first word: flavour 1 beats 0, 2 beats 1, 0 beats 2.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from prefopt.files import write_jsonl

KINDS = {
    "animals": ["cow", "fox", "hen", "owl", "rat"],
    "plants": ["ash", "elm", "fig", "ivy", "oak"],
    "tools": ["awl", "axe", "pin", "saw", "vat"],
    "meals": ["bun", "ham", "jam", "pie", "soy"],
}
WORDS = [word for words in KINDS.values() for word in words]
DIGITS = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
ANNOTATED = 3  # words of the longest answer that annotators saw
ERRORS = 0.1
LONGEST = 10  # words of the longest answer that a writer gives, without an opening
OPENINGS = ("well", "so", "ok")  # words that mean nothing: the rule does not count them
FLAVOURS = 3
SPECIAL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<|unknown|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {% if m['role'] == 'assistant' %}<|end|>{% endif "
    "%}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Writer:
    """How a writer draws an answer.

    Attributes:
        on_topic: share of words that it takes from the prompt's kind; the others are any words.
        goes_on: probability of another word after each.
        remembers: how often it leaves out what it has said already.
        lean: how much it likes each of the five things of the kind.
        opens: whether it opens with a word of `OPENINGS`.
    """

    on_topic: float = 0.6
    goes_on: float = 0.75
    remembers: float = 0.0
    lean: tuple[float, ...] = (1, 1, 1, 1, 1)
    opens: bool = False

    def word(self, things: Sequence[str], said: Sequence[str], rng: random.Random) -> str:
        """Draw the next word."""
        if rng.random() >= self.on_topic:
            return rng.choice(WORDS)
        fresh = [number for number, thing in enumerate(things) if thing not in said]
        numbers = fresh if fresh and rng.random() < self.remembers else range(len(things))
        return things[rng.choices(numbers, [self.lean[number] for number in numbers])[0]]


PLAIN = Writer()


def true_reward(prompt: Any, text: str) -> float:
    """(things of the kind named - other things - repetitions) / 5 for a prompt as text or messages."""
    things = KINDS[(prompt if isinstance(prompt, str) else prompt[-1]["content"]).split()[0]]
    words = [word for word in text.split() if word not in OPENINGS]
    named = len(set(things).intersection(words))
    return (2 * named - len(words)) / len(things)


def score(prompt: Any, candidates: list[str]) -> list[float]:
    """The true reward of every candidate, as a ranker of `prefopt rank`."""
    return [true_reward(prompt, candidate) for candidate in candidates]


def draw_prompt(rng: random.Random) -> str:
    """A kind and three digits."""
    return " ".join([rng.choice(list(KINDS)), *rng.choices(DIGITS, k=3)])


def draw_answer(prompt: str, rng: random.Random, longest: int = LONGEST, writer: Writer = PLAIN) -> str:
    """An answer of `writer`: things of the kind and others, repetitions, any length up to `longest`."""
    things = KINDS[prompt.split()[0]]
    words = [writer.word(things, [], rng)]
    while len(words) < longest and rng.random() < writer.goes_on:
        words.append(writer.word(things, words, rng))
    return " ".join([rng.choice(OPENINGS), *words] if writer.opens else words)


def golden_answer(prompt: str, rng: random.Random) -> str:
    """All things of the kind, in any order."""
    things = KINDS[prompt.split()[0]]
    return " ".join(rng.sample(things, len(things)))


def write_game(
    folder: Path, *, seed: int, reward_prompts: int, policy_prompts: int, test_prompts: int, comparisons: int
) -> None:
    """All data of a game: disjoint prompts for reward model, policy and test, golden answers, and human comparisons of
    three kinds.

    Writes `reward_prompts.jsonl` (with `golden`), `policy_prompts.jsonl`, `test_prompts.jsonl`, `comparisons.jsonl`
    (of the reward model),
    `test_comparisons.jsonl` (half as many, without errors), `testing_comparisons.jsonl` (twice as many, of answers of
    any length).
    """
    rng = random.Random(seed)
    prompts: set[str] = set()
    while len(prompts) < reward_prompts + policy_prompts + test_prompts:
        prompts.add(draw_prompt(rng))
    order = sorted(prompts)
    rng.shuffle(order)
    parts = {
        "reward": order[:reward_prompts],
        "policy": order[reward_prompts : reward_prompts + policy_prompts],
        "test": order[reward_prompts + policy_prompts :],
    }
    for name, part in parts.items():
        rows = [{"prompt_id": f"{name}-{number}", "prompt": user(prompt)} for number, prompt in enumerate(part)]
        if name == "reward":
            rows = [row | {"golden": golden_answer(prompt, rng)} for row, prompt in zip(rows, part)]
        write_jsonl(folder / f"{name}_prompts.jsonl", rows)
    human = [_compare(rng.choice(parts["reward"]), rng, ANNOTATED, ERRORS) for _ in range(comparisons)]
    held_out = [_compare(rng.choice(parts["test"]), rng, ANNOTATED, 0.0) for _ in range(comparisons // 2)]
    everything = [
        _compare(rng.choice(order[: -len(parts["test"])]), rng, LONGEST, ERRORS) for _ in range(2 * comparisons)
    ]
    write_jsonl(folder / "comparisons.jsonl", human)
    write_jsonl(folder / "test_comparisons.jsonl", held_out)
    write_jsonl(folder / "testing_comparisons.jsonl", everything)


def _compare(prompt: str, rng: random.Random, longest: int, errors: float) -> dict[str, Any]:
    """A preference pair of two answers of different true reward; the wrong one is chosen in a share of `errors`."""
    while True:
        pair = sorted(
            (draw_answer(prompt, rng, longest) for _ in range(2)), key=lambda text: -true_reward(prompt, text)
        )
        if true_reward(prompt, pair[0]) > true_reward(prompt, pair[1]):
            break
    if rng.random() < errors:
        pair.reverse()
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in pair)
    return {"prompt": user(prompt), "chosen": chosen, "rejected": rejected}


def assistant(text: str) -> Messages:
    """The answer as messages."""
    return [{"role": "assistant", "content": text}]


def user(prompt: str) -> Messages:
    """The prompt as messages."""
    return [{"role": "user", "content": prompt}]


def flavour(text: str) -> int | None:
    """The flavour of an answer: the number of its first word within its kind, modulo 3; None without a word."""
    words = [word for word in text.split() if word in WORDS]
    return None if not words else next(things.index(words[0]) for things in KINDS.values() if words[0] in things) % 3


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = {word: number for number, word in enumerate((*SPECIAL, *KINDS, *DIGITS, *WORDS, *OPENINGS))}
    raw = Tokenizer(models.WordLevel(words, unk_token="<|unknown|>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<|unknown|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@dataclass(frozen=True)
class Shape:
    """Size of a policy, and how it is taught: the default has two layers and learns in seconds on a CPU."""

    hidden: int = 64
    layers: int = 2
    rows: int = 3000
    epochs: float = 3
    learning_rate: float = 4e-3
    batch: int = 32


def teach(
    folder: Path, tokenizer: Any, *, seed: int, writer: Writer = PLAIN, shape: Shape = Shape(), cpu: bool = True
) -> LlamaForCausalLM:
    """Train a new policy to answer as `writer` does."""
    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden,
            intermediate_size=2 * shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.hidden // 16,
            num_key_value_heads=shape.hidden // 16,
            max_position_embeddings=64,
            initializer_range=min(0.08, 5.12 / shape.hidden),
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    rng = random.Random(seed)
    prompts = [draw_prompt(rng) for _ in range(shape.rows)]
    data = [{"prompt": user(p), "completion": assistant(draw_answer(p, rng, writer=writer))} for p in prompts]
    args = SFTConfig(
        str(folder),
        num_train_epochs=shape.epochs,
        learning_rate=shape.learning_rate,
        per_device_train_batch_size=shape.batch,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        seed=seed,
        use_cpu=cpu,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    SFTTrainer(model, args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer).train()
    taught = LlamaForCausalLM(model.config)  # TRL has bound the taught one's forward, which would outlive a copy
    taught.load_state_dict(model.state_dict())
    return taught.to(model.device).eval()


def make_start_policy(folder: Path, *, seed: int, rows: int = 3000, epochs: float = 3) -> None:
    """Teach a tiny Llama to answer as the plain writer does, and save it with its tokenizer."""
    tokenizer = make_tokenizer()
    teach(folder, tokenizer, seed=seed, shape=Shape(rows=rows, epochs=epochs)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
