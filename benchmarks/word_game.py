"""A game with a known true reward: name things of the kind that the prompt asks for, each once, and nothing else.

A prompt is a kind and three numbers, which mean nothing ("tools 4 0 7"). There are four kinds with five things each.
The true reward of an
answer is (things of that kind named - other things - repetitions) / 5: at most 1, below 0 for rambling. Annotators
compare only short answers
(at most three words) and err in one of ten cases: such a reward model has seen that more things are better, and
neither long answers nor many
repetitions, so that a policy that follows it leaves the answers that it knows. Golden answers name the five things in
any order.
"""

from __future__ import annotations

import random
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
ON_TOPIC, GOES_ON, LONGEST = 0.6, 0.75, 10  # of the start policy's words and lengths
SPECIAL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<|unknown|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {% if m['role'] == 'assistant' %}<|end|>{% endif "
    "%}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def true_reward(prompt: Any, text: str) -> float:
    """(things of the kind named - other things - repetitions) / 5 for a prompt as text or messages."""
    things = KINDS[(prompt if isinstance(prompt, str) else prompt[-1]["content"]).split()[0]]
    words = text.split()
    named = len(set(things).intersection(words))
    return (2 * named - len(words)) / len(things)


def score(prompt: Any, candidates: list[str]) -> list[float]:
    """The true reward of every candidate, as a ranker of `prefopt rank`."""
    return [true_reward(prompt, candidate) for candidate in candidates]


def draw_prompt(rng: random.Random) -> str:
    """A kind and three digits."""
    return " ".join([rng.choice(list(KINDS)), *rng.choices(DIGITS, k=3)])


def draw_answer(prompt: str, rng: random.Random, longest: int = LONGEST) -> str:
    """An answer as the start policy gives it: things of the kind and others, repetitions, any length up to
    `longest`."""
    things = KINDS[prompt.split()[0]]
    words = [rng.choice(things if rng.random() < ON_TOPIC else WORDS)]
    while len(words) < longest and rng.random() < GOES_ON:
        words.append(rng.choice(things if rng.random() < ON_TOPIC else WORDS))
    return " ".join(words)


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
        rows = [{"prompt_id": f"{name}-{number}", "prompt": _user(prompt)} for number, prompt in enumerate(part)]
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
    return {"prompt": _user(prompt), "chosen": chosen, "rejected": rejected}


def _user(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def make_start_policy(folder: Path, *, seed: int, rows: int = 3000, epochs: float = 3) -> None:
    """Teach a tiny Llama to answer as `draw_answer` does, and save it with its tokenizer."""
    words = {word: number for number, word in enumerate((*SPECIAL, *KINDS, *DIGITS, *WORDS))}
    raw = Tokenizer(models.WordLevel(words, unk_token="<|unknown|>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<|unknown|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = TEMPLATE
    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            initializer_range=0.08,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    rng = random.Random(seed)
    prompts = [draw_prompt(rng) for _ in range(rows)]
    data = [
        {"prompt": _user(prompt), "completion": [{"role": "assistant", "content": draw_answer(prompt, rng)}]}
        for prompt in prompts
    ]
    args = SFTConfig(
        str(folder),
        num_train_epochs=epochs,
        learning_rate=4e-3,
        per_device_train_batch_size=32,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(model, args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer)
    trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
