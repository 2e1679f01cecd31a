"""Tiny references of several families, and an independent way to score text under them."""

import torch
from datasets import Dataset

from prefopt.references.filling import ReferenceModel
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = [
    ("Name a colour.", "Blue is a colour.", "A fox is an animal."),
    ("What is two plus three?", "The answer is five.", "zero one two three"),
    ("Please explain why the sky looks blue in the morning.", "Short answers help; Grüße aus Köln 🙂", "Blue."),
    (
        "Name an animal.",
        "A fox that lives in the woods, naïve café.",
        "None of these, sorry: longer answers sometimes help more",
    ),
]


def pairs(rows=ROWS):
    """Conversational preference rows."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
            for prompt, chosen, rejected in rows
        ]
    )


def reference(style="llama3", architecture="llama", *, seed=0, name=None, vocab_size=400, **options):
    """A reference in memory with a vocabulary of its own size."""
    tokenizer = tiny_tokenizer(style, vocab_size=vocab_size)
    model = tiny_model(architecture, vocab_size=len(tokenizer), seed=seed, **options)
    return ReferenceModel(name or f"{style}-{architecture}-{seed}", model, tokenizer)


def score_plainly(ref, prompt, completion):
    """Sum and count of the completion's log-probs, from whole logits of one sequence, written without the library."""
    messages = [{"role": "user", "content": prompt}]
    head = ref.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    answer = [{"role": "assistant", "content": completion}]
    whole = ref.tokenizer.apply_chat_template(messages + answer, add_generation_prompt=False)["input_ids"]
    start = 0
    while start < min(len(head), len(whole)) and head[start] == whole[start]:
        start += 1
    with torch.no_grad():
        logps = ref.model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(logps[i - 1, whole[i]].item() for i in range(start, len(whole))), len(whole) - start
