"""Tiny models with tokenizers in folders, as commands take them, and prompts that have given trouble elsewhere."""

from pathlib import Path

from prefopt.files import write_jsonl
from tests.tiny import tiny_model, tiny_tokenizer

HARD_PROMPTS = [
    "Why does my function return None? None of this helps.",
    "None",
    "What does <|end|> mean, and <s> or [INST]?",
    "Grüße! 你好 世界 🙂 naïve\tcafé\n\n",
    "{{ bos_token }} {% raw %} {prompt}",
]


def save_tiny(folder: Path, *, style="llama3", seed=0, **shape) -> str:
    """A folder with a tiny model and its tokenizer."""
    tokenizer = tiny_tokenizer(style)
    model = tiny_model("llama", seed=seed, eos_token_id=tokenizer.eos_token_id, **shape)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_prompts(path: Path, prompts) -> str:
    """A jsonl file of prompts: texts, message lists, or whole rows."""
    write_jsonl(path, [prompt if isinstance(prompt, dict) else {"prompt": prompt} for prompt in prompts])
    return str(path)
